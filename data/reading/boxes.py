"""Boxes [M, 9]: x, y, z of the bottom centre, length, width, height, yaw, vx, vy.

The layout is that of mmdet3d 1.x LiDARInstance3DBoxes: metres, LiDAR frame (x right, y forward, z up), yaw
counter-clockwise about z from +x, m/s, velocity NaN where unknown.

nuScenes boxes stand upright and move horizontally in the global frame, while the LiDAR frame is tilted by a few
degrees. The conversions below use that: yaw in the LiDAR frame differs from yaw in the global frame by the heading of
`global_SE3_lidar` exactly, and the two horizontal velocity components are related by an invertible 2x2 matrix. So
LiDAR -> global is the exact inverse of global -> LiDAR although neither keeps the tilt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from data.reading.geometry import Float64, inverse, rotation_matrices, transform_points

if TYPE_CHECKING:
    from torch import Tensor


def transform_boxes(boxes: Tensor, bev_aug: Tensor) -> Tensor:
    """Boxes under a similarity that keeps z upright (flips, a turn about z, a scale), as BEV augmentation makes it.

    Args:
        boxes: [M, 9] or wider; columns from 9 on (scores, labels) are passed through.
        bev_aug: [4, 4] augmented frame <- frame of the boxes.
    """
    import torch  # late: the other half of this module is for stages that start without it

    matrix = bev_aug.to(boxes)
    scale = matrix[2, 2]
    linear = matrix[:2, :2]
    centre = boxes[:, :3] @ matrix[:3, :3].T + matrix[:3, 3]
    direction = torch.stack([boxes[:, 6].cos(), boxes[:, 6].sin()], dim=-1) @ linear.T
    yaw = torch.atan2(direction[:, 1], direction[:, 0])
    velocity = boxes[:, 7:9] @ linear.T
    return torch.cat([centre, boxes[:, 3:6] * scale, yaw[:, None], velocity, boxes[:, 9:]], dim=1)


def boxes_in_range(boxes: Tensor, limit: float) -> Tensor:
    """Mask [M] of boxes whose centre is inside the square |x|, |y| < limit (metres)."""
    return (boxes[:, :2].abs() < limit).all(dim=1)


def points_in_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """Mask [P, M]: which points [P, 3] lie inside, or on the surface of, which boxes [M, 9]."""
    offset = points[:, None, :3] - boxes[None, :, :3]
    cos, sin = boxes[:, 6].cos(), boxes[:, 6].sin()
    along = offset[..., 0] * cos + offset[..., 1] * sin
    across = offset[..., 1] * cos - offset[..., 0] * sin
    horizontal = (along.abs() <= boxes[:, 3] / 2) & (across.abs() <= boxes[:, 4] / 2)
    return horizontal & (offset[..., 2] >= 0) & (offset[..., 2] <= boxes[:, 5])


def box_corners(boxes: Float64) -> Float64:
    """Corners [M, 8, 3] of boxes [M, 9]: the four of the bottom face, counter-clockwise, then the four of the top."""
    unit = np.array([[x, y, z] for z in (0.0, 1.0) for x, y in ((0.5, 0.5), (-0.5, 0.5), (-0.5, -0.5), (0.5, -0.5))])
    local = unit * boxes[:, None, 3:6]
    cos, sin = np.cos(boxes[:, 6, None]), np.sin(boxes[:, 6, None])
    turned = np.stack(
        [local[..., 0] * cos - local[..., 1] * sin, local[..., 0] * sin + local[..., 1] * cos, local[..., 2]], axis=-1
    )
    return turned + boxes[:, None, :3]


def lidar_boxes_from_global(
    translation: Float64, size: Float64, rotation: Float64, velocity: Float64, global_SE3_lidar: Float64
) -> Float64:
    """nuScenes annotations as boxes [M, 9] of the LiDAR frame, equal to mmdet3d's conversion.

    Args:
        translation: [M, 3] centres in the global frame.
        size: [M, 3] width, length, height.
        rotation: [M, 4] quaternions w, x, y, z.
        velocity: [M, 2] in the global frame, NaN where unknown.
        global_SE3_lidar: [M, 4, 4] pose of the LiDAR of each box's keyframe.
    """
    lidar_SE3_global = inverse(global_SE3_lidar)
    turn = lidar_SE3_global[:, :3, :3]
    centre = np.einsum("mij,mj->mi", turn, translation) + lidar_SE3_global[:, :3, 3]
    box_turn = turn @ rotation_matrices(rotation)
    # The angle that is left of an upright box once roll and pitch of the LiDAR are taken off: R = Rx Ry Rz(yaw).
    yaw = np.arctan2(-box_turn[:, 0, 1], box_turn[:, 0, 0])
    lidar_velocity = np.einsum("mij,mj->mi", turn[:, :2, :2], velocity)
    bottom = centre - np.array([0.0, 0.0, 0.5]) * size[:, 2:]
    return np.concatenate([bottom, size[:, [1, 0, 2]], yaw[:, None], lidar_velocity], axis=1)


def global_from_lidar_boxes(
    boxes: NDArray[np.floating], global_SE3_lidar: Float64
) -> tuple[Float64, Float64, Float64, Float64]:
    """Boxes [M, 9] of one keyframe in nuScenes terms; the inverse of `lidar_boxes_from_global`.

    Returns:
        translation [M, 3], size [M, 3] (width, length, height), rotation [M, 4] (w, x, y, z; upright) and
        velocity [M, 2], all in the global frame.
    """
    boxes = np.asarray(boxes, dtype=np.float64)
    turn = global_SE3_lidar[:3, :3]
    centre = boxes[:, :3] + np.array([0.0, 0.0, 0.5]) * boxes[:, 5:6]
    translation = transform_points(global_SE3_lidar, centre)
    half = (boxes[:, 6] + np.arctan2(turn[1, 0], turn[0, 0])) / 2
    zero = np.zeros_like(half)
    rotation = np.stack([np.cos(half), zero, zero, np.sin(half)], axis=1)
    velocity = boxes[:, 7:9] @ np.linalg.inv(turn.T[:2, :2]).T
    return translation, boxes[:, [4, 3, 5]], rotation, velocity
