"""Warp cached dense BEV maps by a sample's BEV augmentation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SNAP = 1e-4  # cells; a source this close to a cell's centre is that centre, so that flips and quarter turns are exact


def warp_bev(
    maps: Tensor, bev_aug: Tensor, extent: float, out_extent: float | None = None, present: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Bilinear warp of maps in the LiDAR frame into the augmented frame.

    Exact for flips and quarter turns. The values are taken as they are: a map whose values depend on the frame
    (offsets, velocities) must not be warped so; for head maps there is `models.head.head_maps.warp_head`. Fastest
    for maps whose channels lie last in memory.

    Args:
        maps: [B, C, H, W] with H = W, over +-extent metres.
        bev_aug: [B, 4, 4] LiDAR frame -> augmented frame, invertible in the plane.
        extent: half the side of the maps, metres.
        out_extent: half the side of the result; smaller than `extent` where the maps carry a halo. Default: equal.
        present: [B, H, W] bool, cells whose values are known. Default: all.

    Returns:
        The warped maps [B, C, H', W'], zero where a source lies outside, and the cells whose sources all lie inside
        and are present, bool [B, 1, H', W'].
    """
    batch, channels, size, _ = maps.shape
    position, out_size = source_cells(bev_aug, size, extent, extent if out_extent is None else out_extent)
    nearest = position.round()
    position = torch.where((position - nearest).abs() < SNAP, nearest, position)
    valid = ((position >= 0) & (position <= size - 1)).all(-1)
    rows, weights = _corners(position, size)
    rows = rows + torch.arange(batch, device=maps.device).view(-1, 1, 1) * size**2
    weights = (weights * valid.unsqueeze(-1)).float()
    table = maps.permute(0, 2, 3, 1).reshape(-1, channels).float()
    warped = F.embedding_bag(rows.flatten(0, 1), table, mode="sum", per_sample_weights=weights.flatten(0, 1))
    if present is not None:
        valid &= (present.flatten()[rows] | (weights == 0)).all(-1)
    shape = (batch, out_size, out_size)
    return warped.view(*shape, channels).permute(0, 3, 1, 2).to(maps.dtype), valid.view(shape).unsqueeze(1)


def source_cells(bev_aug: Tensor, size: int, extent: float, out_extent: float) -> tuple[Tensor, int]:
    """Where in a map the cells of the augmented frame come from.

    Args:
        bev_aug: [B, 4, 4] LiDAR frame -> augmented frame.
        size: cells along a side of the map.
        extent: half the side of the map, metres.
        out_extent: half the side of the result, metres.

    Returns:
        Positions [B, H' * W', 2] (x, y) float64 in cells of the map, 0 at the centre of its first cell, and H' = W'.
    """
    cell = 2 * extent / size
    out_size = round(2 * out_extent / cell)
    return (_sources(bev_aug, out_size, cell, out_extent) + extent) / cell - 0.5, out_size


def _sources(bev_aug: Tensor, size: int, cell: float, extent: float) -> Tensor:
    """Where in the LiDAR frame the cells [size, size] of the augmented frame come from: [B, size * size, 2], metres."""
    axis = (torch.arange(size, device=bev_aug.device, dtype=torch.float64) + 0.5) * cell - extent
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    target = torch.stack([x, y, torch.ones_like(x)], dim=-1).view(-1, 3)
    planar = bev_aug.double()[:, [0, 1, 3]][:, :, [0, 1, 3]]
    planar[:, 2] = planar.new_tensor([0, 0, 1])
    return (target @ torch.linalg.inv(planar).mT)[..., :2]


def _corners(position: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Rows [B, P, 4] of the cells around positions [B, P, 2] and their bilinear weights."""
    low = position.floor()
    fraction = position - low
    low = low.long()
    x, y = (torch.stack([low[..., i], low[..., i] + 1], dim=-1).clamp(0, size - 1) for i in (0, 1))
    weight_x, weight_y = (torch.stack([1 - fraction[..., i], fraction[..., i]], dim=-1) for i in (0, 1))
    rows = y.unsqueeze(-1) * size + x.unsqueeze(-2)
    return rows.flatten(-2), (weight_y.unsqueeze(-1) * weight_x.unsqueeze(-2)).flatten(-2)
