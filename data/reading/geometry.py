"""Rigid transforms as 4x4 matrices in float64, named `dst_SE3_src`, and pinhole projection."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]


def rotation_matrices(quaternions: ArrayLike) -> Float64:
    """Rotation matrices [..., 3, 3] of quaternions [..., 4] in w, x, y, z order; they are normalised first."""
    q = np.asarray(quaternions, dtype=np.float64)
    q = q / np.linalg.norm(q, axis=-1, keepdims=True)
    w, x, y, z = np.moveaxis(q, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def se3(quaternions: ArrayLike, translations: ArrayLike) -> Float64:
    """Transforms [..., 4, 4] of quaternions [..., 4] (w, x, y, z) and translations [..., 3] (metres)."""
    rotation = rotation_matrices(quaternions)
    transform = np.zeros((*rotation.shape[:-2], 4, 4))
    transform[..., :3, :3] = rotation
    transform[..., :3, 3] = translations
    transform[..., 3, 3] = 1.0
    return transform


def inverse(dst_SE3_src: Float64) -> Float64:
    """The rigid inverse `src_SE3_dst` of [..., 4, 4]."""
    src_SE3_dst = np.zeros_like(dst_SE3_src)
    rotation = np.swapaxes(dst_SE3_src[..., :3, :3], -1, -2)
    src_SE3_dst[..., :3, :3] = rotation
    src_SE3_dst[..., :3, 3] = -np.einsum("...ij,...j->...i", rotation, dst_SE3_src[..., :3, 3])
    src_SE3_dst[..., 3, 3] = 1.0
    return src_SE3_dst


def transform_points(dst_SE3_src: NDArray[np.floating], points: NDArray[np.floating]) -> NDArray[np.floating]:
    """Points [P, 3] of the source frame in the destination frame, one transform [4, 4]; dtype as promoted."""
    # Coordinates as rows: a product whose rows have three numbers takes five times as long.
    return (dst_SE3_src[:3, :3] @ points.T + dst_SE3_src[:3, 3:]).T


def project(
    points: NDArray[np.floating], camera_SE3_lidar: Float64, pixels_from_camera: Float64
) -> tuple[Float64, Float64]:
    """Pinhole projection into several cameras at once.

    Args:
        points: [P, 3] in the LiDAR frame, metres.
        camera_SE3_lidar: [N, 4, 4].
        pixels_from_camera: [N, 3, 3], affine; the intrinsics, or image_aug @ intrinsics for network pixels.

    Returns:
        Pixels [N, P, 2], where an integer is the centre of a pixel, and depths [N, P] along the optical axis in
        metres. Pixels of points with depth <= 0 mean nothing.
    """
    pixels_from_lidar = pixels_from_camera @ camera_SE3_lidar[:, :3]
    homogeneous = pixels_from_lidar[:, :, :3] @ points.T.astype(np.float64) + pixels_from_lidar[:, :, 3:]
    depth = homogeneous[:, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        pixels = homogeneous[:, :2] / depth[:, None]
    return np.swapaxes(pixels, 1, 2), depth
