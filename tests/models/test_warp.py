"""The warp of dense maps against exact symmetries and a closed form, that of head maps against moved boxes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from data.reading.augment import bev_matrix
from data.reading.boxes import transform_boxes
from models.head.center_head import GridCenterHead
from models.head.head_maps import task_scores, warp_head
from models.head.targets import REGRESSION, TargetEncoder
from models.layers.grid import Grid
from models.layers.warp import warp_bev
from tests.models.factory import TASKS

EXTENT = 51.2
GRID = Grid(25.6, 0.8)


def planar(angle: float = 0.0, scale: float = 1.0, flip_x: bool = False, flip_y: bool = False) -> Tensor:
    """[1, 4, 4] augmentation: flip, then rotate and scale."""
    c, s = scale * math.cos(angle), scale * math.sin(angle)
    matrix = torch.diag(torch.tensor([1.0, 1.0, scale, 1.0]))
    matrix[:2, :2] = torch.tensor([[c, -s], [s, c]]) @ torch.diag(
        torch.tensor([-1.0 if flip_x else 1.0, -1.0 if flip_y else 1.0])
    )
    return matrix[None]


@pytest.mark.parametrize("size", [16, 64, 100, 180])
@pytest.mark.parametrize(
    ("matrix", "dims"),
    [
        (planar(), []),
        (planar(flip_x=True), [-1]),
        (planar(flip_y=True), [-2]),
        (planar(flip_x=True, flip_y=True), [-1, -2]),
        (planar(math.pi), [-1, -2]),
    ],
)
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
def test_heatmaps_of_moved_boxes_are_the_moved_heatmaps(flip_x: bool, flip_y: bool, degrees: float, seed: int) -> None:
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


HEAD_GRID = Grid(12.8, 1.6)
SIZES = tuple(len(names) for names in TASKS)
STARTS = tuple(10 * task + sum(SIZES[:task]) for task in range(len(SIZES)))
"""Of each task the first channel of its ten codes; its heatmaps follow them."""


def encoder(norm_bbox: bool = True) -> TargetEncoder:
    return TargetEncoder(HEAD_GRID, SIZES, (1,) * 10, norm_bbox=norm_bbox)


def random_head_map(size: int = 16, samples: int = 1, seed: int = 0, norm_bbox: bool = True) -> Tensor:
    """[B, 70, size, size] with offsets in [0, 1); sines and cosines are of no unit length, as a head's are."""
    maps = torch.randn(samples, 70, size, size, generator=torch.Generator().manual_seed(seed))
    for start in STARTS:
        maps[:, start : start + 2] = maps[:, start : start + 2].sigmoid()
        if not norm_bbox:
            maps[:, start + 3 : start + 6] = maps[:, start + 3 : start + 6].exp()
    return maps


def said(maps: Tensor, start: int, extent: float, norm_bbox: bool = True) -> tuple[Tensor, Tensor]:
    """Boxes [H * W, 9] in float64 that a task's codes [70, H, W] say, and the length of sine and cosine [H * W]."""
    size = maps.shape[-1]
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    dx, dy, z, *sides, sin, cos, vx, vy = maps[start : start + 10].double()
    length, width, height = [side.exp() for side in sides] if norm_bbox else sides
    x, y = ((cells + offset) * HEAD_GRID.cell - extent for cells, offset in ((column, dx), (row, dy)))
    boxes = [x, y, z - height / 2, length, width, height, torch.atan2(sin, cos), vx, vy]
    return torch.stack(boxes, -1).flatten(0, 1), torch.hypot(sin, cos).flatten()


def as_columns(boxes: Tensor) -> Tensor:
    """Boxes [M, 9] with sine and cosine for the yaw, which has no jump so: [M, 10]."""
    return torch.cat([boxes[:, :6], boxes[:, 6:7].sin(), boxes[:, 6:7].cos(), boxes[:, 7:]], 1)


def came_from(matrix: Tensor, size: int, extent: float) -> tuple[Tensor, Tensor]:
    """Of each cell of HEAD_GRID the map's cell whose centre is nearest to its source, and whether that is inside."""
    source = HEAD_GRID.centers().double().flatten(0, 1) @ torch.linalg.inv(matrix[:2, :2].double()).T
    axis = (torch.arange(size, dtype=torch.float64) + 0.5) * HEAD_GRID.cell - extent
    row, column = torch.meshgrid(axis, axis, indexing="ij")
    nearest = torch.cdist(source, torch.stack([column, row], -1).flatten(0, 1)).argmin(1)
    return nearest, (source.abs() < extent).all(1)


def check_moved(maps: Tensor, matrix: Tensor, extent: float, norm_bbox: bool = True) -> None:
    """Every cell says the moved box of its source cell in all ten codes, and its source cell's scores."""
    warped, valid = warp_head(maps, matrix[None].float(), extent, encoder(norm_bbox))
    assert warped.shape == (1, 70, HEAD_GRID.size, HEAD_GRID.size)
    nearest, inside = came_from(matrix, maps.shape[-1], extent)
    assert torch.equal(valid.flatten(), inside)
    assert (warped.flatten(2)[..., ~inside] == 0).all()
    for start, classes in zip(STARTS, SIZES, strict=True):
        before, length = said(maps[0], start, extent, norm_bbox)
        after, same = said(warped[0], start, HEAD_GRID.range, norm_bbox)
        moved = transform_boxes(before[nearest[inside]], matrix.double())
        torch.testing.assert_close(as_columns(after[inside]), as_columns(moved), rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(same[inside], length[nearest[inside]], rtol=1e-5, atol=1e-6)
        heat = maps[0, start + 10 : start + 10 + classes].flatten(1)[:, nearest[inside]]
        assert torch.equal(warped[0, start + 10 : start + 10 + classes].flatten(1)[:, inside], heat)


@pytest.mark.parametrize("norm_bbox", [True, False])
@pytest.mark.parametrize(
    "kinds",
    [
        {},
        {"flip_x": True},
        {"flip_y": True},
        {"flip_x": True, "flip_y": True},
        {"degrees": 90.0},
        {"degrees": -90.0},
        {"degrees": 180.0},
        {"flip_x": True, "degrees": 90.0},
        {"scale": 1.05},
        {"degrees": 22.5, "scale": 0.95},
    ],
)
def test_a_head_map_says_the_moved_boxes(kinds: dict[str, Any], norm_bbox: bool) -> None:
    matrix = torch.from_numpy(bev_matrix(**kinds))
    check_moved(random_head_map(norm_bbox=norm_bbox), matrix, HEAD_GRID.range, norm_bbox)


@given(st.booleans(), st.booleans(), st.floats(-45, 45), st.floats(0.9, 1.1), st.sampled_from([16, 20]))
@settings(max_examples=40, deadline=None)
def test_a_head_map_says_the_moved_boxes_whatever_the_augmentation(
    flip_x: bool, flip_y: bool, degrees: float, scale: float, size: int
) -> None:
    matrix = torch.from_numpy(bev_matrix(flip_x=flip_x, flip_y=flip_y, degrees=degrees, scale=scale))
    source = HEAD_GRID.centers().double() @ torch.linalg.inv(matrix[:2, :2].double()).T / HEAD_GRID.cell
    assume(((source - source.floor()).minimum(source.ceil() - source) > 1e-4).all())  # which cell is nearest is clear
    check_moved(random_head_map(size), matrix, size * HEAD_GRID.cell / 2)


@pytest.mark.parametrize("kinds", [{}, {"flip_x": True}, {"flip_y": True}, {"degrees": 90.0}])
def test_a_head_map_that_lies_on_the_grid_again_keeps_its_offsets_and_changes_twice_back(kinds: dict[str, Any]) -> None:
    maps, matrix = random_head_map(), torch.from_numpy(bev_matrix(**kinds)).float()[None]
    warped, valid = warp_head(maps, matrix, HEAD_GRID.range, encoder())
    assert valid.all()
    for start in STARTS:
        assert (warped[:, start : start + 2] >= 0).all()
        assert (warped[:, start : start + 2] <= 1).all()
    back, _ = warp_head(warped, torch.linalg.inv(matrix), HEAD_GRID.range, encoder())
    torch.testing.assert_close(back, maps, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kinds", [{"flip_x": True}, {"flip_y": True}, {"degrees": 90.0}, {"degrees": 180.0}])
def test_a_head_decodes_a_moved_map_to_moved_boxes(kinds: dict[str, Any]) -> None:
    head = GridCenterHead(
        {"range": HEAD_GRID.range, "cell": HEAD_GRID.cell}, TASKS, 4, nms_radius=2.0, max_detections=10_000
    )

    def decoded(maps: Tensor) -> Any:
        parts = maps.split([10 + classes for classes in SIZES], 1)
        tasks = [part.split([*REGRESSION.values(), classes], 1) for part, classes in zip(parts, SIZES, strict=True)]
        return head.decode([dict(zip([*REGRESSION, "heatmap"], task, strict=True)) for task in tasks])[0]

    maps, matrix = random_head_map(), torch.from_numpy(bev_matrix(**kinds))
    before = decoded(maps)
    after = decoded(warp_head(maps, matrix.float()[None], HEAD_GRID.range, encoder())[0])
    assert len(before.boxes) > 300
    assert torch.equal(after.scores, before.scores)
    assert torch.equal(after.labels, before.labels)
    torch.testing.assert_close(as_columns(after.boxes), as_columns(transform_boxes(before.boxes, matrix)))


def test_each_head_map_has_its_own_augmentation_and_autocast_does_not_reach_it() -> None:
    maps, aug = random_head_map(samples=2), torch.cat([planar(0.3, 0.95), planar(flip_x=True)])
    warped, valid = warp_head(maps, aug, HEAD_GRID.range, encoder())
    for i in range(2):
        alone, there = warp_head(maps[i : i + 1], aug[i : i + 1], HEAD_GRID.range, encoder())
        assert torch.equal(warped[i : i + 1], alone)
        assert torch.equal(valid[i : i + 1], there)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(warp_head(maps, aug, HEAD_GRID.range, encoder())[0], warped)


def test_a_head_map_of_other_tasks_or_another_cell_is_named() -> None:
    with pytest.raises(ValueError, match="head maps have 60 channels, the tasks need 70"):
        warp_head(torch.zeros(1, 60, 16, 16), planar(), HEAD_GRID.range, encoder())
    with pytest.raises(ValueError, match=r"cells of 0\.8 m, the grid cells of 1\.6 m"):
        warp_head(torch.zeros(1, 70, 32, 32), planar(), HEAD_GRID.range, encoder())


def test_a_tasks_channels_have_the_score_of_its_best_class() -> None:
    maps = random_head_map(4)
    scores = task_scores(maps, encoder())
    assert scores.shape == maps.shape
    for start, classes in zip(STARTS, SIZES, strict=True):
        best = maps[:, start + 10 : start + 10 + classes].amax(1, keepdim=True).sigmoid()
        assert torch.equal(scores[:, start : start + 10 + classes], best.expand(-1, 10 + classes, -1, -1))
