"""Augmentation as matrices: they are drawn here, and everything that is augmented is transformed by them.

Pixel coordinates put integers at pixel centres, so the image covers [-0.5, W - 0.5] x [-0.5, H - 0.5].
"""

from __future__ import annotations

import numpy as np

from data.reading.config import BevConfig, ImageConfig
from data.reading.geometry import Float64


def image_matrix(
    raw_size: tuple[int, int],
    size: tuple[int, int],
    *,
    factor: float = 1.0,
    shift: float = 0.5,
    flip: bool = False,
    degrees: float = 0.0,
) -> Float64:
    """The matrix [3, 3] from raw pixels to network pixels: resize, crop, flip, rotate.

    The raw width times `factor` fits the network's width. What is too high loses its top (the sky), as is usual on
    nuScenes; what is too small leaves black borders.

    Args:
        raw_size: height and width of the raw image.
        size: height and width of the network's image.
        factor: on the scale that fits the width.
        shift: horizontal position of the crop, 0 left to 1 right.
        flip: whether to mirror left and right.
        degrees: rotation about the centre, from the +x to the +y pixel axis.
    """
    height, width = size
    scale = width / raw_size[1] * factor
    left, top = shift * (raw_size[1] * scale - width), raw_size[0] * scale - height
    resize_and_crop = np.array([[scale, 0.0, -left], [0.0, scale, -top], [0.0, 0.0, 1.0]])
    mirror = np.array([[-1.0, 0.0, width], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]) if flip else np.eye(3)
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    turn = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
    centre, half = _shift(width / 2, height / 2), _shift(0.5, 0.5)
    around_centre = centre @ turn @ _shift(-width / 2, -height / 2)
    return _shift(-0.5, -0.5) @ around_centre @ mirror @ resize_and_crop @ half


def draw_image_matrices(raw_sizes: np.ndarray, config: ImageConfig, rng: np.random.Generator | None) -> Float64:
    """Matrices [N, 3, 3] of N cameras, drawn independently; without a generator, those of evaluation.

    Args:
        raw_sizes: [N, 2] heights and widths.
        config: ranges to draw from.
        rng: source of randomness.
    """
    sizes = [(int(height), int(width)) for height, width in raw_sizes]
    if rng is None:
        return np.stack([image_matrix(size, config.size) for size in sizes])
    factors, shifts = rng.uniform(*config.resize, len(sizes)), rng.uniform(size=len(sizes))
    flips = rng.uniform(size=len(sizes)) < config.flip
    degrees = rng.uniform(-config.rotate, config.rotate, len(sizes))
    return np.stack(
        [
            image_matrix(size, config.size, factor=factors[n], shift=shifts[n], flip=bool(flips[n]), degrees=degrees[n])
            for n, size in enumerate(sizes)
        ]
    )


def bev_matrix(*, flip_x: bool = False, flip_y: bool = False, degrees: float = 0.0, scale: float = 1.0) -> Float64:
    """The matrix [4, 4] from the LiDAR frame to the augmented frame: scale, turn about z, then flip."""
    angle = np.deg2rad(degrees)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    flip = np.diag([-1.0 if flip_x else 1.0, -1.0 if flip_y else 1.0, 1.0, 1.0])
    return flip @ turn @ np.diag([scale, scale, scale, 1.0])


def draw_bev_matrix(config: BevConfig, rng: np.random.Generator | None) -> Float64:
    """A matrix [4, 4] drawn from the ranges; without a generator, the identity."""
    if rng is None:
        return np.eye(4)
    flips = rng.uniform(size=2) < (config.flip_x, config.flip_y)
    degrees, scale = rng.uniform(-config.rotate, config.rotate), rng.uniform(*config.scale)
    return bev_matrix(flip_x=bool(flips[0]), flip_y=bool(flips[1]), degrees=degrees, scale=scale)


def _shift(x: float, y: float) -> Float64:
    return np.array([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]])
