"""Deformable attention against a loop and against mmcv's, and what geometry compensation starts as."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from mmcv.ops import ModulatedDeformConv2dPack, MultiScaleDeformableAttention
from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch
from torch import Tensor

from models.layers.deformable import (
    HAS_KERNEL,
    KINDS,
    DeformableSelfAttention,
    FullPrecisionDCNv2,
    GeometryCompensation,
    deformable_attention,
)
from tests.models.factory import trained

SHAPE = (5, 7)


def inputs(batch: int = 2, queries: int = 11, heads: int = 3, points: int = 4, width: int = 5) -> list[Tensor]:
    """Value, locations (some outside the map) and weights, in double precision."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(batch, SHAPE[0] * SHAPE[1], heads, width, generator=generator, dtype=torch.float64)
    locations = torch.rand(batch, queries, heads, points, 2, generator=generator, dtype=torch.float64) * 1.6 - 0.3
    weights = torch.rand(batch, queries, heads, points, generator=generator, dtype=torch.float64)
    return [tensor.requires_grad_() for tensor in (value, locations, weights)]


def mmcvs(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """mmcv's reference, which counts levels."""
    return multi_scale_deformable_attn_pytorch(
        value, torch.tensor([SHAPE]), locations.unsqueeze(3), weights.unsqueeze(3)
    )


def test_a_sample_is_read_between_the_four_cells_around_it() -> None:
    value, locations, weights = (tensor.detach() for tensor in inputs(batch=1, queries=3, heads=2, points=2, width=1))
    height, width = SHAPE
    expected = torch.zeros(1, 3, 2, dtype=torch.float64)
    for query in range(3):
        for head in range(2):
            for point in range(2):
                x, y = (locations[0, query, head, point] * torch.tensor([width, height]) - 0.5).tolist()
                for row in range(height):
                    for column in range(width):
                        near = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
                        cell = value[0, row * width + column, head, 0]
                        expected[0, query, head] += weights[0, query, head, point] * near * cell
    torch.testing.assert_close(deformable_attention(value, SHAPE, locations, weights), expected)


def test_values_and_gradients_are_mmcvs() -> None:
    ours, theirs = inputs(), inputs()
    given = deformable_attention(ours[0], SHAPE, ours[1], ours[2])
    expected = mmcvs(*theirs)
    torch.testing.assert_close(given, expected)
    share = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (given * share).sum().backward()
    (expected * share).sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.skipif(not (HAS_KERNEL and torch.cuda.is_available()), reason="needs a GPU and mmcv's CUDA operators")
def test_the_kernel_gives_the_same() -> None:
    ours, theirs = ([one.detach().float().requires_grad_() for one in inputs()] for _ in range(2))
    given = deformable_attention(ours[0].cuda(), SHAPE, ours[1].cuda(), ours[2].cuda()).cpu()
    expected = deformable_attention(theirs[0], SHAPE, theirs[1], theirs[2])
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)
    given.square().sum().backward()
    expected.square().sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("placed", [False, True])
def test_the_module_is_mmcvs_with_its_weights(placed: bool) -> None:
    """Outputs and the gradients of map and weights, where mmcv is told the cells' centres and given the residual."""
    ours = trained(DeformableSelfAttention(24, num_heads=4, num_points=3))
    theirs = MultiScaleDeformableAttention(24, 4, num_levels=1, num_points=3, dropout=0.0, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 24, *SHAPE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    same = x.detach().clone().requires_grad_()
    position = torch.randn(24, *SHAPE, generator=torch.Generator().manual_seed(3)) if placed else None
    given = ours(x, position)

    cells = same.flatten(2).transpose(1, 2)
    height, width = SHAPE
    points = [[(i + 0.5) / width, (j + 0.5) / height] for j in range(height) for i in range(width)]
    query_pos = None if position is None else position.flatten(1).T[None]
    expected = theirs(
        cells,
        query_pos=query_pos,
        value=cells,
        identity=torch.zeros_like(cells),
        reference_points=torch.tensor(points).view(1, -1, 1, 2).expand(2, -1, -1, -1),
        spatial_shapes=torch.tensor([SHAPE]),
        level_start_index=torch.tensor([0]),
    )
    torch.testing.assert_close(given, expected.transpose(1, 2).unflatten(2, SHAPE), rtol=1e-5, atol=1e-5)
    given.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, same.grad, rtol=1e-5, atol=1e-5)
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4, msg=name)


def compensation(kind: str, **config: Any) -> GeometryCompensation:
    """A small module of a kind."""
    torch.manual_seed(0)
    return GeometryCompensation(12, kind, **({"heads": 2, "points": 3} if kind == "attention" else {}), **config)


def field(seed: int = 0, batch: int = 3) -> Tensor:
    return torch.randn(batch, 12, *SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_the_identity_and_learns(kind: str) -> None:
    module, x = compensation(kind), field()
    torch.testing.assert_close(module(x), x, rtol=0, atol=0)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (module(x) - field(1)).square().mean().backward()
        optimizer.step()
    assert not torch.equal(module(x), x)
    assert not [name for name, parameter in module.named_parameters() if not parameter.grad.any()]


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_layout_changes_nothing(kind: str) -> None:
    module = trained(compensation(kind))
    x = field().requires_grad_()
    same = field().to(memory_format=torch.channels_last).requires_grad_()
    turned = module(same)
    torch.testing.assert_close(turned, module(x), rtol=1e-5, atol=1e-5)
    share = field(1)
    (turned * share.to(memory_format=torch.channels_last)).sum().backward()
    (module(x) * share).sum().backward()
    torch.testing.assert_close(same.grad, x.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_changes_little(kind: str) -> None:
    module, x = trained(compensation(kind)), field()
    with torch.autocast("cpu", torch.bfloat16):
        half = module(x)
        half.sum().backward()
    exact = module(x)
    assert (half - exact).norm() < 0.01 * exact.norm()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_places_are_not_rounded_in_bfloat16() -> None:
    """A head that reads 20 cells away reads that cell, although bfloat16 has steps of an eighth there."""
    module = DeformableSelfAttention(4, num_heads=1, num_points=1)
    torch.nn.init.eye_(module.value_proj.weight)
    torch.nn.init.eye_(module.output_proj.weight)
    module.sampling_offsets.bias.data = torch.tensor([20.03, 0.0])
    x = torch.arange(64.0).expand(1, 4, 3, 64).contiguous()
    with torch.autocast("cpu", torch.bfloat16):
        read = module(x)
    # 10 + 20.03, of which bfloat16 keeps eight bits once it is read.
    assert read[0, 0, 1, 10].item() == pytest.approx(30.03, abs=0.07)


def test_a_position_steers_what_is_read_and_is_not_read_itself() -> None:
    module, x = trained(compensation("attention", position=list(SHAPE))), field()
    with torch.no_grad():
        before = module(x)
        module.position.row += 1.0
        assert (module(x) - before).norm() > 0.01 * before.norm()
        # Where all points of a cell lie on it, their weights add up to one and nothing is left to steer.
        module.layers.sampling_offsets.weight.zero_()
        module.layers.sampling_offsets.bias.zero_()
        torch.testing.assert_close(module(x), x + module.layers(x), rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="8 heads do not divide 44 channels: set heads"):
        GeometryCompensation(44)
    with pytest.raises(ValueError, match="kind 'attn' must be one of attention, deform_conv, conv"):
        GeometryCompensation(16, "attn")
    with pytest.raises(ValueError, match=r"position \[5, 7\] needs kind attention, the kind is 'conv'"):
        GeometryCompensation(16, "conv", position=[5, 7])
    with pytest.raises(ValueError, match=r"position \[7, 5\] for a map of \[5, 7\]: set it"):
        compensation("attention", position=[7, 5])(field())


def test_a_terminal_sees_no_warning_about_widths() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GeometryCompensation(80, heads=8)


def test_a_backbones_deformable_convolution_is_mmcvs_in_full_precision_and_any_layout() -> None:
    """mmcv's own refuses bfloat16 on a CPU, and maps that are not contiguous."""
    ours, theirs = (
        kind(6, 8, 3, stride=2, padding=1, bias=False) for kind in (FullPrecisionDCNv2, ModulatedDeformConv2dPack)
    )
    theirs.load_state_dict(trained(ours).state_dict())
    x = torch.randn(2, 6, *SHAPE, generator=torch.Generator().manual_seed(0))
    expected = theirs(x)
    with torch.autocast("cpu", torch.bfloat16):
        given = ours(x.to(memory_format=torch.channels_last))
    assert given.dtype == torch.float32
    torch.testing.assert_close(given, expected)
