"""The fusion teacher: LiDAR and cameras in one BEV map.

Liu et al., "BEVFusion", ICRA 2023, with CenterPoint's head, which SimDistill needs. Its camera branch reads no LiDAR:
the depth of its lift is the depth net's own, and nothing in it belongs to a student.
"""

from __future__ import annotations

from collections.abc import Collection
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from models.detectors.camera import CameraDetector, view_channels
from models.detectors.lidar import LidarMap
from models.layers.registry import MODELS
from models.ports import Batch, Prediction


class ConvFuser(nn.Module):
    """Two BEV maps to one: concatenation, 3x3 convolution, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """[B, out_channels, H, W] of maps [B, C1, H, W] and [B, C2, H, W]."""
        return self.norm(self.conv(torch.cat([first, second], dim=1))).relu()


@MODELS.register_module()
class BEVFusion(CameraDetector):
    """LiDAR-camera detector. Reads `points` and what `models.detectors.camera.CameraBEVDepth` reads.

    Args:
        grid: see `models.detectors.camera.CameraDetector`, as for all that is not named here.
        depth_net: see `models.detectors.camera.CameraBEVDepth`.
        lidar: keywords of `models.detectors.lidar.LidarMap` without the grid.
        fused_channels: of the map that both become.
        bev_backbone: see `models.detectors.camera.CameraBEVDepth`.
        bev_neck: see `models.detectors.camera.CameraBEVDepth`.
        head: see `models.detectors.camera.CameraBEVDepth`.
        downsample: see `models.layers.lift.LiftSplat`.

    Taps: `pv`, `depth`, `bev_neck`, `head` as of `CameraBEVDepth`; `bev_lift_camera` [B, C, H, W] the
    lifted images, `bev_view` [B, N * C, H, W] the cameras' parts of it; `bev_lift_lidar` [B, C_L, H, W] the LiDAR
    branch; `bev_fused` [B, C_F, H, W] the fuser's output.
    """

    sensors = ("images", "points")
    places = MappingProxyType(
        {
            "encoder": ("lidar.encoder",),
            "middle": ("lidar.middle",),
            "backbone": ("lidar.stage", "bev_backbone"),
            "neck": ("bev_neck",),
        }
    )

    def __init__(
        self,
        grid: dict[str, Any],
        image_backbone: dict[str, Any],
        image_neck: dict[str, Any],
        stride: int,
        depth_net: dict[str, Any],
        depth_bins: list[float],
        lidar: dict[str, Any],
        fused_channels: int,
        bev_backbone: dict[str, Any],
        bev_neck: dict[str, Any],
        head: dict[str, Any],
        downsample: int = 1,
        **camera: Any,
    ) -> None:
        super().__init__(grid, image_backbone, image_neck, stride, depth_bins, **camera)
        self.lift = self.build_lift(depth_net, downsample)
        self.lidar = LidarMap(self.grid, **lidar)
        self.fuser = ConvFuser(self.lift.channels + self.lidar.channels, fused_channels)
        self.build_bev(fused_channels, bev_backbone, bev_neck, head)
        self.tap_channels |= {"bev_lift_camera": self.lift.channels, "bev_lift_lidar": self.lidar.channels}
        self.tap_channels |= view_channels(self.lift)

    def forward(self, batch: Batch, taps: Collection[str] = ()) -> Prediction:
        """See `models.detectors.detector.Detector`."""
        batch = self.at_own_size(batch)
        features = self.images(batch.images[:, 0])
        camera = self.lift(features, batch, views="bev_view" in taps)
        lidar = self.lidar(batch.points)
        lifts = {"pv": features, "bev_lift_camera": camera.bev, "bev_lift_lidar": lidar, **camera.parts}
        return self.predict(self.fuser(camera.bev, lidar), (camera.depth,), taps, lifts)
