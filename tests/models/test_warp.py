"""The warp of dense maps against exact symmetries and a closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.grid import Grid
from models.warp import warp_bev

EXTENT = 51.2


def planar(angle: float = 0.0, scale: float = 1.0, flip_x: bool = False, flip_y: bool = False) -> Tensor:
    """[1, 4, 4] augmentation: flip, then rotate and scale."""
    c, s = scale * math.cos(angle), scale * math.sin(angle)
    matrix = torch.diag(torch.tensor([1.0, 1.0, scale, 1.0]))
    matrix[:2, :2] = torch.tensor([[c, -s], [s, c]]) @ torch.diag(torch.tensor([-1.0 if flip_x else 1.0,
                                                                               -1.0 if flip_y else 1.0]))
    return matrix[None]


@pytest.mark.parametrize("size", [16, 64, 100, 180])
@pytest.mark.parametrize(("matrix", "dims"), [
    (planar(), []), (planar(flip_x=True), [-1]), (planar(flip_y=True), [-2]),
    (planar(flip_x=True, flip_y=True), [-1, -2]), (planar(math.pi), [-1, -2]),
])
def test_flips_are_exact(size: int, matrix: Tensor, dims: list[int]) -> None:
    maps = torch.randn(1, 3, size, size)
    warped, valid = warp_bev(maps, matrix, EXTENT)
    assert torch.equal(warped, maps.flip(dims))
    assert valid.all()


def test_a_quarter_turn_is_exact() -> None:
    maps = torch.randn(1, 3, 20, 20)
    warped, valid = warp_bev(maps, planar(math.pi / 2), EXTENT)  # x becomes y
    assert torch.equal(warped, maps.rot90(-1, (-2, -1)))
    assert valid.all()


@pytest.mark.parametrize(("angle", "scale"), [(0.3, 1.0), (0.0, 0.9), (-0.4, 1.1)])
def test_a_linear_field_follows_the_augmentation(angle: float, scale: float) -> None:
    """Bilinear sampling is exact on a linear field f(x, y) = 2x - 3y."""
    centers = Grid(EXTENT, 1.6).centers()
    field = (centers @ torch.tensor([2.0, -3.0]))[None, None]
    matrix = planar(angle, scale, flip_x=True)
    warped, valid = warp_bev(field, matrix, EXTENT)
    source = centers @ torch.linalg.inv(matrix[0, :2, :2]).T
    expected = (source @ torch.tensor([2.0, -3.0]))[None, None]
    torch.testing.assert_close(warped[valid], expected[valid], rtol=1e-4, atol=1e-3)
    assert (warped[~valid] == 0).all()
    assert 0.5 < valid.float().mean() <= 1.0


def test_a_halo_fills_what_a_turn_would_leave_empty() -> None:
    wide = torch.randn(2, 3, 96, 96)
    aug = planar(math.radians(22.5), 0.95).repeat(2, 1, 1)
    warped, valid = warp_bev(wide, aug, 76.8, EXTENT)
    assert warped.shape == (2, 3, 64, 64)
    assert valid.all()
    assert not warp_bev(wide[..., 16:-16, 16:-16], aug, EXTENT)[1].all()


def test_each_sample_has_its_own_augmentation_and_dtype_stays() -> None:
    maps = torch.randn(2, 3, 16, 16).half()
    warped, _ = warp_bev(maps, torch.cat([planar(), planar(flip_x=True)]), EXTENT)
    assert torch.equal(warped, torch.stack([maps[0], maps[1].flip(-1)]))
