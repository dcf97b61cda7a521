"""Stages `teacher`, `fusion` and `large`: train a teacher on the truth, publish its averaged weights.

The last two are second steps, which start from weights of other teachers: their parts.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from data.reading.batch import collate
from models.detectors.build import build_detector
from models.detectors.detector import Detector
from stages.context import StageContext
from stages.inputs.datasets import training_dataset
from stages.inputs.weights import save_detector, start_as_set
from training.seeding import MODEL, seed_everything
from training.trainer import train


class SupervisedDetector:
    """A detector and the losses against the truth."""

    def __init__(self, detector: Detector) -> None:
        self.module = self.student = detector

    def loss(self, batch: Any, progress: float) -> dict[str, Tensor]:
        """The detector's own losses."""
        return self.module.loss(self.module(batch), batch)


def run(context: StageContext) -> None:
    """Train and publish one entry of `teachers`."""
    params, key = context.params, context.item
    teacher = context.entry("teacher", params.teachers)
    seed_everything(MODEL, context.seed)
    detector = build_detector(teacher.model)
    start_as_set(detector, teacher.start, context.root, params.study.parts(key))
    split = teacher.split or params.data.splits.train
    dataset = training_dataset(context.root, params, detector, context.seed, split)
    task = SupervisedDetector(detector)
    weights = train(task, dataset, collate, teacher.train, context.training(context.seed), dataset.classes)
    if context.rank == 0:
        save_detector(context.scratch / "model", teacher.model, weights)
    context.publish(context.scratch / "model", f"outputs/teachers/{key}")
