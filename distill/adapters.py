"""Adapters: train-only modules between a student's map and the teacher's."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from distill.terms import AdapterConfig


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, C, *size] of [B, C, H, W] that cover the same square, bilinear; `x` itself where it has that size."""
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


class Resize(nn.Module):
    """Bilinear resize of a student's map to the teacher's grid."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """[B, C, *size] of [B, C, H, W]."""
        return resized(x, size)


class Projection(Resize):
    """1x1 convolution to the teacher's width, then to the teacher's grid."""

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(student, teacher, 1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """[B, teacher, *size] of [B, student, H, W]."""
        return super().forward(self.conv(x), size)


def conv_bn_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    """3x3 convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def decoder(student: int, teacher: int, config: AdapterConfig) -> nn.Module:
    """X³KD's small decoder to the sparse activations of the teacher, which end in a ReLU (sizes are ours)."""
    width = config.width or teacher
    return nn.Sequential(
        conv_bn_relu(student, width), conv_bn_relu(width, width), nn.Conv2d(width, teacher, 1), nn.ReLU()
    )


def same_width(kind: str) -> Callable[[int, int, AdapterConfig], None]:
    """Check of the adapters that keep the channels."""

    def check(student: int, teacher: int, _: AdapterConfig) -> None:
        if student != teacher:
            raise ValueError(
                f"adapter '{kind}' keeps the student's {student} channels, the teacher's tap has "
                f"{teacher}: use conv1x1, conv3x3bnrelu, projection or decoder"
            )

    return check


def identity(student: int, teacher: int, config: AdapterConfig) -> nn.Module:
    """Compare the maps as they are."""
    same_width("id")(student, teacher, config)
    return nn.Identity()


def resize(student: int, teacher: int, config: AdapterConfig) -> nn.Module:
    """Compare on the teacher's grid."""
    same_width("resize")(student, teacher, config)
    return Resize()


# Makers of adapters from student channels, teacher channels and config, by name.
ADAPTERS: dict[str, Callable[[int, int, AdapterConfig], nn.Module]] = {
    "id": identity,
    "conv1x1": lambda student, teacher, _: nn.Conv2d(student, teacher, 1),
    "conv3x3bnrelu": lambda student, teacher, _: conv_bn_relu(student, teacher),
    "decoder": decoder,
    "resize": resize,
    "projection": lambda student, teacher, _: Projection(student, teacher),
}
