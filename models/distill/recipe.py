"""A recipe: the distillation terms of a variant, with everything that trains beside the student."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.center_head import REGRESSION
from models.detector import Batch, Prediction
from models.distill.adapters import ADAPTERS, Resize
from models.distill.distances import ELEMENTWISE, quality_focal, soft_gaussian_focal
from models.distill.masks import MASKS, MaskInput
from models.distill.terms import TermConfig
from models.targets import EncodedBoxes, TargetEncoder, flatten_boxes

SMALLEST_STD = 0.05
"""Of a channel, as a share of the mean over channels: a channel that hardly ever fires must not rule the loss."""


class Term(nn.Module, ABC):
    """One distillation loss, not yet weighted."""

    def __init__(self, config: TermConfig) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def forward(self, student: Prediction, teacher: Mapping[str, Any], batch: Batch) -> Tensor:
        """The scalar loss; no gradient reaches the teacher's outputs."""


class BoxTerm(Term):
    """Output distillation from a teacher's boxes (X³KD's X-OD; our reconstruction, the reading by boxes).

    The boxes whose score passes the threshold are drawn as Gaussians that rise to their score. ``gfl`` and ``qfl``
    compare the student's heatmaps with them; ``sl1``, ``l1`` and ``l2`` compare the ten regression values at their
    centres, weighted by the score.
    """

    def __init__(self, config: TermConfig, targets: TargetEncoder) -> None:
        super().__init__(config)
        if config.student != "head":
            raise ValueError(f"teacher boxes compare with the student's head, not with its tap '{config.student}'")
        if config.mask.kind not in ("none", "teacher_conf"):
            raise ValueError(f"mask '{config.mask.kind}' does not apply to boxes: use none or teacher_conf")
        if config.adapter.kind != "id":
            raise ValueError(f"adapter '{config.adapter.kind}' does not apply to boxes: use id")
        self.targets = targets
        self.threshold = config.mask.threshold if config.mask.kind == "teacher_conf" else 0.0

    def forward(self, student: Prediction, teacher: Mapping[str, Any], batch: Batch) -> Tensor:
        """See :class:`Term`; the teacher's boxes are a list of [K, 11]: box, score, label."""
        samples = [boxes.detach()[boxes[:, 9] > self.threshold] for boxes in teacher[self.config.teacher]]
        boxes, labels, sample = flatten_boxes([s[:, :10] for s in samples], [s[:, 10] for s in samples])
        encoded = self.targets.encode(boxes, labels)
        inside = encoded.inside
        boxes, labels, sample = boxes[inside], labels[inside], sample[inside]
        encoded = EncodedBoxes(*(values[inside] for values in encoded))
        cell = encoded.column_row[:, 1] * self.targets.grid.size + encoded.column_row[:, 0]
        score = boxes[:, 9]
        if self.config.distance in ELEMENTWISE:
            return self._regression(student, encoded.code, cell, labels, sample, score)
        logits = torch.cat([task["heatmap"] for task in student.head], dim=1)
        heat = self.targets.heatmap(encoded, labels, sample, len(samples), score)
        if self.config.distance == "qfl":
            loss = quality_focal(logits, heat)
        else:
            peak = torch.zeros_like(heat, dtype=torch.bool).flatten(2)
            peak[sample, labels, cell] = True
            loss = soft_gaussian_focal(logits, heat, peak.view_as(heat))
        return loss.sum() / max(len(boxes), 1)

    def _regression(self, student: Prediction, code: Tensor, cell: Tensor, labels: Tensor, sample: Tensor,
                    score: Tensor) -> Tensor:
        """Distance of the codes at the boxes' cells, averaged with the scores as weights."""
        maps = torch.stack([torch.cat([task[name] for name in REGRESSION], dim=1) for task in student.head], dim=1)
        task = torch.tensor(self.targets.task_of_class, device=labels.device)[labels]
        predicted = maps.flatten(3)[sample, task, :, cell]
        distance = ELEMENTWISE[self.config.distance](predicted, code.nan_to_num(0.0)) * ~code.isnan()
        return (distance.sum(1) * score).sum() / score.sum().clamp(min=1)


class MapTerm(Term):
    """Feature distillation between dense BEV maps (X³KD's X-FD with the adapter ``decoder``; our reconstruction).

    Both maps are divided by the teacher's standard deviation per channel, a constant, so that weights mean the same
    for every teacher. The cells that ``<tap>.valid`` leaves out do not count.
    """

    std: Tensor

    def __init__(self, config: TermConfig, student_channels: int, teacher_channels: int, std: Tensor | None,
                 targets: TargetEncoder) -> None:
        super().__init__(config)
        for kind, known, what in ((config.mask.kind, MASKS, "mask"), (config.adapter.kind, ADAPTERS, "adapter"),
                                  (config.distance, ELEMENTWISE, "distance")):
            if kind not in known:
                raise ValueError(f"{what} '{kind}' does not apply to dense maps: use one of {', '.join(known)}")
        self.targets = targets
        self.adapter = ADAPTERS[config.adapter.kind](student_channels, teacher_channels, config.adapter)
        std = torch.ones(teacher_channels) if std is None else std.float()
        if std.shape != (teacher_channels,):
            raise ValueError(f"statistics of '{config.teacher}' are {list(std.shape)}, its channels {teacher_channels}")
        std = std.clamp(min=max(float(std.mean()) * SMALLEST_STD, 1e-6))
        self.register_buffer("std", std.view(-1, 1, 1))

    def forward(self, student: Prediction, teacher: Mapping[str, Any], batch: Batch) -> Tensor:
        """See :class:`Term`."""
        target = teacher[self.config.teacher].detach().float()
        source = student.taps[self.config.student]
        grid = (target.shape[-2], target.shape[-1])
        adapted = self.adapter(source, grid) if isinstance(self.adapter, Resize) else self.adapter(source)
        if adapted.shape != target.shape:
            raise ValueError(f"student tap '{self.config.student}' is {list(adapted.shape)} after its adapter, "
                             f"'{self.config.teacher}' {list(target.shape)}: grids that differ need the adapter resize")
        valid = teacher.get(f"{self.config.teacher}.valid")
        if valid is None:
            valid = torch.ones_like(target[:, :1], dtype=torch.bool)
        given = MaskInput(target, valid, batch, self.targets, self.config.mask)
        distance = ELEMENTWISE[self.config.distance](adapted.float() / self.std, target / self.std)
        return (distance.mean(1, keepdim=True) * MASKS[self.config.mask.kind](given)).sum()


class Recipe(nn.Module):
    """The weighted distillation losses of a variant.

    It trains with the student and is no part of it: leaving it out is the export.

    Args:
        terms: term configs by name.
        targets: the student's target encoder.
        student_channels: channels of the student's taps.
        teacher_channels: channels of the teachers' dense taps, by ``<teacher>.<tap>``.
        statistics: standard deviation per channel [C] of the teachers' dense taps; 1 where absent.

    Raises:
        ValueError: naming the term and what does not fit.
    """

    def __init__(self, terms: Mapping[str, TermConfig], targets: TargetEncoder, student_channels: Mapping[str, int],
                 teacher_channels: Mapping[str, int], statistics: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.terms: dict[str, Term] = {}
        for name, config in terms.items():
            try:
                self.terms[name] = build_term(config, targets, student_channels, teacher_channels, statistics or {})
            except ValueError as error:
                raise ValueError(f"term '{name}': {error}") from error
        # A list, because a ModuleDict refuses names that modules have as attributes ("double", "type").
        self.modules_of_terms = nn.ModuleList(self.terms.values())

    @property
    def student_taps(self) -> set[str]:
        """Taps that the student's forward must return."""
        return {term.config.student for term in self.terms.values() if isinstance(term, MapTerm)}

    @property
    def teacher_taps(self) -> set[str]:
        """``<teacher>.<tap>`` that the batch must hold."""
        return {term.config.teacher for term in self.terms.values()}

    def forward(self, student: Prediction, teacher: Mapping[str, Any], batch: Batch,
                progress: float) -> dict[str, Tensor]:
        """Weighted losses by term.

        A term that has not started is computed with weight 0, so that the same parameters take part in every step.

        Args:
            student: the student's prediction with ``student_taps``.
            teacher: outputs by ``<teacher>.<tap>`` in the batch's augmented frame; ``boxes`` a list of [K, 11] (box,
                score, label), maps [B, C, H, W], with ``<teacher>.<tap>.valid`` bool [B, 1, H, W] where warped.
            batch: the student's batch.
            progress: fraction of training done, 0 to 1.

        Raises:
            KeyError: naming the teacher's outputs that are missing.
        """
        missing = sorted(self.teacher_taps - set(teacher))
        if missing:
            raise KeyError(f"teacher outputs {', '.join(missing)} are missing: they must be in the teacher's taps")
        losses = {}
        for name, term in self.terms.items():
            weight = term.config.weight if progress >= term.config.start else 0.0
            losses[name] = weight * term(student, teacher, batch)
        return losses


def build_term(config: TermConfig, targets: TargetEncoder, student_channels: Mapping[str, int],
               teacher_channels: Mapping[str, int], statistics: Mapping[str, Tensor]) -> Term:
    """The term of a config: by boxes where the teacher's tap is ``boxes``, else by dense maps."""
    if config.teacher.endswith(".boxes"):
        return BoxTerm(config, targets)
    for tap, channels, whose in ((config.student, student_channels, "the student"),
                                 (config.teacher, teacher_channels, "the store")):
        if tap not in channels:
            raise ValueError(f"{whose} has no dense tap '{tap}': it has {', '.join(channels) or 'none'}")
    return MapTerm(config, student_channels[config.student], teacher_channels[config.teacher],
                   statistics.get(config.teacher), targets)
