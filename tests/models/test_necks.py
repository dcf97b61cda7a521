"""BEVFusion's necks, written once more with plain functions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models.layers.necks  # noqa: F401 (registers them)
from models.layers.registry import MODELS


def block(weights: dict[str, Tensor], name: str) -> Callable[[Tensor], Tensor]:
    """Convolution, normalised by stored statistics, ReLU."""
    weight = weights[f"{name}.conv.weight"]
    statistics = [weights[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
    return lambda x: F.batch_norm(F.conv2d(x, weight, padding=weight.shape[-1] // 2), *statistics).relu()


def build(kind: str, **config: object) -> tuple[nn.Module, dict[str, Tensor]]:
    """A neck in evaluation with statistics that are not the default ones, and its weights."""
    torch.manual_seed(0)
    neck = MODELS.build({"type": kind, **config})
    for name, buffer in neck.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand_like(buffer) + (0.5 if name.endswith("var") else 0.0))
    return neck.eval(), neck.state_dict()


def level(channels: int, height: int, width: int) -> Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(channels))


def test_concat_fpn() -> None:
    neck, weights = build("ConcatFPN", in_channels=[6, 10, 14], out_channels=8)
    fine, middle, coarse = level(6, 12, 20), level(10, 6, 10), level(14, 3, 5)
    up = F.interpolate(coarse, scale_factor=2, mode="bilinear")
    x = block(weights, "smooths.1")(block(weights, "joins.1")(torch.cat([middle, up], 1)))
    up = F.interpolate(x, scale_factor=2, mode="bilinear")
    x = block(weights, "smooths.0")(block(weights, "joins.0")(torch.cat([fine, up], 1)))
    torch.testing.assert_close(neck([fine, middle, coarse]), x)
    assert x.shape == (2, 8, 12, 20)


def test_concat_fpn_needs_two_levels() -> None:
    with pytest.raises(ValueError, match=r"in_channels \[6\]: two levels or more"):
        MODELS.build({"type": "ConcatFPN", "in_channels": [6], "out_channels": 8})


def test_upsampling_fpn() -> None:
    """Of levels of half and of a quarter of the grid, as the decoder's backbone makes them."""
    neck, weights = build("UpsamplingFPN", in_channels=[6, 10, 14], out_channels=8)
    first, unread, last = level(6, 10, 10), level(10, 5, 5), level(14, 5, 5)
    x = torch.cat([twice(last), first], 1)
    x = block(weights, "smooth")(block(weights, "join")(x))
    x = block(weights, "sharpen")(twice(x))
    torch.testing.assert_close(neck([first, unread, last]), x)
    assert x.shape == (2, 8, 20, 20)


def twice(x: Tensor) -> Tensor:
    """Twice the size; both axes by a matrix that reads between the centres of the corner cells."""
    size = x.shape[-1]
    place = torch.arange(2 * size) * (size - 1) / (2 * size - 1)
    matrix = (1 - (place[:, None] - torch.arange(size)).abs()).clamp(min=0)
    return torch.einsum("yi,xj,bcij->bcyx", matrix, matrix, x)


@pytest.mark.parametrize(("kind", "sizes"), [("ConcatFPN", [8, 4, 2]), ("UpsamplingFPN", [8, 4, 4])])
def test_every_weight_learns(kind: str, sizes: list[int]) -> None:
    neck, _ = build(kind, in_channels=[6, 10, 14], out_channels=8)
    neck.train()
    maps = neck([level(width, size, size) for width, size in zip([6, 10, 14], sizes, strict=True)])
    maps.square().mean().backward()
    assert not [name for name, parameter in neck.named_parameters() if parameter.grad is None]
