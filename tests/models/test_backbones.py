"""The ResNets of models.backbones, against mmdet's."""

from __future__ import annotations

from typing import Any

import torch
from mmdet3d.registry import MODELS
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import models.backbones  # noqa: F401 (registers them)

SMALL = {"depth": 18, "base_channels": 4, "out_indices": (0, 1, 2, 3), "frozen_stages": 0, "norm_eval": False}


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
    plain = build("mmdet.ResNet", in_channels=6, base_channels=8, depth=18, num_stages=3, strides=(1, 2, 2),
                  dilations=(1, 1, 1), out_indices=(0, 1, 2), norm_eval=False)
    plain.load_state_dict(bev.state_dict())
    plain.maxpool = nn.Identity()
    x = torch.randn(2, 6, 32, 32)
    maps = bev(x)
    assert maps[0] is x
    assert [list(one.shape[1:]) for one in maps[1:]] == [[8, 16, 16], [16, 8, 8], [32, 4, 4]]
    for ours, theirs in zip(maps[1:], plain(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


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
