"""Batches at another image size: what is seen where must not change."""

from __future__ import annotations

import torch

from models.layers.images import depth_at, nearest_depth, resized
from models.layers.projection import project
from tests.models.factory import IMAGE, random_batch


def test_points_keep_their_places_in_the_picture() -> None:
    batch = random_batch()
    points = torch.rand(200, 3) * torch.tensor([20.0, 20.0, 2.0]) - torch.tensor([10.0, 10.0, 2.0])
    small = resized(batch, (16, 48), 8)
    (before, seen), (after, still) = project(points, batch), project(points, small)
    assert seen.any()
    assert torch.equal(seen, still)
    assert torch.allclose(before[seen], after[seen], atol=1e-5)


def test_a_bright_square_stays_where_it_is() -> None:
    batch = random_batch(batch_size=1)
    batch.images = torch.zeros_like(batch.images)
    batch.images[..., 8:16, 32:48] = 200
    small = resized(batch, (16, 32), 8)
    assert small.images.dtype == torch.uint8
    assert small.images.shape[-2:] == (16, 32)
    assert int(small.images[0, 0, 0, 0, 5, 20]) == 200  # rows 4 to 8, columns 16 to 24
    assert int(small.images[0, 0, 0, 0, 10, 20]) == 0
    assert batch.images.shape[-2:] == IMAGE  # the batch itself is left alone


def test_a_batch_of_the_right_size_comes_back() -> None:
    batch = random_batch()
    assert resized(batch, IMAGE, 8) is batch


def test_the_depth_alone_is_that_of_the_batch_brought_to_a_size() -> None:
    batch = random_batch()
    assert torch.equal(depth_at(batch, (16, 32), 8), resized(batch, (16, 32), 8).depth)
    assert depth_at(batch, (16, 32), 8).shape == (2, 3, 2, 4)
    assert depth_at(batch, IMAGE, 8) is batch.depth
    batch.depth = torch.empty(2, 3, 0, 0)
    assert depth_at(batch, (16, 32), 8) is batch.depth


def test_a_cell_keeps_the_nearest_depth() -> None:
    depth = torch.zeros(1, 1, 4, 4)
    depth[0, 0, 0, 0], depth[0, 0, 1, 1], depth[0, 0, 3, 0] = 7.0, 3.0, 9.0
    assert nearest_depth(depth, (2, 2)).tolist() == [[[[3.0, 0.0], [9.0, 0.0]]]]
