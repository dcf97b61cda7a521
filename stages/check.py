"""Stage `check`: whether all that the parameters ask for can be built, before anything trains for it.

The models of the study are built on torch's device `meta`, where weights have shapes and no memory; their taps, starts
and the terms of the variants are compared as training would. Its outs never change, so that a value that is fine makes
nothing run again, while every stage that costs something waits for it.
"""

from __future__ import annotations

import difflib
import inspect
import json
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from mmengine.registry import Registry
from torch import nn

from base.errors import PipelineError
from base.taps import TapRef
from config.files import located, read_texts
from config.params import Params
from config.sections import ImportParams, StudentParams
from config.wording import suggest
from data.reading.index import devkit_split
from distill.recipe import Recipe
from models.detectors.bevformer import BEVFormer
from models.detectors.build import make_detector
from models.detectors.detector import Detector
from models.layers.registry import MODELS
from stages.context import StageContext, StageError
from stages.featured import AFTER, BEFORE, LIDAR, fusion_teacher
from stages.inputs.segmenters import detection_names, make_segmenter, segmenter_config
from stages.inputs.weights import WEIGHTS, check_fit, fitting, weights_of_start, without_checkpoints
from training.config import TrainConfig

logger = logging.getLogger(__name__)

SERVED: Final = ("boxes", "head")  # taps that every detector has, beside those of its `tap_channels`


def run(context: StageContext) -> None:
    """Publish outs that never change, if nothing is wrong."""
    logger.info("%s", check(context.params, context.root))
    for number, out in enumerate(context.spec.outs):
        made = context.scratch / f"checked-{number}"
        made.write_text("what the parameters ask for can be built\n")
        context.publish(made, out)


def check(params: Params, root: Path) -> str:
    """See that the study can be built; says what was looked at.

    Raises:
        StageError: it cannot; one line for everything that is wrong: file, key, value, what is allowed.
    """
    checks = Checks(params, root)
    if problems := list(dict.fromkeys(checks.problems())):
        listed = "\n".join(f"  {problem}" for problem in located(problems, read_texts(root)))
        raise StageError(f"the parameters ask for what cannot be built:\n{listed}")
    variants = len(params.study.variants)
    return f"the parameters: {len(checks.models)} models and the terms of {variants} variants can be built"


class Checks:
    """What is wrong with the models, taps, starts and terms of a study."""

    def __init__(self, params: Params, root: Path, models: dict[str, nn.Module | str] | None = None) -> None:
        """Take the parameters of a root, and models built before: config as JSON -> the model, or why there is none."""
        self.params, self.root = params, root
        self.models = {} if models is None else models

    def problems(self) -> Iterator[str]:
        """A line for each; the same may come twice."""
        study = self.params.study
        for name in study.detectors:
            teacher = self.params.teachers[name]
            yield from self._of_model(f"teachers.{name}", teacher.model, teacher.train)
            yield from self._of_split(f"teachers.{name}.split", teacher.split)
            yield from self._of_import(f"teachers.{name}.start", self._teacher(name), teacher.start)
            yield from self._of_second_step(name)
        for name in study.segmenters:
            yield from self._of_segmenter(name)
        for name in dict.fromkeys([*study.stores, *self._online()]):
            yield from self._of_store(name)
        for name in study.variants:
            yield from self._of_variant(name)
        for name in study.featured:
            yield from self._of_featured(name)

    def _online(self) -> list[str]:
        """Stores that variants read and that are not in study.stores."""
        terms = [term for name in self.params.study.variants for term in self.params.variants[name].terms.values()]
        return [term.teacher.store for term in terms]

    def _built(self, config: Mapping[str, Any], make: Callable[[Mapping[str, Any]], nn.Module]) -> nn.Module | str:
        """The model of a config without its weights, each config once; in words, why there is none."""
        name = json.dumps(config, sort_keys=True, default=str)
        if name not in self.models:
            self.models[name] = without_weights(config, make)
        return self.models[name]

    def _detector(self, config: Mapping[str, Any]) -> Detector | None:
        """The detector of a config, or None: `_of_model` says why."""
        built = self._built(config, make_detector)
        return built if isinstance(built, Detector) else None

    def _teacher(self, name: str) -> Detector | None:
        """A teacher of boxes."""
        entry = self.params.teachers.get(name)
        return self._detector(entry.model) if entry else None

    def _of_model(self, where: str, config: Mapping[str, Any], train: TrainConfig) -> Iterator[str]:
        """A detector and its training, with what it must have in common with the input."""
        built, given = self._built(config, make_detector), self.params.input
        if not isinstance(built, Detector):
            yield f"{where}.model: {built}"
            return
        if built.frames > given.frames:
            kind = type(built).__name__
            yield f"{where}.model: the {kind} reads {built.frames} keyframes, and input.frames is {given.frames}"
        stride = getattr(built, "stride", given.depth_stride)
        learns_depth = getattr(built, "learns_depth", False) and getattr(built, "image", None) is None
        if learns_depth and stride != given.depth_stride:
            yield (
                f"{where}.model.stride: {stride}, and input.depth_stride is {given.depth_stride}: the depth that it "
                "learns has its stride, so give both the same"
            )
        known = [name for name, _ in built.named_modules() if name]
        for name in train.lr_factors:
            if name not in known:
                shallow = [module for module in known if module.count(".") <= name.count(".")]
                yield f"{where}.train.lr_factors: the model has no module {name!r}{suggest(name, shallow)}"

    def _of_segmenter(self, name: str) -> Iterator[str]:
        settings = self.params.segmenters[name]
        config = segmenter_config(settings)
        built = self._built(without_checkpoints(config), make_segmenter)
        if isinstance(built, str):
            yield f"segmenters.{name}: {built}"
        else:
            yield from self._of_import(f"segmenters.{name}.start", built, settings.start)
        try:
            detection_names(config["classes"], config["class_map"])
        except StageError as error:
            yield f"segmenters.{name}: {error}"

    def _of_split(self, where: str, split: str | None) -> Iterator[str]:
        """A split that something learns from is a part of one that is indexed."""
        if split is None:
            return
        parts = [part for part in self.params.data.splits.model_dump().values() if part]
        try:
            indexed = dict.fromkeys(devkit_split(part)[0] for part in parts)
            if (whole := devkit_split(split)[0]) not in indexed:
                yield f"{where}: {split!r} is no part of what data.splits names{suggest(whole, indexed)}"
        except ValueError as error:
            yield f"{where}: {error}"

    def _of_import(self, where: str, model: nn.Module | None, start: Any) -> Iterator[str]:
        """Weights from elsewhere are there, are the ones that were meant, and fit."""
        if not isinstance(start, ImportParams) or model is None:
            return
        folder = self.root / start.folder
        try:
            check_fit(model, weights_of_start(folder, start.checksum), folder / WEIGHTS)
        except StageError as error:
            yield f"{where}: {error}".replace(f"{self.root}/", "")

    def _of_second_step(self, name: str) -> Iterator[str]:
        """A teacher that is trained in a second step takes modules of its parts."""
        parts, own = self.params.study.parts(name), self._teacher(name)
        for start in self.params.teachers[name].parts:
            if own is not None and start.part in parts:
                part = parts[start.part]
                yield from self._fits(f"teachers.{name}.start", own, part, start.only, resample=start.resample)

    def _fits(
        self, where: str, own: Detector, teacher: str, only: Collection[str] | None, *, resample: bool = False
    ) -> Iterator[str]:
        """Whether a detector can take weights of a teacher."""
        if (other := self._teacher(teacher)) is None:
            return
        try:
            fitting(own, other.state_dict(), f"teacher {teacher!r}", only, resample=resample)
        except StageError as error:
            yield f"{where}: {error}"

    def _of_store(self, name: str) -> Iterator[str]:
        """Whether a teacher has the taps that are stored of it or served online."""
        store = self.params.stores[name]
        if (teacher := self._teacher(store.teacher)) is None:  # a segmenter, whose only tap the schema knows
            return
        known, whose = [*SERVED, *teacher.tap_channels], f"the {type(teacher).__name__} of teacher {store.teacher!r}"
        for tap, settings in store.taps.items():
            if tap not in known:
                yield f"stores.{name}.taps: {whose} has no {tap!r}{suggest(tap, known)}"
                continue
            if settings.cached and (settings.channels or 0) > (has := teacher.tap_channels.get(tap, 0)):
                yield f"stores.{name}.taps.{tap}.channels: {settings.channels} are to be kept, and {whose} has {has}"
            if settings.halo and isinstance(teacher, BEVFormer):
                yield f"stores.{name}.taps.{tap}.halo: {whose} cannot have one: its queries were learned for the grid"

    def _of_variant(self, name: str) -> Iterator[str]:
        """A variant's student, where it starts, and its terms."""
        variant, settings = self.params.variants[name], self.params.student(name)
        whose = f"variants.{name}" if variant.model or variant.train else f"students.{variant.student}"
        yield from self._of_model(whose, settings.model, settings.train)
        yield from self._of_split(f"variants.{name}.truth", variant.labelled)
        yield from self._of_share(name, variant.truth_share, settings.train.batch_size)
        if (student := self._detector(settings.model)) is not None:
            yield from self._of_starts(name, student, settings)
            yield from self._of_terms(name, student)

    def _of_share(self, name: str, share: float | None, batch_size: int) -> Iterator[str]:
        """A step that mixes samples with and without truth holds both."""
        if share is not None and not 0 < (count := round(share * batch_size)) < batch_size:
            yield (
                f"variants.{name}.truth_share: {share} of a step of {batch_size} samples is {count}: at least one must "
                "have truth, and one must not"
            )

    def _of_starts(self, name: str, student: Detector, settings: StudentParams) -> Iterator[str]:
        variant = self.params.variants[name]
        where = f"variants.{name}.start" if variant.start or variant.model else f"students.{variant.student}.start"
        yield from self._of_import(where, student, settings.start)
        for start in settings.starts:
            teacher = self._teacher(start.teacher)
            if teacher is None:
                continue
            if start.only is not None:
                yield from self._fits(where, student, start.teacher, start.only, resample=start.resample)
                continue
            try:
                check_fit(student, teacher.state_dict(), f"teacher {start.teacher!r}")
            except StageError as error:
                yield f"{where}: {error}; or name in `only` the modules to take"

    def _of_terms(self, name: str, student: Detector) -> Iterator[str]:
        """Whether each term can compare the student with its teacher."""
        for term, config in self.params.variants[name].terms.items():
            teacher = self._teacher(self.params.stores[config.teacher.store].teacher)
            channels: dict[str, int] = {} if teacher is None else {
                TapRef.of(config.teacher.store, tap): width for tap, width in widths(teacher).items()
            }  # fmt: skip
            try:
                Recipe({term: config}, student.targets, student.tap_channels, channels,
                       stride=getattr(student, "stride", None), losses=student.head.losses)  # fmt: skip
            except ValueError as error:
                words = str(error).removeprefix(f"term '{term}': ")
                yield f"variants.{name}.terms.{term}: {words}"

    def _of_featured(self, name: str) -> Iterator[str]:
        try:
            teacher = self._teacher(fusion_teacher(self.params, name))
        except StageError as error:
            yield str(error)
            return
        student = self._detector(self.params.student(name).model)
        for model, taps in ((student, (BEFORE, AFTER)), (teacher, (LIDAR,))):
            if model is not None and (missing := [tap for tap in taps if tap not in model.tap_channels]):
                kind = type(model).__name__
                yield f"study.featured: {name!r} shows taps {', '.join(missing)}, which the {kind} does not have"


def without_weights(config: Mapping[str, Any], make: Callable[[Mapping[str, Any]], nn.Module]) -> nn.Module | str:
    """The model of a config with shapes in place of weights; in words, why there is none."""
    try:
        try:
            with torch.device("meta"):
                return make(config)
        except (NotImplementedError, RuntimeError) as error:
            if "meta tensor" not in str(error):
                raise
            return make(config)  # some modules compute with their first weights, so they get some
    except Exception as error:  # code of mmdet and torch runs on values of any kind
        return in_words(error, config)


def widths(teacher: Detector) -> dict[str, int]:
    """Channels of a teacher's dense taps, its head maps among them."""
    return {**teacher.tap_channels, "head": sum(teacher.targets.task_channels)}


def in_words(error: Exception, config: Mapping[str, Any]) -> str:
    """Why a model cannot be built: a misspelt or missing key with what is allowed, or else the error's first line."""
    text = str(error.args[0]) if error.args else ""
    if found := re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text):
        kind, key = kind_of(found[1], config), found[2]
        return f"{kind} has no key {key!r}{suggest(key, keys_of(kind))}"
    if found := re.search(r"(\w+)\.__init__\(\) missing \d+ required .*?arguments?: (.*)", text):
        kind, keys = kind_of(found[1], config), found[2]
        return f"{kind} lacks {keys}; its keys: {', '.join(keys_of(kind))}"
    if found := re.match(r"(\w+) is not in the .* registry", text):
        close = difflib.get_close_matches(found[1], registered(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return f"type {found[1]!r} is unknown{hint}; there are: {', '.join(MODELS.module_dict)}, and those of mmdet3d"
    lines = text.splitlines() or [""]
    return lines[0] if isinstance(error, PipelineError | ValueError) else f"{type(error).__name__}: {lines[0]}"


def kind_of(name: str, config: Mapping[str, Any]) -> str:
    """The type that a person wrote, of a class that refused a key: it may be what the detector's class extends."""
    return name if name in registered() else str(config.get("type"))


def registered() -> list[str]:
    """The types that a part of a detector can have."""
    names: list[str] = []
    registry: Registry | None = MODELS
    while registry is not None:
        names += registry.module_dict
        registry = registry.parent
    return names


def keys_of(kind: str) -> list[str]:
    """The keys of a registered class, and of what it passes on to the class that it extends."""
    keys: dict[str, None] = {}
    for one in inspect.getmro(MODELS.get(kind) or object):
        if one in (object, nn.Module) or "__init__" not in vars(one):
            continue
        signature = inspect.signature(vars(one)["__init__"]).parameters.values()
        keys |= dict.fromkeys(p.name for p in signature if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in signature):
            break
    keys.pop("self", None)
    return list(keys)
