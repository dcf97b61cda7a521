"""Frozen teachers as functions from samples to the arrays that a store holds: detectors, and segmenters of images."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from base.environment import cores
from config.params import Params
from config.sections import StoreParams
from data.reading.batch import Batch, collate
from data.reading.dataset import NuScenesDataset
from data.reading.instances import StoredInstances, pack
from models.detectors.bevformer import BEVFormer
from models.detectors.build import build_detector
from models.detectors.detector import Detector
from models.layers.pillars import PointwisePillarNet
from stages.context import StageError
from stages.inputs.datasets import camera_dataset, grown_grid, plain_dataset
from stages.inputs.weights import CONFIG, load_detector, without_checkpoints
from stages.teaching.serving import box_rows
from training.loading import load_weights

BATCH: Final = 4  # samples; fixed, because rounding may depend on it
FOREGROUND: Final = 0.01  # of the ground truth's Gaussians, above which a cell is foreground
KEEP: Final = ".keep"  # behind a tap's name: bool [H, W], the cells that are to be stored

Outputs = dict[str, NDArray[Any]]


class Frozen(Protocol):
    """A frozen teacher and the cached taps of a store for any samples of the training split, not augmented."""

    @property
    def tokens(self) -> list[str]:
        """Sample tokens by row."""
        ...

    def extent(self, tap: str) -> float:
        """Half the side of a dense tap's map in metres, halo included."""
        ...

    def stream(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[str, Outputs]]:
        """Token and outputs of samples, group after group; a batch never holds samples of two groups.

        So what comes out for a sample depends on its group alone, whichever groups are asked for.
        """
        ...


def freeze(root: Path, params: Params, store: StoreParams, folder: Path, device: torch.device) -> Frozen:
    """The teacher of a store.

    Args:
        root: of the project.
        params: all parameters.
        store: the entry of `stores`.
        folder: of the teacher's weights.
        device: to run on.

    Raises:
        StageError: the weights are not whole, or do not fit the larger grid of a halo.
    """
    kind = FrozenSegmenter if store.teacher in params.segmenters else FrozenTeacher
    return kind(root, params, store, folder, device)


class View:
    """The teacher on one extent: the grid's, or one with a halo around it.

    Args:
        detector: built for that extent.
        dataset: the samples, cropped to that extent, with boxes where foreground is asked for.
        taps: what is wanted of it, `boxes` included.
        foreground: of them, those that come with a mask of the cells near an object.
        score_threshold: of the boxes.
        halo: metres beyond the grid.
    """

    def __init__(
        self,
        detector: Detector,
        dataset: NuScenesDataset,
        taps: Sequence[str],
        *,
        foreground: Sequence[str] = (),
        score_threshold: float = 0.0,
        halo: float = 0.0,
    ) -> None:
        self.detector, self.dataset = detector.eval().requires_grad_(False), dataset
        self.taps, self.foreground = list(taps), list(foreground)
        self.score_threshold, self.halo = score_threshold, halo

    @property
    def extent(self) -> float:
        """Half the side of the dense maps in metres."""
        return self.detector.targets.grid.range

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> list[Outputs]:
        """Arrays of each sample of a batch: dense maps [C, H, W], boxes [K, 11] (box, score, label), masks [H, W].

        Raises:
            StageError: the detector lacks a tap, or cannot run on this extent.
        """
        try:
            prediction = self.detector(batch, self.taps)
        except (ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not self.halo:
                raise
            hint = f" with a halo of {self.halo} m (try a multiple of 8 cells)" if self.halo else ""
            raise StageError(f"the teacher cannot give {', '.join(self.taps)}{hint}: {error}") from error
        columns: dict[str, list[Tensor]] = {name: list(maps) for name, maps in prediction.taps.items()}
        if "boxes" in self.taps:
            columns["boxes"] = [box_rows(found, self.score_threshold) for found in self.detector.decode(prediction)]
        if self.foreground:
            heat = self.detector.targets(batch.boxes, batch.labels).heatmap.sum(1)
            columns |= {tap + KEEP: list(heat > FOREGROUND) for tap in self.foreground}
        samples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return [{name: value.cpu().numpy() for name, value in sample.items()} for sample in samples]


class FrozenTeacher:
    """A detector, see `Frozen`."""

    def __init__(self, root: Path, params: Params, store: StoreParams, folder: Path, device: torch.device) -> None:
        """Load the teacher, once per extent that its taps ask for; see `freeze`."""
        self.plain = load_detector(folder).to(device)
        self.device = device
        self.views: list[View] = []
        for halo in sorted({tap.halo for tap in store.cached.values()}):
            taps = [name for name, tap in store.cached.items() if tap.halo == halo]
            foreground = [name for name in taps if store.taps[name].cells == "foreground"]
            detector = grown(folder, self.plain, halo).to(device) if halo else self.plain
            split, grid = params.data.splits.train, grown_grid(params, halo)
            dataset = plain_dataset(root, params, split, detector, grid=grid, boxes=bool(foreground))
            threshold = store.score_threshold
            view = View(detector, dataset, taps, foreground=foreground, score_threshold=threshold, halo=halo)
            self.views.append(view)

    @property
    def tokens(self) -> list[str]:
        """Sample tokens by row."""
        return self.views[0].dataset.tokens

    def extent(self, tap: str) -> float:
        """Half the side of a dense tap's map in metres, halo included."""
        return next(view.extent for view in self.views if tap in view.taps)

    def stream(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[str, Outputs]]:
        """See `Frozen`."""
        loaders = [_loader(view.dataset, rows, self.device, len(self.views)) for view in self.views]
        for parts in zip(*loaders, strict=True):
            outputs = [view(part.to(self.device)) for view, part in zip(self.views, parts, strict=True)]
            for token, *pieces in zip(parts[0].tokens, *outputs, strict=True):
                yield token, {name: array for piece in pieces for name, array in piece.items()}


class FrozenSegmenter:
    """A segmenter of the keyframe's camera images, see `Frozen`."""

    def __init__(self, root: Path, params: Params, store: StoreParams, folder: Path, device: torch.device) -> None:
        """Load the segmenter; see `freeze`."""
        from stages.inputs.segmenters import InstanceFinder  # late: it brings all of mmdet, which no detector needs

        self.finder, self.device = InstanceFinder.load(folder, device, store.score_threshold), device
        self.dataset = camera_dataset(root, params, params.data.splits.train, self.finder.size)

    @property
    def tokens(self) -> list[str]:
        """Sample tokens by row."""
        return self.dataset.tokens

    def extent(self, tap: str) -> float:
        """It has no dense taps."""
        raise StageError(f"tap {tap} of a segmenter: it has inst2d and no other")

    def stream(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[str, Outputs]]:
        """See `Frozen`."""
        for batch in _loader(self.dataset, rows, self.device):
            for token, images, image_aug in zip(batch.tokens, batch.images, batch.image_aug, strict=True):
                found = self.finder(images[0].to(self.device))
                yield token, {"inst2d": pack(StoredInstances.of(found, image_aug[0], self.finder.size))}


def _loader(
    dataset: NuScenesDataset, rows: Sequence[Sequence[int]], device: torch.device, loaders: int = 1
) -> DataLoader[Any]:
    """Batches of groups of samples, each of one group; `loaders` run at once."""
    cuda = device.type == "cuda"
    batches = [list(group[i : i + BATCH]) for group in rows for i in range(0, len(group), BATCH)]
    workers = max(min(cores(), 8) // loaders, 1) if cuda else 0
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers, pin_memory=cuda)


def evenly(count: int, total: int) -> list[int]:
    """At most `count` rows of `total`, evenly spaced, the first included."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def grown(folder: Path, plain: Detector, halo: float) -> Detector:
    """A published detector on a grid that reaches `halo` metres further on every side, with the same weights.

    Its convolutions do not know the grid's size. PointwisePillarNet does: it scales positions by the scene that it was
    trained on, and goes on doing so. More area may hold more voxels, so their limit grows with it.

    Raises:
        StageError: the weights do not fit the larger model, or are of learned queries, which belong to places.
    """
    if isinstance(plain, BEVFormer):
        raise StageError(f"teacher {folder} cannot run with a halo of {halo} m: its queries were learned for the grid")
    reach = plain.targets.grid.range
    config = without_checkpoints(json.loads((folder / CONFIG).read_text()))
    config = _grown(config, halo, ((reach + halo) / reach) ** 2)
    detector = build_detector(config)
    try:
        load_weights(detector, plain.state_dict())
    except RuntimeError as error:
        raise StageError(f"teacher {folder} cannot run with a halo of {halo} m: {error}") from error
    for name, module in plain.named_modules():
        if isinstance(module, PointwisePillarNet):
            detector.get_submodule(name).scale = module.scale
    return detector


def _grown(config: Any, halo: float, area: float) -> Any:
    """The config with every grid reaching further, and more voxels for more area."""
    if isinstance(config, list):
        return [_grown(value, halo, area) for value in config]
    if not isinstance(config, dict):
        return config
    changed = {key: _grown(value, halo, area) for key, value in config.items()}
    if isinstance(grid := changed.get("grid"), dict):
        changed["grid"] = grid | {"range": grid["range"] + halo}
    if most := changed.get("max_voxels"):
        changed["max_voxels"] = (
            [math.ceil(n * area) for n in most] if isinstance(most, list) else math.ceil(most * area)
        )
    return changed
