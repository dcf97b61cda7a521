"""Random batches and small model configs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from models.detectors.build import build_detector
from models.detectors.detector import Detector

TASKS = [
    ["car"],
    ["truck", "construction_vehicle"],
    ["bus", "trailer"],
    ["barrier"],
    ["motorcycle", "bicycle"],
    ["pedestrian", "traffic_cone"],
]
GRID = {"range": 12.8, "cell": 0.8, "z": [-5.0, 3.0]}
CAMERAS = 3
IMAGE = (32, 64)


def random_boxes(count: int, extent: float = 12.8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Boxes [count, 9], some with unknown velocity, and labels [count]."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(count, 9, generator=generator)
    low = torch.tensor([-extent, -extent, -2.0, 0.3, 0.3, 0.5, -3.14, -5.0, -5.0])
    high = torch.tensor([extent, extent, 1.0, 8.0, 3.0, 3.0, 3.14, 5.0, 5.0])
    boxes = low + draw * (high - low)
    boxes[::4, 7:] = torch.nan
    return boxes, torch.randint(0, 10, (count,), generator=generator)


def camera_poses() -> Tensor:
    """[N, 4, 4] of cameras that look along +y, +x, -x, 1.5 m above the ground of a LiDAR at 1.8 m."""
    forward = torch.tensor([[0.0, 1, 0], [1, 0, 0], [-1, 0, 0]])
    down = torch.tensor([0.0, 0, -1]).expand(3, 3)
    right = torch.cross(down, forward, dim=1)
    poses = torch.eye(4).repeat(CAMERAS, 1, 1)
    poses[:, :3, :3] = torch.stack([right, down, forward], dim=2)
    poses[:, :3, 3] = forward * 0.5 - torch.tensor([0.0, 0, 0.3])
    return poses


def random_batch(
    batch_size: int = 2,
    frames: int = 1,
    boxes: int = 12,
    stride: int = 8,
    seed: int = 0,
    extent: float = 12.8,
    image: tuple[int, int] = IMAGE,
) -> Any:
    """A batch with every attribute that models read."""
    generator = torch.Generator().manual_seed(seed)
    height, width = image
    focal = torch.tensor([[40.0, 0, width / 2], [0, 40.0, height / 2], [0, 0, 1]])
    views = (batch_size, frames, CAMERAS)
    pairs = [random_boxes(boxes, extent, seed + i) for i in range(batch_size)]
    points = torch.rand(batch_size, 600, 5, generator=generator) * torch.tensor([2 * extent, 2 * extent, 4, 1, 0.5])
    return SimpleNamespace(
        tokens=[f"token-{i}" for i in range(batch_size)],
        images=torch.randint(0, 256, (*views, 3, height, width), dtype=torch.uint8, generator=generator),
        intrinsics=focal.expand(*views, 3, 3).clone(),
        image_aug=torch.eye(3).expand(*views, 3, 3).clone(),
        lidar_SE3_cam=camera_poses().expand(*views, 4, 4).clone(),
        bev_aug=torch.eye(4).expand(batch_size, 4, 4).clone(),
        has_previous=torch.ones(batch_size, dtype=torch.bool),
        points=list(points - torch.tensor([extent, extent, 2.5, 0, 0])),
        boxes=[pair[0] for pair in pairs],
        labels=[pair[1] for pair in pairs],
        labelled=torch.ones(batch_size, dtype=torch.bool),
        depth=torch.rand(batch_size, CAMERAS, height // stride, width // stride, generator=generator) * 20,
        radar=[random_radar(120, extent, seed + i) for i in range(batch_size)],
        teacher={},
    )


def random_radar(count: int, extent: float = 12.8, seed: int = 0) -> Tensor:
    """RADAR returns [count, 7]."""
    low = torch.tensor([-extent, -extent, -1.4, -10.0, -15.0, -15.0, 0.0])
    high = torch.tensor([extent, extent, -0.8, 30.0, 15.0, 15.0, 0.5])
    return low + torch.rand(count, 7, generator=torch.Generator().manual_seed(seed)) * (high - low)


def second(in_channels: int, strides: list[int]) -> dict[str, Any]:
    """A small BEV backbone."""
    return {
        "type": "SECOND",
        "in_channels": in_channels,
        "out_channels": [16, 16],
        "layer_nums": [1, 1],
        "layer_strides": strides,
    }


def second_fpn(in_channels: list[int], strides: list[float]) -> dict[str, Any]:
    """A small neck."""
    return {"type": "SECONDFPN", "in_channels": in_channels, "out_channels": [16, 16], "upsample_strides": strides}


def head_config(**changes: Any) -> dict[str, Any]:
    """A small head."""
    return {
        "tasks": TASKS,
        "share_conv_channel": 16,
        "separate_head": {"type": "JointTaskHead", "head_conv": 16},
        "min_radius": 1,
        "nms_radius": 1.0,
    } | changes


def lidar_config(**changes: Any) -> dict[str, Any]:
    """A small LiDAR detector: pillars of half a cell."""
    return {
        "type": "LidarCenterPoint",
        "grid": GRID,
        "voxel": {"size": [0.4, 0.4], "max_points": 8, "max_voxels": [1000, 1000]},
        "encoder": {"type": "PointwisePillarNet", "feat_channels": [12]},
        "backbone": second(12, [2, 2]),
        "neck": second_fpn([16, 16], [1, 2]),
        "head": head_config(),
    } | changes


VOXELS: dict[str, Any] = {
    "voxel": {"size": [0.4, 0.4, 1.0], "max_points": 5, "max_voxels": [8000, 8000]},
    "encoder": {"type": "HardSimpleVFE"},
    "middle": {
        "type": "SparseEncoder",
        "base_channels": 3,
        "output_channels": 3,
        "order": ["conv", "norm", "act"],
        "encoder_channels": [[3, 3], [3]],
        "encoder_paddings": [[1, 1], [1]],
        "block_type": "basicblock",
    },
}
"""Of a LiDAR detector with sparse convolutions, on 32 x 32 cells of 6 channels; most of its kernels are 3^5 numbers."""


def voxel_config(**changes: Any) -> dict[str, Any]:
    """A small LiDAR detector with sparse convolutions: `lidar_config` over voxels."""
    return lidar_config(**VOXELS, backbone=second(6, [1, 2])) | changes


def voxel_encoder() -> nn.Module:
    """The sparse encoder of `voxel_config`."""
    return build_detector(voxel_config()).get_submodule("middle")


def radar_config(**changes: Any) -> dict[str, Any]:
    """A small RADAR detector: `lidar_config` over the other sensor."""
    return lidar_config(type="RadarCenterPoint") | changes


RADAR_MAP = {
    "voxel": {"size": [0.8, 0.8], "max_points": 8, "max_voxels": 500},
    "encoder": {"type": "PointwisePillarNet", "feat_channels": [6]},
}
"""A camera detector's `radar`, on the grid itself."""


def camera_config(**changes: Any) -> dict[str, Any]:
    """A small camera detector with stride 8."""
    return {
        "type": "CameraBEVDepth",
        "grid": GRID,
        "stride": 8,
        "image_backbone": {
            "type": "mmdet.ResNet",
            "depth": 18,
            "base_channels": 4,
            "num_stages": 3,
            "strides": [1, 2, 2],
            "dilations": [1, 1, 1],
            "out_indices": [1, 2],
            "norm_cfg": {"type": "BN"},
            "norm_eval": False,
        },
        "image_neck": second_fpn([8, 16], [1, 2]),
        "depth_net": {"mid_channels": 16, "context_channels": 12, "blocks": 1},
        "depth_bins": [1.0, 21.0, 1.0],
        "bev_backbone": second(12, [1, 2]),
        "bev_neck": second_fpn([16, 16], [1, 2]),
        "head": head_config(),
    } | changes


def fusion_config(**changes: Any) -> dict[str, Any]:
    """A small fusion teacher: the camera detector's lift beside pillars with one stage of a backbone."""
    lidar = {key: lidar_config()[key] for key in ("voxel", "encoder")}
    stage = {"type": "SECOND", "in_channels": 12, "out_channels": [16], "layer_nums": [1], "layer_strides": [2]}
    return camera_config(type="BEVFusion", lidar={**lidar, "stage": stage, "channels": 16}, fused_channels=16) | changes


COMPENSATION: dict[str, dict[str, Any]] = {
    "image_compensation": {"heads": 4, "points": 3, "position": [4, 8]},
    "bev_compensation": {"heads": 4, "points": 5},
}
"""Of a simulated fusion student, in both planes."""


def simulated_config(**changes: Any) -> dict[str, Any]:
    """A small student with a simulated LiDAR branch, without compensation."""
    return camera_config(type="SimulatedFusion", fused_channels=16) | changes


def bevformer_config(**changes: Any) -> dict[str, Any]:
    """A small BEVFormer of two frames: 8 x 8 queries for the grid's 32 x 32 cells."""
    camera = camera_config()
    shared = {key: camera[key] for key in ("grid", "stride", "image_backbone", "image_neck", "bev_neck")}
    return {
        "type": "BEVFormer",
        **shared,
        "channels": 12,
        "queries": 8,
        "layers": 2,
        "heads": 3,
        "points": 2,
        "pillar": [-1.5, -0.5],
        "feedforward": 16,
        "bev_backbone": second(12, [1, 2]),
        "head": head_config(),
        "frames": 2,
    } | changes


def trained(module: nn.Module, scale: float = 0.3) -> nn.Module:
    """The module with random weights where it has zeros."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return module


def awaken(student: Detector) -> Detector:
    """The student with a compensation that does something, as after training."""
    for name in ("image_compensation", "bev_compensation"):
        for parameter in student.get_submodule(name).parameters():
            nn.init.normal_(parameter, std=0.5)
    return student


SENSED = ("images", "points", "depth", "boxes", "radar")
"""What sensors and annotators say of a sample."""


def read_by(detector: Detector, batch: Any) -> dict[str, set[str]]:
    """Of `SENSED`, by tap, what the tap depends on: it changes when that is replaced by another sample's."""
    names, other = [*detector.tap_channels, "head"], random_batch(len(batch.tokens), seed=100)
    found: dict[str, set[str]] = {name: set() for name in names}
    with torch.no_grad():
        plain = detector(batch, names).taps
        for sensed in SENSED:
            changed = copy.copy(batch)
            setattr(changed, sensed, getattr(other, sensed))
            taps = detector(changed, names).taps
            for name in names:
                if not torch.equal(taps[name], plain[name]):
                    found[name].add(sensed)
    return found


def let_in(lift: nn.Module, sensed: str) -> None:
    """A defect of SimDistill's released code: a lift of camera features that looks at something else too."""
    plain: Callable[..., Any] = lift.forward

    def forward(features: Tensor, batch: Any, **options: Any) -> Any:
        seen = torch.stack([sample.float().mean() for sample in getattr(batch, sensed)])
        return plain(features + seen.view(-1, 1, 1, 1, 1), batch, **options)

    lift.forward = forward
