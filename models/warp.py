"""Warp cached dense BEV maps by a sample's BEV augmentation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SNAP = 1e-4
"""Cells; a source this close to a cell's centre is that centre, so that flips and quarter turns are exact."""


def warp_bev(maps: Tensor, bev_aug: Tensor, extent: float, out_extent: float | None = None) -> tuple[Tensor, Tensor]:
    """Bilinear warp of maps in the LiDAR frame into the augmented frame.

    Exact for flips and quarter turns. The values are taken as they are: a map whose values depend on the frame
    (offsets, velocities) must not be warped.

    Args:
        maps: [B, C, H, W] with H = W, over +-extent metres.
        bev_aug: [B, 4, 4] LiDAR frame -> augmented frame, invertible in the plane.
        extent: half the side of the maps, metres.
        out_extent: half the side of the result; smaller than ``extent`` where the maps carry a halo. Default: equal.

    Returns:
        The warped maps [B, C, H', W'], zero where there is no source, and the cells that have one, bool [B, 1, H', W'].
    """
    batch, channels, size, _ = maps.shape
    cell = 2 * extent / size
    out_extent = extent if out_extent is None else out_extent
    out_size = round(2 * out_extent / cell)
    axis = (torch.arange(out_size, device=maps.device, dtype=torch.float64) + 0.5) * cell - out_extent
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    target = torch.stack([x, y, torch.ones_like(x)], dim=-1).view(-1, 3)
    planar = bev_aug.double()[:, [0, 1, 3]][:, :, [0, 1, 3]]
    planar[:, 2] = planar.new_tensor([0, 0, 1])
    source = (target @ torch.linalg.inv(planar).mT)[..., :2]
    position = (source + extent) / cell - 0.5  # [B, H' W', 2], in cells from the first centre
    nearest = position.round()
    position = torch.where((position - nearest).abs() < SNAP, nearest, position)
    valid = ((position >= 0) & (position <= size - 1)).all(-1)
    rows, weights = _corners(position, size)
    first_row = torch.arange(batch, device=maps.device).view(-1, 1, 1) * size**2
    table = maps.permute(0, 2, 3, 1).reshape(-1, channels).float()
    weights = (weights * valid.unsqueeze(-1)).float()
    bags, weights = (rows + first_row).flatten(0, 1), weights.flatten(0, 1)
    warped = F.embedding_bag(bags, table, mode="sum", per_sample_weights=weights)
    shape = (batch, out_size, out_size)
    return warped.view(*shape, channels).permute(0, 3, 1, 2).to(maps.dtype), valid.view(shape).unsqueeze(1)


def _corners(position: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Rows [B, P, 4] of the cells around positions [B, P, 2] and their bilinear weights."""
    low = position.floor()
    fraction = position - low
    low = low.long()
    x, y = (torch.stack([low[..., i], low[..., i] + 1], dim=-1).clamp(0, size - 1) for i in (0, 1))
    weight_x, weight_y = (torch.stack([1 - fraction[..., i], fraction[..., i]], dim=-1) for i in (0, 1))
    rows = y.unsqueeze(-1) * size + x.unsqueeze(-2)
    return rows.flatten(-2), (weight_y.unsqueeze(-1) * weight_x.unsqueeze(-2)).flatten(-2)
