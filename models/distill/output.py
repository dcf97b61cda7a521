"""Distillation of a teacher's output, its boxes or its head maps, into the student's head maps.

X³KD's X-OD in two readings, both our reconstruction: by boxes and dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.center_head import REGRESSION
from models.detector import Batch, Prediction
from models.distill.distances import ELEMENTWISE, quality_focal, soft_gaussian_focal
from models.distill.features import valid_cells
from models.distill.term import Outcome, Term
from models.distill.terms import TermConfig
from models.targets import CODE_SIZE, EncodedBoxes, TargetEncoder, flatten_boxes


class OutputTerm(Term):
    """What the two readings share.

    ``gfl`` and ``qfl`` compare heatmaps; ``sl1``, ``l1`` and ``l2`` the ten regression values, weighted by the
    teacher's score unless the mask says ``weighted: false``. What does not pass the mask's threshold is background.
    """

    def __init__(self, config: TermConfig, targets: TargetEncoder) -> None:
        super().__init__(config)
        if config.student != "head":
            raise ValueError(f"a teacher's output compares with the student's head, not with its tap "
                             f"'{config.student}'")
        if config.mask.kind not in ("none", "teacher_conf"):
            raise ValueError(f"mask '{config.mask.kind}' does not apply to outputs: use none or teacher_conf")
        if config.adapter.kind != "id":
            raise ValueError(f"adapter '{config.adapter.kind}' does not apply to outputs: use id")
        known = (*ELEMENTWISE, "gfl", "qfl")
        if config.distance not in known:
            raise ValueError(f"distance '{config.distance}' does not apply to outputs: use one of {', '.join(known)}")
        self.targets = targets
        self.threshold = config.mask.threshold if config.mask.kind == "teacher_conf" else 0.0

    def classification(self, logits: Tensor, target: Tensor, peak: Tensor) -> Tensor:
        """Focal loss [B, C, H, W] of heatmap logits against scores; ``peak`` marks the positives of ``gfl``."""
        if self.config.distance == "qfl":
            return quality_focal(logits, target)
        return soft_gaussian_focal(logits, target, peak)

    def weights(self, score: Tensor) -> Tensor:
        """Of regression, from the scores that pass the threshold; 0 stays 0."""
        return score if self.config.mask.weighted else (score > 0).to(score)


class BoxTerm(OutputTerm):
    """From a teacher's boxes: those whose score passes the threshold are drawn as Gaussians that rise to their score.

    Regression is compared at their centres.
    """

    def forward(self, student: Prediction, teacher: Mapping[str, Any], batch: Batch, progress: float) -> Outcome:
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
            return Outcome(self._regression(student, encoded.code, cell, labels, sample, score))
        heat = self.targets.heatmap(encoded, labels, sample, len(samples), score)
        peak = torch.zeros_like(heat, dtype=torch.bool).flatten(2)
        peak[sample, labels, cell] = True
        loss = self.classification(_heatmaps(student.head), heat, peak.view_as(heat))
        return Outcome(loss.sum() / max(len(boxes), 1))

    def _regression(self, student: Prediction, code: Tensor, cell: Tensor, labels: Tensor, sample: Tensor,
                    score: Tensor) -> Tensor:
        """Distance of the codes at the boxes' cells, averaged by weight."""
        task = torch.tensor(self.targets.task_of_class, device=labels.device)[labels]
        predicted = _codes(student.head).flatten(3)[sample, task, :, cell]
        distance = ELEMENTWISE[self.config.distance](predicted, code.nan_to_num(0.0)) * ~code.isnan()
        weight = self.weights(score)
        return (distance.sum(1) * weight).sum() / weight.sum().clamp(min=1)


class HeadTerm(OutputTerm):
    """From a teacher's head maps, cell by cell; they must lie on the student's grid.

    Only a teacher that sees the student's augmented scene has them (serve: online): their values depend on the frame.
    A task's regression counts by its best class that passes the threshold.
    """

    def __init__(self, config: TermConfig, targets: TargetEncoder, teacher_channels: int) -> None:
        super().__init__(config, targets)
        if config.mask.kind != "teacher_conf":
            raise ValueError(f"mask '{config.mask.kind}' does not apply to head maps: use teacher_conf, whose "
                             "threshold tells objects from background")
        expected = targets.classes + CODE_SIZE * len(targets.task_sizes)
        if teacher_channels != expected:
            raise ValueError(f"'{config.teacher}' has {teacher_channels} channels, the student's head {expected}: "
                             "teacher and student need the same tasks")

    def forward(self, student: Prediction, teacher: Mapping[str, Any], batch: Batch, progress: float) -> Outcome:
        """See :class:`Term`; the teacher's map is [B, sum of the head's channels, H, W] as ``head_map`` makes it."""
        maps = teacher[self.config.teacher].detach().float()
        head = self._as_head(maps, student.head)
        score = _heatmaps(head).sigmoid()
        valid = valid_cells(teacher, self.config.teacher, maps)
        score = score * ((score > self.threshold) & valid)
        if self.config.distance in ELEMENTWISE:
            return Outcome(self._regression(student, head, score))
        peak = (score > 0) & (score == F.max_pool2d(score, 3, stride=1, padding=1))
        loss = self.classification(_heatmaps(student.head), score, peak) * valid
        return Outcome(loss.sum() / peak.sum().clamp(min=1))

    def _as_head(self, maps: Tensor, layout: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """A teacher's map as the maps of each task, split as the student's own are."""
        sizes = [[values.shape[1] for values in task.values()] for task in layout]
        own = next(iter(layout[0].values())).shape
        expected = (own[0], sum(map(sum, sizes)), *own[2:])
        if maps.shape != expected:
            raise ValueError(f"'{self.config.teacher}' is {list(maps.shape)}, the student's head {list(expected)}: "
                             "head maps are compared on one grid")
        tasks = maps.split([sum(task) for task in sizes], dim=1)
        return [dict(zip(task, part.split(size, dim=1), strict=True))
                for task, part, size in zip(layout, tasks, sizes, strict=True)]

    def _regression(self, student: Prediction, head: list[dict[str, Tensor]], score: Tensor) -> Tensor:
        """Distance of the codes of all cells, averaged by weight."""
        weight = self.weights(torch.stack([part.amax(1) for part in score.split(self.targets.task_sizes, dim=1)], 1))
        distance = ELEMENTWISE[self.config.distance](_codes(student.head), _codes(head)).sum(2)
        return (distance * weight).sum() / weight.sum().clamp(min=1)


def _heatmaps(head: list[dict[str, Tensor]]) -> Tensor:
    """Logits of all classes [B, C, H, W]."""
    return torch.cat([task["heatmap"] for task in head], dim=1).float()


def _codes(head: list[dict[str, Tensor]]) -> Tensor:
    """Regression maps of all tasks [B, T, 10, H, W], in the order of the code."""
    return torch.stack([torch.cat([task[name] for name in REGRESSION], dim=1) for task in head], dim=1).float()
