"""RADAR: a detector of its returns alone, and the map that joins a camera detector's BEV features.

No released code says how X³KD's RADAR branch looks; pillars on the detector's grid are this project's reading.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.detectors.points import PointCenterPoint, PointLift
from models.layers.grid import Grid
from models.layers.registry import MODELS
from models.ports import Batch

# x, y, z stay metres, in which pillars are cut; cross section in 20 dBsm, velocity in 10 m/s, age in 0.5 s.
RADAR_SCALE = (1.0, 1.0, 1.0, 20.0, 10.0, 10.0, 0.5)


def scaled(radar: list[Tensor]) -> list[Tensor]:
    """RADAR returns [R, 7] with the values after x, y, z at about [-1, 1]."""
    scale = torch.tensor(RADAR_SCALE, device=radar[0].device)
    return [returns.float() / scale for returns in radar]


@MODELS.register_module()
class RadarCenterPoint(PointCenterPoint):
    """CenterPoint over RADAR returns: x, y, z, cross section, velocity over ground, age. Reads `radar` only."""

    sensors = ("radar",)
    point_features = len(RADAR_SCALE)

    def points(self, batch: Batch) -> list[Tensor]:
        """The batch's RADAR returns, scaled."""
        return scaled(batch.radar)


class RadarMap(PointLift):
    """RADAR returns to a map on a detector's grid; keywords as of `models.detectors.points.PointLift`."""

    def __init__(self, grid: Grid, voxel: dict[str, Any], encoder: dict[str, Any]) -> None:
        super().__init__(len(RADAR_SCALE), grid, voxel, encoder)
        self.channels: int = encoder["feat_channels"][-1]

    def forward(self, radar: list[Tensor]) -> Tensor:
        """[B, channels, H, W] of returns [R, 7] per sample; zero where there is none."""
        return self.to_grid(self.lift(scaled(radar)))
