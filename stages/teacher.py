"""Stage `teacher`: train a teacher on the truth, publish its averaged weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from data.reading.batch import collate
from models.detectors.build import build_detector
from models.detectors.detector import Detector
from stages.context import StageContext, StageError
from stages.inputs.datasets import training_dataset
from stages.inputs.weights import save_detector
from stages.training import train_stage
from training.seeding import MODEL, seed_everything


class Supervised:
    """A detector and the losses against the truth."""

    def __init__(self, detector: Detector) -> None:
        self.module = detector

    def loss(self, batch: Any, progress: float) -> dict[str, Tensor]:
        """The detector's own losses."""
        return self.module.loss(self.module(batch), batch)


def run(context: StageContext) -> None:
    """Train and publish one entry of `teachers`."""
    train_teacher(context, lambda detector: None)


def train_teacher(context: StageContext, start: Callable[[Detector], None]) -> None:
    """Train and publish one entry of `teachers`, whose new detector `start` is given first."""
    if context.key not in context.params.teachers:
        raise StageError(f"teacher {context.key!r}: params.yaml has {', '.join(context.params.teachers)}")
    teacher = context.params.teachers[context.key]
    split = teacher.split or context.params.data.splits.train
    seed_everything(MODEL, context.seed)
    detector = build_detector(teacher.model)
    start(detector)
    dataset = training_dataset(context.root, context.params, detector, context.seed, split)
    task = Supervised(detector)
    weights = train_stage(context, task, dataset, collate, teacher.train, context.seed, dataset.classes)
    if context.rank == 0:
        save_detector(context.scratch / "model", teacher.model, weights)
    context.publish(context.scratch / "model", f"outputs/teachers/{context.key}")
