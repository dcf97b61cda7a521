"""Where points appear in the images: against a projection point by point, in float64."""

from __future__ import annotations

import numpy as np
import torch

from models.layers.grid import Grid
from models.layers.projection import inverse3, project, seen
from tests.models.factory import CAMERAS, GRID, IMAGE, random_batch


def turned_batch() -> object:
    batch = random_batch(batch_size=2, frames=2)
    angle = torch.tensor(0.3)
    turn = torch.eye(4)
    turned = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
    turn[:2, :2] = 1.05 * turned @ torch.diag(torch.tensor([1.0, -1.0]))
    turn[2, 2] = 1.05
    batch.bev_aug[1] = turn
    batch.image_aug[:, :, 1] = torch.tensor([[0.9, 0.05, 3.0], [-0.05, 0.9, -2.0], [0, 0, 1]])
    batch.lidar_SE3_cam[:, 1, :, 0, 3] += 1.5  # the previous frame's cameras stood elsewhere
    return batch


def by_hand(point: np.ndarray, batch: object, sample: int, frame: int, camera: int) -> tuple[np.ndarray, bool]:
    pose = batch.bev_aug[sample].double().numpy() @ batch.lidar_SE3_cam[sample, frame, camera].double().numpy()
    x = (np.linalg.inv(pose) @ np.append(point, 1.0))[:3]
    to_pixels = batch.image_aug[sample, frame, camera].double() @ batch.intrinsics[sample, frame, camera].double()
    pixel = to_pixels.numpy() @ x
    place = (pixel[:2] / pixel[2] + 0.5) / np.array([IMAGE[1], IMAGE[0]])
    return place, bool(x[2] > 0.1 and (place >= 0).all() and (place <= 1).all())


def test_points_appear_where_a_pinhole_puts_them() -> None:
    batch = turned_batch()
    points = torch.rand(60, 3, generator=torch.Generator().manual_seed(1)) * 20 - 10
    for frame in (0, 1):
        places, inside = project(points, batch, frame)
        assert inside.any()
        for sample in range(2):
            for camera in range(CAMERAS):
                for number, point in enumerate(points.double().numpy()):
                    place, visible = by_hand(point, batch, sample, frame, camera)
                    assert bool(inside[sample, camera, number]) == visible
                    if visible:
                        assert np.allclose(places[sample, camera, number], place, atol=1e-4)


def test_a_pillar_is_seen_if_one_of_its_points_is() -> None:
    batch, centers = turned_batch(), Grid(**GRID).centers()
    heights = [-2.0, 4.0]
    found = seen(centers, heights, batch)
    _, low = project(torch.cat([centers, torch.full_like(centers[..., :1], -2.0)], -1).flatten(0, 1), batch)
    _, high = project(torch.cat([centers, torch.full_like(centers[..., :1], 4.0)], -1).flatten(0, 1), batch)
    assert torch.equal(found.flatten(2), low | high)
    assert (low & ~high).any()


def test_inverse_of_three_by_three() -> None:
    matrices = torch.randn(50, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(inverse3(matrices), torch.linalg.inv(matrices), atol=1e-8)
