"""The LiDAR teacher: mmdet3d's CenterPoint over LiDAR points."""

from __future__ import annotations

from mmdet3d.registry import MODELS
from torch import Tensor

from models.detector import Batch
from models.points import PointCenterPoint


@MODELS.register_module()
class LidarCenterPoint(PointCenterPoint):
    """CenterPoint over LiDAR points: x, y, z, intensity, seconds into the past. Reads ``points`` only."""

    sensors = ("points",)
    point_features = 5

    def points(self, batch: Batch) -> list[Tensor]:
        """The batch's LiDAR points."""
        return batch.points
