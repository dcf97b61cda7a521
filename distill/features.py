"""Distillation between dense BEV maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from base.taps import TapRef
from distill.adapters import ADAPTERS, Resize
from distill.distances import ELEMENTWISE, pearson
from distill.masks import MASKS, MaskInput, grid_of
from distill.term import Outcome, Term
from distill.terms import TermConfig
from models.head.targets import CODE_SIZE, TargetEncoder
from models.ports import Batch, Prediction

# Of a channel, as a share of the mean over channels: a channel that hardly ever fires must not rule the loss.
SMALLEST_STD = 0.05
DISTANCES = (*ELEMENTWISE, "pearson")  # of dense maps


def channel_scale(std: Tensor | None, channels: int, tap: str) -> Tensor:
    """[channels, 1, 1] by which a teacher's map is divided: its standard deviation, not too small; 1 if unknown.

    Raises:
        ValueError: the statistics are of another number of channels.
    """
    std = torch.ones(channels) if std is None else std.float()
    if std.shape != (channels,):
        raise ValueError(f"statistics of '{tap}' are {list(std.shape)}, its channels {channels}")
    return std.clamp(min=max(float(std.mean()) * SMALLEST_STD, 1e-6)).view(-1, 1, 1)


def valid_cells(teacher: Mapping[str, Any], tap: TapRef, maps: Tensor) -> Tensor:
    """[B, 1, H, W] bool, the cells for which a teacher's map is known: all unless `tap.valid` says otherwise."""
    valid = teacher.get(tap.valid)
    return torch.ones_like(maps[:, :1], dtype=torch.bool) if valid is None else valid


def check_tasks(tap: str, channels: int, targets: TargetEncoder) -> None:
    """Raises ValueError where a teacher's head maps are not of the student's tasks."""
    expected = sum(targets.task_channels)
    if channels != expected:
        raise ValueError(
            f"'{tap}' has {channels} channels, the student's head {expected}: teacher and student need the same tasks"
        )


def best_score(head: Tensor, targets: TargetEncoder) -> Tensor:
    """Best score over all classes [B, 1, H, W] of a teacher's head maps, laid out as `head_map` makes them."""
    tasks = head.split(targets.task_channels, dim=1)
    return torch.cat([task[:, CODE_SIZE:] for task in tasks], dim=1).amax(1, keepdim=True).sigmoid()


class MapTerm(Term):
    """Feature distillation between dense BEV maps (X³KD's X-FD with the adapter `decoder`; our reconstruction).

    Both maps are divided by the teacher's standard deviation per channel, a constant, so that weights mean the same
    for every teacher; with `normalise: false` they are compared as they are (SimDistill's IMD, CMD and MMD-F). The
    cells that `<tap>.valid` leaves out do not count.
    """

    std: Tensor

    def __init__(
        self,
        config: TermConfig,
        student_channels: int,
        teacher_channels: int,
        std: Tensor | None,
        targets: TargetEncoder,
    ) -> None:
        super().__init__(config)
        for kind, known, what in (
            (config.mask.kind, MASKS, "mask"),
            (config.adapter.kind, ADAPTERS, "adapter"),
            (config.distance, DISTANCES, "distance"),
        ):
            if kind not in known:
                raise ValueError(f"{what} '{kind}' does not apply to dense maps: use one of {', '.join(known)}")
        self.targets = targets
        self.adapter = ADAPTERS[config.adapter.kind](student_channels, teacher_channels, config.adapter)
        self.register_buffer("std", channel_scale(std if config.normalise else None, teacher_channels, config.teacher))

    def forward(self, student: Prediction, teacher: Mapping[str, Any], batch: Batch, progress: float) -> Outcome:
        """See `Term`."""
        target = teacher[self.config.teacher].detach().float()
        source = student.taps[self.config.student]
        adapted = self.adapter(source, grid_of(target)) if isinstance(self.adapter, Resize) else self.adapter(source)
        if adapted.shape != target.shape:
            raise ValueError(
                f"student tap '{self.config.student}' is {list(adapted.shape)} after its adapter, "
                f"'{self.config.teacher}' {list(target.shape)}: grids that differ need the adapter resize "
                "or projection"
            )
        valid = valid_cells(teacher, self.config.teacher, target)
        given = MaskInput(target, valid, batch, self.targets, self.config.mask, self._scores(teacher))
        distance = self._distance(adapted.float() / self.std, target / self.std)
        return Outcome((distance * MASKS[self.config.mask.kind](given)).sum())

    def _distance(self, adapted: Tensor, target: Tensor) -> Tensor:
        """Distance [B, 1, H, W] of maps, cell by cell."""
        if self.config.distance == "pearson":
            return pearson(adapted, target)
        return ELEMENTWISE[self.config.distance](adapted, target, self.config.beta).mean(1, keepdim=True)

    def _scores(self, teacher: Mapping[str, Any]) -> Tensor | None:
        """What `phi_softmax` weighs by; cells of the head that are not known count as background."""
        tap = self.config.teacher.beside("head")
        if tap not in self.config.teacher_taps:
            return None
        head = teacher[tap].detach().float()
        return best_score(head, self.targets) * valid_cells(teacher, tap, head)
