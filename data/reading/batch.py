"""One sample and a batch of them. Frames: 0 is the keyframe, 1 the previous one; six cameras in the order of CAMERAS.

Intrinsics, image_aug and lidar_SE3_cam take a pixel of the network back to the canonical LiDAR frame of the keyframe;
bev_aug goes on to the augmented frame, in which points, RADAR and boxes, a teacher's too, are given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from data.reading.instances import CameraBatch


@dataclass(frozen=True)
class Sample:
    """What the dataset returns; the shapes are those of Batch without B. Parts that were not asked for are empty."""

    token: str
    images: Tensor  # [T, 6, 3, H, W] uint8
    intrinsics: Tensor  # [T, 6, 3, 3]
    image_aug: Tensor  # [T, 6, 3, 3]
    lidar_SE3_cam: Tensor  # [T, 6, 4, 4]
    bev_aug: Tensor  # [4, 4]
    has_previous: bool
    points: Tensor  # [P, 5]
    radar: Tensor  # [R, 7]
    boxes: Tensor  # [M, 9]
    labels: Tensor  # [M] int64
    depth: Tensor  # [6, H / stride, W / stride]
    labelled: bool = True


@dataclass
class Batch:
    """B samples. Images, points, RADAR, boxes or depth that were not asked for have no pixels, rows or cells."""

    tokens: list[str]
    images: Tensor  # [B, T, 6, 3, H, W] uint8, RGB
    intrinsics: Tensor  # [B, T, 6, 3, 3], camera -> raw pixels
    image_aug: Tensor  # [B, T, 6, 3, 3], raw pixels -> network pixels
    lidar_SE3_cam: Tensor  # [B, T, 6, 4, 4], camera at its own timestamp -> canonical LiDAR frame of the keyframe
    bev_aug: Tensor  # [B, 4, 4], canonical LiDAR frame -> augmented frame
    has_previous: Tensor  # [B] bool; where False, frame 1 repeats frame 0
    points: list[Tensor]  # of [P, 5]: x, y, z, intensity 0-1, age in s; augmented frame
    radar: list[Tensor]  # of [R, 7]: x, y, z, rcs, vx, vy, age in s; augmented frame
    boxes: list[Tensor]  # of [M, 9], see data.reading.boxes; augmented frame
    labels: list[Tensor]  # of [M] int64, positions in CLASSES
    depth: Tensor  # [B, 6, H / stride, W / stride] in m, 0 where unknown; supervision of training only
    labelled: Tensor  # [B] bool; where False, that there are no boxes says nothing
    # Teacher outputs: boxes in the augmented frame, instances in the augmented images of frame 0, stored maps in the
    # LiDAR frame (stages.teaching.taught)
    teacher: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The batch on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; the loader calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(**{entry.name: _map_tensors(getattr(self, entry.name), function) for entry in fields(self)})


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack what has one shape, list what is ragged."""
    return Batch(
        tokens=[sample.token for sample in samples],
        images=torch.stack([sample.images for sample in samples]),
        intrinsics=torch.stack([sample.intrinsics for sample in samples]),
        image_aug=torch.stack([sample.image_aug for sample in samples]),
        lidar_SE3_cam=torch.stack([sample.lidar_SE3_cam for sample in samples]),
        bev_aug=torch.stack([sample.bev_aug for sample in samples]),
        has_previous=torch.tensor([sample.has_previous for sample in samples]),
        points=[sample.points for sample in samples],
        radar=[sample.radar for sample in samples],
        boxes=[sample.boxes for sample in samples],
        labels=[sample.labels for sample in samples],
        depth=torch.stack([sample.depth for sample in samples]),
        labelled=torch.tensor([sample.labelled for sample in samples]),
    )


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`function` on every tensor in nested lists, tuples and dicts; anything else is kept."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map_tensors(entry, function) for key, entry in value.items()}
    if isinstance(value, CameraBatch):
        return value.map(function)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map_tensors(entry, function) for entry in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_map_tensors(entry, function) for entry in value)
    return value
