"""What several stages open in the same way: the index's splits as datasets."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

from config.params import BevParams, Params, merge
from data.reading.augment import BevConfig, ImageConfig
from data.reading.dataset import GridConfig, InputConfig, NuScenesDataset
from data.reading.index import Index
from models.detectors.camera import CameraDetector
from models.detectors.detector import Detector
from stages.context import StageError

INDEX: Final = "outputs/index"


def training_dataset(
    root: Path,
    params: Params,
    detector: Detector,
    seed: int,
    split: str,
    *,
    beside: Collection[Detector] = (),
    bev: BevParams | None = None,
) -> NuScenesDataset:
    """A split, augmented, with what the detector reads and what its losses compare with.

    `beside` are detectors that read the same samples; `bev` augments scenes instead of input.bev.

    Raises:
        StageError: one of them reads RADAR, and `input.radar` is off, or the previous keyframe, and there is none.
    """
    readers = (detector, *beside)
    modalities = {"boxes"}.union(*(reader.sensors for reader in readers))
    if isinstance(detector, CameraDetector) and detector.learns_depth:
        modalities.add("depth")
    for reader in readers:
        if "radar" in reader.sensors and not params.input.radar:
            raise StageError(
                f"input.radar: false, and {type(reader).__name__} reads RADAR: set it to true and run `prepare` again"
            )
    changes: dict[str, Any] = {"frames": frames_of(params, *readers)}
    changes |= {} if bev is None else {"bev": bev.model_dump()}
    grid = grown_grid(params, 0.0)
    return _dataset(root, params, split, train=True, modalities=modalities, seed=seed, grid=grid, **changes)


def plain_dataset(
    root: Path,
    params: Params,
    split: str,
    detector: Detector,
    *,
    grid: GridConfig | None = None,
    boxes: bool = False,
) -> NuScenesDataset:
    """A split with the sensors that the detector says it reads, not augmented; no truth unless `boxes` are asked for.

    `grid` crops it instead of that of params.yaml.
    """
    modalities = {*detector.sensors, "boxes"} if boxes else detector.sensors
    grid, changes = grid or grown_grid(params, 0.0), {"frames": frames_of(params, detector)}
    return _dataset(root, params, split, train=False, modalities=modalities, seed=0, grid=grid, **changes)


def frames_of(params: Params, *detectors: Detector) -> int:
    """Keyframes that detectors read, no more than which are loaded.

    Raises:
        StageError: a detector reads the previous keyframe, and `input.frames` is 1.
    """
    for detector in detectors:
        if detector.frames > params.input.frames:
            name = type(detector).__name__
            raise StageError(f"input.frames: {params.input.frames}, and {name} reads {detector.frames}: raise it")
    return max(detector.frames for detector in detectors)


def camera_dataset(root: Path, params: Params, split: str, size: tuple[int, int]) -> NuScenesDataset:
    """The keyframe's images of a split, not augmented, height and width `size` whatever params.yaml has."""
    grid, changes = grown_grid(params, 0.0), {"frames": 1, "depth_stride": 1, "image": {"size": size}}
    return _dataset(root, params, split, train=False, modalities={"images"}, seed=0, grid=grid, **changes)


def grown_grid(params: Params, halo: float) -> GridConfig:
    """The grid of params.yaml, `halo` metres larger on every side."""
    given = params.grid.model_dump()
    return GridConfig(**given | {"range": given["range"] + halo})


def _dataset(
    root: Path,
    params: Params,
    split: str,
    *,
    train: bool,
    modalities: Collection[str],
    seed: int,
    grid: GridConfig,
    **changes: Any,
) -> NuScenesDataset:
    """A split with the input of params.yaml, `changes` laid over it."""
    given = merge(params.input.model_dump(), changes)
    config = InputConfig(**given | {"image": ImageConfig(**given["image"]), "bev": BevConfig(**given["bev"])})
    return NuScenesDataset(
        Index.open(root / INDEX),
        root / params.data.dataroot,
        split,
        config,
        grid,
        train=train,
        seed=seed,
        modalities=modalities,
    )
