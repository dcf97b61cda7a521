"""A teacher's boxes in place of the truth, for samples that have none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from distill.term import Outcome, Term
from distill.terms import TermConfig
from models.head.targets import TargetEncoder, Targets
from models.ports import Batch, Prediction

# The losses of a head against targets, for the samples that a mask [B] marks.
HeadLosses = Callable[[list[dict[str, Tensor]], Targets, Tensor], dict[str, Tensor]]


class PseudoLabels(Term):
    """The student's own losses against a teacher's confident boxes, on the samples whose true boxes are not known.

    The control that every other term has to beat where few samples are labelled: it needs no map, no adapter and no
    loss of its own. A box counts wholly or not at all, whatever its score is.
    """

    def __init__(self, config: TermConfig, targets: TargetEncoder, losses: HeadLosses | None) -> None:
        super().__init__(config)
        if config.student != "head" or config.teacher.tap != "boxes":
            raise ValueError(
                "distance 'labels' takes a teacher's boxes for labels: student head, teacher <store>.boxes"
            )
        if config.adapter.kind != "id" or config.mask.kind not in ("none", "teacher_conf"):
            raise ValueError("distance 'labels' has no adapter and the mask none or teacher_conf")
        if losses is None:
            raise ValueError("distance 'labels' needs a student whose head learns from boxes")
        self.targets, self.losses = targets, losses
        self.threshold = config.mask.threshold if config.mask.kind == "teacher_conf" else 0.0

    def forward(self, student: Prediction, teacher: Mapping[str, Any], batch: Batch, progress: float) -> Outcome:
        """See `Term`; the teacher's boxes are a list of [K, 11]: box, score, label."""
        without = ~batch.labelled
        found = [
            boxes.detach()[(boxes[:, 9] > self.threshold) & missing]
            for boxes, missing in zip(teacher[self.config.teacher], without, strict=True)
        ]
        targets = self.targets([boxes[:, :9] for boxes in found], [boxes[:, 10] for boxes in found])
        return Outcome(torch.stack([*self.losses(student.head, targets, without).values()]).sum())
