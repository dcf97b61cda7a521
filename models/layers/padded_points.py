"""Point clouds to BEV maps with shapes that depend on no value: what an exported graph holds of `PointLift`.

The pillars that hold points are as many as the scene makes them; here every cell of the map is one.
"""

from __future__ import annotations

import torch
from mmcv.ops import Voxelization
from torch import Tensor, nn

from models.layers.pillars import PointPillarsScatter, PointwisePillarNet


def lift_padded(voxelize: Voxelization, encoder: nn.Module, middle: nn.Module, points: Tensor) -> Tensor:
    """The map [C, h, w] that a lift of these parts makes of points [P, features]; those outside do not count.

    Raises:
        ValueError: naming what of the lift cannot be done with fixed shapes.
    """
    if not isinstance(encoder, PointwisePillarNet) or not isinstance(middle, PointPillarsScatter):
        raise ValueError(
            f"export of {type(encoder).__name__} and {type(middle).__name__}: only pillars of "
            "PointwisePillarNet on PointPillarsScatter have a graph of fixed shapes"
        )
    cells = middle.ny * middle.nx
    _check_limit(voxelize, min(len(points), cells))
    xyz = points[:, :3]
    low = points.new_tensor(voxelize.point_cloud_range[:3])
    place = torch.floor((xyz - low) / encoder.size).long()
    inside = ((place >= 0) & (place < place.new_tensor([middle.nx, middle.ny, 1]))).all(1)
    pillar = torch.where(inside, place[:, 1] * middle.nx + place[:, 0], cells)
    # Points that do not count go to one pillar more, which is dropped.
    pillar = torch.where(earlier(pillar) < voxelize.max_num_points, pillar, cells)
    center = (place + 0.5) * encoder.size + encoder.low
    features = encoder.of_points(points, mean_of(xyz, pillar, cells + 1)[pillar], center)
    # No feature is negative, so a pillar without points stays at zero.
    empty = features.new_zeros(cells + 1, features.shape[1])
    pooled = empty.scatter_reduce(0, pillar[:, None].expand_as(features), features, "amax")
    return pooled[:cells].T.unflatten(1, (middle.ny, middle.nx))


def earlier(pillar: Tensor) -> Tensor:
    """How many points before it lie in a point's pillar, [P] of pillars [P]."""
    return (pillar[:, None] == pillar).tril(-1).sum(1)


def mean_of(xyz: Tensor, pillar: Tensor, pillars: int) -> Tensor:
    """Mean [pillars, 3] of the points [P, 3] of each pillar."""
    total = xyz.new_zeros(pillars, 3).scatter_add(0, pillar[:, None].expand_as(xyz), xyz)
    count = xyz.new_zeros(pillars).scatter_add(0, pillar, torch.ones_like(xyz[:, 0]))
    return total / count.clamp(min=1)[:, None]


def _check_limit(voxelize: Voxelization, most: int) -> None:
    """Refuse a lift that may have to leave pillars out: which ones depends on the points."""
    limit = voxelize.max_voxels[1]
    if most > limit:
        raise ValueError(
            f"export of a lift with voxel.max_voxels {limit}: {most} pillars may hold points, and a graph "
            f"of fixed shapes leaves none out; train with max_voxels {most}"
        )
