"""LiDAR: mmdet3d's CenterPoint over its points, the teacher, and the LiDAR branch of a fusion teacher."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from models.detectors.points import PointCenterPoint, PointLift
from models.layers.grid import Grid
from models.layers.registry import MODELS
from models.ports import Batch

LIDAR_FEATURES = 5  # of a point: x, y, z, intensity, seconds into the past


@MODELS.register_module()
class LidarCenterPoint(PointCenterPoint):
    """CenterPoint over LiDAR points: x, y, z, intensity, seconds into the past. Reads `points` only."""

    sensors = ("points",)
    point_features = LIDAR_FEATURES

    def points(self, batch: Batch) -> list[Tensor]:
        """The batch's LiDAR points."""
        return batch.points


class LidarMap(PointLift):
    """CenterPoint's encoder: LiDAR points to a map on a detector's grid.

    Args:
        grid: on which the map ends.
        voxel: see `models.detectors.points.PointLift`.
        encoder: see `models.detectors.points.PointLift`.
        channels: of the map.
        middle: see `models.detectors.points.PointLift`.
        stage: config of a backbone with one stage on the middle encoder's map. Pillars have no convolution of their
            own: with the first stage of the LiDAR teacher's backbone they are as deep as a sparse encoder.
    """

    def __init__(
        self,
        grid: Grid,
        voxel: dict[str, Any],
        encoder: dict[str, Any],
        channels: int,
        middle: dict[str, Any] | None = None,
        stage: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(LIDAR_FEATURES, grid, voxel, encoder, middle)
        self.channels = channels
        self.stage = None if stage is None else MODELS.build(stage)

    def forward(self, points: list[Tensor]) -> Tensor:
        """[B, channels, H, W] of point clouds [P, 5]; without a stage zero where there is no voxel."""
        lifted = self.lift(points)
        return self.to_grid(lifted if self.stage is None else self.stage(lifted)[0])
