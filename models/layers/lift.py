"""Lift image features into BEV by a distribution over depth.

Philion and Fidler, "Lift, Splat, Shoot", ECCV 2020; the depth net is BEVDepth's (Li et al., AAAI 2023).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.layers.bev_pool import bev_pool, bev_pool_by_product, pool_index
from models.layers.depth_net import DepthBins, DepthNet, camera_parameters
from models.layers.grid import Grid
from models.layers.projection import inverse3
from models.ports import Batch


class Lifted(NamedTuple):
    """What the lift of one frame makes."""

    bev: Tensor  # [B, C, H, W] on the grid
    depth: Tensor  # [B, N, D, h, w] logits
    views: Tensor | None = None  # [B, N * C, H, W], where asked for: the cameras' parts of `bev` one after another

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tap `bev_view`, where it was asked for."""
        return {} if self.views is None else {"bev_view": self.views}


class LiftSplat(nn.Module):
    """Depth net and pooling into cells.

    Args:
        grid: on which the map ends.
        in_channels: of the image features.
        stride: pixels per cell of the image features.
        depth_net: `mid_channels`, `context_channels`, `blocks` of `models.layers.depth_net.DepthNet`.
        bins: of depth.
        downsample: cells are pooled this many times finer than the grid's, then convolutions bring them onto it
            (BEVFusion pools at 0.3 m for a grid of 0.6 m). 1: pooled on the grid, no convolution.
    """

    def __init__(
        self, grid: Grid, in_channels: int, stride: int, depth_net: dict[str, Any], bins: DepthBins, downsample: int = 1
    ) -> None:
        super().__init__()
        self.cells = Grid(grid.range, grid.cell / downsample, grid.z)
        self.stride, self.bins = stride, bins
        self.depth_net = DepthNet(in_channels, bins=bins.count, **depth_net)
        self.channels: int = depth_net["context_channels"]
        self.reduce = reduction(self.channels, downsample) if downsample > 1 else nn.Identity()

    def forward(self, features: Tensor, batch: Batch, frame: int = 0, views: bool = False) -> Lifted:
        """Lift the features [B, N, C, h, w] of all cameras of one frame.

        Args:
            features: of the image neck.
            batch: with the cameras.
            frame: of the batch, whose features they are.
            views: whether to give the cameras' parts as well; the map is then their sum.

        Raises:
            ValueError: parts are asked for, and convolutions follow the pooling, after which none is one camera's.
        """
        if views and not self.has_views:
            raise ValueError("bev_view: the parts of the cameras do not add up behind convolutions: use downsample 1")
        # The pose of the current frame for every frame: cameras are mounted rigidly, and the pose of a past frame
        # holds the ego motion, which says nothing about depth.
        height, width = batch.images.shape[-2:]
        camera = camera_parameters(
            batch.intrinsics[:, frame].flatten(0, 1),
            batch.image_aug[:, frame].flatten(0, 1),
            batch.lidar_SE3_cam[:, 0].flatten(0, 1),
            (height, width),
        )
        logits, context = self.depth_net(features.flatten(0, 1), camera.float())
        cells, depth = self._cells(batch, frame, features.shape[-2:], views), logits.unflatten(0, features.shape[:2])
        if not views:
            return Lifted(self.reduce(self._splat(context, logits, cells, len(features))), depth)
        parts = self._splat(context, logits, cells, len(logits)).unflatten(0, features.shape[:2])
        return Lifted(parts.sum(1), depth, parts.flatten(1, 2))

    @property
    def has_views(self) -> bool:
        """Whether the map is the sum of what the cameras were pooled to."""
        return isinstance(self.reduce, nn.Identity)

    def _splat(self, context: Tensor, logits: Tensor, cells: Tensor, maps: int) -> Tensor:
        """Pool context [M, C, h, w], weighted by depth [M, D, h, w], into cells [M h w, D]: [maps, C, H, W]."""
        features = context.permute(0, 2, 3, 1).flatten(0, 2)
        depth = logits.permute(0, 2, 3, 1).flatten(0, 2).float().softmax(-1)
        count = maps * self.cells.size**2
        pooled = (
            bev_pool_by_product(features.float(), depth, cells, count)
            if torch.compiler.is_exporting()
            else bev_pool(features, depth, pool_index(cells, count))
        )
        return pooled.view(maps, self.cells.size, self.cells.size, -1).permute(0, 3, 1, 2)

    @torch.no_grad()
    def _cells(self, batch: Batch, frame: int, shape: torch.Size, views: bool = False) -> Tensor:
        """Cell of each frustum point [B N h w, D], -1 outside the grid; counted through the batch, or its views."""
        device = batch.images.device
        # Whole numbers are the centres of pixels, so a cell of `stride` pixels has its centre half a pixel lower.
        centers = ((torch.arange(n, device=device) + 0.5) * self.stride - 0.5 for n in shape)
        v, u = torch.meshgrid(*centers, indexing="ij")
        pixel = torch.stack([u, v, torch.ones_like(u)], dim=-1).view(-1, 3)
        # Autocast would round metres and pixels to eight bits.
        with torch.autocast(device.type, enabled=False):
            pose = batch.bev_aug.float()[:, None] @ batch.lidar_SE3_cam[:, frame].float()
            to_pixels = batch.image_aug[:, frame].float() @ batch.intrinsics[:, frame].float()
            rays = pixel @ (pose[..., :3, :3] @ inverse3(to_pixels)).mT  # [B, N, h w, 3], unit camera depth
            points = rays.unsqueeze(-2) * self.bins.centers(device)[:, None] + pose[..., None, None, :3, 3]
            column_row = torch.floor(self.cells.to_cells(points[..., :2])).long()
        low, high = self.cells.z
        inside = ((column_row >= 0) & (column_row < self.cells.size)).all(-1)
        inside &= (points[..., 2] >= low) & (points[..., 2] < high)
        cameras = points.shape[1]
        number = torch.arange(len(points) * cameras, device=device).view(-1, cameras, 1, 1)
        number = number if views else number // cameras
        cell = (number * self.cells.size + column_row[..., 1]) * self.cells.size + column_row[..., 0]
        return torch.where(inside, cell, -1).flatten(0, 2)


def reduction(channels: int, stride: int) -> nn.Sequential:
    """Three 3x3 convolutions with batch norm and ReLU, of which the middle one has the stride (BEVFusion)."""
    return nn.Sequential(
        *(
            layer
            for step in (1, stride, 1)
            for layer in (
                nn.Conv2d(channels, channels, 3, stride=step, padding=1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            )
        )
    )
