"""What every detector offers, and how one is built from a config dict."""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from models.registry import MODELS
from models.targets import TargetEncoder


class Batch(Protocol):
    """The attributes that models read; shapes as in the data room's batch."""

    images: Tensor
    """[B, T, N, 3, H, W] uint8 RGB; frame 0 is the current keyframe."""
    intrinsics: Tensor
    """[B, T, N, 3, 3] camera -> raw pixels."""
    image_aug: Tensor
    """[B, T, N, 3, 3] raw pixels -> network pixels."""
    lidar_SE3_cam: Tensor
    """[B, T, N, 4, 4] camera -> current LiDAR frame, before augmentation."""
    bev_aug: Tensor
    """[B, 4, 4] LiDAR frame -> augmented frame."""
    has_previous: Tensor
    """[B] bool."""
    points: list[Tensor]
    """Of [P, 5]: x, y, z, intensity, seconds into the past; augmented frame."""
    radar: list[Tensor]
    """Of [R, 7]: x, y, z, cross section in dBsm, vx and vy over ground, seconds into the past; augmented frame."""
    boxes: list[Tensor]
    """Of [M, 9]: x, y, z_bottom, length, width, height, yaw, vx, vy; augmented frame."""
    labels: list[Tensor]
    """Of [M] int64."""
    depth: Tensor
    """[B, N, h, w] metres, 0 where unknown; training only."""


class Prediction(NamedTuple):
    """Raw outputs of a detector."""

    head: list[dict[str, Tensor]]
    """Per task: ``heatmap`` logits, ``reg``, ``height``, ``dim``, ``rot``, ``vel``, each [B, channels, H, W]."""
    taps: dict[str, Tensor]
    """The taps that were asked for."""
    depth: tuple[Tensor, ...] = ()
    """Of detectors that predict depth, for each lift its logits [B, N, D, h, w] of the current frame."""


class Detections(NamedTuple):
    """Boxes of one sample, best first, in the frame of the batch (the LiDAR frame when it is not augmented)."""

    boxes: Tensor
    """[K, 9]: x, y, z_bottom, length, width, height, yaw, vx, vy."""
    scores: Tensor
    """[K]."""
    labels: Tensor
    """[K] int64."""


class Detector(nn.Module, ABC):
    """A 3D detector: forward to head maps and taps, loss against boxes, decoding to boxes."""

    sensors: tuple[str, ...]
    """The batch's sensor data that ``forward`` reads, of ``images``, ``points``, ``radar``; no other need be loaded."""
    tap_channels: dict[str, int]
    """Channels of the taps of this detector that are dense maps."""
    targets: TargetEncoder
    """How boxes become head targets on this detector's grid."""
    frames: int = 1
    """Keyframes of the batch that ``forward`` reads; no other need be loaded."""
    truth_losses: tuple[str, ...] = ("heatmap", "box")
    """Those of the losses that compare with the true boxes."""
    places: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    """Where weights of other detectors fit: the name of a module there -> names here. Unlisted: the same name."""

    @abstractmethod
    def forward(self, batch: Batch, taps: Collection[str] = ()) -> Prediction:
        """Head maps of a batch, and the named taps.

        ``boxes`` may be named and is not returned: boxes come from :meth:`decode`.
        """

    @abstractmethod
    def loss(self, prediction: Prediction, batch: Batch) -> dict[str, Tensor]:
        """Weighted supervised losses by name; their sum is what is minimised."""

    @abstractmethod
    def decode(self, prediction: Prediction) -> list[Detections]:
        """Boxes of each sample."""

    def init_weights(self) -> None:
        """Initialise every part by its own ``init_cfg`` (which may name a checkpoint)."""
        initialise(*(child for child in self.children() if isinstance(child, BaseModule)))

    def select_taps(self, available: Mapping[str, Callable[[], Tensor]], taps: Collection[str]) -> dict[str, Tensor]:
        """The asked taps, made only now, out of those that this detector has.

        Raises:
            ValueError: naming a tap that it does not have.
        """
        for name in taps:
            if name not in available and name != "boxes":
                known = ", ".join([*available, "boxes"])
                raise ValueError(f"{type(self).__name__} has no tap '{name}': it has {known}")
        return {name: available[name]() for name in taps if name != "boxes"}


def head_map(head: list[dict[str, Tensor]]) -> Tensor:
    """The ``head`` tap: all maps of all tasks in order, [B, sum of channels, H, W]."""
    return torch.cat([task_map for task in head for task_map in task.values()], dim=1)


def initialise(*modules: BaseModule) -> None:
    """Initialise the weights of mmengine's modules by their ``init_cfg``, which may name a checkpoint."""
    level = logging.root.manager.disable
    logging.disable(logging.INFO)  # mmengine reports every parameter
    try:
        for module in modules:
            module.init_weights()
    finally:
        logging.disable(level)


def build_detector(config: Mapping[str, Any]) -> Detector:
    """Build a detector from a config dict through the registry, with its weights initialised.

    Raises:
        ValueError: if ``type`` is missing or not a detector of this project.
    """
    import models.bevformer
    import models.camera
    import models.fusion
    import models.lidar
    import models.radar
    import models.simulated  # noqa: F401 (registers the detectors)
    from models.memory_layout import read_any_layout

    name = config.get("type")
    kind = MODELS.get(name) if isinstance(name, str) else None
    if kind is None or not issubclass(kind, Detector):
        raise ValueError(f"model type {name!r} is unknown: use LidarCenterPoint, RadarCenterPoint, CameraBEVDepth, "
                         "BEVFormer, BEVFusion or SimulatedFusion")
    detector = MODELS.build(copy.deepcopy(dict(config)))
    detector.init_weights()
    read_any_layout(detector)
    return detector
