"""The camera student: a BEVDepth-type detector.

Images -> backbone and neck -> depth distribution and context -> lift into BEV -> BEV encoder -> CenterPoint head.
RADAR, where it is used, joins before the BEV encoder.
Li et al., "BEVDepth", AAAI 2023; the lift is that of Philion and Fidler, "Lift, Splat, Shoot", ECCV 2020.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, NamedTuple

import torch
from mmdet3d.registry import MODELS
from torch import Tensor

import models.backbones  # noqa: F401 (registers them)
from models.bev_pool import bev_pool, pool_index
from models.center_head import GridCenterHead
from models.depth_net import DepthBins, DepthNet, camera_parameters, depth_loss
from models.detector import Batch, Detections, Detector, Prediction, head_map
from models.grid import Grid
from models.radar import RadarMap

IMAGE_MEAN = (123.675, 116.28, 103.53)
IMAGE_STD = (58.395, 57.12, 57.375)
"""ImageNet's RGB statistics, which pretrained backbones expect."""


class Lifted(NamedTuple):
    """What the lift of one frame makes."""

    bev: Tensor
    """[B, C, H, W]."""
    features: Tensor
    """[B, N, C_pv, h, w], the image neck's output."""
    depth: Tensor
    """[B, N, D, h, w] logits."""


@MODELS.register_module()
class CameraBEVDepth(Detector):
    """BEVDepth-type camera detector.

    At evaluation it reads ``images``, ``intrinsics``, ``image_aug``, ``lidar_SE3_cam`` and ``bev_aug``, with ``radar``
    the RADAR returns too, and nothing else.

    Args:
        grid: keywords of :class:`~models.grid.Grid`.
        image_backbone: config of an mmdet backbone.
        image_neck: config of a neck with ``out_channels``, whose (first) output has stride ``stride``.
        stride: pixels per cell of the neck's output.
        depth_net: ``mid_channels``, ``context_channels``, ``blocks`` of :class:`~models.depth_net.DepthNet`.
        depth_bins: [low, high, step] in metres.
        bev_backbone: config of the BEV backbone; its ``in_channels`` are filled in.
        bev_neck: config of the BEV neck, which must end on the grid.
        head: config of the head; ``grid`` and ``in_channels`` are filled in.
        frames: 2 adds the previous keyframe, lifted into the current LiDAR frame without gradient.
        depth_loss_weight: 0 switches depth supervision off.
        depth_loss_kind: see :func:`~models.depth_net.depth_loss`.
        radar: ``voxel`` and ``encoder`` of :class:`~models.radar.RadarMap`, whose map joins the lifted ones.

    Taps: ``pv`` [B, N, C, h, w] the image neck; ``depth`` [B, N, D, h, w] probabilities; ``bev_lift`` the lifted
    current frame; ``bev_prev`` the lifted previous frame (with frames 2); ``bev_fused`` the BEV encoder's input,
    RADAR last; ``bev_neck`` the input of the head; ``head``.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, grid: dict[str, Any], image_backbone: dict[str, Any], image_neck: dict[str, Any], stride: int,
                 depth_net: dict[str, Any], depth_bins: list[float], bev_backbone: dict[str, Any],
                 bev_neck: dict[str, Any], head: dict[str, Any], frames: int = 1, depth_loss_weight: float = 3.0,
                 depth_loss_kind: Literal["bce", "ce"] = "bce", radar: dict[str, Any] | None = None) -> None:
        super().__init__()
        if frames not in (1, 2):
            raise ValueError(f"CameraBEVDepth frames {frames} must be 1, or 2 for the previous keyframe as well")
        if depth_loss_kind not in ("bce", "ce"):
            raise ValueError(f"CameraBEVDepth depth_loss_kind {depth_loss_kind!r} must be 'bce' or 'ce'")
        self.grid, self.frames, self.stride = Grid(**grid), frames, stride
        self.bins = DepthBins(*depth_bins)
        self.depth_loss_weight, self.depth_loss_kind = depth_loss_weight, depth_loss_kind
        self.image_backbone = MODELS.build(image_backbone)
        self.image_neck = MODELS.build(image_neck)
        pv_channels = total_channels(image_neck["out_channels"])
        self.depth_net = DepthNet(pv_channels, bins=self.bins.count, **depth_net)
        lift_channels = depth_net["context_channels"]
        self.radar = None if radar is None else RadarMap(self.grid, **radar)
        self.sensors = ("images",) if self.radar is None else ("images", "radar")
        fused_channels = lift_channels * frames + (0 if self.radar is None else self.radar.channels)
        self.bev_backbone = MODELS.build({**bev_backbone, "in_channels": fused_channels})
        self.bev_neck = MODELS.build(bev_neck)
        neck_channels = total_channels(bev_neck["out_channels"])
        head = {"type": "GridCenterHead", **head, "grid": grid, "in_channels": neck_channels}
        self.head: GridCenterHead = MODELS.build(head)
        self.targets = self.head.targets
        self.tap_channels = {"pv": pv_channels, "depth": self.bins.count, "bev_lift": lift_channels,
                             "bev_fused": fused_channels, "bev_neck": neck_channels}
        if frames == 2:
            self.tap_channels["bev_prev"] = lift_channels
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD).view(3, 1, 1), persistent=False)

    def forward(self, batch: Batch, taps: Collection[str] = ()) -> Prediction:
        """See :class:`Detector`."""
        if batch.images.shape[1] < self.frames:
            raise ValueError(f"CameraBEVDepth was built for {self.frames} frames, the batch has "
                             f"{batch.images.shape[1]}: set input.frames")
        current = self._lift(batch, 0)
        previous = self._lift_previous(batch) if self.frames == 2 else None
        maps = [current.bev] if previous is None else [current.bev, previous]
        if self.radar is not None:
            maps.append(self.radar(batch.radar))
        fused = maps[0] if len(maps) == 1 else torch.cat(maps, dim=1)
        neck = first(self.bev_neck(self.bev_backbone(fused)))
        if neck.shape[-1] != self.grid.size:
            raise ValueError(f"CameraBEVDepth: the BEV neck's map has {neck.shape[-1]} cells a side, the grid "
                             f"{self.grid.size}: change the strides of bev_backbone and bev_neck")
        head = self.head(neck)
        available = {
            "pv": lambda: current.features,
            "depth": lambda: current.depth.softmax(2),
            "bev_lift": lambda: current.bev,
            "bev_fused": lambda: fused,
            "bev_neck": lambda: neck,
            "head": lambda: head_map(head),
        }
        if previous is not None:
            available["bev_prev"] = lambda: previous
        return Prediction(head, self.select_taps(available, taps), current.depth)

    def loss(self, prediction: Prediction, batch: Batch) -> dict[str, Tensor]:
        """``heatmap``, ``box`` and, where it is weighted, ``depth``."""
        losses = self.head.losses(prediction.head, self.targets(batch.boxes, batch.labels))
        if self.depth_loss_weight > 0 and prediction.depth is not None:
            value = depth_loss(prediction.depth, batch.depth, self.bins, self.depth_loss_kind)
            losses["depth"] = self.depth_loss_weight * value
        return losses

    def decode(self, prediction: Prediction) -> list[Detections]:
        """Boxes of each sample, in the frame that ``bev_aug`` leads to."""
        return self.head.decode(prediction.head)

    def _lift_previous(self, batch: Batch) -> Tensor:
        """BEV of the previous keyframe in the current LiDAR frame; no gradient, as BEVDepth has it.

        The camera poses of that frame lead to the current LiDAR frame, so the maps are aligned by ego motion.
        """
        with torch.no_grad():
            return self._lift(batch, 1).bev

    def _lift(self, batch: Batch, frame: int) -> Lifted:
        """Lift all cameras of one frame into BEV."""
        images = batch.images[:, frame]
        batch_size, cameras, _, height, width = images.shape
        if height % self.stride or width % self.stride:
            raise ValueError(f"CameraBEVDepth: image size {height}x{width} is not a multiple of stride {self.stride}")
        x = (images.flatten(0, 1).float() - self.mean) / self.std
        features = first(self.image_neck(self.image_backbone(x.contiguous(memory_format=torch.channels_last))))
        if features.shape[-2:] != (height // self.stride, width // self.stride):
            raise ValueError(f"CameraBEVDepth: the image neck's map is {list(features.shape[-2:])} for images "
                             f"{height}x{width}: stride {self.stride} does not describe it")
        # The pose of the current frame for every frame: cameras are mounted rigidly, and the pose of a past frame
        # holds the ego motion, which says nothing about depth.
        camera = camera_parameters(batch.intrinsics[:, frame].flatten(0, 1), batch.image_aug[:, frame].flatten(0, 1),
                                   batch.lidar_SE3_cam[:, 0].flatten(0, 1), (height, width))
        logits, context = self.depth_net(features, camera.float())
        bev = self._splat(context, logits, self._cells(batch, frame, features.shape[-2:]), batch_size)
        views = (batch_size, cameras)
        return Lifted(bev, features.unflatten(0, views), logits.unflatten(0, views))

    def _splat(self, context: Tensor, logits: Tensor, cells: Tensor, batch_size: int) -> Tensor:
        """Pool context [M, C, h, w], weighted by depth [M, D, h, w], into cells [M h w, D]: [B, C, H, W]."""
        count = batch_size * self.grid.size**2
        features = context.permute(0, 2, 3, 1).flatten(0, 2)
        depth = logits.permute(0, 2, 3, 1).flatten(0, 2).float().softmax(-1)
        pooled = bev_pool(features, depth, pool_index(cells, count))
        return pooled.view(batch_size, self.grid.size, self.grid.size, -1).permute(0, 3, 1, 2)

    @torch.no_grad()
    def _cells(self, batch: Batch, frame: int, shape: torch.Size) -> Tensor:
        """Cell of each frustum point [B N h w, D], counted through the batch; -1 outside the grid."""
        device = batch.images.device
        # Whole numbers are the centres of pixels, so a cell of `stride` pixels has its centre half a pixel lower.
        centers = ((torch.arange(n, device=device) + 0.5) * self.stride - 0.5 for n in shape)
        v, u = torch.meshgrid(*centers, indexing="ij")
        pixel = torch.stack([u, v, torch.ones_like(u)], dim=-1).view(-1, 3)
        # Autocast would round metres and pixels to eight bits.
        with torch.autocast(device.type, enabled=False):
            pose = batch.bev_aug.float()[:, None] @ batch.lidar_SE3_cam[:, frame].float()
            to_pixels = batch.image_aug[:, frame].float() @ batch.intrinsics[:, frame].float()
            rays = pixel @ (pose[..., :3, :3] @ torch.linalg.inv(to_pixels)).mT  # [B, N, h w, 3], unit camera depth
            points = rays.unsqueeze(-2) * self.bins.centers(device)[:, None] + pose[..., None, None, :3, 3]
            column_row = torch.floor(self.grid.to_cells(points[..., :2])).long()
        low, high = self.grid.z
        inside = ((column_row >= 0) & (column_row < self.grid.size)).all(-1)
        inside &= (points[..., 2] >= low) & (points[..., 2] < high)
        sample = torch.arange(len(points), device=device).view(-1, 1, 1, 1)
        cell = (sample * self.grid.size + column_row[..., 1]) * self.grid.size + column_row[..., 0]
        return torch.where(inside, cell, -1).flatten(0, 2)


def first(maps: Tensor | list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """The map of a neck that returns one, or the first of several."""
    return maps if isinstance(maps, Tensor) else maps[0]


def total_channels(out_channels: int | list[int]) -> int:
    """Channels of a neck's output: SECONDFPN lists those it concatenates, FPN has one number."""
    return out_channels if isinstance(out_channels, int) else sum(out_channels)
