"""Stage `distill`: train a variant's student on the truth and on its teachers' stored outputs, publish the student."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.data import Dataset

from data.batch import collate
from data.blobs import BlobError
from data.store import Store, StoreError
from data.teacher import TaughtDataset, collate_taught
from models.detector import Detector, build_detector
from models.distill import Recipe, TermConfig
from models.warp import warp_bev
from pipeline.params import split_key
from pipeline.seeding import MODEL, RECIPE, seed_everything
from pipeline.stage import StageContext, StageError
from pipeline.trainer import train
from stages.extract import store_identity
from stages.inputs import training_dataset
from stages.weights import save_detector

logger = logging.getLogger(__name__)


class Distillation:
    """A student with the losses against the truth and those of its recipe."""

    def __init__(self, student: Detector, recipe: Recipe, extent: float) -> None:
        """Keep the parts.

        Args:
            student: what is exported.
            recipe: what trains beside it.
            extent: half the side of the stored maps in metres.
        """
        self.student, self.recipe, self.extent = student, recipe, extent
        self.module = nn.ModuleDict({"student": student, "recipe": recipe})

    def loss(self, batch: Any, progress: float) -> dict[str, Tensor]:
        """The student's own losses, and `distill/<term>` for each term."""
        prediction = self.student(batch, self.recipe.student_taps)
        losses = self.student.loss(prediction, batch)
        terms = self.recipe(prediction, self._augmented(batch), batch, progress)
        return losses | {f"distill/{name}": value for name, value in terms.items()}

    @torch.no_grad()
    def _augmented(self, batch: Any) -> dict[str, Any]:
        """Teacher outputs in the frame of the batch; beside a map the cells that have a source, `<name>.valid`."""
        outputs: dict[str, Any] = {}
        for name, value in batch.teacher.items():
            if isinstance(value, Tensor):
                outputs[name], outputs[f"{name}.valid"] = warp_bev(value.float(), batch.bev_aug, self.extent)
            else:
                outputs[name] = value
        return outputs


def run(context: StageContext) -> None:
    """Train and publish one variant with one seed."""
    variant, seed = split_key(context.key or "")
    if variant not in context.params.variants:
        raise StageError(f"variant {variant!r}: params.yaml has {', '.join(context.params.variants)}")
    settings = context.params.student(variant)
    try:
        terms = {name: TermConfig(**term) for name, term in context.params.variants[variant].terms.items()}
        stores = open_stores(context, terms)
        # The student comes first and from its own seed: all variants of a seed start from the same weights.
        seed_everything(MODEL, seed)
        student = build_detector(settings.model)
        seed_everything(RECIPE, seed)
        task = Distillation(student, make_recipe(student, terms, stores), context.params.grid.range)
        dataset, collate_batch = taught_dataset(context, student, task.recipe, stores, seed)
        weights = train(
            task,
            dataset,
            collate_batch,
            settings.train,
            seed=seed,
            scratch=context.scratch,
            tracker=context.tracker,
            stop=context.stop.is_set,
            label=context.spec.address,
        )
    except (StoreError, BlobError, ValidationError) as error:
        raise StageError(str(error)) from error
    if context.rank == 0:
        exported = {name.removeprefix("student."): w for name, w in weights.items() if name.startswith("student.")}
        save_detector(context.scratch / "model", settings.model, exported)
    context.publish(context.scratch / "model", f"outputs/students/{context.key}")


def open_stores(context: StageContext, terms: Mapping[str, TermConfig]) -> dict[str, Store]:
    """The stores that the terms read, each checked against what extraction would make now; none without terms."""
    stores = {}
    for term in terms.values():
        teacher, _, tap = term.teacher.partition(".")
        if context.params.teachers[teacher].taps[tap] == "online":
            raise StageError(f"term reads {term.teacher}, which is `online`: extract keeps cached taps only")
        if teacher in stores:
            continue
        folder = context.root / f"outputs/stores/{teacher}"
        weights = None
        if not (context.root / f"outputs/teachers/{teacher}").exists():
            logger.warning("the weights of teacher %s are not here: its store is not compared with them", teacher)
            weights = Store.open(folder).identity.weights
        stores[teacher] = Store.open(folder, store_identity(context.root, context.params, teacher, weights))
    return stores


def make_recipe(student: Detector, terms: Mapping[str, TermConfig], stores: Mapping[str, Store]) -> Recipe:
    """The recipe of the terms, with widths and statistics out of the stores."""
    dense = {
        f"{teacher}.{tap}": (store, tap)
        for teacher, store in stores.items()
        for tap, spec in store.taps.items()
        if not spec.ragged
    }
    channels = {name: int(store.taps[tap].shape[0] or 0) for name, (store, tap) in dense.items()}
    statistics = {name: torch.from_numpy(store.std(tap)) for name, (store, tap) in dense.items()}
    try:
        return Recipe(terms, student.targets, student.tap_channels, channels, statistics)
    except ValueError as error:
        raise StageError(str(error)) from error


def taught_dataset(
    context: StageContext, student: Detector, recipe: Recipe, stores: Mapping[str, Store], seed: int
) -> tuple[Dataset[Any], Callable[[Any], Any]]:
    """The student's training data with the teacher outputs that the recipe asks for, and its collate."""
    dataset = training_dataset(context.root, context.params, student, seed)
    if not recipe.teacher_taps:
        return dataset, collate
    return TaughtDataset(dataset, stores, recipe.teacher_taps), collate_taught
