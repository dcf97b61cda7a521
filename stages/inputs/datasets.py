"""What several stages open in the same way: the index's splits as datasets."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from config.nested import merge
from config.params import Params
from data.reading.config import BevConfig, GridConfig, InputConfig
from data.reading.dataset import NuScenesDataset
from data.reading.index import Index
from models.detectors.camera import CameraDetector
from models.detectors.detector import Detector
from stages.context import INDEX, StageError


def training_dataset(
    root: Path,
    params: Params,
    detector: Detector,
    seed: int,
    split: str,
    *,
    beside: Collection[Detector] = (),
    bev: BevConfig | None = None,
    labelled: str | None = None,
) -> NuScenesDataset:
    """A split, augmented, with what the detector reads and what its losses compare with.

    `beside` are detectors that read the same samples; `bev` augments scenes instead of input.bev; `labelled` is the
    split whose boxes are given, None: all are.

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
    return _dataset(
        root,
        params,
        split,
        train=True,
        modalities=modalities,
        seed=seed,
        grid=params.grid,
        labelled=labelled,
        **changes,
    )


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

    `grid` crops it instead of the parameters'.
    """
    modalities = {*detector.sensors, "boxes"} if boxes else detector.sensors
    grid, frames = grid or params.grid, frames_of(params, detector)
    return _dataset(root, params, split, train=False, modalities=modalities, seed=0, grid=grid, frames=frames)


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
    """The keyframe's images of a split, not augmented, height and width `size` whatever the parameters have."""
    changes: dict[str, Any] = {"frames": 1, "depth_stride": 1, "image": {"size": size}}
    return _dataset(root, params, split, train=False, modalities={"images"}, seed=0, grid=params.grid, **changes)


def grown_grid(params: Params, halo: float) -> GridConfig:
    """The grid of the parameters, `halo` metres larger on every side."""
    return params.grid.model_copy(update={"range": params.grid.range + halo})


def _dataset(
    root: Path,
    params: Params,
    split: str,
    *,
    train: bool,
    modalities: Collection[str],
    seed: int,
    grid: GridConfig,
    labelled: str | None = None,
    **changes: Any,
) -> NuScenesDataset:
    """A split with the input of the parameters, `changes` laid over it."""
    config = InputConfig.model_validate(merge(params.input.model_dump(), changes))
    return NuScenesDataset(
        Index.open(root / INDEX),
        root / params.data.dataroot,
        split,
        config,
        grid,
        train=train,
        seed=seed,
        modalities=modalities,
        labelled=labelled,
    )
