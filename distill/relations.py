"""Terms that compare not maps but what relates their parts, so that the widths of student and teacher may differ.

Relations between cameras and between keyframes are our reconstruction of Structured KD (Zhang et al., 2022; only its
abstract was available). Attention transfer and similarity-preserving distillation are baselines.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from base.taps import TapRef
from distill.adapters import resized
from distill.features import valid_cells
from distill.masks import grid_of, mean_over
from distill.term import Outcome, Term
from distill.terms import TermConfig
from models.head.targets import TargetEncoder
from models.layers.grid import Grid
from models.layers.projection import seen
from models.ports import Batch, Prediction

EMPTY = 1e-12  # squared length up to which a vector has no direction
# Points of a pillar, evenly spaced over the grid's height; a camera sees the pillar where it sees one of them.
HEIGHTS = 4
REACH = 1  # cells to either side of a pillar at which its relations to the previous keyframe end: a window of 3 x 3
TEMPERATURE = 0.1  # of the softmax over the cosines in that window
OUTSIDE = -1e4  # logit of a neighbour that is not known: its share is zero


class Pair(NamedTuple):
    """Maps of student and teacher on the teacher's grid, float32."""

    student: Tensor  # [B, C, H, W]
    teacher: Tensor  # [B, C', H, W], without gradient
    valid: Tensor  # [B, 1, H, W] bool, cells for which the teacher's map is known


class RelationTerm(Term):
    """What the terms of this module share: nothing that is trained, float32 whatever the step's precision."""

    mask = "none"
    tap: str | None = None  # the one tap that is compared; None: any dense map

    def __init__(self, config: TermConfig, targets: TargetEncoder) -> None:
        super().__init__(config)
        if config.mask.kind != self.mask:
            raise ValueError(f"mask '{config.mask.kind}' does not apply to {config.distance}: use {self.mask}")
        if config.adapter.kind != "id":
            raise ValueError(
                f"adapter '{config.adapter.kind}' does not apply to {config.distance}, which needs no "
                "common width: use id"
            )
        if self.tap is not None and (config.student, config.teacher) != (self.tap, config.teacher.beside(self.tap)):
            raise ValueError(
                f"{config.distance} does not compare '{config.student}' with '{config.teacher}': use "
                f"'{self.tap}' of both"
            )
        self.targets = targets

    def forward(self, student: Prediction, teacher: Mapping[str, Any], batch: Batch, progress: float) -> Outcome:
        """See `Term`."""
        ours, theirs = student.taps[self.config.student], self.config.teacher
        with torch.autocast(ours.device.type, enabled=False):
            return Outcome(self.loss(on_one_grid(ours, teacher, theirs), student, teacher, batch))

    @abstractmethod
    def loss(self, maps: Pair, student: Prediction, teacher: Mapping[str, Any], batch: Batch) -> Tensor:
        """The loss of the maps of the term's own taps."""


class SpatialTerm(RelationTerm):
    """Structured KD between views: how alike the cameras' parts of a pillar are, among them and with the whole pillar.

    Of a pillar that cameras k and l see, the cosine of their parts; for k = l that of its part with the sum of all
    parts, which is the cosine with their mean as well. The absolute differences of student and teacher are averaged
    over a pillar's relations, then over the pillars that a camera sees. Where one camera sees a pillar, its part is
    the whole, and there is nothing to learn.
    """

    mask = "visible_views"
    tap = "bev_view"

    def loss(self, maps: Pair, student: Prediction, teacher: Mapping[str, Any], batch: Batch) -> Tensor:
        """See `RelationTerm`."""
        cameras, size = batch.images.shape[2], maps.teacher.shape[-1]
        visible = seen(self._centers(size, maps.teacher.device), self._heights(), batch) & maps.valid
        pairs = visible.unsqueeze(1) & visible.unsqueeze(2)
        ours, theirs = (view_relations(views, cameras) for views in (maps.student, maps.teacher))
        error = ((ours - theirs).abs() * pairs).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)
        return (error * mean_over(visible.any(1).float())).sum()

    def _centers(self, size: int, device: torch.device) -> Tensor:
        """Pillars [size, size, 2] over the square of the student's grid, metres."""
        extent = self.targets.grid.range
        return Grid(extent, 2 * extent / size).centers(device)

    def _heights(self) -> list[float]:
        low, high = self.targets.grid.z
        return [low + (high - low) * (i + 0.5) / HEIGHTS for i in range(HEIGHTS)]


class TemporalTerm(RelationTerm):
    """Structured KD between keyframes: which cells of the previous map around a pillar the pillar is like.

    The cosines of the current cell with the cells of a window in the previous map become a distribution by a softmax;
    the loss is the divergence KL(teacher || student), mean over the pillars of samples that have a previous keyframe.
    Neighbours off the map, or of which the teacher knows nothing, take no part.
    """

    tap = "bev_lift"

    @property
    def student_taps(self) -> set[str]:
        """See `Term`."""
        return super().student_taps | {"bev_prev"}

    def loss(self, maps: Pair, student: Prediction, teacher: Mapping[str, Any], batch: Batch) -> Tensor:
        """See `RelationTerm`."""
        before = on_one_grid(student.taps["bev_prev"], teacher, self.config.teacher.beside("bev_prev"))
        if before.teacher.shape != maps.teacher.shape:
            raise ValueError(
                f"'{self.config.teacher.beside('bev_prev')}' is {list(before.teacher.shape)}, "
                f"'{self.config.teacher}' {list(maps.teacher.shape)}: both keyframes need one grid"
            )
        known = torch.cat(neighbours(before.valid), dim=1)
        cells = maps.valid & known.any(1, keepdim=True) & batch.has_previous.view(-1, 1, 1, 1)
        ours, theirs = (
            time_relations(current, previous).div(TEMPERATURE).masked_fill(~known, OUTSIDE).log_softmax(1)
            for current, previous in ((maps.student, before.student), (maps.teacher, before.teacher))
        )
        divergence = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1, keepdim=True)
        return (divergence * mean_over(cells.float())).sum()


class AttentionTerm(RelationTerm):
    """Attention transfer (Zagoruyko and Komodakis, ICLR 2017): where a map is active, as a map of unit length.

    The squared distance of the two maps of a sample, mean over samples. The released code takes the mean over cells as
    well; with their sum a weight means the same on every grid.
    """

    def loss(self, maps: Pair, student: Prediction, teacher: Mapping[str, Any], batch: Batch) -> Tensor:
        """See `RelationTerm`."""
        ours, theirs = (unit((values.square().mean(1, keepdim=True) * maps.valid).flatten(1)) for values in maps[:2])
        return (ours - theirs).square().sum(1).mean()


class SimilarityTerm(RelationTerm):
    """Similarity-preserving distillation (Tung and Mori, ICCV 2019): how alike the samples of a batch are.

    The mean squared difference of the Gram matrices of the samples' maps, whose rows have unit length. The samples are
    those of one process: with several, each compares its own. A single sample has nothing to learn from.
    """

    def loss(self, maps: Pair, student: Prediction, teacher: Mapping[str, Any], batch: Batch) -> Tensor:
        """See `RelationTerm`."""
        samples = ((values * maps.valid).flatten(1) for values in maps[:2])
        ours, theirs = (unit(values @ values.mT) for values in samples)
        return (ours - theirs).square().mean()


# Terms by their distance.
RELATIONS: dict[str, type[RelationTerm]] = {
    "cos_rel": SpatialTerm,
    "kl_rel": TemporalTerm,
    "attention": AttentionTerm,
    "similarity": SimilarityTerm,
}


def on_one_grid(ours: Tensor, teacher: Mapping[str, Any], tap: TapRef) -> Pair:
    """A student's map, brought to the teacher's grid, and the teacher's."""
    theirs = teacher[tap].detach().float()
    return Pair(resized(ours.float(), grid_of(theirs)), theirs, valid_cells(teacher, tap, theirs))


def cosine(product: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Cosines of vectors from their scalar products and squared lengths; 0, without gradient, of an empty one."""
    known = (first > EMPTY) & (second > EMPTY)
    return torch.where(known, product, 0.0) * torch.where(known, first * second, 1.0).rsqrt()


def unit(vectors: Tensor) -> Tensor:
    """Vectors [B, D] of length 1; an empty one stays 0, without gradient."""
    square = vectors.square().sum(1, keepdim=True)
    known = square > EMPTY
    return torch.where(known, vectors, 0.0) * torch.where(known, square, 1.0).rsqrt()


def view_relations(views: Tensor, cameras: int) -> Tensor:
    """Relations [B, N, N, H, W] of the cameras' parts [B, N * C, H, W] of each pillar.

    The cosine of parts k and l; for k = l that of part k with the sum of the parts.

    Raises:
        ValueError: the channels are not those of so many cameras.
    """
    if views.shape[1] % cameras:
        raise ValueError(f"bev_view has {views.shape[1]} channels, which {cameras} cameras cannot share")
    parts = views.unflatten(1, (cameras, -1))
    whole = parts.sum(1, keepdim=True)
    # Scalar products first, lengths after: normalised copies of the parts would be as large as the parts.
    products = torch.einsum("bkchw,blchw->bklhw", parts, parts)
    squares = products.diagonal(dim1=1, dim2=2).movedim(-1, 1)
    between = cosine(products, squares.unsqueeze(1), squares.unsqueeze(2))
    with_whole = cosine((parts * whole).sum(2), squares, whole.square().sum(2))
    same = torch.eye(cameras, dtype=torch.bool, device=views.device).view(1, cameras, cameras, 1, 1)
    return torch.where(same, with_whole.unsqueeze(2), between)


def time_relations(current: Tensor, previous: Tensor) -> Tensor:
    """Cosines [B, 9, H, W] of each cell of a map [B, C, H, W] with the cells around it in another, row by row."""
    # Cell by cell of the window: all neighbours side by side would be nine maps.
    products = torch.stack([(current * moved).sum(1) for moved in neighbours(previous)], dim=1)
    squares = torch.cat(neighbours(previous.square().sum(1, keepdim=True)), dim=1)
    return cosine(products, current.square().sum(1, keepdim=True), squares)


def neighbours(maps: Tensor) -> list[Tensor]:
    """Of maps [B, C, H, W] what lies at each cell of the window around a cell, row by row; zero off the map."""
    height, width = grid_of(maps)
    padded = F.pad(maps, (REACH,) * 4)
    window = range(2 * REACH + 1)
    return [padded[..., y : y + height, x : x + width] for y in window for x in window]
