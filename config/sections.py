"""The typed sections of params.yaml and of the files in params/."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from base.section import Count, Fraction, Positive, Section
from data.reading.config import BevConfig
from distill.terms import TermConfig
from training.config import TrainConfig

COARSEST_STRIDE: Final = 32  # pixels per cell of an image backbone's last stage


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


class ImportParams(Section):
    """Weights that are not made by this pipeline."""

    folder: str  # relative to the root, with model.safetensors
    checksum: str  # xxh3-128 of that file


class ModulesStart(Section):
    """What a model takes of another one that this pipeline makes."""

    only: list[str] | None = None  # names of modules
    resample: bool = False  # of `only`: weights of another size are brought to the model's (models/inherit.py)

    @model_validator(mode="after")
    def _resamples_modules(self) -> Self:
        if self.resample and not self.only:
            raise ValueError("resample brings modules of another size to the model's: name them in only")
        return self


class TeacherStart(ModulesStart):
    """A student starts from an entry of `teachers`: without `only` from all of it, then of the same model."""

    teacher: str


class PartStart(ModulesStart):
    """The second step of a teacher starts from one of its parts: without `only` from all that fits of it."""

    part: Literal["lidar", "camera"]  # in study.fusions or study.large


def _listed(value: Any) -> Any:
    """A start from one model is a list of one."""
    return (
        [value] if isinstance(value, ModulesStart) or (isinstance(value, Mapping) and "folder" not in value) else value
    )


# Which alternative of a start is meant, so that a mistake in it is said once.
def _kind_of_start(value: Any) -> str:
    return "<teachers>" if isinstance(value, list) else "<weights>"


def _kind_of_parts_start(value: Any) -> str:
    return "<parts>" if isinstance(value, list) else "<weights>"


Start = Annotated[
    Annotated[list[TeacherStart], Tag("<teachers>")] | Annotated[ImportParams, Tag("<weights>")],
    Discriminator(_kind_of_start),
    BeforeValidator(_listed),
]
PartsStart = Annotated[
    Annotated[list[PartStart], Tag("<parts>")] | Annotated[ImportParams, Tag("<weights>")],
    Discriminator(_kind_of_parts_start),
    BeforeValidator(_listed),
]
TAGS: Final = {"<teachers>": TeacherStart, "<parts>": PartStart, "<weights>": ImportParams}  # what the tags stand for


class TeacherParams(Section):
    """A teacher of 3D boxes, or a student that trains alone for others to start from: its model and its training."""

    split: str | None = None  # what it learns from; None: data.splits.train
    start: PartsStart | None = None  # parts: of a second step alone
    model: dict[str, Any]
    train: TrainConfig

    @property
    def parts(self) -> list[PartStart]:
        """The parts that it starts from."""
        return self.start if isinstance(self.start, list) else []


class SegmenterParams(Section):
    """An instance segmentation teacher: an mmdet model that is trained on `data.instances`, imported, or both."""

    image: tuple[Count, Count]  # height, width of its input; the raw image is scaled to that width
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


@dataclass(frozen=True)
class TapKind:
    """What taps of a kind can be asked for; what is done with them is in stages/teaching/kinds.py."""

    serves: tuple[str, ...]
    exact: bool = False  # ragged, stored as they are
    dtypes: tuple[str, ...] = ("float32", "float16", "int8", "float8_e4m3")
    whole: bool = False  # with all channels and cells

    def problems(self, name: str, tap: TapParams) -> Iterable[str]:
        """Why a tap cannot be served as it is asked for."""
        if tap.serve not in self.serves:
            yield f"serve {tap.serve!r} is not possible for {name}; allowed: {', '.join(self.serves)}"
        if self.exact and (given := sorted(tap.model_fields_set - {"serve"})):
            yield f"{name} is stored exactly and takes no {', '.join(given)}: leave it out"
        if not tap.cached:
            return
        if tap.dtype not in self.dtypes:
            yield f"dtype {tap.dtype!r} is not possible for {name}; allowed: {', '.join(self.dtypes)}"
        if self.whole and tap.channels is not None:
            yield f"channels {tap.channels} is not possible for {name}; allowed: null"
        if self.whole and tap.cells != "all":
            yield f"cells {tap.cells!r} is not possible for {name}; allowed: all"


MAP: Final = TapKind(("cached-warp", "online"))
TAP_KINDS: Final = {
    "boxes": TapKind(("cached-exact", "online"), exact=True),
    "inst2d": TapKind(("cached-exact",), exact=True),
    "head": TapKind(("cached-warp", "online"), dtypes=("float32", "float16"), whole=True),  # its boxes are moved
}


def tap_kind(name: str) -> TapKind:
    """What a tap can be asked for: a map in bird's-eye view unless its name says otherwise."""
    return TAP_KINDS.get(name, MAP)


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
        wrong = [
            f"taps.{name}: {text}" for name, tap in self.taps.items() for text in tap_kind(name).problems(name, tap)
        ]
        if wrong:
            raise ValueError("\n".join(wrong))
        return self


class StudentParams(Section):
    """A student: its model and its training."""

    start: Start | None = None
    bev: BevConfig | None = None  # augmentation of its scenes, instead of input.bev
    model: dict[str, Any]
    train: TrainConfig

    @property
    def starts(self) -> list[TeacherStart]:
        """The teachers that it starts from."""
        return self.start if isinstance(self.start, list) else []


class VariantParams(Section):
    """One arm of the ablation: a student, its distillation terms, and what it overrides of the student's settings."""

    student: str
    terms: dict[str, TermConfig]
    model: dict[str, Any] = {}
    train: dict[str, Any] = {}
    start: Start | None = None  # instead of the student's
    # Whose true boxes teach the student: true: those of all keyframes; a split, as train[::4]: its own; false: none.
    # What its teachers say and the depth of all keyframes teach it in any case.
    truth: bool | str = True
    truth_share: Fraction | None = None  # of a split: share of each step that has truth; null: as the samples come
    row: str | None = None  # of a paper's table that this variant reproduces

    @model_validator(mode="after")
    def _mixes_a_split(self) -> Self:
        if self.truth_share is not None and self.labelled is None:
            raise ValueError(f"truth_share {self.truth_share} mixes a split with the rest: name it in truth")
        return self

    @property
    def labelled(self) -> str | None:
        """The split whose true boxes are known; None: all are."""
        return self.truth if isinstance(self.truth, str) else None

    @property
    def starts(self) -> list[TeacherStart]:
        """The teachers that its student starts from instead of the student's own."""
        return self.start if isinstance(self.start, list) else []


class Resources(Section):
    """What a stage asks for on each node; none of it changes a result."""

    gpus: int = Field(ge=0)
    cpus: Count | None  # None: what the scheduler gives by itself
    hours: Positive  # from the start of the stage to its end


class DistributedResources(Resources):
    """Of a stage that can run in several processes."""

    nodes: Count


class MemoryParams(Section):
    """What the training of a model takes of a GPU, as far as one sample on a CPU tells (benchmarks/model_cost.py)."""

    model: Positive  # GB: weights, gradients, the optimiser's state, the average
    sample: (
        Positive  # GB that the forward pass of a sample keeps for the backward pass, with the terms of the whole recipe
    )


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


class CameraParts(Section):
    """Of what the second step of a camera teacher is made: names of entries of `teachers`."""

    camera: str


class FusionParts(Section):
    """Of what a fusion teacher is made: names of entries of `teachers`."""

    lidar: str
    camera: str


class StudyParams(Section):
    """What one report compares."""

    name: str = "own"  # under which MLflow and the report show it
    teachers: list[str]
    # Teachers that are trained in a second step, from parts: those of both sensors, and of cameras alone.
    fusions: dict[str, FusionParts]
    large: dict[str, CameraParts]
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
        return f"study.teachers {self.teachers}, study.fusions {[*self.fusions]} or study.large {[*self.large]}"

    @property
    def second_steps(self) -> dict[str, dict[str, dict[str, str]]]:
        """Key of the study -> teacher -> sensor -> the part that it is trained from."""
        return {
            key: {name: parts.model_dump() for name, parts in steps.items()}
            for key, steps in (("fusions", self.fusions), ("large", self.large))
        }

    def parts(self, teacher: str) -> dict[str, str]:
        """Sensor -> the teacher from which a second step begins; none of a teacher that is trained in one."""
        return next((steps[teacher] for steps in self.second_steps.values() if teacher in steps), {})


class EvaluateParams(Section):
    """The official evaluation."""

    official: Literal["vectorised", "devkit"] = "vectorised"  # equal numbers; the devkit takes minutes and its memory
    split: Literal["train", "val"]
    batch_size: Count
    pictures: int = Field(ge=0)  # keyframes to draw, spread over the split
    score_threshold: Fraction  # of the predicted boxes in the pictures
