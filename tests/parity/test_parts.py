"""Our parts that mmdet and mmdet3d have too, against theirs: names, draws, weights, outputs and gradients, by bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mmdet3d.registry import MODELS as THEIRS
from torch import Tensor, nn

import models.layers.backbones
import models.layers.necks
import models.layers.pillars  # noqa: F401 (registers them)
from models.layers.initialising import initialise
from models.layers.registry import MODELS as OURS

RESNETS: list[dict[str, Any]] = [
    {"depth": 18},
    {"depth": 50, "norm_eval": False},
    {"depth": 50, "frozen_stages": 1},
    {"depth": 18, "frozen_stages": 0, "norm_cfg": {"type": "BN", "requires_grad": False}},
    {"depth": 18, "num_stages": 3, "strides": (1, 2, 2), "dilations": (1, 1, 2), "out_indices": (0, 2)},
    {
        "depth": 50,
        "dcn": {"type": "DCNv2", "deform_groups": 1, "fallback_on_stride": False},
        "stage_with_dcn": (False, False, True, True),
    },
]
NORM = {"type": "BN", "eps": 1e-3, "momentum": 0.1}


def assert_same(ours: str, theirs: str, config: dict[str, Any], *inputs: Any) -> None:
    built = []
    for registry, kind in ((OURS, ours), (THEIRS, theirs)):
        torch.manual_seed(0)
        module = registry.build({"type": kind, **config})
        if hasattr(module, "init_weights"):
            initialise(module)
        built.append((module, torch.rand(1)))
    (mine, drawn), (other, drawn_there) = built
    assert type(mine) is not type(other)
    assert torch.equal(drawn, drawn_there)
    assert list(mine.state_dict()) == list(other.state_dict())
    assert_equal(list(mine.state_dict().values()), list(other.state_dict().values()))
    for mode in (True, False):
        mine.train(mode)
        other.train(mode)
        assert_equal(results(mine, *inputs), results(other, *inputs))


def results(module: nn.Module, *inputs: Any) -> list[Tensor]:
    """Outputs, and the gradients of all weights that learn."""
    outputs = module(*inputs)
    maps = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    weights = [p for p in module.parameters() if p.requires_grad]
    learns = weights and maps[0].requires_grad
    total = sum(one.square().mean() for one in maps)
    return maps + (list(torch.autograd.grad(total, weights, materialize_grads=True)) if learns else [])


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("config", RESNETS)
def test_resnet_is_mmdets(config: dict[str, Any]) -> None:
    assert_same("ResNet", "mmdet.ResNet", {"base_channels": 8, **config}, torch.randn(2, 3, 64, 64))


def test_second_is_mmdet3ds() -> None:
    config = {"in_channels": 6, "out_channels": [8, 12], "layer_nums": [1, 2], "layer_strides": [1, 2]}
    assert_same("SECOND", "mmdet3d.SECOND", config, torch.randn(2, 6, 16, 16))


@pytest.mark.parametrize(("strides", "conv"), [([1, 2], False), ([0.5, 1], True)])
def test_second_fpn_is_mmdet3ds(strides: list[float], conv: bool) -> None:
    config = {
        "in_channels": [8, 12],
        "out_channels": [4, 6],
        "upsample_strides": strides,
        "norm_cfg": NORM,
        "use_conv_for_no_stride": conv,
    }
    assert_same("SECONDFPN", "mmdet3d.SECONDFPN", config, [torch.randn(2, 8, 16, 16), torch.randn(2, 12, 8, 8)])


def test_scattered_pillars_are_mmdet3ds() -> None:
    cells = torch.randperm(48, generator=torch.Generator().manual_seed(0))[:20]
    sample, z = torch.arange(20) % 2, torch.zeros(20, dtype=torch.long)
    coordinates = torch.stack([sample, z, cells // 6, cells % 6], dim=1).int()
    config = {"in_channels": 5, "output_shape": [8, 6]}
    assert_same("PointPillarsScatter", "mmdet3d.PointPillarsScatter", config, torch.randn(20, 5), coordinates, 2)


def test_another_normalisation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"use BN or SyncBN, or mmdet\.ResNet for other"):
        OURS.build({"type": "ResNet", "depth": 18, "norm_cfg": {"type": "GN", "num_groups": 2}})


def test_a_published_config_may_name_mmdets_resnet() -> None:
    """So did those of weights from before this project had its own."""
    published = OURS.build({"type": "mmdet.ResNet", "depth": 18, "base_channels": 8})
    ours = OURS.build({"type": "ResNet", "depth": 18, "base_channels": 8})
    ours.load_state_dict(published.state_dict())
