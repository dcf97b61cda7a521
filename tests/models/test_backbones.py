"""The ResNets of models.layers.backbones, against mmdet's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import models.layers.backbones  # noqa: F401 (registers them)
from models.layers.registry import MODELS

SMALL = {"depth": 18, "base_channels": 8, "out_indices": (0, 1, 2, 3), "frozen_stages": 0, "norm_eval": False}


def build(kind: str, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    module = MODELS.build({"type": kind, **config})
    module.train()
    return module


def step(backbone: nn.Module, x: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Tensor], int]:
    """Outputs, gradients, and bytes that autograd keeps."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        maps = backbone(x)
    sum(one.square().mean() for one in maps).backward()
    gradients = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    return maps, gradients, sum(kept.values())


def test_bev_resnet_is_mmdets_without_the_pool_and_with_the_map() -> None:
    bev = build("BEVResNet", in_channels=6, base_channels=8)
    plain = build(
        "mmdet.ResNet",
        in_channels=6,
        base_channels=8,
        depth=18,
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(0, 1, 2),
        norm_eval=False,
    )
    plain.load_state_dict(bev.state_dict())
    plain.maxpool = nn.Identity()
    x = torch.randn(2, 6, 32, 32)
    maps = bev(x)
    assert maps[0] is x
    assert [list(one.shape[1:]) for one in maps[1:]] == [[8, 16, 16], [16, 8, 8], [32, 4, 4]]
    for ours, theirs in zip(maps[1:], plain(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_staged_resnet_is_mmdets_without_the_stem() -> None:
    ours = build("StagedResNet", in_channels=8, channels=[8, 16, 32], strides=[2, 2, 1], blocks=[2, 2, 2])
    theirs = build(
        "mmdet.ResNet",
        depth=18,
        base_channels=8,
        num_stages=3,
        strides=(2, 2, 1),
        dilations=(1, 1, 1),
        out_indices=(0, 1, 2),
        norm_eval=False,
    )
    layers = [getattr(theirs, name) for name in theirs.res_layers]
    for stage, layer in zip(ours.stages, layers, strict=True):
        stage.load_state_dict(layer.state_dict())
    x = torch.randn(2, 8, 20, 20)
    maps, expected = ours(x), x
    assert [list(one.shape[1:]) for one in maps] == [[8, 10, 10], [16, 5, 5], [32, 5, 5]]
    for one, layer in zip(maps, layers, strict=True):
        expected = layer(expected)
        torch.testing.assert_close(one, expected, rtol=0, atol=0)


def test_staged_resnet_names_lists_of_different_lengths() -> None:
    with pytest.raises(ValueError, match=r"strides \[2\], blocks \[2, 2\]: give one of each"):
        build("StagedResNet", in_channels=8, channels=[8, 16], strides=[2], blocks=[2, 2])


def test_recomputing_changes_memory_and_nothing_else() -> None:
    plain, recomputed = build("mmdet.ResNet", **SMALL), build("RecomputedResNet", **SMALL)
    recomputed.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 96)
    maps, gradients, kept = step(plain, x)
    same_maps, same_gradients, less = step(recomputed, x)
    for ours, theirs in zip(same_maps, maps, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert same_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(same_gradients[name], gradient, rtol=0, atol=0, msg=name)
    assert less < kept / 2
    plain.eval()
    recomputed.eval()
    recomputed.load_state_dict(plain.state_dict())
    with torch.no_grad():
        for ours, theirs in zip(recomputed(x), plain(x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
