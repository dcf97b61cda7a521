"""What several stages open in the same way: the index's splits as datasets."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Final

from data.augment import BevConfig, ImageConfig
from data.dataset import GridConfig, InputConfig, NuScenesDataset
from data.index import Index
from models.detector import Detector
from pipeline.params import Params

INDEX: Final = "outputs/index"


def training_dataset(root: Path, params: Params, detector: Detector, seed: int) -> NuScenesDataset:
    """The training split, augmented, with what the detector reads and what its losses compare with."""
    truth = {"boxes", "depth"} if "images" in detector.sensors else {"boxes"}
    split = params.data.splits.train
    return _dataset(root, params, split, train=True, modalities={*detector.sensors, *truth}, seed=seed)


def plain_dataset(root: Path, params: Params, split: str, detector: Detector) -> NuScenesDataset:
    """A split with the sensors that the detector says it reads, and nothing else: no augmentation, no truth."""
    return _dataset(root, params, split, train=False, modalities=detector.sensors, seed=0)


def _dataset(
    root: Path, params: Params, split: str, *, train: bool, modalities: Collection[str], seed: int
) -> NuScenesDataset:
    given = params.input.model_dump()
    config = InputConfig(**{**given, "image": ImageConfig(**given["image"]), "bev": BevConfig(**given["bev"])})
    return NuScenesDataset(
        Index.open(root / INDEX),
        root / params.data.dataroot,
        split,
        config,
        GridConfig(**params.grid.model_dump()),
        train=train,
        seed=seed,
        modalities=modalities,
    )
