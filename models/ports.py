"""What detectors are given and what they give."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Batch(Protocol):
    """The attributes that models read; shapes as in the data room's batch."""

    images: Tensor  # [B, T, N, 3, H, W] uint8 RGB; frame 0 is the current keyframe
    intrinsics: Tensor  # [B, T, N, 3, 3] camera -> raw pixels
    image_aug: Tensor  # [B, T, N, 3, 3] raw pixels -> network pixels
    lidar_SE3_cam: Tensor  # [B, T, N, 4, 4] camera -> current LiDAR frame, before augmentation
    bev_aug: Tensor  # [B, 4, 4] LiDAR frame -> augmented frame
    has_previous: Tensor  # [B] bool
    points: list[Tensor]  # of [P, 5]: x, y, z, intensity, seconds into the past; augmented frame
    # Of [R, 7]: x, y, z, cross section in dBsm, vx and vy over ground, seconds into the past; augmented frame.
    radar: list[Tensor]
    boxes: list[Tensor]  # of [M, 9]: x, y, z_bottom, length, width, height, yaw, vx, vy; augmented frame
    labels: list[Tensor]  # of [M] int64
    depth: Tensor  # [B, N, h, w] metres, 0 where unknown; training only
    labelled: Tensor  # [B] bool, whether the boxes are known; training only


class Prediction(NamedTuple):
    """Raw outputs of a detector."""

    # Per task: `heatmap` logits, `reg`, `height`, `dim`, `rot`, `vel`, each [B, channels, H, W].
    head: list[dict[str, Tensor]]
    taps: dict[str, Tensor]  # the taps that were asked for
    # Of detectors that predict depth, for each lift its logits [B, N, D, h, w] of the current frame.
    depth: tuple[Tensor, ...] = ()


class Detections(NamedTuple):
    """Boxes of one sample, best first, in the frame of the batch (the LiDAR frame when it is not augmented)."""

    boxes: Tensor  # [K, 9]: x, y, z_bottom, length, width, height, yaw, vx, vy
    scores: Tensor  # [K]
    labels: Tensor  # [K] int64


def head_map(head: list[dict[str, Tensor]]) -> Tensor:
    """The `head` tap: all maps of all tasks in order, [B, sum of channels, H, W]."""
    return torch.cat([task_map for task in head for task_map in task.values()], dim=1)
