from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcv.ops import points_in_boxes_cpu
from mmdet3d.structures import LiDARInstance3DBoxes
from nuscenes.utils.data_classes import Box
from nuscenes.utils.geometry_utils import transform_matrix
from pyquaternion import Quaternion

from data.reading.augment import bev_matrix
from data.reading.boxes import (
    box_corners,
    boxes_in_range,
    global_from_lidar_boxes,
    lidar_boxes_from_global,
    points_in_boxes,
    transform_boxes,
)
from data.reading.geometry import inverse, rotation_matrices, se3

SEEDS = st.integers(0, 2**31)
AUGMENTATIONS = st.builds(
    bev_matrix,
    flip_x=st.booleans(),
    flip_y=st.booleans(),
    degrees=st.floats(-180, 180),
    scale=st.floats(0.5, 2.0),
)


def random_boxes(rng: np.random.Generator, count: int = 12) -> np.ndarray:
    low = [-50, -50, -3, 0.3, 0.3, 0.5, -np.pi, -10, -10]
    high = [50, 50, 2, 10, 4, 4, np.pi, 10, 10]
    return rng.uniform(low, high, (count, 9))


def random_pose(rng: np.random.Generator, tilt: float = 0.05) -> np.ndarray:
    turn = Quaternion(axis=[0, 0, 1], angle=rng.uniform(-np.pi, np.pi)) * Quaternion(axis=[0.6, 0.8, 0], angle=tilt)
    return transform_matrix(rng.uniform(-2000, 2000, 3), turn)


@given(SEEDS, AUGMENTATIONS)
@settings(max_examples=60, deadline=None)
def test_a_point_stays_inside_its_box_and_no_other(seed: int, bev_aug: np.ndarray) -> None:
    rng = np.random.default_rng(seed)
    boxes, matrix = torch.from_numpy(random_boxes(rng)), torch.from_numpy(bev_aug)
    points = torch.from_numpy(rng.uniform(-1.2, 1.2, (12, 20, 3))) * boxes[:, None, 3:6] / 2 + boxes[:, None, :3]
    points = points.reshape(-1, 3)
    moved = points @ matrix[:3, :3].T + matrix[:3, 3]
    assert torch.equal(points_in_boxes(points, boxes), points_in_boxes(moved, transform_boxes(boxes, matrix)))


@given(SEEDS, AUGMENTATIONS)
@settings(max_examples=60, deadline=None)
def test_corners_follow_and_the_inverse_restores(seed: int, bev_aug: np.ndarray) -> None:
    boxes = random_boxes(np.random.default_rng(seed))
    moved = transform_boxes(torch.from_numpy(boxes), torch.from_numpy(bev_aug))
    expected = box_corners(boxes) @ bev_aug[:3, :3].T
    distance = np.linalg.norm(box_corners(moved.numpy())[:, :, None] - expected[:, None], axis=-1)
    assert distance.min(axis=2).max() < 1e-9  # as sets: a flip reorders them
    back = transform_boxes(moved, torch.from_numpy(np.linalg.inv(bev_aug))).numpy()
    np.testing.assert_allclose(np.delete(back, 6, 1), np.delete(boxes, 6, 1), atol=1e-9)
    np.testing.assert_allclose(np.cos(back[:, 6] - boxes[:, 6]), 1.0, atol=1e-12)


def test_transform_equals_mmdet3d_and_passes_scores_on() -> None:
    boxes = torch.from_numpy(random_boxes(np.random.default_rng(0))).float()
    theirs = LiDARInstance3DBoxes(boxes.clone(), box_dim=9)
    theirs.rotate(0.3)
    theirs.scale(1.05)
    theirs.flip("horizontal")  # y -> -y
    wide = torch.cat([boxes, torch.arange(24.0).reshape(12, 2)], dim=1)
    degrees = float(np.rad2deg(0.3))
    ours = transform_boxes(wide, torch.from_numpy(bev_matrix(flip_y=True, degrees=degrees, scale=1.05)))
    turn = (ours[:, 6] - theirs.tensor[:, 6]).numpy()
    np.testing.assert_allclose(np.cos(turn), 1.0, atol=1e-6)
    keep = [0, 1, 2, 3, 4, 5, 7, 8]
    torch.testing.assert_close(ours[:, keep], theirs.tensor[:, keep], rtol=1e-5, atol=1e-5)
    assert torch.equal(ours[:, 9:], wide[:, 9:])


def test_corners_and_points_inside_equal_mmdet3d_and_mmcv() -> None:
    rng = np.random.default_rng(1)
    boxes = random_boxes(rng)
    theirs = LiDARInstance3DBoxes(torch.from_numpy(boxes).float(), box_dim=9).corners.numpy()
    distance = np.linalg.norm(box_corners(boxes)[:, :, None] - theirs[:, None], axis=-1)
    assert distance.min(axis=2).max() < 1e-4
    points = torch.from_numpy(rng.uniform([-50, -50, -3], [50, 50, 5], (20_000, 3))).float()
    boxes32 = torch.from_numpy(boxes).float()
    counted = points_in_boxes_cpu  # the first box that holds a point, so the boxes are taken one by one
    for n in range(len(boxes)):
        inside = counted(points[None], boxes32[None, n : n + 1, :7])[0, :, 0].bool()
        assert torch.equal(points_in_boxes(points, boxes32[n : n + 1])[:, 0], inside)


@given(SEEDS)
@settings(max_examples=40, deadline=None)
def test_global_boxes_come_back_through_a_tilted_lidar(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pose, translation, size = random_pose(rng), rng.uniform(-2000, 2000, (5, 3)), rng.uniform(0.5, 10, (5, 3))
    yaw, velocity = rng.uniform(-np.pi, np.pi, 5), rng.normal(0, 5, (5, 2))
    rotation = np.array([Quaternion(axis=[0, 0, 1], angle=angle).elements for angle in yaw])
    velocity[0] = np.nan
    poses = np.broadcast_to(pose, (5, 4, 4))
    boxes = lidar_boxes_from_global(translation, size, rotation, velocity, poses)
    back = global_from_lidar_boxes(boxes, pose)
    np.testing.assert_allclose(back[0], translation, atol=1e-6)
    np.testing.assert_allclose(back[1], size, atol=1e-12)
    np.testing.assert_allclose(rotation_matrices(back[2]), rotation_matrices(rotation), atol=1e-9)
    np.testing.assert_allclose(back[3], velocity, atol=1e-9)


def test_lidar_boxes_equal_the_devkits_box() -> None:
    rng = np.random.default_rng(3)
    pose = random_pose(rng)
    box = Box(rng.normal(0, 20, 3), rng.uniform(1, 5, 3), Quaternion(axis=[0, 0, 1], angle=0.4), velocity=(3, 1, 0))
    ours = lidar_boxes_from_global(
        box.center[None], box.wlh[None], box.orientation.elements[None], box.velocity[None, :2], pose[None]
    )[0]
    box.translate(-pose[:3, 3])
    box.rotate(Quaternion(matrix=pose).inverse)
    np.testing.assert_allclose(ours[:3], box.center - np.array([0, 0, box.wlh[2] / 2]), atol=1e-9)
    np.testing.assert_allclose(ours[3:6], box.wlh[[1, 0, 2]])
    np.testing.assert_allclose(ours[6], box.orientation.yaw_pitch_roll[0], atol=1e-9)
    np.testing.assert_allclose(ours[7:], box.velocity[:2], atol=1e-9)


def test_rigid_transforms_equal_the_devkits() -> None:
    rng = np.random.default_rng(4)
    quaternions, translations = rng.normal(0, 1, (6, 4)), rng.normal(0, 100, (6, 3))
    ours = se3(quaternions, translations)
    for n in range(6):
        expected = transform_matrix(translations[n], Quaternion(quaternions[n]))
        np.testing.assert_allclose(ours[n], expected, atol=1e-12)
        expected = transform_matrix(translations[n], Quaternion(quaternions[n]), inverse=True)
        np.testing.assert_allclose(inverse(ours)[n], expected, atol=1e-10)


def test_no_boxes_are_no_special_case() -> None:
    empty = torch.empty(0, 9)
    assert transform_boxes(empty, torch.eye(4)).shape == (0, 9)
    assert boxes_in_range(empty, 10.0).shape == (0,)
    assert points_in_boxes(torch.zeros(3, 3), empty).shape == (3, 0)
    assert [part.shape for part in global_from_lidar_boxes(empty.numpy(), np.eye(4))] == [
        (0, 3),
        (0, 3),
        (0, 4),
        (0, 2),
    ]
