"""How what a store holds becomes what a student compares with: the same for training, cards and pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from data.store import Calibration
from models.head.head_maps import warp_head
from models.head.targets import TargetEncoder
from models.layers.warp import warp_bev
from models.ports import Detections


@torch.no_grad()
def serve_maps(
    values: Tensor,
    present: Tensor | None,
    calibration: Calibration,
    extent: float,
    bev_aug: Tensor,
    out_extent: float,
) -> tuple[Tensor, Tensor]:
    """Stored maps in the augmented frame, as the teacher's channels.

    Casting, warp, scales and basis run where the values are, and the warp moves the K stored channels, not all C: it
    is linear and its weights add up to 1, so what `Calibration.expand` does may follow it.

    Args:
        values: [B, H, W, K] of the stored dtype; uint8 are the bits of float8.
        present: [B, H, W] bool, cells that the store holds; None are all.
        calibration: of the tap.
        extent: half the side of the stored maps in metres, halo included (`TapSpec.extent`).
        bev_aug: [B, 4, 4] LiDAR frame -> augmented frame.
        out_extent: half the side of the result in metres, the student's `grid.range`.

    Returns:
        Maps [B, C, H', W'] float32, and the cells that have a source, bool [B, 1, H', W']: all the stored cells that
        they are made of lie on the stored map and are present. Elsewhere maps are zero.
    """
    if values.dtype == torch.uint8:
        values = values.view(torch.float8_e4m3fn)
    stored = values.float().permute(0, 3, 1, 2)
    warped, valid = warp_bev(stored, bev_aug, extent, out_extent, present)
    maps = calibration.expand(warped.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    # After the expansion, because a stored zero of int8 need not mean 0.
    return maps.masked_fill_(~valid, 0.0), valid


@torch.no_grad()
def serve_head(
    values: Tensor, calibration: Calibration, extent: float, bev_aug: Tensor, targets: TargetEncoder
) -> tuple[Tensor, Tensor]:
    """Stored head maps in the augmented frame: their boxes are moved, not only their cells.

    Args:
        values: [B, H, W, C] of the stored dtype.
        calibration: of the tap.
        extent: half the side of the stored maps in metres, halo included (`TapSpec.extent`).
        bev_aug: [B, 4, 4] LiDAR frame -> augmented frame.
        targets: the student's.

    Returns:
        Maps [B, C, H', W'] float32 on the student's grid, and the cells that have a source, bool [B, 1, H', W'].
    """
    return warp_head(calibration.expand(values).permute(0, 3, 1, 2), bev_aug, extent, targets)


def box_rows(found: Detections, score_threshold: float) -> Tensor:
    """[K, 11]: box, score, label of the detections whose score reaches the threshold; what a store keeps of them."""
    columns = (found.boxes, found.scores[:, None], found.labels[:, None])
    return torch.cat([column.float() for column in columns], dim=1)[found.scores >= score_threshold]
