"""Point clouds to BEV maps, and a CenterPoint detector on such a map, for every sensor that gives points.

Assembled from the registry. Yin, Zhou, Kraehenbuehl, CVPR 2021; pillars after Lang et al., "PointPillars", CVPR
2019.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.ops import Voxelization
from mmengine.model import BaseModule
from torch import Tensor

import models.layers.pillars  # noqa: F401 (registers its encoder)
from models.detectors.detector import Detector
from models.layers.grid import Grid
from models.layers.padded_points import lift_padded
from models.layers.registry import MODELS
from models.layers.sparse_convolution import require_spconv
from models.ports import Batch, Detections, Prediction, head_map


class PointLift(BaseModule):
    """Point clouds to a dense BEV map: voxels, their encoder, and the middle encoder that lays them out.

    Args:
        features: values of a point, of which the first three are x, y, z in metres.
        grid: the extent, and the cells that `to_grid` ends on.
        voxel: `size` [x, y] of a pillar or [x, y, z] of a voxel in metres, `max_points` of one, `max_voxels`
            per sample (one number, or one for training and one for evaluation).
        encoder: config of the voxel encoder; its sizes are filled in.
        middle: config of the middle encoder: `PointPillarsScatter` (default) or `SparseEncoder` (needs spconv).
    """

    def __init__(
        self,
        features: int,
        grid: Grid,
        voxel: dict[str, Any],
        encoder: dict[str, Any],
        middle: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.features, self.grid = features, grid
        low, high = grid.z
        size = [*voxel["size"], high - low] if len(voxel["size"]) == 2 else list(voxel["size"])
        extent = grid.point_cloud_range
        cells = [round((extent[i + 3] - extent[i]) / size[i]) for i in range(3)]
        self.voxelize = Voxelization(size, extent, voxel["max_points"], voxel["max_voxels"])
        middle = dict(middle or {"type": "PointPillarsScatter"})
        if middle["type"] == "PointPillarsScatter":
            encoder = {"in_channels": features, "voxel_size": size, "point_cloud_range": extent, **encoder}
            middle = {"in_channels": encoder["feat_channels"][-1], "output_shape": cells[:2][::-1], **middle}
        else:
            require_spconv(middle["type"])
            encoder = {"num_features": features, **encoder}
            middle = {
                "in_channels": features,
                "sparse_shape": [cells[2] + 1, cells[1], cells[0]],
                **{key: as_tuples(value) for key, value in middle.items()},
            }
        self.encoder = MODELS.build(encoder)
        self.middle = MODELS.build(middle)

    def lift(self, points: list[Tensor]) -> Tensor:
        """The middle encoder's dense map [B, C, h, w] of point clouds [P, features] or wider."""
        # Coordinates up to 50 m do not fit bfloat16 (0.25 m steps), so this part stays in float32 under autocast.
        with torch.autocast(points[0].device.type, enabled=False):
            if torch.compiler.is_exporting():
                clouds = (sample[:, : self.features].float() for sample in points)
                return torch.stack([lift_padded(self.voxelize, self.encoder, self.middle, cloud) for cloud in clouds])
            voxels, coordinates, counts = self._voxels(points)
            features = self.encoder(voxels, counts, coordinates)
            return self.middle(features, coordinates, len(points))

    def to_grid(self, lifted: Tensor) -> Tensor:
        """The map, max-pooled to the grid's cells."""
        factor, rest = divmod(lifted.shape[-1], self.grid.size)
        if factor < 1 or rest:
            raise ValueError(
                f"{type(self).__name__}: the middle encoder's map has {lifted.shape[-1]} cells a side, "
                f"the grid {self.grid.size}: choose voxel.size so that the first is a multiple"
            )
        return F.max_pool2d(lifted, factor) if factor > 1 else lifted

    def _voxels(self, points: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Voxels [V, max_points, features], their coordinates [V, 4] (sample, z, y, x) and point counts [V]."""
        parts = [self._voxels_of_sample(sample[:, : self.features].float().contiguous()) for sample in points]
        coordinates = [F.pad(part[1], (1, 0), value=i) for i, part in enumerate(parts)]
        return torch.cat([part[0] for part in parts]), torch.cat(coordinates), torch.cat([part[2] for part in parts])

    def _voxels_of_sample(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Voxels, coordinates [V, 3] (z, y, x) and point counts of points [P, features]."""
        if len(points):
            return self.voxelize(points)
        # mmcv's CUDA kernel cannot be launched over no points.
        coordinates = points.new_zeros(0, 3, dtype=torch.int32)
        return points.new_zeros(0, self.voxelize.max_num_points, self.features), coordinates, coordinates[:, 0]


class PointCenterPoint(Detector, PointLift):
    """CenterPoint over pillars or voxels of one sensor's points.

    Args:
        grid: keywords of `models.layers.grid.Grid`, the head's grid.
        voxel: see `PointLift`.
        encoder: see `PointLift`.
        backbone: config of the BEV backbone on the middle encoder's map.
        neck: config of the BEV neck, which must end on the head's grid.
        head: config of the head; `grid` and `in_channels` are filled in.
        middle: see `PointLift`.

    Taps: `bev_lift` the middle encoder's map, max-pooled to the head's grid, zero where there is no voxel;
    `bev_neck` the input of the head; `head`.
    """

    point_features: int  # values of a point of this sensor

    def __init__(
        self,
        grid: dict[str, Any],
        voxel: dict[str, Any],
        encoder: dict[str, Any],
        backbone: dict[str, Any],
        neck: dict[str, Any],
        head: dict[str, Any],
        middle: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(self.point_features, Grid(**grid), voxel, encoder, middle)
        self.backbone = MODELS.build(backbone)
        self.neck = MODELS.build(neck)
        neck_channels = sum(neck["out_channels"])
        head = {"type": "GridCenterHead", **head, "grid": grid, "in_channels": neck_channels}
        self.head = MODELS.build(head)
        self.targets = self.head.targets
        self.tap_channels = {"bev_lift": backbone["in_channels"], "bev_neck": neck_channels}

    @abstractmethod
    def points(self, batch: Batch) -> list[Tensor]:
        """The sensor's points [P, point_features] or wider of each sample."""

    def forward(self, batch: Batch, taps: Collection[str] = ()) -> Prediction:
        """See `Detector`; reads what `points` reads, nothing else."""
        lifted = self.lift(self.points(batch))
        neck = self.neck(self.backbone(lifted.contiguous(memory_format=torch.channels_last)))[0]
        if neck.shape[-1] != self.grid.size:
            raise ValueError(
                f"{type(self).__name__}: the neck's map has {neck.shape[-1]} cells a side, the head "
                f"{self.grid.size}: change the strides of backbone and neck, or voxel.size"
            )
        head = self.head(neck)
        available = {
            "bev_lift": lambda: self.to_grid(lifted),
            "bev_neck": lambda: neck,
            "head": lambda: head_map(head),
        }
        return Prediction(head, self.select_taps(available, taps))

    def loss(self, prediction: Prediction, batch: Batch) -> dict[str, Tensor]:
        """`heatmap` and `box`."""
        return self.head.losses(prediction.head, self.targets(batch.boxes, batch.labels), batch.labelled)

    def decode(self, prediction: Prediction) -> list[Detections]:
        """Boxes of each sample, in the frame of the batch's points."""
        return self.head.decode(prediction.head)


def as_tuples(value: Any) -> Any:
    """Lists, as YAML has them, as the tuples that SparseEncoder insists on."""
    return tuple(as_tuples(item) for item in value) if isinstance(value, list) else value
