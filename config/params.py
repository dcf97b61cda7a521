"""The schema of params.yaml: read and checked whole, before anything runs."""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from base import redaction
from base.errors import PipelineError
from base.section import Count, Fraction, Positive, Section
from distill.terms import TermConfig
from training.config import TrainConfig

Size = tuple[Count, Count]
Range = tuple[float, float]
NAME = re.compile(r"(?=.*[A-Za-z])[A-Za-z0-9_][A-Za-z0-9_-]*")  # of a model, a store or a variant
EXACT_TAPS = ("boxes", "inst2d")  # ragged, stored as they are
COARSEST_STRIDE = 32  # pixels per cell of an image backbone's last stage


class ParamsError(PipelineError):
    """params.yaml breaks its schema; the message has one line per problem."""


class SplitParams(Section):
    """The devkit's splits, or parts of them: `train[:-16]` are all but the last 16 scenes in order of name."""

    train: str  # of teachers and stores
    students: str | None = None  # a part of train that students learn from; None: all of it
    val: str

    @property
    def of_students(self) -> str:
        """The split that students learn from."""
        return self.students or self.train


class InstancesParams(Section):
    """2D instances of camera images, nuImages-style COCO JSON; its file names are relative to `root`."""

    root: str
    train: str
    val: str


class DataParams(Section):
    """Where the nuScenes dataroot is, and what of it is used."""

    worlds: list[str]
    dataroot: str
    version: Literal["v1.0-mini", "v1.0-trainval", "v1.0-test"]
    splits: SplitParams
    instances: InstancesParams | None = None  # needed where segmenters are trained or evaluated
    skip_broken: int = Field(0, ge=0)

    @property
    def generated(self) -> bool:
        """Whether the dataroot is a synthetic city that `generate` makes."""
        return self.dataroot in {f"outputs/{world}" for world in self.worlds}


class CityParams(Section):
    """Size of the synthetic city; data.city checks the values in more depth."""

    model_config = ConfigDict(extra="allow", frozen=True)

    seed: int
    train_scenes: int = Field(ge=0)
    val_scenes: int = Field(ge=0)
    train_keyframes: Count
    val_keyframes: Count
    image: Size
    sweeps: Count
    azimuths: Count


class ImageParams(Section):
    """Network image size (height, width) and the image augmentation of training."""

    size: Size
    resize: tuple[Positive, Positive]
    rotate: float = Field(ge=0.0, lt=180.0)
    flip: Fraction


class BevParams(Section):
    """Augmentation of the scene in bird's-eye view."""

    flip_x: Fraction
    flip_y: Fraction
    rotate: float = Field(ge=0.0, le=180.0)
    scale: tuple[Positive, Positive]


class InputParams(Section):
    """What one sample holds."""

    frames: Literal[1, 2]
    sweeps: Count
    radar: bool
    image: ImageParams
    bev: BevParams
    depth_stride: Count

    @model_validator(mode="after")
    def _size_is_multiple_of_stride(self) -> Self:
        stride = math.lcm(self.depth_stride, COARSEST_STRIDE)
        if any(side % stride for side in self.image.size):
            raise ValueError(
                f"image.size {list(self.image.size)} must be multiples of {stride}: "
                f"depth_stride is {self.depth_stride}, image backbones go down to stride {COARSEST_STRIDE}"
            )
        for name, (low, high) in {"image.resize": self.image.resize, "bev.scale": self.bev.scale}.items():
            if low > high:
                raise ValueError(f"{name} [{low}, {high}] must be [smallest, largest]")
        return self


class GridParams(Section):
    """Square BEV grid: +- range, cell and z limits in metres."""

    range: Positive
    cell: Positive
    z: Range

    @model_validator(mode="after")
    def _whole_cells(self) -> Self:
        cells = 2.0 * self.range / self.cell
        if abs(cells - round(cells)) > 1e-6:
            raise ValueError(
                f"range {self.range} and cell {self.cell} give {cells:g} cells per side: a whole number is needed"
            )
        if self.z[0] >= self.z[1]:
            raise ValueError(f"z {list(self.z)} must be [lowest, highest]")
        return self


class TeacherParams(Section):
    """A teacher of 3D boxes, or a student that trains alone for others to start from: its model and its training."""

    split: str | None = None  # what it learns from; None: data.splits.train
    model: dict[str, Any]
    train: TrainConfig


class ImportParams(Section):
    """Weights that are not made by this pipeline."""

    folder: str  # relative to the root, with model.safetensors
    checksum: str  # xxh3-128 of that file


class SegmenterParams(Section):
    """An instance segmentation teacher: an mmdet model that is trained on `data.instances`, imported, or both."""

    image: Size  # height, width of its input; the raw image is scaled to that width
    classes: list[str] | None = None  # of its outputs in order; None: the ten detection classes
    class_map: dict[str, str] = {}  # of them -> detection class, where the names differ; what is in neither is dropped
    start: ImportParams | None = None
    model: dict[str, Any]
    train: TrainConfig | None = None  # None: `start` is used as it is

    @model_validator(mode="after")
    def _has_weights(self) -> Self:
        if self.start is None and self.train is None:
            raise ValueError("train and start are both null: give settings of a training, or imported weights")
        if any(side % COARSEST_STRIDE for side in self.image):
            raise ValueError(f"image {list(self.image)} must be multiples of {COARSEST_STRIDE}")
        return self


class TapParams(Section):
    """How one tap is served to students, and how `extract` encodes it if it is cached.

    A student turned by an angle a and scaled by s looks `grid.range * (cos a + sin a) / s` metres far. Where a cached
    map with its halo ends before that, cells have no source; they are masked out of the loss, which is no error.
    """

    serve: Literal["cached-exact", "cached-warp", "online"]
    dtype: Literal["float32", "float16", "int8", "float8_e4m3"] = "float16"
    channels: Count | None = None  # principal components that are kept; None keeps the teacher's channels
    cells: Literal["all", "occupied", "foreground"] = "all"
    compression: Literal["none", "lz4", "zstd"] = "none"
    halo: float = Field(0.0, ge=0.0)  # metres beyond grid.range on every side

    @property
    def cached(self) -> bool:
        """Whether the store holds it."""
        return self.serve != "online"


class StoreParams(Section):
    """What students read of a teacher: its taps, cached in outputs/stores/<store> or made online."""

    teacher: str
    score_threshold: Fraction  # of the boxes
    taps: dict[str, TapParams]

    @property
    def cached(self) -> dict[str, TapParams]:
        """The taps that `extract` writes, by name in order."""
        return {name: tap for name, tap in sorted(self.taps.items()) if tap.cached}

    @model_validator(mode="after")
    def _taps_can_be_served(self) -> Self:
        if problems := [f"taps.{name}: {text}" for name, tap in self.taps.items() for text in _bad_tap(name, tap)]:
            raise ValueError("\n".join(problems))
        return self


class TeacherStart(Section):
    """A student starts from an entry of `teachers`: from all of it, then of the same model, or from some modules."""

    teacher: str
    only: list[str] | None = None  # names of modules
    resample: bool = False  # of `only`: weights of another size are brought to the student's (models/inherit.py)

    @model_validator(mode="after")
    def _resamples_modules(self) -> Self:
        if self.resample and not self.only:
            raise ValueError("resample brings modules of another size to the student's: name them in only")
        return self


Start = TeacherStart | list[TeacherStart] | ImportParams | None


class StudentParams(Section):
    """A student: its model and its training."""

    start: Start = None
    bev: BevParams | None = None  # augmentation of its scenes, instead of input.bev
    model: dict[str, Any]
    train: TrainConfig

    @property
    def starts(self) -> list[TeacherStart]:
        """The teachers that it starts from."""
        return _teachers_of(self.start)


class VariantParams(Section):
    """One arm of the ablation: a student, its distillation terms, and what it overrides of the student's settings."""

    student: str
    terms: dict[str, TermConfig]
    model: dict[str, Any] = {}
    train: dict[str, Any] = {}
    start: Start = None  # instead of the student's
    truth: bool = True  # False: no losses against boxes of the ground truth, the teachers' only
    row: str | None = None  # of a paper's table that this variant reproduces


class Resources(Section):
    """What a stage asks for on each node; none of it changes a result."""

    gpus: int = Field(ge=0)
    cpus: Count | None  # None: what the scheduler gives by itself
    hours: Positive  # from the start of the stage to its end


class DistributedResources(Resources):
    """Of a stage that can run in several processes."""

    nodes: Count


class ResourcesParams(Section):
    """What the stages ask for; dvc.yaml takes it into their `meta`."""

    generate: Resources
    prepare: Resources
    teacher: DistributedResources  # of any step
    segmenter: DistributedResources
    extract: DistributedResources
    distill: DistributedResources
    predict: Resources
    evaluate: Resources
    cost: Resources
    features: Resources


class StorageParams(Section):
    """What is common to all stores."""

    shard_samples: Count
    calibration_samples: Count  # evenly spaced; encodings are fitted to them
    gap_samples: int = Field(ge=0)  # evenly spaced; served taps are compared with a rerun teacher's; 0 = not compared


class PartsParams(Section):
    """Names of the teachers that fusion teachers start from."""

    lidar: str
    camera: str


class StudyParams(Section):
    """What one report compares."""

    name: str = "own"  # under which MLflow and the report show it
    teachers: list[str]
    parts: PartsParams
    fusions: list[str]  # entries of `teachers` that are trained in a second step, from the parts
    large: list[str] = []  # of `teachers`, camera teachers that are trained in a second step, from the camera part
    segmenters: list[str]
    stores: list[str]
    variants: list[str]
    baselines: list[str] = []  # variants that those listed behind them are compared with; none: the first variant
    featured: list[str]  # variants whose simulated LiDAR features are drawn beside the teacher's
    seeds: list[Annotated[int, Field(ge=0)]]
    search: str | None = None  # studies/results/<search>.json: how the weights of the terms were chosen

    @property
    def detectors(self) -> list[str]:
        """All teachers of 3D boxes, those of one step first."""
        return [*self.teachers, *self.fusions, *self.large]

    @property
    def places(self) -> str:
        """Where teachers of 3D boxes are listed, for messages."""
        return f"study.teachers {self.teachers}, study.fusions {self.fusions} or study.large {self.large}"


class EvaluateParams(Section):
    """The official evaluation."""

    split: Literal["train", "val"]
    batch_size: Count
    pictures: int = Field(ge=0)  # keyframes to draw, spread over the split
    score_threshold: Fraction  # of the predicted boxes in the pictures


class Params(Section):
    """The whole of params.yaml."""

    profile: str
    seed: int
    data: DataParams
    city: CityParams
    input: InputParams
    grid: GridParams
    teachers: dict[str, TeacherParams]
    segmenters: dict[str, SegmenterParams] = {}
    stores: dict[str, StoreParams]
    store: StorageParams
    students: dict[str, StudentParams]
    terms: dict[str, TermConfig]
    variants: dict[str, VariantParams]
    resources: ResourcesParams
    study: StudyParams
    evaluate: EvaluateParams

    def student(self, variant: str) -> StudentParams:
        """The student of a variant, with the variant's overrides laid over it."""
        chosen = self.variants[variant]
        base = self.students[chosen.student]
        overrides = {"model": chosen.model, "train": chosen.train}
        start = base.start if chosen.start is None else chosen.start
        return StudentParams.model_validate(merge(base.model_dump(), overrides) | {"start": start})

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        problems = [*self._bad_names(), *self._unknown_names(), *self._bad_stores(), *self._bad_variants()]
        if self.data.generated and self.input.sweeps > self.city.sweeps:
            problems.append(
                f"input.sweeps: {self.input.sweeps} is more than city.sweeps {self.city.sweeps}: "
                f"{self.data.dataroot} has no more sweeps per keyframe"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _bad_names(self) -> Iterable[str]:
        """Names go into those of DVC's stages, of files, and into commands."""
        sections: dict[str, Iterable[str]] = {
            "teachers": self.teachers, "segmenters": self.segmenters, "stores": self.stores, "students": self.students,
            "variants": self.variants, "data.worlds": self.data.worlds,
        }  # fmt: skip
        for section, names in sections.items():
            for name in names:
                if not NAME.fullmatch(name):
                    yield f"{section}: {name!r} is no name: it is made of letters, digits, _ and -, one letter at least"

    def _unknown_names(self) -> Iterable[str]:
        checks: list[tuple[str, list[str], Collection[str]]] = [
            ("study.teachers", self.study.teachers, self.teachers),
            ("study.fusions", self.study.fusions, self.teachers),
            ("study.large", self.study.large, self.teachers),
            ("study.segmenters", self.study.segmenters, self.segmenters),
            ("study.stores", self.study.stores, self.stores),
            ("study.variants", self.study.variants, self.variants),
            ("study.baselines", self.study.baselines, self.study.variants),
            ("study.featured", self.study.featured, self.study.variants),
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
            for start in _teachers_of(variant.start)
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
        yield from self._bad_second_steps()
        if len(set(self.study.seeds)) < len(self.study.seeds):
            yield f"study.seeds: {self.study.seeds} lists a seed more than once"

    def _bad_second_steps(self) -> Iterable[str]:
        study = self.study
        if both := sorted({*study.teachers} & {*study.fusions}):
            yield f"study.fusions: {both} are in study.teachers too: a teacher is trained in one step or in two"
        if both := sorted({*study.large} & {*study.teachers, *study.fusions}):
            yield f"study.large: {both} are in study.teachers or study.fusions too: a teacher is trained in one way"
        needs = {"lidar": {"study.fusions": study.fusions}}
        needs["camera"] = needs["lidar"] | {"study.large": study.large}
        for part, name in study.parts.model_dump().items():
            for key in (key for key, names in needs[part].items() if names and name not in study.teachers):
                yield f"study.parts.{part}: {key} need {name!r} in study.teachers {study.teachers}"

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
            if name in self.study.variants:
                yield from self._missing_start(name)
            if variant.student in self.students:
                try:
                    self.student(name)
                except ValidationError as error:
                    yield from (f"variants.{name}.{problem}" for problem in _problems(error, StudentParams))

    def _missing_start(self, variant: str) -> Iterable[str]:
        chosen = self.variants[variant]
        student = self.students.get(chosen.student)
        own = student.start if student and chosen.start is None else chosen.start
        for start in _teachers_of(own):
            if start.teacher not in self.study.detectors:
                yield (
                    f"variants.{variant}: its student starts from teacher {start.teacher!r}, "
                    f"which is not in {self.study.places}"
                )

    def _bad_teacher_taps(self, where: str, term: TermConfig, variant: str) -> Iterable[str]:
        """Of all that a term reads: its own tap, and those that its distance and its mask look at beside it."""
        for source in sorted(term.teacher_taps, key=lambda source: source != term.teacher):
            name, _, tap = source.partition(".")
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


def load_params(path: Path | str = "params.yaml") -> Params:
    """Read and check params.yaml. Raises ParamsError with one line per problem: key, value, what is allowed."""
    path = Path(path)
    raw = read_yaml(path)
    try:
        params = Params.model_validate(raw)
    except ValidationError as error:
        lines = "\n".join(f"  {problem}" for problem in _problems(error, Params))
        raise ParamsError(f"{path} is not valid:\n{lines}") from None
    profiles = sorted(p.stem for p in (path.parent / "profiles").glob("*.yaml"))
    if profiles and params.profile not in profiles:
        raise ParamsError(
            f"{path} is not valid:\n  profile: {params.profile!r} is unknown{suggest(params.profile, profiles)}"
        )
    return params


def read_yaml(path: Path) -> dict[str, Any]:
    """Parse a YAML 1.2 file as DVC does (`1e-3` is a number); duplicate keys are errors."""
    from ruamel.yaml import YAML, YAMLError

    try:
        text = path.read_text()
        redaction.learn(text)
        loaded = YAML(typ="safe").load(text)
    except FileNotFoundError:
        raise ParamsError(f"{path} does not exist") from None
    except YAMLError as error:
        raise ParamsError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(loaded, dict):
        raise ParamsError(f"{path} must be a mapping of sections, not {type(loaded).__name__}")
    return loaded


def merge(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `base` with `overlay` laid over it: dicts merge, everything else is replaced."""
    merged = dict(base)
    for key, value in overlay.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def split_key(key: str) -> tuple[str, int]:
    """The key of a student's stage, `<variant>-<seed>`, taken apart."""
    variant, _, seed = key.rpartition("-")
    if not variant or not seed.isdigit():
        raise ParamsError(f"key {key!r} must be <variant>-<seed>, as in baseline-0")
    return variant, int(seed)


def _teachers_of(start: Start) -> list[TeacherStart]:
    """The teachers of a start."""
    if isinstance(start, list):
        return start
    return [start] if isinstance(start, TeacherStart) else []


def _bad_tap(name: str, tap: TapParams) -> Iterable[str]:
    """Why a tap cannot be served as it is asked for."""
    allowed: tuple[str, ...] = ("cached-exact", "online") if name == "boxes" else ("cached-warp", "online")
    if name == "inst2d":
        allowed = ("cached-exact",)
    if tap.serve not in allowed:
        yield f"serve {tap.serve!r} is not possible for {name}; allowed: {', '.join(allowed)}"
    if name in EXACT_TAPS and (given := sorted(tap.model_fields_set - {"serve"})):
        yield f"{name} is stored exactly and takes no {', '.join(given)}: leave it out"
    if name == "head" and tap.cached:  # its boxes are moved value by value, cell by cell
        if tap.dtype not in ("float32", "float16"):
            yield f"dtype {tap.dtype!r} is not possible for head; allowed: float32, float16"
        if tap.channels is not None:
            yield f"channels {tap.channels} is not possible for head; allowed: null"
        if tap.cells != "all":
            yield f"cells {tap.cells!r} is not possible for head; allowed: all"


def _problems(error: ValidationError, model: type[BaseModel]) -> Iterable[str]:
    """One line per problem of a ValidationError."""
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = _fields(model, item["loc"][:-1])
            yield f"{where}: unknown key{suggest(str(item['loc'][-1]), known)}"
        elif item["type"] == "missing":
            yield f"{where}: missing"
        elif item["type"] == "literal_error":
            yield f"{where}: {item['input']!r} is unknown{suggest(str(item['input']), _allowed(item))}"
        elif item["loc"][-1:] == ("[key]",):
            yield f"{where.removesuffix('.[key]')}: {item['input']!r} is no name: it must be text, with a letter in it"
        elif item["type"] == "value_error":
            for line in str(item["ctx"]["error"]).splitlines():
                yield f"{where}: {line}" if where else line
        else:
            yield f"{where}: {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _allowed(item: Any) -> list[str]:
    """The values that an entry may have, out of pydantic's words: 'a', 'b' or 'c'."""
    return re.findall(r"(?:^|, | or )'?(.+?)'?(?=, | or |$)", item["ctx"]["expected"])


def _fields(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the section at `location`."""
    kind: Any = model
    for part in location:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[str(part)].annotation
        elif isinstance(kind, types.GenericAlias) or typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[-1]
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def suggest(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...? allowed: ...` for a name that is not among the known ones."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint}; allowed: {', '.join(known) or 'nothing'}"
