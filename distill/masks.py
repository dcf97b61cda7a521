"""Masks of dense terms: weights [B, 1, H, W] of the cells, by which a term sums its distances.

Counts of cells are those of all processes, see `models.layers.processes`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from distill.adapters import resized
from distill.terms import MaskConfig
from models.head.targets import TargetEncoder, flatten_boxes
from models.layers.processes import divisor
from models.ports import Batch

CLIP = 20.0  # largest weight that `phi_softmax` gives a cell where `mask.clip` is not set; their mean is 1 before


class MaskInput(NamedTuple):
    """What a mask may look at."""

    teacher: Tensor  # [B, C, H, W], not normalised
    valid: Tensor  # [B, 1, H, W] bool, cells for which the teacher's map is known
    batch: Batch
    targets: TargetEncoder
    config: MaskConfig
    # [B, 1, h, w] best score of the teacher's head at each of its cells, for `phi_softmax`.
    scores: Tensor | None = None


def mean_over(cells: Tensor) -> Tensor:
    """Weights that make a mean over the cells that are set; zero without any."""
    return cells / divisor(cells.sum())


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


def true_heat(given: MaskInput) -> Tensor:
    """The ground truth's Gaussians [B, C, H, W] on the student's grid."""
    boxes, labels, sample = flatten_boxes(given.batch.boxes, given.batch.labels)
    encoded = given.targets.encode(boxes, labels)
    return given.targets.heatmap(encoded, labels, sample, len(given.teacher), torch.ones_like(boxes[:, 0]))


def gt_gauss(given: MaskInput) -> Tensor:
    """Squared sum over classes of the ground truth's Gaussians, over the number of cells (SimDistill's CMD mask)."""
    weight = resized(true_heat(given).sum(1, keepdim=True), grid_of(given.teacher))
    if given.config.clip is not None:
        weight = weight.clamp(max=given.config.clip)
    return weight**2 * given.valid / divisor(given.valid.sum())


def by_sample(weight: Tensor) -> Tensor:
    """Weights that make the mean over samples of each sample's weighted mean; zero where it has no weight."""
    return weight / weight.sum((1, 2, 3), keepdim=True).clamp(min=1e-6) / len(weight)


def phi_softmax(given: MaskInput) -> Tensor:
    """PointDistiller's weights: a softmax over a sample's cells of the teacher's best score, clipped.

    Zhang et al., "PointDistiller", CVPR 2023 reweighs distillation by a softmax of importance; of a camera teacher's
    scores over BEV pillars it is our choice.

    Raises:
        ValueError: the scores are not given.
    """
    if given.scores is None:
        raise ValueError("mask 'phi_softmax' weighs by the scores of the teacher's head: give them")
    logits = resized(given.scores, grid_of(given.teacher)) / given.config.temperature
    share = logits.masked_fill(~given.valid, torch.finfo(logits.dtype).min).flatten(1).softmax(1).view_as(logits)
    phi = share * given.valid.sum((1, 2, 3), keepdim=True)
    return by_sample(phi.clamp(max=given.config.clip or CLIP) * given.valid)


def uniform(given: MaskInput) -> Tensor:
    """All cells of a sample alike."""
    return by_sample(given.valid.float())


def gt_heat(given: MaskInput) -> Tensor:
    """The ground truth's Gaussians, their largest over classes; a sample without a box has no weight."""
    return by_sample(resized(true_heat(given).amax(1, keepdim=True), grid_of(given.teacher)) * given.valid)


def grid_of(maps: Tensor) -> tuple[int, int]:
    """Cells along y and x of maps [..., H, W]."""
    return maps.shape[-2], maps.shape[-1]


# Masks that a teacher's head maps may have as well, by name.
PILLARS: dict[str, Callable[[MaskInput], Tensor]] = {
    "phi_softmax": phi_softmax,
    "uniform": uniform,
    "gt_heat": gt_heat,
}
# Masks of dense terms by name.
MASKS: dict[str, Callable[[MaskInput], Tensor]] = {
    "none": everywhere,
    "occupied": occupied,
    "balanced": balanced,
    "gt_gauss": gt_gauss,
    **PILLARS,
}
