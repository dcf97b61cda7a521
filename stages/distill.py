"""Stage `distill`: train a variant's student on the truth and on its teachers' outputs, publish the student."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from base.watching import DISTILLED, WATCHED
from config.params import split_key
from data.reading.batch import collate
from data.reading.config import BevConfig
from data.reading.dataset import NuScenesDataset
from data.store import Store
from distill.recipe import Recipe
from distill.terms import TermConfig
from models.detectors.build import build_detector
from models.detectors.detector import Detector
from models.head.targets import TargetEncoder
from stages.context import StageContext, StageError
from stages.inputs.datasets import plain_dataset, training_dataset
from stages.inputs.weights import load_detector, save_detector, start_as_set
from stages.teaching.frozen import evenly
from stages.teaching.identity import store_identity
from stages.teaching.sources import OnlineTeacher, Sources
from stages.teaching.taught import TaughtDataset, collate_taught
from training.config import TrainConfig
from training.sampler import LabelMix
from training.seeding import MODEL, RECIPE, seed_everything
from training.trainer import train

logger = logging.getLogger(__name__)


class Distillation:
    """A student with the losses against the truth, where that is known, and those of its recipe."""

    def __init__(
        self, student: Detector, recipe: Recipe, sources: Callable[[Any], dict[str, Any]], truth: bool = True
    ) -> None:
        """Keep the parts.

        Args:
            student: what is exported.
            recipe: what trains beside it.
            sources: makes of a batch the teacher outputs that the recipe reads; nothing of it trains.
            truth: whether the student learns from the true boxes too.
        """
        self.student, self.recipe, self.sources = student, recipe, sources
        self.unused = set() if truth else set(student.truth_losses)
        self.module = nn.ModuleDict({"student": student, "recipe": recipe})

    def loss(self, batch: Any, progress: float) -> dict[str, Tensor]:
        """The student's own losses, `distill/<term>` for each term, and what terms watch."""
        prediction = self.student(batch, self.recipe.student_taps)
        losses = self.student.loss(prediction, batch)
        losses = {name: value for name, value in losses.items() if name not in self.unused}
        terms = self.recipe(prediction, self.sources(batch), batch, progress)
        return losses | {_curve(name): value for name, value in terms.items()}


def _curve(name: str) -> str:
    return name if name.startswith(WATCHED) else f"{DISTILLED}{name}"


def run(context: StageContext) -> None:
    """Train and publish one variant with one seed."""
    variant, seed = split_key(context.item)
    chosen = context.entry("variant", context.params.variants, variant)
    settings, terms = context.params.student(variant), chosen.terms
    # The student comes first and from its own seed: all variants of a seed start from the same weights.
    seed_everything(MODEL, seed)
    student = build_detector(settings.model)
    start_as_set(student, settings.start, context.root)
    sources = open_sources(context, terms, student.targets)
    statistics = tap_statistics(context, sources)
    seed_everything(RECIPE, seed)
    task = Distillation(student, make_recipe(student, terms, statistics), sources, chosen.truth is not False)
    samples = samples_of(context, student, sources, seed, settings.bev, chosen.labelled)
    dataset, collate_batch = taught(samples, task.recipe, sources)
    config = of_student(settings.train)
    order = label_mix(context, samples, chosen.truth_share, config.batch_size)
    weights = train(task, dataset, collate_batch, config, context.training(seed), samples.classes, order)
    if context.rank == 0:
        exported = {name.removeprefix("student."): w for name, w in weights.items() if name.startswith("student.")}
        save_detector(context.scratch / "model", settings.model, exported)
    context.publish(context.scratch / "model", f"outputs/students/{context.key}")


def label_mix(context: StageContext, samples: NuScenesDataset, share: float | None, batch_size: int) -> LabelMix | None:
    """The order of samples in which each step has its share of truth; None: as they come.

    Raises:
        StageError: no sample has truth, or the share cannot be had.
    """
    variant = f"variants.{split_key(context.item)[0]}"
    if not samples.labelled.any():
        raise StageError(f"{variant}.truth: no keyframe that students learn from is of that split")
    if share is None:
        return None
    try:
        return LabelMix(samples.labelled, share, batch_size)
    except ValueError as error:
        raise StageError(f"{variant}.truth_share: {error}") from None


def of_student(config: TrainConfig) -> TrainConfig:
    """The same settings with `lr_factors` keyed `student.<module>`, as modules are called beside a recipe's."""
    factors = {f"student.{module}": factor for module, factor in config.lr_factors.items()}
    return config.model_copy(update={"lr_factors": factors})


def open_sources(
    context: StageContext, terms: Mapping[str, TermConfig], targets: TargetEncoder | None = None
) -> Sources:
    """What the terms read: stores of their cached taps, teachers of their online ones; nothing without terms.

    A cached head needs the `targets` of the student, which say how it is laid out.
    """
    asked: dict[str, set[str]] = {}
    for term in terms.values():
        for source in term.teacher_taps:
            asked.setdefault(source.store, set()).add(source.tap)
    stores: dict[str, Store] = {}
    online: dict[str, OnlineTeacher] = {}
    for name, taps in asked.items():
        if lacking := sorted(taps - context.params.stores[name].taps.keys()):
            raise StageError(f"stores.{name}.taps lacks {', '.join(lacking)}, which terms read: add it there")
        cached = taps & context.params.stores[name].cached.keys()
        if cached:
            stores[name] = open_store(context, name)
        if taps > cached:
            online[name] = open_teacher(context, name, taps - cached)
    return Sources(stores, online, context.params.grid.range, targets)


def open_store(context: StageContext, name: str) -> Store:
    """A published store, checked against what extraction would make now."""
    folder, teacher = context.root / f"outputs/stores/{name}", context.params.stores[name].teacher
    weights = None
    if not (context.root / f"outputs/teachers/{teacher}").exists():
        logger.warning("the weights of teacher %s are not here: store %s is not compared with them", teacher, name)
        weights = Store.open(folder).identity.weights
    return Store.open(folder, store_identity(context.root, context.params, name, weights))


def open_teacher(context: StageContext, name: str, taps: Collection[str]) -> OnlineTeacher:
    """The teacher of an entry of `stores`, for taps that are online."""
    settings = context.params.stores[name]
    detector = load_detector(context.root / f"outputs/teachers/{settings.teacher}")
    return OnlineTeacher(detector, taps, settings.score_threshold, context.device)


def tap_statistics(context: StageContext, sources: Sources) -> dict[str, Tensor]:
    """Standard deviation per channel [C] of the dense taps, by `<store>.<tap>`.

    A store has it of all its samples. An online teacher runs for it over the samples that a store would be calibrated
    on, as they are without augmentation.
    """
    statistics = {
        f"{name}.{tap}": torch.from_numpy(store.std(tap))
        for name, store in sources.stores.items()
        for tap, spec in store.taps.items()
        if not spec.ragged
    }
    params = context.params
    for name, teacher in sources.online.items():
        if teacher.taps == ["boxes"]:
            continue
        dataset = plain_dataset(context.root, params, params.data.splits.train, teacher.detector)
        try:
            found = teacher.std(dataset, evenly(params.store.calibration_samples, len(dataset)))
        except ValueError as error:
            raise StageError(f"stores.{name}.taps: {error}") from error
        statistics |= {f"{name}.{tap}": std for tap, std in found.items()}
    return statistics


def make_recipe(student: Detector, terms: Mapping[str, TermConfig], statistics: Mapping[str, Tensor]) -> Recipe:
    """The recipe of the terms, with the widths of the teachers' dense taps out of their statistics."""
    channels = {name: len(std) for name, std in statistics.items()}
    try:
        stride = getattr(student, "stride", None)  # of students that read images
        return Recipe(
            terms,
            student.targets,
            student.tap_channels,
            channels,
            statistics,
            stride=stride,
            losses=student.head.losses,
        )
    except ValueError as error:
        raise StageError(str(error)) from error


def samples_of(
    context: StageContext,
    student: Detector,
    sources: Sources,
    seed: int,
    bev: BevConfig | None = None,
    labelled: str | None = None,
) -> NuScenesDataset:
    """The student's training data, with what online teachers read of the same samples.

    `bev` stands instead of input.bev; the boxes of keyframes that are not of the split `labelled` are left out.
    """
    params = context.params
    beside = [teacher.detector for teacher in sources.online.values()]
    split = params.data.splits.of_students
    return training_dataset(context.root, params, student, seed, split, beside=beside, bev=bev, labelled=labelled)


def taught(samples: NuScenesDataset, recipe: Recipe, sources: Sources) -> tuple[Dataset[Any], Callable[[Any], Any]]:
    """Samples with the cached taps that the recipe asks for, and their collate."""
    if not sources.stores:
        return samples, collate
    return TaughtDataset(samples, sources.stores, sources.cached(recipe.teacher_taps)), collate_taught
