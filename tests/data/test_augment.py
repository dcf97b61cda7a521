from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data.reading.augment import draw_bev_matrix, draw_image_matrices, image_matrix
from data.reading.config import BevConfig, GridConfig, ImageConfig, InputConfig
from data.reading.sensors import load_image

RAW = (360, 640)
SPOT = 24  # raw pixels; a disc large enough to be seen at a quarter of the size


def spot_image(path: Path, centre: tuple[float, float]) -> None:
    y, x = np.mgrid[: RAW[0], : RAW[1]]
    disc = np.hypot(x - centre[0], y - centre[1]) <= SPOT / 2
    cv2.imwrite(str(path), np.where(disc[..., None], 255, 0).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 98])


@given(
    size=st.sampled_from([(64, 128), (96, 320), (360, 640)]),
    factor=st.floats(0.8, 1.2),
    shift=st.floats(0, 1),
    flip=st.booleans(),
    degrees=st.floats(-20, 20),
    where=st.tuples(st.floats(0.2, 0.8), st.floats(0.55, 0.8)),
)
@settings(max_examples=40, deadline=None)
def test_a_marked_pixel_lands_where_the_matrix_says(
    tmp_path_factory: pytest.TempPathFactory,
    size: tuple[int, int],
    factor: float,
    shift: float,
    flip: bool,
    degrees: float,
    where: tuple[float, float],
) -> None:
    path = tmp_path_factory.getbasetemp() / "spot.jpg"
    centre = (where[0] * RAW[1], where[1] * RAW[0])
    spot_image(path, centre)
    matrix = image_matrix(RAW, size, factor=factor, shift=shift, flip=flip, degrees=degrees)
    image = load_image(path, "token", RAW, matrix, size)[..., 0].astype(float)
    expected = matrix @ [*centre, 1.0]
    radius = SPOT * size[1] / RAW[1]
    if not (radius < expected[0] < size[1] - radius and radius < expected[1] < size[0] - radius):
        return
    y, x = np.mgrid[: size[0], : size[1]]
    image[image < 40] = 0  # JPEG noise
    found = np.array([(image * x).sum(), (image * y).sum()]) / image.sum()
    np.testing.assert_allclose(found, expected[:2], atol=0.15)


def test_evaluation_fits_the_width_and_drops_the_sky() -> None:
    matrix = image_matrix((900, 1600), (256, 704))
    corners = matrix @ np.array([[-0.5, 1599.5], [899.5, 899.5], [1, 1]])
    np.testing.assert_allclose(corners[:2], [[-0.5, 703.5], [255.5, 255.5]], atol=1e-9)
    np.testing.assert_array_equal(image_matrix((128, 352), (128, 352)), np.eye(3))


def test_an_image_of_the_right_size_is_not_resampled(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 255, (64, 128, 3), dtype=np.uint8))
    loaded = load_image(path, "token", (64, 128), np.eye(3), (64, 128))
    np.testing.assert_array_equal(loaded, cv2.imread(str(path)))


def test_draws_are_a_function_of_the_generator_and_stay_in_range() -> None:
    image = ImageConfig(size=(64, 128), resize=(0.9, 1.1), rotate=5.0, flip=0.5)
    bev = BevConfig(flip_x=0.5, flip_y=0.5, rotate=20.0, scale=(0.9, 1.1))
    sizes = np.tile(RAW, (200, 1))
    first, again = (draw_image_matrices(sizes, image, np.random.default_rng(1)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    scale = np.sqrt(np.abs(np.linalg.det(first[:, :2, :2]))) / (128 / 640)
    assert 0.9 <= scale.min() < 0.92
    assert 1.08 < scale.max() <= 1.1
    assert 60 < (np.linalg.det(first[:, :2, :2]) < 0).sum() < 140
    rng = np.random.default_rng(2)
    drawn = np.stack([draw_bev_matrix(bev, rng) for _ in range(200)])
    assert np.abs(drawn[:, 2, 2] - 1).max() <= 0.1
    assert 60 < (drawn[:, 0, 0] < 0).sum() < 140
    np.testing.assert_array_equal(draw_bev_matrix(bev, None), np.eye(4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": {"size": (60, 128), "resize": (1, 1), "rotate": 0, "flip": 0}}, "multiples of depth_stride 16"),
        ({"image": {"size": (64, 128), "resize": (1.1, 0.9), "rotate": 0, "flip": 0}}, "smallest, largest"),
        ({"bev": {"flip_x": 2, "flip_y": 0, "rotate": 0, "scale": (1, 1)}}, "flip_x"),
        ({"frames": 3}, "frames"),
        ({"lidar": True}, "lidar"),
    ],
)
def test_wrong_input_configs_are_refused(config: InputConfig, change: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        InputConfig(**(config.model_dump() | change))


def test_a_grid_has_whole_cells() -> None:
    with pytest.raises(ValidationError, match="whole number"):
        GridConfig(range=51.2, cell=1.5, z=(-5, 3))
