"""Head maps in another frame: what a cell says of its box depends on the frame and moves with the scene."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from models.head.targets import CODE_SIZE, REGRESSION, TargetEncoder
from models.layers.warp import source_cells


@torch.no_grad()
def warp_head(maps: Tensor, bev_aug: Tensor, extent: float, targets: TargetEncoder) -> tuple[Tensor, Tensor]:
    """Head maps of the LiDAR frame as a head would give them in the augmented frame.

    A cell takes over all that the source cell nearest to it says: the heatmap logits, and the boxes, which are moved
    and described again from where the cell is, so that their offsets may leave [0, 1). Interpolated heatmaps would
    lose peaks of one cell, and their boxes would be of other cells than their scores. Exact for flips and quarter
    turns. No gradient passes.

    Args:
        maps: [B, C, H, W] with H = W, over +-extent metres, laid out as `models.ports.head_map` does.
        bev_aug: [B, 4, 4] LiDAR frame -> augmented frame: flips, a turn about z, a scale, a shift.
        extent: half the side of the maps, metres.
        targets: grid of the result, and the tasks and the code of the maps.

    Returns:
        The maps [B, C, H', W'] on the grid of `targets`, zero where a source lies outside, and the cells whose source
        lies inside, bool [B, 1, H', W'].

    Raises:
        ValueError: the maps are of other tasks or of another cell.
    """
    _check_layout(maps, extent, targets)
    batch, channels, size, _ = maps.shape
    position, out_size = source_cells(bev_aug, size, extent, targets.grid.range)
    nearest = position.round()
    valid = ((nearest >= 0) & (nearest <= size - 1)).all(-1)
    column_row = nearest.clamp(0, size - 1).long()
    rows = column_row[..., 1] * size + column_row[..., 0]
    rows = rows + torch.arange(batch, device=maps.device).view(-1, 1) * size**2
    # Whole rows are taken and then turned over: the cells of a channel lie side by side for what follows.
    moved = maps.permute(0, 2, 3, 1).reshape(-1, channels)[rows].transpose(1, 2).contiguous()
    codes = torch.tensor(_code_channels(targets), device=maps.device)
    beside = (position - nearest).mT.to(maps.dtype)
    moved[:, codes] = _move_codes(moved[:, codes], beside, bev_aug.to(maps), targets.norm_bbox)
    moved *= valid.unsqueeze(1)
    return moved.unflatten(2, (out_size, out_size)), valid.view(-1, 1, out_size, out_size)


def task_scores(maps: Tensor, targets: TargetEncoder) -> Tensor:
    """Best score of a task at a cell, for each channel of that task: [B, C, H, W] of head maps of that shape."""
    parts = maps.split(targets.task_channels, dim=1)
    return torch.cat([part[:, CODE_SIZE:].sigmoid().amax(1, keepdim=True).expand_as(part) for part in parts], dim=1)


def _check_layout(maps: Tensor, extent: float, targets: TargetEncoder) -> None:
    channels, cell = sum(targets.task_channels), 2 * extent / maps.shape[-1]
    if maps.shape[1] != channels:
        raise ValueError(
            f"head maps have {maps.shape[1]} channels, the tasks need {channels}: teacher and student "
            "need the same tasks"
        )
    if abs(cell - targets.grid.cell) > 1e-6:
        raise ValueError(
            f"head maps have cells of {cell:g} m, the grid cells of {targets.grid.cell:g} m: teacher and "
            "student need the same cell"
        )


def _code_channels(targets: TargetEncoder) -> list[list[int]]:
    """Channels [T][10] of each task's code; its heatmaps follow them."""
    starts = [0, *accumulate(targets.task_channels)][:-1]
    return [list(range(start, start + CODE_SIZE)) for start in starts]


def _move_codes(code: Tensor, beside: Tensor, bev_aug: Tensor, log_size: bool) -> Tensor:
    """Codes [B, T, 10, P] into the augmented frame, in place: fresh memory for them would cost most of the time.

    Args:
        code: of boxes in the LiDAR frame, relative to their source cells.
        beside: [B, 2, P] from the centre of a source cell to where the centre of its new cell comes from, cells.
        bev_aug: [B, 4, 4] LiDAR frame -> augmented frame.
        log_size: whether sizes are logarithms.
    """
    linear, scale, lift = bev_aug[:, :2, :2], bev_aug[:, 2, 2].view(-1, 1, 1, 1), bev_aug[:, 2, 3].view(-1, 1, 1, 1)
    offset, height, size, sin_cos, velocity = code.split(list(REGRESSION.values()), dim=2)
    offset -= beside.unsqueeze(1) + 0.5
    for vectors, matrix in ((offset, linear), (velocity, linear), (sin_cos, linear.flip(-2, -1) / scale[..., 0])):
        _turn(vectors, matrix)
    offset += 0.5
    height.mul_(scale).add_(lift)
    if log_size:
        size += scale.log()
    else:
        size *= scale
    return code


def _turn(vectors: Tensor, matrix: Tensor) -> None:
    """Multiply vectors [B, T, 2, P] in place by [B, 2, 2]; no matrix product, which autocast and TF32 would round."""
    first, second = vectors.split(1, dim=2)
    by_first, by_second = matrix[:, None].split(1, dim=-1)
    vectors.copy_(by_first * first + by_second * second)
