"""All parameters as one checked whole."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from typing import Final, Self

from pydantic import ValidationError, model_validator

from base.errors import PipelineError
from base.section import Section
from config.nested import overlaid
from config.sections import (
    COARSEST_STRIDE,
    DataParams,
    EvaluateParams,
    InstancesParams,
    MemoryParams,
    ResourcesParams,
    SegmenterParams,
    StorageParams,
    StoreParams,
    StudentParams,
    StudyParams,
    TeacherParams,
    VariantParams,
)
from config.wording import NO_NAME, problems, suggest
from data.city.config import CityConfig
from data.reading.config import GridConfig, InputConfig
from distill.terms import TermConfig

NAME: Final = re.compile(r"(?=.*[A-Za-z])[A-Za-z0-9_][A-Za-z0-9_-]*")  # of a model, a store, a term or a variant
FEATURES: Final = "features"  # folder in outputs/evaluations, beside those of models


class ParamsError(PipelineError):
    """The parameters cannot be read or break their schema; the message has one line per problem."""


class Params(Section):
    """Everything in params.yaml and in the files of params/."""

    profile: str
    seed: int
    data: DataParams
    city: CityConfig
    input: InputConfig
    grid: GridConfig
    teachers: dict[str, TeacherParams]
    segmenters: dict[str, SegmenterParams] = {}
    stores: dict[str, StoreParams]
    store: StorageParams
    students: dict[str, StudentParams]
    terms: dict[str, TermConfig]
    variants: dict[str, VariantParams]
    resources: ResourcesParams
    memory: dict[str, MemoryParams] = {}  # entry of `teachers` or `students` -> its estimate; none: not measured
    study: StudyParams
    evaluate: EvaluateParams

    @property
    def instances(self) -> InstancesParams:
        """The instances that segmenters learn from and are scored on; raises ParamsError where there are none."""
        if self.data.instances is None:
            raise ParamsError("data.instances: missing, and segmenters need its images")
        return self.data.instances

    def student(self, variant: str) -> StudentParams:
        """The student of a variant, with the variant's overrides laid over it."""
        chosen = self.variants[variant]
        base = self.students[chosen.student]
        overrides = {"model": chosen.model, "train": chosen.train}
        start = base.start if chosen.start is None else chosen.start
        return StudentParams.model_validate(overlaid(base.model_dump(), overrides) | {"start": start})

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        found = [
            *self._bad_input(),
            *self._bad_names(),
            *self._unknown_names(),
            *self._bad_second_steps(),
            *self._bad_stores(),
            *self._bad_variants(),
        ]
        if found:
            raise ValueError("\n".join(found))
        return self

    def _bad_input(self) -> Iterable[str]:
        """What the sections about data do not agree on."""
        stride = math.lcm(self.input.depth_stride, COARSEST_STRIDE)
        if any(side % stride for side in self.input.image.size):
            yield (
                f"input.image.size: {list(self.input.image.size)} must be multiples of {stride}: input.depth_stride is "
                f"{self.input.depth_stride}, and image backbones go down to stride {COARSEST_STRIDE}"
            )
        if self.data.worlds and self.data.version == "v1.0-test":
            yield "data.version: no city can be made for 'v1.0-test'; allowed: v1.0-mini, v1.0-trainval"
        if self.data.generated and self.input.sweeps > self.city.sweeps:
            yield (
                f"input.sweeps: {self.input.sweeps} is more than city.sweeps {self.city.sweeps}: "
                f"{self.data.dataroot} has no more sweeps per keyframe"
            )

    def _bad_names(self) -> Iterable[str]:
        """Names go into those of DVC's stages, of files, and into commands."""
        sections: dict[str, Iterable[str]] = {
            "teachers": self.teachers, "segmenters": self.segmenters, "stores": self.stores, "students": self.students,
            "terms": self.terms, "variants": self.variants, "data.worlds": self.data.worlds,
        }  # fmt: skip
        for section, names in sections.items():
            for name in names:
                if not NAME.fullmatch(name):
                    yield f"{section}.{name}: {NO_NAME}"
        students = {f"{variant}-{seed}" for variant in self.study.variants for seed in self.study.seeds}
        for section, models in (("teachers", self.study.detectors), ("segmenters", self.study.segmenters)):
            for name in students.intersection(models):
                yield f"{section}.{name}: a student of the study has the same key, and each key has its predictions"
            if FEATURES in models:
                yield f"{section}.{FEATURES}: outputs/evaluations/{FEATURES} is the folder of features: rename it"

    def _unknown_names(self) -> Iterable[str]:
        checks: list[tuple[str, list[str], Collection[str]]] = [
            ("study.teachers", self.study.teachers, self.teachers),
            ("study.fusions", [*self.study.fusions], self.teachers),
            ("study.large", [*self.study.large], self.teachers),
            ("study.segmenters", self.study.segmenters, self.segmenters),
            ("study.stores", self.study.stores, self.stores),
            ("study.variants", self.study.variants, self.variants),
            ("study.baselines", self.study.baselines, self.study.variants),
            ("study.featured", self.study.featured, self.study.variants),
            ("memory", [*self.memory], {**self.teachers, **self.students}),
        ]
        sources = {**self.teachers, **self.segmenters}
        checks += [(f"stores.{name}.teacher", [s.teacher], sources) for name, s in self.stores.items()]
        checks += [
            (f"students.{name}.start.teacher", [start.teacher], self.teachers)
            for name, student in self.students.items()
            for start in student.starts
        ]
        checks += [(f"variants.{name}.student", [v.student], self.students) for name, v in self.variants.items()]
        checks += [
            (f"variants.{name}.start.teacher", [start.teacher], self.teachers)
            for name, variant in self.variants.items()
            for start in variant.starts
        ]
        for where, names, known in checks:
            for name in names:
                if name not in known:
                    yield f"{where}: {name!r} is unknown{suggest(name, known)}"
            for name in sorted({name for name in names if names.count(name) > 1}):
                yield f"{where}: {name!r} is listed more than once"
        if self.study.segmenters and self.data.instances is None:
            yield f"data.instances: missing, and study.segmenters {self.study.segmenters} need it"
        for name in sorted(self.teachers.keys() & self.segmenters.keys()):
            yield f"segmenters.{name}: teachers has the same name, and both are published in outputs/teachers"
        if len(set(self.study.seeds)) < len(self.study.seeds):
            yield f"study.seeds: {self.study.seeds} lists a seed more than once"

    def _bad_second_steps(self) -> Iterable[str]:
        study = self.study
        if both := sorted({*study.teachers} & {*study.fusions}):
            yield f"study.fusions: {both} are in study.teachers too: a teacher is trained in one step or in two"
        if both := sorted({*study.large} & {*study.teachers, *study.fusions}):
            yield f"study.large: {both} are in study.teachers or study.fusions too: a teacher is trained in one way"
        for key, steps in study.second_steps.items():
            for name, parts in steps.items():
                for sensor, part in parts.items():
                    if part not in study.teachers:
                        yield f"study.{key}.{name}.{sensor}: needs {part!r} in study.teachers {study.teachers}"
        for name in study.detectors:
            has = study.parts(name)
            for start in self.teachers[name].parts if name in self.teachers else ():
                if start.part not in has:
                    place = f"it has {', '.join(has)}" if has else f"{name!r} is in study.teachers, trained in one step"
                    yield f"teachers.{name}.start: takes part {start.part!r}, and {place}"

    def _bad_stores(self) -> Iterable[str]:
        for name, store in self.stores.items():
            for tap, settings in store.taps.items():
                cells = settings.halo / self.grid.cell
                if abs(cells - round(cells)) > 1e-6:
                    yield (
                        f"stores.{name}.taps.{tap}.halo: {settings.halo} m are {cells:g} cells of grid.cell "
                        f"{self.grid.cell} m: a whole number is needed"
                    )
            if (store.teacher in self.segmenters) != ("inst2d" in store.taps) and store.taps:
                yield (
                    f"stores.{name}.taps: {', '.join(store.taps)}: a segmenter has the tap inst2d and no other, "
                    "other teachers have no inst2d"
                )
            if name not in self.study.stores:
                continue
            if not store.cached:
                yield f"study.stores: all taps of {name!r} are online, so there is nothing to extract: leave it out"
            study = self.study
            if store.teacher not in (*study.detectors, *study.segmenters):
                place = f"study.segmenters {study.segmenters}" if store.teacher in self.segmenters else study.places
                yield f"study.stores: {name!r} needs teacher {store.teacher!r} in {place}"

    def _bad_variants(self) -> Iterable[str]:
        for name, variant in self.variants.items():
            for term, config in variant.terms.items():
                yield from self._bad_teacher_taps(f"variants.{name}.terms.{term}.teacher", config, name)
            if variant.truth is False and all(term.student != "head" for term in variant.terms.values()):
                yield f"variants.{name}.truth: false, and its head needs a term to learn from"
            if name in self.study.variants:
                yield from self._missing_start(name)
            if variant.student in self.students:
                try:
                    balanced = self.student(name).train.balanced
                except ValidationError as error:
                    yield from (f"variants.{name}.{problem}" for problem in problems(error, StudentParams))
                    continue
                if balanced and variant.truth_share is not None and name in self.study.variants:
                    yield f"variants.{name}.truth_share: its student's train.balanced draws the samples: choose one"

    def _missing_start(self, variant: str) -> Iterable[str]:
        chosen = self.variants[variant]
        student = self.students.get(chosen.student)
        own = student.starts if student and chosen.start is None else chosen.starts
        for start in own:
            if start.teacher not in self.study.detectors:
                yield (
                    f"variants.{variant}: its student starts from teacher {start.teacher!r}, "
                    f"which is not in {self.study.places}"
                )

    def _bad_teacher_taps(self, where: str, term: TermConfig, variant: str) -> Iterable[str]:
        """Of all that a term reads: its own tap, and those that its distance and its mask look at beside it."""
        for source in sorted(term.teacher_taps, key=lambda source: source != term.teacher):
            name, tap = source.store, source.tap
            if name not in self.stores:
                yield f"{where}: {source!r} names an unknown store{suggest(name, self.stores)}"
                return
            if tap not in (taps := self.stores[name].taps):
                beside = "" if source == term.teacher else ", which the term reads beside its own"
                yield f"{where}: {source!r} names a tap that stores.{name}.taps lacks{beside}{suggest(tap, taps)}"
            elif variant in self.study.variants:
                yield from self._missing_source(where, name, tap)

    def _missing_source(self, where: str, name: str, tap: str) -> Iterable[str]:
        """What the study lacks of a tap that one of its variants reads."""
        store, stores, teachers = self.stores[name], self.study.stores, self.study.detectors
        if store.taps[tap].cached and name not in stores:
            yield f"{where}: '{name}.{tap}' needs store {name!r} in study.stores {stores}"
        elif not store.taps[tap].cached and store.teacher not in teachers:
            yield (f"{where}: '{name}.{tap}' is online and needs teacher {store.teacher!r} in {self.study.places}")


def split_key(key: str) -> tuple[str, int]:
    """The key of a student's stage, `<variant>-<seed>`, taken apart."""
    variant, _, seed = key.rpartition("-")
    if not variant or not seed.isdigit():
        raise ParamsError(f"key {key!r} must be <variant>-<seed>, as in baseline-0")
    return variant, int(seed)
