"""The camera-aware depth network of BEVDepth, and its supervision by LiDAR.

Li et al., "BEVDepth: Acquisition of Reliable Depth for Multi-view 3D Object Detection", AAAI 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from models.layers.backbones import BasicBlock
from models.layers.processes import divisor

CAMERA_PARAMETERS = 22


@dataclass(frozen=True)
class DepthBins:
    """Equal steps of depth (along the camera's z axis) in metres."""

    low: float
    high: float
    step: float

    @property
    def count(self) -> int:
        """Number of bins."""
        return round((self.high - self.low) / self.step)

    def centers(self, device: torch.device | None = None) -> Tensor:
        """[D] metres."""
        return self.low + (torch.arange(self.count, device=device) + 0.5) * self.step

    def index(self, depth: Tensor) -> Tensor:
        """Bin of each depth, int64; outside [low, high) it is below 0 or at least `count`."""
        return torch.floor((depth - self.low) / self.step).long()


def camera_parameters(intrinsics: Tensor, image_aug: Tensor, lidar_SE3_cam: Tensor, size: tuple[int, int]) -> Tensor:
    """What a depth network must know of a camera, each near 1 in size.

    Args:
        intrinsics: [M, 3, 3] camera -> raw pixels.
        image_aug: [M, 3, 3] raw -> network pixels.
        lidar_SE3_cam: [M, 4, 4].
        size: height, width of the network's image in pixels.

    Returns:
        [M, 22]: focal lengths and centre, the image's affine, the camera's pose.
    """
    pixels = intrinsics.new_tensor([size[1], size[0]])
    effective = (image_aug @ intrinsics)[:, :2]
    pinhole = torch.cat([effective.diagonal(dim1=1, dim2=2), effective[:, :, 2]], dim=1) / pixels.repeat(2)
    affine = torch.cat([image_aug[:, :2, :2].flatten(1), image_aug[:, :2, 2] / pixels], dim=1)
    return torch.cat([pinhole, affine, lidar_SE3_cam[:, :3].flatten(1)], dim=1)


class CameraGate(nn.Module):
    """Squeeze-and-excitation by the camera: channels are scaled by what its parameters say."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(CAMERA_PARAMETERS, channels),
            nn.ReLU(inplace=True),
            nn.Linear(channels, channels),
            nn.ReLU(inplace=True),
            nn.Linear(channels, channels),
        )

    def forward(self, x: Tensor, camera: Tensor) -> Tensor:
        """Feature map [M, C, h, w] gated by normalised parameters [M, 22]."""
        return x * self.mlp(camera).sigmoid()[:, :, None, None]


class DepthNet(nn.Module):
    """Depth logits and context features of image features.

    Args:
        in_channels: channels of the image neck.
        mid_channels: width of this network.
        context_channels: channels that are lifted into BEV.
        bins: number of depth bins.
        blocks: residual blocks of the depth branch (BEVDepth has 3).
    """

    def __init__(self, in_channels: int, mid_channels: int, context_channels: int, bins: int, blocks: int = 3) -> None:
        super().__init__()
        self.split = (bins, context_channels)
        self.reduce = nn.Sequential(
            nn.Conv2d(in_channels, mid_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(mid_channels),
            nn.ReLU(inplace=True),
        )
        self.normalise = nn.BatchNorm1d(CAMERA_PARAMETERS)
        self.context_gate, self.depth_gate = CameraGate(mid_channels), CameraGate(mid_channels)
        self.context = nn.Conv2d(mid_channels, context_channels, 1)
        self.depth_blocks = nn.Sequential(*(BasicBlock(mid_channels, mid_channels) for _ in range(blocks)))
        self.depth = nn.Conv2d(mid_channels, bins, 1)

    def forward(self, features: Tensor, camera: Tensor) -> tuple[Tensor, Tensor]:
        """Depth logits [M, D, h, w] and context [M, C, h, w] of features [M, in, h, w], parameters [M, 22]."""
        camera = self.normalise(camera)
        x = self.reduce(features)
        context = self.context(self.context_gate(x, camera))
        return self.depth(self.depth_blocks(self.depth_gate(x, camera))), context


def depth_loss(logits: Tensor, depth: Tensor, bins: DepthBins, kind: Literal["bce", "ce"] = "bce") -> Tensor:
    """Supervision of the depth distribution by the nearest LiDAR point of each feature cell.

    Args:
        logits: [B, N, D, h, w].
        depth: [B, N, h, w] metres; 0 where no point fell.
        bins: the depth bins.
        kind: `bce` sums a binary term per bin of the softmax, as BEVDepth does; `ce` is cross-entropy.

    Returns:
        Mean over the cells, of all processes, that have a depth inside the bins; 0 without any.

    Raises:
        ValueError: if the shapes differ.
    """
    if depth.shape != (*logits.shape[:2], *logits.shape[3:]):
        raise ValueError(
            f"depth supervision is {list(depth.shape)}, the depth network's map {list(logits.shape)}: "
            "input.depth_stride must be the stride of the image neck"
        )
    index = bins.index(depth)
    known = (depth > 0) & (index >= 0) & (index < bins.count)
    log_p = logits.movedim(2, -1)[known].float().log_softmax(-1)
    target = index[known].unsqueeze(-1)
    total = -log_p.gather(-1, target).sum()
    if kind == "bce":
        log_q = torch.log1p(-log_p.exp().clamp(max=1 - 1e-6))
        total = total - log_q.sum() + log_q.gather(-1, target).sum()
    return total / divisor(known.sum())
