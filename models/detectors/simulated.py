"""The student of SimDistill: a camera detector built as the fusion teacher is, with a simulated LiDAR branch.

Zhao et al., "SimDistill", AAAI 2024. Two lifts of their own share the image features; the second stands in for the
LiDAR branch, with geometry compensation in the image plane, before its depth net, and in BEV. The released code runs
one lift twice and lets LiDAR depth into it; neither is so here.
"""

from __future__ import annotations

from collections.abc import Collection
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from models.detectors.camera import CameraDetector, view_channels
from models.detectors.fusion import ConvFuser
from models.layers.deformable import GeometryCompensation
from models.layers.registry import MODELS
from models.ports import Batch, Prediction


@MODELS.register_module()
class SimulatedFusion(CameraDetector):
    """Camera detector with a camera branch and a simulated LiDAR branch.

    At evaluation it reads `images`, `intrinsics`, `image_aug`, `lidar_SE3_cam` and `bev_aug`, nothing else.

    Args:
        grid: see `models.detectors.camera.CameraDetector`, as for all that is not named here.
        depth_net: see `models.detectors.camera.CameraBEVDepth`; each lift has its own.
        fused_channels: of the map that both branches become; the teacher's, to compare them as they are.
        bev_backbone: see `models.detectors.camera.CameraBEVDepth`.
        bev_neck: see `models.detectors.camera.CameraBEVDepth`.
        head: see `models.detectors.camera.CameraBEVDepth`.
        downsample: see `models.layers.lift.LiftSplat`.
        image_compensation: keywords of `models.layers.deformable.GeometryCompensation` on the image features
            that the simulated branch lifts. None: no such module.
        bev_compensation: the same on the map that the simulated branch lifted.

    Taps: `pv`, `bev_neck`, `head` as of `CameraBEVDepth`; `depth` of the camera branch; `bev_lift_camera`
    [B, C, H, W] the camera branch, `bev_view` [B, N * C, H, W] the cameras' parts of it; `bev_lift_simulated`
    [B, C, H, W] the simulated one after compensation, `bev_lift_uncompensated` before that in BEV; `bev_fused`
    [B, C_F, H, W] the fuser's output.
    """

    sensors = ("images",)
    places = MappingProxyType({**CameraDetector.places, "lift": ("camera_lift", "simulated_lift")})

    def __init__(
        self,
        grid: dict[str, Any],
        image_backbone: dict[str, Any],
        image_neck: dict[str, Any],
        stride: int,
        depth_net: dict[str, Any],
        depth_bins: list[float],
        fused_channels: int,
        bev_backbone: dict[str, Any],
        bev_neck: dict[str, Any],
        head: dict[str, Any],
        downsample: int = 1,
        image_compensation: dict[str, Any] | None = None,
        bev_compensation: dict[str, Any] | None = None,
        **camera: Any,
    ) -> None:
        super().__init__(grid, image_backbone, image_neck, stride, depth_bins, **camera)
        self.camera_lift = self.build_lift(depth_net, downsample)
        self.simulated_lift = self.build_lift(depth_net, downsample)
        channels = self.camera_lift.channels
        self.fuser = ConvFuser(2 * channels, fused_channels)
        self.build_bev(fused_channels, bev_backbone, bev_neck, head)
        # Beside the stream of random numbers, so that a student without compensation begins with the same weights.
        with torch.random.fork_rng(devices=[]):
            self.image_compensation = compensation(self.images.channels, image_compensation)
            self.bev_compensation = compensation(channels, bev_compensation)
        lifts = ("bev_lift_camera", "bev_lift_simulated", "bev_lift_uncompensated")
        self.tap_channels |= dict.fromkeys(lifts, channels) | view_channels(self.camera_lift)

    def forward(self, batch: Batch, taps: Collection[str] = ()) -> Prediction:
        """See `models.detectors.detector.Detector`."""
        batch = self.at_own_size(batch)
        features = self.images(batch.images[:, 0])
        camera = self.camera_lift(features, batch, views="bev_view" in taps)
        seen = self.image_compensation(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        lifted = self.simulated_lift(seen, batch)
        simulated: Tensor = self.bev_compensation(lifted.bev)
        lifts = {
            "pv": features,
            "bev_lift_camera": camera.bev,
            "bev_lift_simulated": simulated,
            "bev_lift_uncompensated": lifted.bev,
            **camera.parts,
        }
        return self.predict(self.fuser(camera.bev, simulated), (camera.depth, lifted.depth), taps, lifts)


def compensation(channels: int, config: dict[str, Any] | None) -> nn.Module:
    """The compensation of a map with so many channels; the identity without a config."""
    return nn.Identity() if config is None else GeometryCompensation(channels, **config)
