"""From the bird's-eye view into the cameras: where points of the scene appear in the images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.ports import Batch

NEAREST = 0.1  # metres in front of a camera from which on it sees a point


def project(points: Tensor, batch: Batch, frame: int = 0) -> tuple[Tensor, Tensor]:
    """Where points appear in the images of one frame, and whether they do.

    Args:
        points: [P, 3] metres, in the batch's (augmented) frame.
        batch: with the cameras.
        frame: of the batch; the points stay those of the current LiDAR frame.

    Returns:
        Positions [B, N, P, 2] float32, x and y, 0 and 1 at the outer edges of the network's image; meaningless where
        the second, [B, N, P] bool, is False: the point lies behind the camera or outside the image.
    """
    height, width = batch.images.shape[-2:]
    # Autocast would round metres and pixels to eight bits.
    with torch.autocast(points.device.type, enabled=False):
        to_pixels, offset = cameras(batch, frame)
        ahead = points.float() @ to_pixels.mT + offset.unsqueeze(-2)  # [B, N, P, 3]
        depth = ahead[..., 2:].clamp(min=NEAREST)
        # Whole numbers are the centres of pixels.
        positions = (ahead[..., :2] / depth + 0.5) / points.new_tensor([width, height], dtype=torch.float32)
    inside = ((positions >= 0) & (positions <= 1)).all(-1)
    return positions, inside & (ahead[..., 2] > NEAREST)


def seen(centers: Tensor, heights: Sequence[float], batch: Batch, frame: int = 0) -> Tensor:
    """Which camera sees which pillar: [B, N, H, W] bool.

    Args:
        centers: [H, W, 2] of the pillars, metres, as `Grid.centers` gives them.
        heights: metres; a pillar is seen where its point at one of them is.
        batch: with the cameras.
        frame: of the batch.
    """
    _, inside = project(pillar_points(centers, heights), batch, frame)
    return inside.unflatten(2, (*centers.shape[:2], len(heights))).any(-1)


def pillar_points(centers: Tensor, heights: Sequence[float]) -> Tensor:
    """Points [H * W * Z, 3] of pillars [H, W, 2], those of a pillar one after another."""
    z = centers.new_tensor(heights).expand(*centers.shape[:2], -1)
    xy = centers.unsqueeze(2).expand(-1, -1, len(heights), -1)
    return torch.cat([xy, z.unsqueeze(-1)], dim=-1).flatten(0, 2)


def cameras(batch: Batch, frame: int) -> tuple[Tensor, Tensor]:
    """The cameras of a frame as maps of points x in the augmented frame to M x + t: pixels times depth, and depth.

    Returns:
        M [B, N, 3, 3] and t [B, N, 3].
    """
    pose = batch.bev_aug.float()[:, None] @ batch.lidar_SE3_cam[:, frame].float()
    pixels = batch.image_aug[:, frame].float() @ batch.intrinsics[:, frame].float()
    to_pixels = pixels @ inverse3(pose[..., :3, :3])
    return to_pixels, -(to_pixels @ pose[..., :3, 3:]).squeeze(-1)


def inverse3(matrix: Tensor) -> Tensor:
    """Inverse of matrices [..., 3, 3], by cross products: ONNX has no operator for it."""
    first, second, third = matrix.unbind(-1)
    rows = torch.stack(
        [torch.linalg.cross(second, third), torch.linalg.cross(third, first), torch.linalg.cross(first, second)], dim=-2
    )
    return rows / (first * rows[..., 0, :]).sum(-1)[..., None, None]
