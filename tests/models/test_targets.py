"""Targets under the symmetries of the grid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.head.center_head import circle_nms
from models.head.targets import TargetEncoder, Targets
from models.layers.grid import Grid
from tests.models.factory import random_boxes

ENCODER = TargetEncoder(Grid(12.8, 0.8), (1, 2, 2, 1, 2, 2), (1,) * 10)


def dense_codes(targets: Targets) -> Tensor:
    """Codes [T, 10, H, W] laid out at their cells; the first of those that share one."""
    size = ENCODER.grid.size
    dense = torch.full((6, size * size, 10), 99.0)
    for task in range(6):
        valid = targets.valid[0, task]
        dense[task, targets.cell[0, task, valid].flip(0)] = targets.code[0, task, valid].flip(0)
    return dense.mT.reshape(6, 10, size, size)


@pytest.mark.parametrize(("axis", "dim"), [(0, -1), (1, -2)])
def test_targets_of_flipped_boxes_are_the_flipped_targets(axis: int, dim: int) -> None:
    boxes, labels = random_boxes(25, extent=12.0)
    boxes = boxes.nan_to_num(1.0)
    flipped = boxes.clone()
    flipped[:, axis] *= -1
    flipped[:, 7 + axis] *= -1
    flipped[:, 6] = torch.pi - boxes[:, 6] if axis == 0 else -boxes[:, 6]
    plain, mirrored = ENCODER([boxes], [labels]), ENCODER([flipped], [labels])
    assert torch.equal(mirrored.heatmap, plain.heatmap.flip(dim))
    expected = dense_codes(plain).flip(dim)
    empty = expected[:, :1] == 99.0
    expected[:, axis] = 1 - expected[:, axis]  # the offset counts from the other side of the cell
    expected[:, 7 if axis == 0 else 6] *= -1  # cos of pi - yaw, sin of -yaw
    expected[:, 8 + axis] *= -1
    actual = dense_codes(mirrored)
    torch.testing.assert_close(actual.masked_fill(empty, 0), expected.masked_fill(empty, 0), rtol=0, atol=1e-5)
    assert torch.equal(actual[:, :1] == 99.0, empty)


def test_more_boxes_than_slots_keep_the_first() -> None:
    boxes, _ = random_boxes(30, extent=12.0)
    few = TargetEncoder(ENCODER.grid, (1,), (1,), max_objects=5)
    targets = few([boxes], [torch.zeros(30, dtype=torch.long)])
    assert targets.valid.shape == (1, 1, 5)
    assert targets.valid.all()
    torch.testing.assert_close(targets.code[0, 0], few.encode(boxes[:5], torch.zeros(5).long()).code, equal_nan=True)


def test_circle_nms_equals_the_greedy_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    for trial in range(20):
        xy = torch.rand(40, 2, generator=generator) * 10
        scores = torch.rand(40, generator=generator).sort(descending=True).values
        scores[scores < 0.1] = 0
        radius = 0.5 + trial / 10
        keep: list[int] = []
        for i in range(40):
            if scores[i] > 0 and all((xy[i] - xy[j]).norm() > radius for j in keep):
                keep.append(i)
        assert circle_nms(xy, scores, torch.tensor(radius)).nonzero().squeeze(1).tolist() == keep


def test_a_grid_must_hold_whole_cells() -> None:
    assert Grid(51.2, 0.8).size == 128
    with pytest.raises(ValueError, match="whole number of cells"):
        Grid(51.2, 1.5)
    with pytest.raises(ValueError, match="low < high"):
        Grid(51.2, 1.6, (3.0, -5.0))
