"""Detectors that lift camera images into BEV, and the plain one of them: a BEVDepth-type detector.

Images -> backbone and neck -> depth distribution and context -> lift into BEV -> BEV encoder -> CenterPoint head.
RADAR, where it is used, joins before the BEV encoder.
Li et al., "BEVDepth", AAAI 2023. Without depth supervision and with one frame it is the camera part of BEVFusion
(Liu et al., ICRA 2023), the baseline of SimDistill.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from models.detectors.detector import Detector
from models.detectors.radar import RadarMap
from models.layers.depth_net import DepthBins, depth_loss
from models.layers.grid import Grid
from models.layers.images import ImageEncoder, depth_at, first, resized, total_channels
from models.layers.lift import LiftSplat
from models.layers.registry import MODELS
from models.ports import Batch, Detections, Prediction, head_map

CAMERAS = 6  # on the nuScenes rig


def view_channels(lift: LiftSplat) -> dict[str, int]:
    """Channels of the tap `bev_view` of a lift; nothing where the cameras' parts do not add up to its map."""
    return {"bev_view": CAMERAS * lift.channels} if lift.has_views else {}


class CameraDetector(Detector):
    """What all detectors share that lift images: image encoder, BEV encoder and head, losses and decoding.

    Args:
        grid: keywords of `models.layers.grid.Grid`.
        image_backbone: see `models.layers.images.ImageEncoder`.
        image_neck: see `models.layers.images.ImageEncoder`.
        stride: pixels per cell of the image neck's output.
        depth_bins: [low, high, step] in metres; None: it predicts no depth.
        depth_loss_weight: 0 switches depth supervision off.
        depth_loss_kind: see `models.layers.depth_net.depth_loss`.
        image: height and width that it sees; it brings images of another size to that. None: those of the batch.
    """

    # The BEV encoder of a LiDAR teacher, for those that inherit it.
    places = MappingProxyType({"backbone": ("bev_backbone",), "neck": ("bev_neck",)})

    def __init__(
        self,
        grid: dict[str, Any],
        image_backbone: dict[str, Any],
        image_neck: dict[str, Any],
        stride: int,
        depth_bins: list[float] | None,
        depth_loss_weight: float = 3.0,
        depth_loss_kind: Literal["bce", "ce"] = "bce",
        image: list[int] | None = None,
    ) -> None:
        super().__init__()
        if depth_loss_kind not in ("bce", "ce"):
            raise ValueError(f"{type(self).__name__} depth_loss_kind {depth_loss_kind!r} must be 'bce' or 'ce'")
        self.grid, self.stride = Grid(**grid), stride
        self.bins = None if depth_bins is None else DepthBins(*depth_bins)
        self.depth_loss_weight, self.depth_loss_kind = depth_loss_weight, depth_loss_kind
        self.image = None if image is None else (image[0], image[1])
        self.images = ImageEncoder(image_backbone, image_neck, stride)

    def build_lift(self, depth_net: dict[str, Any], downsample: int) -> LiftSplat:
        """A lift of the image features onto the grid."""
        assert self.bins is not None
        return LiftSplat(self.grid, self.images.channels, self.stride, depth_net, self.bins, downsample)

    def build_bev(
        self, fused_channels: int, backbone: dict[str, Any], neck: dict[str, Any], head: dict[str, Any]
    ) -> None:
        """BEV encoder and head on a fused map; a backbone that names no `in_channels` gets the map's."""
        self.bev_backbone = MODELS.build({**backbone, "in_channels": fused_channels})
        self.bev_neck = MODELS.build(neck)
        neck_channels = total_channels(neck["out_channels"])
        head = {"type": "GridCenterHead", **head, "grid": vars(self.grid), "in_channels": neck_channels}
        self.head = MODELS.build(head)
        self.targets = self.head.targets
        self.tap_channels = {"pv": self.images.channels, "bev_fused": fused_channels, "bev_neck": neck_channels}
        if self.bins is not None:
            self.tap_channels["depth"] = self.bins.count

    @property
    def learns_depth(self) -> bool:
        """Whether a loss compares with the batch's depth."""
        return self.bins is not None and self.depth_loss_weight > 0

    def at_own_size(self, batch: Batch) -> Batch:
        """The batch with the images, and what belongs to them, at the size that this detector sees."""
        return batch if self.image is None else resized(batch, self.image, self.stride)

    def predict(
        self, fused: Tensor, depth: tuple[Tensor, ...], taps: Collection[str], lifts: dict[str, Tensor]
    ) -> Prediction:
        """The prediction on a fused map [B, C, H, W].

        Args:
            fused: input of the BEV encoder.
            depth: logits of the current frame, one per lift; the first is the tap `depth`.
            taps: that are asked for.
            lifts: the taps that are made before the BEV encoder.
        """
        neck = first(self.bev_neck(self.bev_backbone(fused)))
        if neck.shape[-1] != self.grid.size:
            raise ValueError(
                f"{type(self).__name__}: the BEV neck's map has {neck.shape[-1]} cells a side, the grid "
                f"{self.grid.size}: change the strides of bev_backbone and bev_neck"
            )
        head = self.head(neck)
        maps = {**lifts, "bev_fused": fused, "bev_neck": neck}
        available: dict[str, Callable[[], Tensor]] = {name: partial(maps.__getitem__, name) for name in maps}
        available["head"] = lambda: head_map(head)
        if depth:
            available["depth"] = lambda: depth[0].softmax(2)
        return Prediction(head, self.select_taps(available, taps), depth)

    def loss(self, prediction: Prediction, batch: Batch) -> dict[str, Tensor]:
        """`heatmap`, `box` and, where it is weighted, `depth`, the mean over the lifts."""
        losses = self.head.losses(prediction.head, self.targets(batch.boxes, batch.labels), batch.labelled)
        if self.learns_depth:
            assert self.bins is not None
            supervision = batch.depth if self.image is None else depth_at(batch, self.image, self.stride)
            values = [depth_loss(logits, supervision, self.bins, self.depth_loss_kind) for logits in prediction.depth]
            losses["depth"] = self.depth_loss_weight * torch.stack(values).mean()
        return losses

    def decode(self, prediction: Prediction) -> list[Detections]:
        """Boxes of each sample, in the frame that `bev_aug` leads to."""
        return self.head.decode(prediction.head)


@MODELS.register_module()
class CameraBEVDepth(CameraDetector):
    """BEVDepth-type camera detector.

    At evaluation it reads `images`, `intrinsics`, `image_aug`, `lidar_SE3_cam` and `bev_aug`, with `radar`
    the RADAR returns too, and nothing else.

    Args:
        grid: see `CameraDetector`, as for all that is not named here.
        depth_net: `mid_channels`, `context_channels`, `blocks` of `models.layers.depth_net.DepthNet`.
        bev_backbone: config of the BEV backbone; its `in_channels` are filled in.
        bev_neck: config of the BEV neck, which must end on the grid.
        head: config of the head; `grid` and `in_channels` are filled in.
        downsample: see `models.layers.lift.LiftSplat`.
        frames: 2 adds the previous keyframe, lifted into the current LiDAR frame without gradient.
        radar: `voxel` and `encoder` of `models.detectors.radar.RadarMap`, whose map joins the lifted ones.

    Taps: `pv` [B, N, C, h, w] the image neck; `depth` [B, N, D, h, w] probabilities; `bev_lift` the lifted
    current frame; `bev_view` [B, N * C, H, W] the cameras' parts of it, which add up to it (with downsample 1);
    `bev_prev` the lifted previous frame (with frames 2); `bev_fused` the BEV encoder's input, RADAR last;
    `bev_neck` the input of the head; `head`.
    """

    def __init__(
        self,
        grid: dict[str, Any],
        image_backbone: dict[str, Any],
        image_neck: dict[str, Any],
        stride: int,
        depth_net: dict[str, Any],
        depth_bins: list[float],
        bev_backbone: dict[str, Any],
        bev_neck: dict[str, Any],
        head: dict[str, Any],
        downsample: int = 1,
        frames: int = 1,
        radar: dict[str, Any] | None = None,
        **camera: Any,
    ) -> None:
        super().__init__(grid, image_backbone, image_neck, stride, depth_bins, **camera)
        if frames not in (1, 2):
            raise ValueError(f"CameraBEVDepth frames {frames} must be 1, or 2 for the previous keyframe as well")
        self.frames = frames
        self.lift = self.build_lift(depth_net, downsample)
        self.radar = None if radar is None else RadarMap(self.grid, **radar)
        self.sensors = ("images",) if self.radar is None else ("images", "radar")
        fused_channels = self.lift.channels * frames + (0 if self.radar is None else self.radar.channels)
        self.build_bev(fused_channels, bev_backbone, bev_neck, head)
        self.tap_channels |= {"bev_lift": self.lift.channels}
        self.tap_channels |= view_channels(self.lift)
        if frames == 2:
            self.tap_channels["bev_prev"] = self.lift.channels

    def forward(self, batch: Batch, taps: Collection[str] = ()) -> Prediction:
        """See `Detector`."""
        if batch.images.shape[1] < self.frames:
            raise ValueError(
                f"CameraBEVDepth was built for {self.frames} frames, the batch has "
                f"{batch.images.shape[1]}: set input.frames"
            )
        batch = self.at_own_size(batch)
        features = self.images(batch.images[:, 0])
        current = self.lift(features, batch, views="bev_view" in taps)
        lifts = {"pv": features, "bev_lift": current.bev, **current.parts}
        maps = [current.bev]
        if self.frames == 2:
            maps.append(self._lift_previous(batch))
            lifts["bev_prev"] = maps[1]
        if self.radar is not None:
            maps.append(self.radar(batch.radar))
        fused = maps[0] if len(maps) == 1 else torch.cat(maps, dim=1)
        return self.predict(fused, (current.depth,), taps, lifts)

    def _lift_previous(self, batch: Batch) -> Tensor:
        """BEV of the previous keyframe in the current LiDAR frame; no gradient, as BEVDepth has it.

        The camera poses of that frame lead to the current LiDAR frame, so the maps are aligned by ego motion.
        """
        with torch.no_grad():
            return self.lift(self.images(batch.images[:, 1]), batch, 1).bev
