"""A pillar encoder that spends nothing on empty slots, and the map that pillars are laid out on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn

from models.layers.registry import MODELS


@MODELS.register_module()
class PointwisePillarNet(BaseModule):
    """PointPillars' feature net over the points that exist.

    mmdet3d's `PillarFeatureNet` runs over every slot of every pillar, most of them empty, and counts those in its
    batch statistics and its maximum. This one takes the same arguments and inputs, leaves the empty slots out, and
    scales every coordinate to about [-1, 1]: in metres the position in the scene, up to 50, hides the position in the
    pillar, up to 0.5, which is what places a box.

    Args:
        in_channels: features of a point; the first three are x, y, z.
        feat_channels: one number, the output's channels.
        voxel_size: [x, y, z] of a pillar, metres.
        point_cloud_range: mmdet3d's six limits, metres.
        norm_cfg: config of the normalisation.
    """

    def __init__(
        self,
        in_channels: int,
        feat_channels: list[int],
        voxel_size: list[float],
        point_cloud_range: list[float],
        norm_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if len(feat_channels) != 1:
            raise ValueError(
                f"PointwisePillarNet feat_channels {feat_channels} must be one number: "
                "use PillarFeatureNet for several layers"
            )
        self.linear = nn.Linear(in_channels + 6, feat_channels[0], bias=False)
        self.norm = build_norm_layer(norm_cfg or {"type": "BN1d", "eps": 1e-3, "momentum": 0.1}, feat_channels[0])[1]
        low, high = torch.tensor(point_cloud_range).view(2, 3)
        half_scene, half_pillar = (high - low) / 2, torch.tensor(voxel_size) / 2
        rest = torch.ones(in_channels - 3)
        self.register_buffer("size", torch.tensor(voxel_size), persistent=False)
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("scale", torch.cat([half_scene, rest, half_pillar, half_pillar]), persistent=False)

    size: Tensor
    low: Tensor
    scale: Tensor

    def forward(self, voxels: Tensor, counts: Tensor, coordinates: Tensor) -> Tensor:
        """Features [V, C] of pillars [V, M, in_channels] with counts [V] and coordinates [V, 4] (sample, z, y, x)."""
        mean = voxels[..., :3].sum(1) / counts[:, None]
        center = (coordinates[:, [3, 2, 1]] + 0.5) * self.size + self.low
        exists = torch.arange(voxels.shape[1], device=voxels.device) < counts[:, None]
        pillar = exists.nonzero()[:, 0]
        features = self.of_points(voxels[exists], mean[pillar], center[pillar])
        return torch.segment_reduce(features, "max", lengths=counts.long(), unsafe=True)

    def of_points(self, points: Tensor, mean: Tensor, center: Tensor) -> Tensor:
        """Features [P, C] of points [P, in_channels], given mean and centre [P, 3] of the pillar of each, metres."""
        xyz = points[:, :3]
        decorated = torch.cat([points, xyz - mean, xyz - center], dim=1) / self.scale
        return self._normalised(self.linear(decorated)).relu()

    def _normalised(self, features: Tensor) -> Tensor:
        """Features [P, C] after the norm; with fewer than two points, whose variance nothing tells, by its averages.

        RADAR may return nothing for a whole batch. SyncBatchNorm counts the points of all ranks, this rank must take
        part in it.
        """
        norm = self.norm
        if not (isinstance(norm, nn.BatchNorm1d) and norm.training and len(features) < 2):
            return norm(features)
        return F.batch_norm(features, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


@MODELS.register_module()
class PointPillarsScatter(nn.Module):
    """Pillars laid out on a map, zero where there is none.

    It is mmdet3d's, of which one part costs all (models.layers.registry).

    Args:
        in_channels: features of a pillar.
        output_shape: cells of the map along y and x.
    """

    def __init__(self, in_channels: int, output_shape: Sequence[int]) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.ny, self.nx = output_shape

    def forward(self, features: Tensor, coordinates: Tensor, samples: int) -> Tensor:
        """The map [samples, in_channels, ny, nx] of features [V, C] and coordinates [V, 4] (sample, z, y, x)."""
        sample, _, y, x = coordinates.long().unbind(1)
        canvas = features.new_zeros(samples, self.in_channels, self.ny * self.nx)
        canvas[sample, :, y * self.nx + x] = features
        return canvas.unflatten(2, (self.ny, self.nx))
