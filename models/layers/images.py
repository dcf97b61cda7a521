"""Camera images to feature maps."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor

import models.layers.backbones
import models.layers.necks  # noqa: F401 (registers them)
from models.layers.registry import MODELS
from models.ports import Batch

IMAGE_MEAN = (123.675, 116.28, 103.53)
IMAGE_STD = (58.395, 57.12, 57.375)  # imageNet's RGB statistics, which pretrained backbones expect


class ImageEncoder(BaseModule):
    """Backbone and neck over all cameras of a frame.

    Args:
        backbone: config of an mmdet backbone.
        neck: config of a neck with `out_channels`, whose (first) output has stride `stride`.
        stride: pixels per cell of the neck's output.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: dict[str, Any], neck: dict[str, Any], stride: int) -> None:
        super().__init__()
        self.backbone = MODELS.build(backbone)
        self.neck = MODELS.build(neck)
        self.stride, self.channels = stride, total_channels(neck["out_channels"])
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, N, C, h, w] of images [B, N, 3, H, W] (uint8 RGB)."""
        height, width = images.shape[-2:]
        if height % self.stride or width % self.stride:
            raise ValueError(f"image size {height}x{width} is not a multiple of stride {self.stride}")
        x = (images.flatten(0, 1).float() - self.mean) / self.std
        features = first(self.neck(self.backbone(x.contiguous(memory_format=torch.channels_last))))
        if features.shape[-2:] != (height // self.stride, width // self.stride):
            raise ValueError(
                f"the image neck's map is {list(features.shape[-2:])} for images {height}x{width}: "
                f"stride {self.stride} does not describe it"
            )
        return features.unflatten(0, images.shape[:2])


def resized(batch: Batch, size: tuple[int, int], stride: int) -> Batch:
    """A batch whose images are `size` pixels high and wide, with the matrices and the depth that belong to them.

    Args:
        batch: it is left alone; the result shares what does not change.
        size: of the new images; the batch itself comes back where its images have that size.
        stride: new pixels per cell of the supervision of depth, whose cells keep the nearest depth of those they cover.
    """
    height, width = batch.images.shape[-2:]
    if (height, width) == size:
        return batch
    smaller = copy.copy(batch)
    images = F.interpolate(batch.images.flatten(0, 2).float(), size, mode="bilinear", antialias=True)
    smaller.images = images.round().to(torch.uint8).unflatten(0, batch.images.shape[:3])
    down, right = size[0] / height, size[1] / width
    # Whole numbers are the centres of pixels.
    smaller.image_aug = (
        batch.image_aug.new_tensor([[right, 0, (right - 1) / 2], [0, down, (down - 1) / 2], [0, 0, 1]])
        @ batch.image_aug
    )
    smaller.depth = depth_at(batch, size, stride)
    return smaller


def depth_at(batch: Batch, size: tuple[int, int], stride: int) -> Tensor:
    """The supervision of depth [B, N, h, w] alone that `resized` gives a batch, without its images' cost."""
    if batch.images.shape[-2:] == size or not batch.depth.numel():
        return batch.depth
    return nearest_depth(batch.depth, (size[0] // stride, size[1] // stride))


def nearest_depth(depth: Tensor, shape: tuple[int, int]) -> Tensor:
    """Depth maps [B, N, h, w], 0 where unknown, on fewer cells: the nearest depth of those that a new one covers."""
    nearest = -F.adaptive_max_pool2d(torch.where(depth > 0, -depth, -torch.inf), shape)
    return torch.where(nearest.isinf(), 0.0, nearest)


def first(maps: Tensor | list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """The map of a neck that returns one, or the first of several."""
    return maps if isinstance(maps, Tensor) else maps[0]


def total_channels(out_channels: int | list[int]) -> int:
    """Channels of a neck's output: SECONDFPN lists those it concatenates, FPN has one number."""
    return out_channels if isinstance(out_channels, int) else sum(out_channels)
