"""Inputs of the right shapes where no data set is needed: speed does not depend on what they show."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from config.params import Params
from data.reading.batch import Sample
from models.detectors.camera import CAMERAS

RADARS: Final = 5
RADAR_SWEEPS: Final = 6
RADAR_RETURNS: Final = 50  # of one RADAR in one sweep, about what nuScenes has


def random_points(generator: torch.Generator, reach: float, count: int = 75_000) -> Tensor:
    """Points [P, 5] of three sweeps: the rings that the lower beams draw on flat ground, and a hundred posts."""
    elevation = torch.linspace(-30.67, -0.3, 24).deg2rad()
    ring = torch.randint(0, len(elevation), (count,), generator=generator)
    radius = 1.84 / -elevation[ring].tan() * (1 + 0.005 * torch.randn(count, generator=generator))
    angle = torch.empty(count).uniform_(-torch.pi, torch.pi, generator=generator)
    flat = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    height = -1.84 + 0.02 * torch.randn(count, generator=generator)
    on_post = torch.arange(count) % 10 == 0
    posts = torch.empty(100, 2).uniform_(-reach, reach, generator=generator)
    flat[on_post] = posts.repeat(-(-count // 100), 1)[: int(on_post.sum())]
    height[on_post] += torch.empty(int(on_post.sum())).uniform_(0.0, 2.0, generator=generator)
    age = 0.05 * (torch.arange(count) % 3)
    points = torch.cat([flat, height[:, None], torch.rand(count, 1, generator=generator), age[:, None]], dim=1)
    return points[(points[:, :2].abs() < reach).all(1)]


def random_boxes(generator: torch.Generator, reach: float, count: int) -> Tensor:
    """Boxes [count, 9] about as large and as fast as road users."""
    low = torch.tensor([-reach, -reach, -2.0, 0.5, 0.5, 1.0, -3.14, -5.0, -5.0])
    high = torch.tensor([reach, reach, -1.0, 8.0, 3.0, 3.0, 3.14, 5.0, 5.0])
    return low + torch.rand(count, 9, generator=generator) * (high - low)


def random_radar(generator: torch.Generator, reach: float) -> Tensor:
    """Returns [R, 7] of all RADARs and sweeps."""
    low = torch.tensor([-reach, -reach, -1.4, -10.0, -15.0, -15.0, 0.0])
    high = torch.tensor([reach, reach, -0.8, 30.0, 15.0, 15.0, 0.5])
    count = RADARS * RADAR_SWEEPS * RADAR_RETURNS
    return low + torch.rand(count, 7, generator=generator) * (high - low)


def random_samples(params: Params, count: int) -> list[Sample]:
    """Training samples as the data set would give them, for six cameras that look around."""
    return [_sample(params, torch.Generator().manual_seed(number), number) for number in range(count)]


def _sample(params: Params, generator: torch.Generator, number: int) -> Sample:
    height, width = params.input.image.size
    frames, stride, reach = params.input.frames, params.input.depth_stride, params.grid.range
    focal = torch.tensor([[0.8 * width, 0, width / 2], [0, 0.8 * width, height / 2], [0, 0, 1]])
    flip = torch.diag(torch.tensor([-1.0 if number % 2 else 1.0, -1.0 if number % 4 > 1 else 1.0, 1, 1]))
    depth = torch.rand(CAMERAS, height // stride, width // stride, generator=generator) * 55 + 1
    return Sample(
        token=f"sample-{number:05d}",
        images=torch.randint(0, 256, (frames, CAMERAS, 3, height, width), dtype=torch.uint8, generator=generator),
        intrinsics=focal.expand(frames, CAMERAS, 3, 3).clone(),
        image_aug=torch.eye(3).expand(frames, CAMERAS, 3, 3).clone(),
        lidar_SE3_cam=_poses().expand(frames, CAMERAS, 4, 4).clone(),
        bev_aug=flip,
        has_previous=True,
        points=random_points(generator, reach),
        radar=random_radar(generator, reach) if params.input.radar else torch.empty(0, 7),
        boxes=random_boxes(generator, reach, 30),
        labels=torch.randint(0, 10, (30,), generator=generator),
        depth=depth * (torch.rand(depth.shape, generator=generator) < 0.2),
    )


def _poses() -> Tensor:
    """[6, 4, 4] of cameras 60 degrees apart, 0.3 m below the LiDAR."""
    angle = torch.arange(CAMERAS) * torch.pi / 3
    forward = torch.stack([angle.cos(), angle.sin(), torch.zeros(CAMERAS)], dim=1)
    down = torch.tensor([0.0, 0, -1]).expand(CAMERAS, 3)
    poses = torch.eye(4).repeat(CAMERAS, 1, 1)
    poses[:, :3, :3] = torch.stack([torch.cross(down, forward, dim=1), down, forward], dim=2)
    poses[:, :3, 3] = forward * 0.5 - torch.tensor([0.0, 0, 0.3])
    return poses
