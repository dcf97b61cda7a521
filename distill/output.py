"""Distillation of a teacher's output, its boxes or its head maps, into the student's head maps.

X³KD's X-OD in two readings, both our reconstruction: by boxes and dense. SimDistill's MMD-P as meant; its released
code takes the sigmoid of heatmaps twice and averages boxes over empty slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.distances import ELEMENTWISE, bernoulli_divergence, quality_focal, soft_gaussian_focal
from distill.features import check_tasks, valid_cells
from distill.masks import PILLARS, MaskInput, mean_over
from distill.term import Outcome, Term
from distill.terms import TermConfig
from models.head.targets import CODE_SIZE, REGRESSION, EncodedBoxes, TargetEncoder, flatten_boxes
from models.layers.processes import divisor
from models.ports import Batch, Prediction

POSITIVE = 0.1  # a teacher's score above which a cell counts as positive where no threshold is set


class OutputTerm(Term):
    """What the two readings share.

    `gfl` and `qfl` compare heatmaps; `sl1`, `l1` and `l2` the ten regression values, weighted by the
    teacher's score unless the mask says `weighted: false`. What does not pass the mask's threshold is background.

    Every task has a normaliser of its own, and the tasks' losses are summed, as those against the truth are: divided
    by the boxes of all tasks together, a term of six tasks is about a sixth of what its weight says.
    """

    distances: tuple[str, ...] = (*ELEMENTWISE, "gfl", "qfl")

    def __init__(self, config: TermConfig, targets: TargetEncoder) -> None:
        super().__init__(config)
        if config.student != "head":
            raise ValueError(
                f"a teacher's output compares with the student's head, not with its tap '{config.student}'"
            )
        if config.adapter.kind != "id":
            raise ValueError(f"adapter '{config.adapter.kind}' does not apply to outputs: use id")
        if config.distance not in self.distances:
            raise ValueError(
                f"distance '{config.distance}' does not apply to outputs: use one of {', '.join(self.distances)}"
            )
        masks = self.masks(config.distance)
        if config.mask.kind not in masks:
            raise ValueError(
                f"mask '{config.mask.kind}' does not apply to outputs with distance {config.distance}: "
                f"use {' or '.join(masks)}"
            )
        self.targets = targets
        self.code_weights = config.code_weights or (1.0,) * CODE_SIZE
        self.threshold = config.mask.threshold if config.mask.kind == "teacher_conf" else 0.0

    def masks(self, distance: str) -> tuple[str, ...]:
        """Masks that a distance can have."""
        return ("none", "teacher_conf")

    def classification(self, logits: Tensor, target: Tensor, peak: Tensor) -> Tensor:
        """Focal loss [B, C, H, W] of heatmap logits against scores; `peak` marks the positives of `gfl`."""
        if self.config.distance == "qfl":
            return quality_focal(logits, target)
        return soft_gaussian_focal(logits, target, peak)

    def code_distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Distance of codes [..., 10], code by code; the weights scale the difference, as SimDistill has it."""
        weights = student.new_tensor(self.code_weights)
        return ELEMENTWISE[self.config.distance](student * weights, teacher * weights, self.config.beta)

    def by_task(self, values: Tensor) -> Tensor:
        """Sums [T] of values [C] by class."""
        return torch.stack([part.sum() for part in values.split(self.targets.task_sizes)])

    def weights(self, score: Tensor) -> Tensor:
        """Of regression, from the scores that pass the threshold; 0 stays 0."""
        return score if self.config.mask.weighted else (score > 0).to(score)


class BoxTerm(OutputTerm):
    """From a teacher's boxes: those whose score passes the threshold are drawn as Gaussians that rise to their score.

    Regression is compared at their centres.
    """

    def forward(self, student: Prediction, teacher: Mapping[str, Any], batch: Batch, progress: float) -> Outcome:
        """See `Term`; the teacher's boxes are a list of [K, 11]: box, score, label."""
        samples = [boxes.detach()[boxes[:, 9] > self.threshold] for boxes in teacher[self.config.teacher]]
        found = [s[:, :10] for s in samples], [s[:, 10] for s in samples]
        boxes, labels, sample, encoded = on_grid(self.targets, *found)
        cell = encoded.column_row[:, 1] * self.targets.grid.size + encoded.column_row[:, 0]
        score = boxes[:, 9]
        if self.config.distance in ELEMENTWISE:
            return Outcome(self._regression(student, encoded.code, cell, labels, sample, score))
        heat = self.targets.heatmap(encoded, labels, sample, len(samples), score)
        peak = torch.zeros_like(heat, dtype=torch.bool).flatten(2)
        peak[sample, labels, cell] = True
        loss = self.classification(_heatmaps(student.head), heat, peak.view_as(heat)).sum((0, 2, 3))
        boxes_of_class = torch.bincount(labels, minlength=self.targets.classes).float()
        return Outcome((self.by_task(loss) / divisor(self.by_task(boxes_of_class))).sum())

    def _regression(
        self, student: Prediction, code: Tensor, cell: Tensor, labels: Tensor, sample: Tensor, score: Tensor
    ) -> Tensor:
        """Distance of the codes at the boxes' cells, averaged by weight over those of a task, summed over tasks."""
        task = torch.tensor(self.targets.task_of_class, device=labels.device)[labels]
        predicted = _codes(student.head).flatten(3)[sample, task, :, cell]
        distance = self.code_distance(predicted, code.nan_to_num(0.0)) * ~code.isnan()
        weight = self.weights(score)
        sums = weight.new_zeros(2, len(self.targets.task_sizes))
        sums = sums.index_add(1, task, torch.stack([distance.sum(1) * weight, weight]))
        return (sums[0] / divisor(sums[1])).sum()


class HeadTerm(OutputTerm):
    """From a teacher's head maps, cell by cell; they must lie on the student's grid and be of its augmented frame.

    The mask says which reading: with `teacher_conf` X³KD's, in which a task's regression counts by its best class
    that passes the threshold; with `none` (heatmaps) and `gt_centers` (regression at the true boxes' centres)
    SimDistill's MMD-P; with those of `PILLARS` our reconstruction of Structured KD's response per pillar, a mean
    weighted cell by cell.

    `kl` is plain logit distillation: the divergence of the scores, summed over classes, mean over cells.
    """

    distances = (*OutputTerm.distances, "kl")

    def __init__(self, config: TermConfig, targets: TargetEncoder, teacher_channels: int) -> None:
        super().__init__(config, targets)
        check_tasks(config.teacher, teacher_channels, targets)

    def masks(self, distance: str) -> tuple[str, ...]:
        """Masks that a distance can have."""
        known = {"gfl": ("teacher_conf",), "qfl": ("teacher_conf", "none", *PILLARS), "kl": ("none",)}
        return known.get(distance, ("teacher_conf", "gt_centers", *PILLARS))

    def forward(self, student: Prediction, teacher: Mapping[str, Any], batch: Batch, progress: float) -> Outcome:
        """See `Term`; the teacher's map is [B, sum of the head's channels, H, W] as `head_map` makes it."""
        maps = teacher[self.config.teacher].detach().float()
        head = self._as_head(maps, student.head)
        valid = valid_cells(teacher, self.config.teacher, maps)
        if self.config.mask.kind == "gt_centers":
            return Outcome(self._at_centres(student, head, valid, batch))
        score = _heatmaps(head).sigmoid()
        if self.config.mask.kind in PILLARS:
            given = MaskInput(maps, valid, batch, self.targets, self.config.mask, score.amax(1, keepdim=True))
            weight = PILLARS[self.config.mask.kind](given)
            return Outcome((self._of_pillars(student, head, score) * weight).sum())
        if self.config.distance == "kl":
            divergence = bernoulli_divergence(_heatmaps(student.head), _heatmaps(head)).sum(1, keepdim=True)
            return Outcome((divergence * mean_over(valid.float())).sum())
        if self.config.mask.kind == "none":
            return Outcome(self._everywhere(student, score, valid))
        return Outcome(self._confident(student, head, score * ((score > self.threshold) & valid), valid))

    def _as_head(self, maps: Tensor, layout: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """A teacher's map as the maps of each task, split as the student's own are."""
        sizes = [[values.shape[1] for values in task.values()] for task in layout]
        own = next(iter(layout[0].values())).shape
        expected = (own[0], sum(map(sum, sizes)), *own[2:])
        if maps.shape != expected:
            raise ValueError(
                f"'{self.config.teacher}' is {list(maps.shape)}, the student's head {list(expected)}: "
                "head maps are compared on one grid"
            )
        tasks = maps.split([sum(task) for task in sizes], dim=1)
        return [
            dict(zip(task, part.split(size, dim=1), strict=True))
            for task, part, size in zip(layout, tasks, sizes, strict=True)
        ]

    def _of_pillars(self, student: Prediction, head: list[dict[str, Tensor]], score: Tensor) -> Tensor:
        """Loss [B, 1, H, W] of each cell.

        Heatmaps: summed over classes. Codes: their mean, summed over the tasks of which the teacher takes the cell for
        an object's.
        """
        if self.config.distance == "qfl":
            return quality_focal(_heatmaps(student.head), score).sum(1, keepdim=True)
        distance = self._code_distances(student, head).mean(-1)
        return (distance * (self._best_of_tasks(score) > POSITIVE)).sum(1, keepdim=True)

    def _confident(self, student: Prediction, head: list[dict[str, Tensor]], score: Tensor, valid: Tensor) -> Tensor:
        """The loss where the teacher is sure: of scores [B, C, H, W] that are 0 where it is not."""
        if self.config.distance in ELEMENTWISE:
            weight = self.weights(self._best_of_tasks(score))
            sums = (self._code_distances(student, head).sum(-1) * weight).sum((0, 2, 3))
            return (sums / divisor(weight.sum((0, 2, 3)))).sum()
        peak = (score > 0) & (score == F.max_pool2d(score, 3, stride=1, padding=1))
        loss = (self.classification(_heatmaps(student.head), score, peak) * valid).sum((0, 2, 3))
        return (self.by_task(loss) / divisor(self.by_task(peak.sum((0, 2, 3)).float()))).sum()

    def _best_of_tasks(self, score: Tensor) -> Tensor:
        """Best score [B, T, H, W] of each task, of scores [B, C, H, W]."""
        return torch.stack([part.amax(1) for part in score.split(self.targets.task_sizes, dim=1)], dim=1)

    def _code_distances(self, student: Prediction, head: list[dict[str, Tensor]]) -> Tensor:
        """Distance of the codes of all cells, [B, T, H, W, 10]."""
        return self.code_distance(_codes(student.head).movedim(2, -1), _codes(head).movedim(2, -1))

    def _everywhere(self, student: Prediction, score: Tensor, valid: Tensor) -> Tensor:
        """Quality focal loss over all cells, of each task by how many of them the teacher takes for an object's."""
        loss = self.by_task((quality_focal(_heatmaps(student.head), score) * valid).sum((0, 2, 3)))
        positive = self.by_task(((score > POSITIVE) & valid).sum((0, 2, 3)).float())
        return (loss / divisor(positive)).sum()

    def _at_centres(self, student: Prediction, head: list[dict[str, Tensor]], valid: Tensor, batch: Batch) -> Tensor:
        """Distance of the codes that student and teacher have at true centres: of each task its mean over boxes."""
        _, labels, sample, encoded = on_grid(self.targets, batch.boxes, batch.labels)
        column, row = encoded.column_row.unbind(1)
        task = torch.tensor(self.targets.task_of_class, device=labels.device)[labels]
        counts = F.one_hot(task, len(head)) * valid[sample, 0, row, column].unsqueeze(1)  # [M, T]
        ours, theirs = (_codes(maps)[sample, task, :, row, column] for maps in (student.head, head))
        distance = (self.code_distance(ours, theirs).sum(1, keepdim=True) * counts).sum(0)
        return (distance / divisor(counts.sum(0))).sum()


def on_grid(
    targets: TargetEncoder, boxes: Sequence[Tensor], labels: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, EncodedBoxes]:
    """Of boxes and labels by sample those whose centres lie on the grid: boxes, labels, sample numbers, encoded."""
    flat, label, sample = flatten_boxes(boxes, labels)
    encoded = targets.encode(flat, label)
    inside = encoded.inside
    return flat[inside], label[inside], sample[inside], EncodedBoxes(*(values[inside] for values in encoded))


def _heatmaps(head: list[dict[str, Tensor]]) -> Tensor:
    """Logits of all classes [B, C, H, W]."""
    return torch.cat([task["heatmap"] for task in head], dim=1).float()


def _codes(head: list[dict[str, Tensor]]) -> Tensor:
    """Regression maps of all tasks [B, T, 10, H, W], in the order of the code."""
    return torch.stack([torch.cat([task[name] for name in REGRESSION], dim=1) for task in head], dim=1).float()
