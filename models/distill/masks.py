"""Masks of dense terms: weights [B, 1, H, W] of the cells, by which a term sums its distances."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from models.detector import Batch
from models.distill.terms import MaskConfig
from models.targets import TargetEncoder, flatten_boxes


class MaskInput(NamedTuple):
    """What a mask may look at."""

    teacher: Tensor
    """[B, C, H, W], not normalised."""
    valid: Tensor
    """[B, 1, H, W] bool, cells for which the teacher's map is known."""
    batch: Batch
    targets: TargetEncoder
    config: MaskConfig


def mean_over(cells: Tensor) -> Tensor:
    """Weights that make a mean over the cells that are set; zero without any."""
    return cells / cells.sum().clamp(min=1)


def everywhere(given: MaskInput) -> Tensor:
    """Mean over all cells."""
    return mean_over(given.valid.float())


def _occupied(given: MaskInput) -> Tensor:
    return (given.teacher != 0).any(1, keepdim=True) & given.valid


def occupied(given: MaskInput) -> Tensor:
    """Mean over the cells where the teacher is active."""
    return mean_over(_occupied(given).float())


def balanced(given: MaskInput) -> Tensor:
    """Mean over the occupied cells plus mean over the empty ones, which would otherwise outweigh them."""
    cells = _occupied(given)
    return mean_over(cells.float()) + mean_over((given.valid & ~cells).float())


def gt_gauss(given: MaskInput) -> Tensor:
    """Squared sum over classes of the ground truth's Gaussians, over the number of cells (SimDistill's CMD mask)."""
    boxes, labels, sample = flatten_boxes(given.batch.boxes, given.batch.labels)
    encoded = given.targets.encode(boxes, labels)
    heat = given.targets.heatmap(encoded, labels, sample, len(given.teacher), torch.ones_like(boxes[:, 0]))
    weight = heat.sum(1, keepdim=True)
    if given.config.clip is not None:
        weight = weight.clamp(max=given.config.clip)
    return weight**2 * given.valid / given.valid.sum().clamp(min=1)


MASKS: dict[str, Callable[[MaskInput], Tensor]] = {
    "none": everywhere,
    "occupied": occupied,
    "balanced": balanced,
    "gt_gauss": gt_gauss,
}
"""Masks of dense terms by name."""
