"""What the pictures show: boxes where the devkit projects them, nothing from behind a camera."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nuscenes.utils.geometry_utils import BoxVisibility, view_points

from data.index import CAMERAS, Index
from data.pictures import NEAR, Boxes, View, draw_bev, draw_cameras, load_view, project_boxes

K = np.array([[100.0, 0, 80], [0, 100.0, 45], [0, 0, 1]])


@pytest.fixture(scope="module")
def view(real_index: Index, real_dataroot: Path) -> View:
    return load_view(real_index, 0, real_dataroot)


def test_edges_end_where_the_devkit_projects_the_corners(city_index: Index, city_devkit: Any) -> None:
    view = load_view(city_index, 0, Path(city_devkit.dataroot))
    boxes_seen = 0
    for name in CAMERAS:
        token = city_devkit.get("sample", view.token)["data"][name]
        _, boxes, intrinsics = city_devkit.get_sample_data(token, box_vis_level=BoxVisibility.NONE)
        segments, _, owner, facing = project_boxes(view.truth.boxes, view.camera_SE3_lidar[name], view.intrinsics[name])
        ours = {index: segments[owner == index].reshape(-1, 2) for index in facing}
        theirs = [view_points(box.corners(), intrinsics, normalize=True)[:2].T for box in boxes]
        for points in ours.values():
            assert min(np.abs(points[:, None] - pixels).max(axis=2).min(axis=0).max() for pixels in theirs) < 1e-3
            boxes_seen += 1
    assert boxes_seen >= 10


def test_a_box_across_the_image_plane_is_cut_and_one_behind_is_gone() -> None:
    to_camera = np.array([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])  # looks along +y
    across = [1.0, 0.0, -0.5, 2.0, 4.0, 1.0, 0.0, 0.0, 0.0]
    behind = [0.0, -9.0, -0.5, 2.0, 4.0, 1.0, 0.0, 0.0, 0.0]
    before = [0.0, 9.0, -0.5, 2.0, 4.0, 1.0, 0.0, 0.0, 0.0]
    segments, faces, owner, facing = project_boxes(np.array([across, behind, before]), to_camera, K)
    assert set(owner) == {0, 2}
    assert (owner == 2).sum() == 12
    assert (owner == 0).sum() == 8  # of twelve edges, the four of the hidden end are gone
    assert np.isfinite(segments).all()
    assert np.abs(segments).max() <= 100 * 2.0 / NEAR + 80
    assert facing.tolist() == [2]
    assert faces.shape == (1, 4, 2)
    assert owner[0] == 2  # the far box is drawn first


def test_nothing_to_draw_is_drawn(view: View) -> None:
    nothing = Boxes(np.empty((0, 9)), np.empty(0, np.int64))
    assert draw_cameras(view, nothing, "no boxes").dtype == np.uint8
    empty, full = draw_bev(view, nothing, "no boxes"), draw_bev(view, view.truth, "no boxes")
    assert empty.shape == full.shape
    assert (empty != full).any()


def test_the_threshold_is_inclusive() -> None:
    boxes = Boxes(np.zeros((3, 9)), np.arange(3))
    assert boxes.above(np.array([0.1, 0.2, 0.3]), 0.2).labels.tolist() == [1, 2]
