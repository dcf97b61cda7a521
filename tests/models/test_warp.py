"""The warp of dense maps against exact symmetries and a closed form."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data.augment import bev_matrix
from data.boxes import transform_boxes
from models.grid import Grid
from models.targets import TargetEncoder
from models.warp import warp_bev

EXTENT = 51.2
GRID = Grid(25.6, 0.8)


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


def test_channels_may_lie_last_in_memory() -> None:
    maps = torch.randn(2, 16, 16, 3).permute(0, 3, 1, 2)
    aug = planar(0.2).repeat(2, 1, 1)
    assert torch.equal(warp_bev(maps, aug, EXTENT)[0], warp_bev(maps.contiguous(), aug, EXTENT)[0])


@pytest.mark.parametrize(("matrix", "dims"), [(planar(), []), (planar(flip_x=True), [-1]), (planar(flip_y=True), [-2])])
def test_cells_that_are_not_present_are_not_valid_and_cost_no_neighbour(matrix: Tensor, dims: list[int]) -> None:
    present = torch.rand(1, 16, 16) < 0.5
    valid = warp_bev(torch.randn(1, 2, 16, 16), matrix, EXTENT, present=present)[1]
    assert torch.equal(valid[:, 0], present.flip(dims))


@given(st.floats(-math.pi, math.pi), st.floats(0.9, 1.1), st.booleans(), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_a_cell_is_valid_where_all_that_it_is_made_of_is_present(
    angle: float, scale: float, flip: bool, seed: int
) -> None:
    """Absent cells are poisoned: what is valid is finite, and what is not valid would not have been."""
    generator = torch.Generator().manual_seed(seed)
    maps, present = torch.randn(1, 2, 16, 16, generator=generator), torch.rand(1, 16, 16, generator=generator) < 0.8
    aug = planar(angle, scale, flip)
    _, inside = warp_bev(maps, aug, EXTENT, 25.6)
    warped, valid = warp_bev(torch.where(present[:, None], maps, 1e30), aug, EXTENT, 25.6, present)
    assert (warped.abs().amax(1, keepdim=True)[valid] < 100).all()
    poisoned = warped.abs().amax(1, keepdim=True)[inside & ~valid]
    assert (poisoned > 100).all()


def footprint(box: Tensor, grow: float = 0.0) -> Tensor:
    """[H, W] bool: cells of GRID whose centre lies in a box of [9], grown by metres on every side."""
    offset = GRID.centers() - box[:2]
    along = offset @ torch.stack([box[6].cos(), box[6].sin()])
    across = offset @ torch.stack([-box[6].sin(), box[6].cos()])
    return (along.abs() <= box[3] / 2 + grow) & (across.abs() <= box[4] / 2 + grow)


augmentations = st.tuples(st.booleans(), st.booleans(), st.floats(-45, 45), st.floats(0.9, 1.1))
poses = st.tuples(st.floats(-12, 12), st.floats(-12, 12), st.floats(3, 9), st.floats(2.5, 4), st.floats(-3.14, 3.14))


@given(augmentations, poses)
@settings(max_examples=100, deadline=None)
def test_a_box_drawn_after_the_warp_lands_where_the_warped_map_has_it(
    augmentation: tuple[bool, bool, float, float], pose: tuple[float, float, float, float, float]
) -> None:
    flip_x, flip_y, degrees, scale = augmentation
    x, y, length, width, yaw = pose
    matrix = torch.from_numpy(bev_matrix(flip_x=flip_x, flip_y=flip_y, degrees=degrees, scale=scale))
    box = torch.tensor([x, y, 0, length, width, 2, yaw, 0, 0])
    warped, valid = warp_bev(footprint(box).float()[None, None], matrix.float()[None], GRID.range)
    moved = transform_boxes(box[None], matrix)[0]
    full, empty = (warped[0, 0] > 1 - 1e-5) & valid[0, 0], (warped[0, 0] == 0) & valid[0, 0]
    # All four sources inside: so is the cell, because a box is convex. All four outside: the cell is not deep inside.
    assert not (full & ~footprint(moved, 1e-3)).any()
    assert not (empty & footprint(moved, -1.5 * GRID.cell * scale)).any()
    assert (full | ~footprint(moved, -1.5 * GRID.cell * scale) | ~valid[0, 0]).all()
    # And its centre is the centre of mass of the map.
    if valid.all():
        centre = (GRID.centers() * warped[0, 0, :, :, None]).sum((0, 1)) / warped.sum()
        torch.testing.assert_close(centre, moved[:2], atol=GRID.cell / 2, rtol=0)


@given(st.booleans(), st.booleans(), st.sampled_from([0.0, 90.0, 180.0, -90.0]), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_heatmaps_of_moved_boxes_are_the_moved_heatmaps(
    flip_x: bool, flip_y: bool, degrees: float, seed: int
) -> None:
    """To the last bit where the augmentation maps cells to cells."""
    generator = torch.Generator().manual_seed(seed)
    encoder = TargetEncoder(GRID, (1, 2), (1, 1, 1))
    low, high = torch.tensor([-25, -25, 0, 1, 1, 1, -3.1, 0, 0]), torch.tensor([25, 25, 1, 9, 4, 3, 3.1, 5, 5])
    boxes = low + torch.rand(12, 9, generator=generator) * (high - low)
    labels = torch.randint(0, 3, (12,), generator=generator)
    matrix = torch.from_numpy(bev_matrix(flip_x=flip_x, flip_y=flip_y, degrees=degrees))
    before = encoder([boxes], [labels]).heatmap
    after = encoder([transform_boxes(boxes.double(), matrix).float()], [labels]).heatmap
    assert torch.equal(warp_bev(before, matrix[None].float(), GRID.range)[0], after)
