"""mmcv's operators on channels-last maps, against themselves on contiguous ones, wherever in a model they stand."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from mmcv.ops import DeformConv2dPack, ModulatedDeformConv2dPack, RoIAlignRotated, SAConv2d
from mmcv.ops import RoIAlign as MmcvRoIAlign
from torch import Tensor, nn

from models.detectors.build import build_detector
from models.layers.memory_layout import read_any_layout
from tests.conftest import ROOT
from tests.models.factory import head_config, lidar_config, random_batch, trained

CHANNELS = 8
CONVOLUTION = {"in_channels": CHANNELS, "out_channels": CHANNELS, "kernel_size": 3, "padding": 1}
ROI_LAYER = {"output_size": 7, "spatial_scale": 0.125, "sampling_ratio": 2}
ROIS = torch.tensor([[0.0, 2, 3, 60, 70], [1, 10, 10, 90, 100]])
ROTATED = torch.tensor([[0.0, 30, 30, 40, 40, 0.3], [1, 40, 50, 40, 30, -0.5]])
OPERATORS: list[tuple[type[nn.Module], dict[str, Any], tuple[Tensor, ...]]] = [
    (DeformConv2dPack, CONVOLUTION | {"groups": 4}, ()),
    (ModulatedDeformConv2dPack, CONVOLUTION, ()),
    (SAConv2d, CONVOLUTION | {"use_deform": True}, ()),
    (MmcvRoIAlign, ROI_LAYER, (ROIS,)),
    (MmcvRoIAlign, ROI_LAYER | {"pool_mode": "max"}, (ROIS,)),
    (MmcvRoIAlign, ROI_LAYER | {"aligned": False}, (ROIS,)),
    (RoIAlignRotated, ROI_LAYER, (ROTATED,)),
]


def maps() -> Tensor:
    return torch.randn(2, CHANNELS, 16, 20, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("kind", "settings", "others"), OPERATORS)
def test_a_channels_last_map_is_read_as_what_it_is(
    kind: type[nn.Module], settings: dict[str, Any], others: tuple[Tensor, ...]
) -> None:
    torch.manual_seed(0)
    operator = trained(kind(**settings), 0.1)
    expected = operator(maps(), *others)
    model = nn.ModuleDict({"deep": nn.ModuleList([nn.Sequential(copy.deepcopy(operator))])})
    names = model.state_dict().keys()
    read_any_layout(model)
    assert model.state_dict().keys() == names
    copied = copy.deepcopy(model).get_submodule("deep.0.0")
    torch.testing.assert_close(copied(maps().contiguous(memory_format=torch.channels_last), *others), expected)


STRIDED = """
import torch
from torch import nn
from models.layers.memory_layout import read_any_layout

torch.set_num_threads(1)
model = nn.Sequential(nn.Conv2d(4, 8, 1, stride=2, bias=False))
read_any_layout(model)
for _ in range(20):
    maps = torch.randn(6, 4, 16, 24).contiguous(memory_format=torch.channels_last).requires_grad_()
    model(maps).square().mean().backward()
    model.zero_grad()
    # Allocations that trip over what was written behind a buffer.
    others = [torch.randn(size) for size in range(1, 3000, 50)]
"""


def test_a_strided_pointwise_convolution_keeps_to_its_memory() -> None:
    """On any CPU, as oneDNN does without what a CPU has beyond AVX2."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", STRIDED], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("size", [(16, 24), (15, 9)])
def test_a_strided_pointwise_convolution_is_what_it_was(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, 1, stride=2).double()
    maps = torch.randn(2, 4, *size, dtype=torch.double, requires_grad=True)
    expected = layer(maps)
    (gradient,) = torch.autograd.grad(expected.square().sum(), maps)
    model = nn.Sequential(layer)
    read_any_layout(model)
    torch.testing.assert_close(model(maps), expected)
    torch.testing.assert_close(torch.autograd.grad(model(maps).square().sum(), maps)[0], gradient)


def deformable_head() -> dict[str, Any]:
    """The head of mmdet3d's CenterPoint configs with deformable convolutions."""
    layer = {"type": "DCN", "in_channels": 16, "out_channels": 16, "kernel_size": 3, "padding": 1, "groups": 4}
    return head_config(
        separate_head={"type": "DCNSeparateHead", "dcn_config": layer, "init_bias": -2.19, "final_kernel": 3}
    )


@pytest.mark.parametrize("half", [False, True])
def test_a_detector_with_a_deformable_head_trains_and_decodes(half: bool) -> None:
    torch.manual_seed(0)
    detector, batch = build_detector(lidar_config(head=deformable_head())), random_batch()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        losses = detector.loss(detector(batch), batch)
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())
    detector.eval()
    with torch.no_grad():
        assert len(detector.decode(detector(batch))) == 2


def test_a_deformable_head_says_what_mmcvs_says() -> None:
    torch.manual_seed(0)
    detector = build_detector(lidar_config(head=deformable_head())).eval()
    trained(detector.head, 0.05)  # offsets begin with zero
    plain = copy.deepcopy(detector.head)
    for task in plain.task_heads:
        for name in ("feature_adapt_cls", "feature_adapt_reg"):
            ours = getattr(task, name)
            mmcvs = DeformConv2dPack(16, 16, 3, padding=1, groups=4)
            mmcvs.load_state_dict(ours.state_dict())
            setattr(task, name, mmcvs)
    with torch.no_grad():
        prediction = detector(random_batch(), ["bev_neck"])
        shared = plain.shared_conv(prediction.taps["bev_neck"]).contiguous()
        for given, task in zip(prediction.head, plain.task_heads, strict=True):
            for name, value in task(shared).items():
                torch.testing.assert_close(given[name], value, msg=name)
