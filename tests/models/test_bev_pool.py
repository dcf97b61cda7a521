"""BEV pooling against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.layers.bev_pool import bev_pool, bev_pool_reference, pool_index


def problem(
    pixels: int, bins: int, channels: int, cells: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(pixels, channels, generator=generator, dtype=dtype)
    depth = torch.rand(pixels, bins, generator=generator, dtype=dtype)
    return features, depth, torch.randint(-cells // 3, cells, (pixels, bins), generator=generator)


def gradients(pool: object, features: Tensor, depth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    features, depth = features.clone().requires_grad_(), depth.clone().requires_grad_()
    pooled = pool(features, depth)  # type: ignore[operator]
    weights = torch.linspace(-1, 1, pooled.numel(), dtype=pooled.dtype).view_as(pooled)
    (pooled * weights).sum().backward()
    return pooled.detach(), features.grad, depth.grad


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 20), st.integers(1, 30), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_values_and_gradients_equal_the_definition(
    pixels: int, bins: int, channels: int, cells: int, seed: int
) -> None:
    features, depth, cell = problem(pixels, bins, channels, cells, seed)
    ours = gradients(lambda f, d: bev_pool(f, d, pool_index(cell, cells)), features, depth)
    reference = gradients(lambda f, d: bev_pool_reference(f, d, cell, cells), features, depth)
    for mine, theirs in zip(ours, reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_gradients_equal_finite_differences() -> None:
    features, depth, cell = problem(7, 4, 3, 6, dtype=torch.float64)
    index = pool_index(cell, 6)
    inputs = (features.requires_grad_(), depth.requires_grad_())
    assert torch.autograd.gradcheck(lambda f, d: bev_pool(f, d, index), inputs)


def test_points_outside_the_grid_do_not_count() -> None:
    features, depth, _ = problem(5, 4, 3, 6)
    ours = gradients(lambda f, d: bev_pool(f, d, pool_index(torch.full((5, 4), -1), 6)), features, depth)
    assert all((values == 0).all() for values in ours)
    assert ours[0].shape == (6, 3)


def test_one_feature_alone_may_need_a_gradient() -> None:
    features, depth, cell = problem(5, 4, 3, 6)
    depth.requires_grad_()
    bev_pool(features, depth, pool_index(cell, 6)).sum().backward()
    assert features.grad is None
    assert depth.grad is not None


def test_results_are_the_same_every_time_and_sum_in_float32_under_autocast() -> None:
    features, depth, cell = problem(2000, 16, 8, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, second = (bev_pool(features, depth, pool_index(cell, 20)) for _ in range(2))
    assert first.dtype == torch.float32
    assert torch.equal(first, second)
    exact = bev_pool_reference(features.double(), depth.double(), cell, 20)
    torch.testing.assert_close(first.double(), exact, rtol=1e-4, atol=1e-3)


def test_half_precision_features_get_half_precision_gradients() -> None:
    features, depth, cell = problem(50, 4, 8, 6)
    half = features.bfloat16().requires_grad_()
    bev_pool(half, depth, pool_index(cell, 6)).sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    features, depth, cell = problem(5, 4, 3, 6)
    with pytest.raises(ValueError, match="4 feature rows and 5 depth rows"):
        bev_pool(features[:4], depth, pool_index(cell, 6))
    with pytest.raises(ValueError, match="made for 4 pixels"):
        bev_pool(features, depth, pool_index(cell[:4], 6))
