"""A variant's task and batches as stage `distill` makes them, for tests that look inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader

from distill.terms import TermConfig
from models.detectors.detector import Detector
from stages.context import StageContext
from stages.distill import Distillation, make_recipe, open_sources, samples_of, tap_statistics, taught
from training.seeding import RECIPE, seed_everything


def task_of(
    context: StageContext, student: Detector, terms: Mapping[str, TermConfig], samples: int
) -> tuple[Distillation, list[Any]]:
    """The task of some terms on a student, and its batches of two out of the first `samples` in order."""
    sources = open_sources(context, terms, student.targets)
    statistics = tap_statistics(context, sources)
    seed_everything(RECIPE, 0)
    task = Distillation(student, make_recipe(student, terms, statistics), sources)
    dataset, collate = taught(samples_of(context, student, sources, seed=0), task.recipe, sources)
    keys = [(0, i, i) for i in range(samples)]
    return task, list(DataLoader(dataset, 2, sampler=keys, collate_fn=collate))  # type: ignore[arg-type]
