"""Index and sensor files -> samples. A sample depends on the seed and its key (epoch, position, index) only."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Final

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from data.reading.augment import draw_bev_matrix, draw_image_matrices
from data.reading.batch import Sample
from data.reading.boxes import boxes_in_range, transform_boxes
from data.reading.config import GridConfig, InputConfig
from data.reading.decoded import DecodedImages
from data.reading.geometry import Float64, inverse
from data.reading.index import CAMERAS, Index, Record
from data.reading.sensors import depth_map, load_image, load_points, load_radar

MODALITIES: Final = frozenset({"images", "points", "radar", "boxes", "depth"})

KEPT_BYTES: Final = 2**30  # of decoded images, in each worker of a loader

# What a sampler yields. Epoch and position (in the order of the epoch, over all ranks) fix the random draws, the index
# fixes the keyframe.
SampleKey = tuple[int, int, int]


class NuScenesDataset(Dataset[Sample]):
    """The keyframes of one split.

    In training every sample is augmented and holds all modalities, of its boxes those that a LiDAR or RADAR point
    has seen. Otherwise nothing is random and it holds what a camera student may see: images, and RADAR where
    `config.radar`. Boxes and points outside the grid are dropped in both.
    """

    def __init__(
        self,
        index: Index | Path | str,
        dataroot: Path | str,
        split: str,
        config: InputConfig,
        grid: GridConfig,
        *,
        train: bool,
        seed: int = 0,
        modalities: Collection[str] | None = None,
        labelled: str | None = None,
    ) -> None:
        """Open a split.

        Args:
            index: an index or the path of one.
            dataroot: folder that the files of the index are relative to.
            split: the devkit's name of a split of the index.
            config: what a sample holds.
            grid: bounds of boxes and points.
            train: whether to augment, and load everything by default.
            seed: of the augmentation.
            modalities: what to load instead of the default; a subset of MODALITIES.
            labelled: split whose boxes are given; those of other keyframes are left out. None: all are given.
        """
        default = MODALITIES if train else frozenset({"images", "radar"})
        self.modalities = frozenset(default if modalities is None else modalities)
        if self.modalities - MODALITIES:
            raise ValueError(f"modalities {sorted(self.modalities - MODALITIES)}: allowed are {sorted(MODALITIES)}.")
        self.index = index if isinstance(index, Index) else Index.open(index)
        self.dataroot, self.split, self.config, self.grid = Path(dataroot), split, config, grid
        self.train, self.seed = train, seed
        self.rows = self.index.rows(split)
        known = self.rows if labelled is None else self.index.rows(labelled)
        self.labelled: NDArray[np.bool_] = np.isin(self.rows, known)  # [N], whether the boxes of a sample are given
        self.decoded = None if train and config.image.augments else DecodedImages(self._kept_images())
        cv2.setNumThreads(0)  # the loader's workers are the parallelism

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> list[str]:
        """Sample tokens by index."""
        return self.index.tokens(self.split)

    def classes(self) -> list[set[int]]:
        """Labels of each sample's boxes that are given and that a LiDAR or RADAR point has seen, by index."""
        annotations = (self.index.annotations(int(row)) for row in self.rows)
        return [
            set(found.labels[found.valid & labelled].tolist())
            for found, labelled in zip(annotations, self.labelled, strict=True)
        ]

    def __getitem__(self, key: SampleKey | int) -> Sample:
        """The sample of a key; a plain index means epoch 0 and the position of that index.

        Raises:
            BlobError: a file is missing or broken; names file and token.
        """
        epoch, position, index = (0, key, key) if isinstance(key, int) else key
        rng = np.random.default_rng((self.seed, epoch, position)) if self.train else None
        record = self.index.sample(int(self.rows[index]))
        bev_aug = draw_bev_matrix(self.config.bev, rng)
        image_aug = draw_image_matrices(record.cameras.sizes, self.config.image, rng)
        frames = self._frames(record)
        lidar_SE3_cam = np.stack([self._lidar_SE3_cam(record, frame) for frame in frames])
        points, depth = self._lidar(record, image_aug, lidar_SE3_cam[0], bev_aug)
        boxes, labels = self._boxes(record, bev_aug, given=bool(self.labelled[index]))
        return Sample(
            token=record.token,
            images=self._images(frames, image_aug),
            intrinsics=_tensor(np.stack([frame.cameras.intrinsics for frame in frames])),
            image_aug=_tensor(np.stack([image_aug] * len(frames))),
            lidar_SE3_cam=_tensor(lidar_SE3_cam),
            bev_aug=_tensor(bev_aug),
            has_previous=record.previous >= 0,
            points=points,
            radar=self._radar(record, bev_aug),
            boxes=boxes,
            labels=labels,
            depth=depth,
            labelled=bool(self.labelled[index]),
        )

    def _frames(self, record: Record) -> list[Record]:
        """The keyframe and, if asked for, the previous one, which the first of a scene repeats."""
        if self.config.frames == 1:
            return [record]
        return [record, self.index.sample(record.previous) if record.previous >= 0 else record]

    @staticmethod
    def _lidar_SE3_cam(record: Record, frame: Record) -> Float64:
        """[6, 4, 4]: the cameras of a frame in the LiDAR frame of the keyframe."""
        return inverse(record.global_SE3_lidar) @ frame.cameras.global_SE3_camera

    def _images(self, frames: list[Record], image_aug: Float64) -> Tensor:
        """[T, 6, 3, H, W] uint8, RGB."""
        if "images" not in self.modalities:
            return torch.empty((len(frames), len(CAMERAS), 3, 0, 0), dtype=torch.uint8)
        size = self.config.image.size
        images = np.empty((len(frames), len(CAMERAS), 3, *size), np.uint8)
        for t, frame in enumerate(frames):
            if t and frame is frames[0]:
                images[t] = images[0]
                continue
            cameras = frame.cameras
            for n, file in enumerate(cameras.files):
                raw_size = (int(cameras.sizes[n, 0]), int(cameras.sizes[n, 1]))
                load = partial(load_image, self.dataroot / file, frame.token, raw_size, image_aug[n], size)
                bgr = load() if self.decoded is None else self.decoded.get(file, image_aug[n], load)
                for channel in range(3):
                    cv2.extractChannel(bgr, 2 - channel, images[t, n, channel])
        return torch.from_numpy(images)

    def _kept_images(self) -> int:
        """How many images stay decoded: in training all of a split that fits, else two keyframes' for the previous."""
        height, width = self.config.image.size
        split = len(self.rows) * len(CAMERAS)
        return split if self.train and split * 3 * height * width <= KEPT_BYTES else 2 * len(CAMERAS)

    def _lidar(
        self, record: Record, image_aug: Float64, lidar_SE3_cam: Float64, bev_aug: Float64
    ) -> tuple[Tensor, Tensor]:
        """Points [P, 5] in the augmented frame and the depth map of the keyframe's sweep."""
        points, depth = np.empty((0, 5), np.float32), np.empty((len(CAMERAS), 0, 0), np.float32)
        if not self.modalities & {"points", "depth"}:
            return torch.from_numpy(points), torch.from_numpy(depth)
        count = self.config.sweeps if "points" in self.modalities else 1
        loaded = load_points(self.dataroot, record.token, record.lidar, count, record.global_SE3_lidar)
        if "depth" in self.modalities:
            depth = depth_map(
                loaded[: np.searchsorted(loaded[:, 4], 0.0, side="right")],  # the keyframe's own sweep comes first
                inverse(lidar_SE3_cam),
                image_aug @ record.cameras.intrinsics,
                self.config.image.size,
                self.config.depth_stride,
            )
        if "points" in self.modalities:
            loaded[:, :3] = loaded[:, :3] @ bev_aug[:3, :3].T.astype(np.float32)
            points = loaded.take(np.flatnonzero(self._in_grid(loaded)), axis=0)
        return torch.from_numpy(points), torch.from_numpy(depth)

    def _radar(self, record: Record, bev_aug: Float64) -> Tensor:
        """[R, 7] in the augmented frame."""
        if not self.config.radar or "radar" not in self.modalities:
            return torch.empty((0, 7))
        radar = load_radar(self.dataroot, record.token, record.radars, record.timestamp, record.global_SE3_lidar)
        radar[:, :3] = radar[:, :3] @ bev_aug[:3, :3].T.astype(np.float32)
        radar[:, 4:6] = radar[:, 4:6] @ bev_aug[:2, :2].T.astype(np.float32)
        return torch.from_numpy(radar[self._in_grid(radar)])

    def _boxes(self, record: Record, bev_aug: Float64, *, given: bool) -> tuple[Tensor, Tensor]:
        """Boxes [M, 9] in the augmented frame and labels [M] of what a point has seen inside the grid."""
        if "boxes" not in self.modalities or not given:
            return torch.empty((0, 9)), torch.empty(0, dtype=torch.int64)
        valid = record.annotations.valid
        boxes = transform_boxes(torch.from_numpy(record.annotations.boxes[valid]), torch.from_numpy(bev_aug)).float()
        inside = boxes_in_range(boxes, self.grid.range)
        return boxes[inside], torch.from_numpy(record.annotations.labels[valid])[inside]

    def _in_grid(self, points: NDArray[np.float32]) -> NDArray[np.bool_]:
        low, high = self.grid.z
        x, y, z = points[:, :3].T
        return (np.abs(x) < self.grid.range) & (np.abs(y) < self.grid.range) & (z > low) & (z < high)


def _tensor(array: Float64) -> Tensor:
    return torch.from_numpy(array.astype(np.float32))
