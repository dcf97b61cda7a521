"""What the pictures show: boxes where the devkit projects them, nothing from behind a camera."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nuscenes.utils.geometry_utils import BoxVisibility, view_points

from data.drawing.pictures import (
    COLOURS,
    HALF,
    NEAR,
    Boxes,
    View,
    compose_row,
    draw_bev,
    draw_camera_instances,
    draw_cameras,
    draw_instances,
    draw_strength,
    load_view,
    project_boxes,
)
from data.reading.classes import CLASSES
from data.reading.coco_json import InstanceArrays
from data.reading.index import CAMERAS, Index

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


def instances(boxes: list[list[float]], labels: list[int], scores: list[float]) -> InstanceArrays:
    """Instances that fill their boxes in an image of 50 x 100 pixels."""
    masks = torch.zeros(len(boxes), 50, 100, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[int(top) : int(bottom), int(left) : int(right)] = 1
    return InstanceArrays.of((torch.tensor(boxes).view(-1, 4), torch.tensor(labels), torch.tensor(scores), masks))


def test_masks_are_drawn_where_they_are_in_the_colour_of_their_class() -> None:
    image = np.full((50, 100, 3), 128, np.uint8)
    car, bus = CLASSES.index("car"), CLASSES.index("bus")
    shown = instances([[10, 20, 60, 45], [40, 5, 90, 40]], [car, bus], [0.9, 0.4])
    empty = draw_instances(image, instances([], [], []), "", scores=True).astype(int)
    picture = draw_instances(image, shown, "", scores=False).astype(int)
    scale = HALF / 100
    strip = picture.shape[0] - round(HALF * 50 / 100)

    def change(x: float, y: float) -> np.ndarray:
        row, column = strip + round(y * scale), round(x * scale)
        return picture[row, column] - empty[row, column]

    def towards(colour: str) -> np.ndarray:
        return np.sign(np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) - 128)

    assert (np.sign(change(20, 35)) == towards(COLOURS["car"])).all()
    assert (np.sign(change(80, 20)) == towards(COLOURS["bus"])).all()
    assert (change(50, 30) == change(20, 35)).all()  # the better score lies on top
    for x, y in ((5, 30), (65, 43), (95, 20), (30, 47)):
        assert not change(x, y).any()
    edge = [x for x in range(picture.shape[1]) if change(x / scale, 44).any()]
    assert abs(min(edge) - 10 * scale) <= 2  # the outline is at the pixels' edge
    assert abs(max(edge) - 60 * scale) <= 2


def test_scores_are_written_beside_the_classes() -> None:
    image = np.zeros((50, 100, 3), np.uint8)
    shown = instances([[20, 20, 60, 45]], [0], [0.9])
    plain, scored = (draw_instances(image, shown, "", scores=scores).astype(int) for scores in (False, True))
    changed = np.argwhere((plain != scored).any(axis=2))
    assert len(changed)
    assert changed[:, 0].max() < 20 * HALF / 100 + 30  # above the box


def test_instances_in_cameras_keep_to_their_camera(view: View) -> None:
    size = view.images["CAM_FRONT"].shape[:2]
    nothing = InstanceArrays(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32),
                             np.zeros((0, *size), np.uint8))  # fmt: skip
    whole = InstanceArrays(np.float32([[0.0, 0.0, size[1], size[0]]]), np.array([3]), np.ones(1, np.float32),
                           np.ones((1, *size), np.uint8))  # fmt: skip
    shown = dict.fromkeys(CAMERAS, nothing)
    empty = draw_camera_instances(view, shown, "").astype(int)
    picture = draw_camera_instances(view, shown | {"CAM_BACK": whole}, "").astype(int)
    rows, columns = np.nonzero((picture != empty).any(axis=2)[40:])
    assert rows.min() + 40 > picture.shape[0] / 2  # the second row of cameras, its middle one
    assert picture.shape[1] / 3 - 4 < columns.min() < columns.max() < 2 * picture.shape[1] / 3 + 4
    assert len(rows) > 0.9 * (picture.shape[0] / 2 - 40) * picture.shape[1] / 3


def test_a_map_is_bright_where_it_is_strong() -> None:
    strength = np.zeros((20, 20), np.float32)
    strength[16:19, 2:5] = 7.0  # y about +7.5, x about -6.5 on +-10 m
    strength[4, 15] = 3.5
    nothing = Boxes(np.empty((0, 9)), np.empty(0, np.int64))
    picture = draw_strength(strength, 10.0, nothing, "", 200).astype(int)
    strip = picture.shape[0] - 200

    def at(x: float, y: float) -> list[int]:
        return picture[strip + round((10 - y) * 10), round((x + 10) * 10)].tolist()

    assert at(-6.5, 7.5) == [255, 255, 255]
    assert sum(at(-6.5, -7.5)) == sum(at(6.5, 7.5)) < sum(at(5.5, -5.5)) < 3 * 255
    boxed = draw_strength(strength, 10.0, Boxes(np.array([[5, 5, 0, 4, 2, 1, 0, 0, 0.0]]), np.array([0])), "", 200)
    rows, columns = np.nonzero((boxed.astype(int) != picture).any(2))
    assert abs((columns.min() + columns.max()) / 20 - 10 - 5) < 0.2
    assert abs(10 - (rows.min() + rows.max() - 2 * strip) / 20 - 5) < 0.2
    assert (draw_strength(np.zeros((4, 4), np.float32), 10.0, nothing, "", 200) < 80).mean() > 0.95


def test_panels_of_a_row_stand_side_by_side() -> None:
    panels = [np.full((50, width, 3), width, np.uint8) for width in (40, 60, 80)]
    picture = compose_row(panels, "below")
    assert picture.shape[0] > 50
    assert [int(picture[0, x, 0]) for x in (0, 44, 108, 187)] == [40, 60, 80, 80]
    assert picture.shape[1] == 40 + 60 + 80 + 2 * 4
