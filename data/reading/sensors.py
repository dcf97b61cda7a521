"""Reads sensor files: images, LiDAR sweeps, RADAR sweeps, and the depth map that LiDAR gives the cameras."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from data.reading.blobs import POINT_BYTES, BlobError, jpeg_fault, points_fault
from data.reading.geometry import Float64, inverse, project, transform_points
from data.reading.index import Sweeps

EGO_RADIUS: Final = 1.0  # m; returns that are closer in x and in y are the car's own
INTENSITY_SCALE: Final = 255.0
_MICROSECONDS: Final = 1e-6
# Decoding at a fraction of the size is faster than at full size, and averages where a warp would alias.
_REDUCED: Final = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
_PCD_TYPES: Final = {"F": "f", "I": "i", "U": "u"}
_VALID_DYNAMICS: Final = 7  # dyn_prop 0-6: moving to stopped; 7 is unknown
_UNAMBIGUOUS: Final = 3


def load_image(
    path: Path, token: str, raw_size: tuple[int, int], image_aug: Float64, size: tuple[int, int]
) -> NDArray[Any]:
    """A network image [H, W, 3], uint8 BGR: decoded and warped once, by the very matrix that the networks are told.

    Args:
        path: of the JPEG.
        token: of the sample, for errors.
        raw_size: height and width that the tables state.
        image_aug: [3, 3], raw pixels -> network pixels; an affine map.
        size: height and width of the result.

    Raises:
        BlobError: the file is missing, empty, truncated, cannot be decoded or has another size.
    """
    content = _read(path, token)
    fault = jpeg_fault(content[:2].tobytes(), content[-64:].tobytes())
    if fault:
        raise BlobError(f"{path} {fault} (sample {token}).")
    reduction = _reduction(image_aug)
    image = cv2.imdecode(content, _REDUCED[reduction] | cv2.IMREAD_IGNORE_ORIENTATION)
    expected = tuple(-(-length // reduction) for length in raw_size)
    if image is None or image.shape[:2] != expected:
        found = "cannot be decoded" if image is None else f"is not the {raw_size[1]}x{raw_size[0]} image of the tables"
        raise BlobError(f"{path} {found} (sample {token}).")
    shift = (reduction - 1) / 2
    raw_from_reduced = np.array([[reduction, 0.0, shift], [0.0, reduction, shift], [0.0, 0.0, 1.0]])
    matrix = image_aug @ raw_from_reduced
    if image.shape[:2] == size and np.array_equal(matrix, np.eye(3)):
        return image
    return cv2.warpAffine(image, matrix[:2], (size[1], size[0]), flags=cv2.INTER_LINEAR)


def load_points(
    dataroot: Path, token: str, sweeps: Sweeps, count: int, global_SE3_lidar: Float64
) -> NDArray[np.float32]:
    """Points [P, 5] of the first `count` sweeps: x, y, z in the keyframe's LiDAR frame, intensity 0-1, age in seconds.

    Each sweep is moved by the ego motion since it was taken; returns off the car itself are dropped.

    Raises:
        BlobError: a file is missing or truncated.
    """
    clouds = [read_points(dataroot / file, token) for file in sweeps.files[:count]]
    ages = (sweeps.timestamps[0] - sweeps.timestamps[: len(clouds)]) * _MICROSECONDS
    lidar_SE3_sweeps = inverse(global_SE3_lidar) @ sweeps.global_SE3_sensor[: len(clouds)]
    # A row per coordinate, which the result is the transpose of: all that follows reads whole coordinates.
    planar, end = np.empty((POINT_BYTES // 4, sum(map(len, clouds))), np.float32), 0
    for cloud, age, lidar_SE3_sweep in zip(clouds, ages, lidar_SE3_sweeps, strict=True):
        far = np.flatnonzero((np.abs(cloud[:, 0]) >= EGO_RADIUS) | (np.abs(cloud[:, 1]) >= EGO_RADIUS))
        kept = cloud.take(far, axis=0)  # a mask in place of numbers takes four times as long
        start, end = end, end + len(far)
        planar[:3, start:end] = transform_points(lidar_SE3_sweep, kept[:, :3]).T
        planar[3, start:end], planar[4, start:end] = kept[:, 3] / INTENSITY_SCALE, age
    return planar[:, :end].T


def read_points(path: Path, token: str) -> NDArray[np.float32]:
    """One LiDAR sweep [P, 5] as nuScenes stores it: x, y, z in the sensor's frame, intensity 0-255, ring.

    Raises:
        BlobError: the file is missing or truncated.
    """
    content = _read(path, token)
    fault = points_fault(len(content))
    if fault:
        raise BlobError(f"{path} {fault} (sample {token}).")
    return content.view(np.float32).reshape(-1, POINT_BYTES // 4)


def load_radar(
    dataroot: Path, token: str, sweeps: Sweeps, timestamp: int, global_SE3_lidar: Float64
) -> NDArray[np.float32]:
    """RADAR returns [R, 7] of all sweeps: x, y, z in the LiDAR frame, RCS in dBsm, vx, vy over ground, age in seconds.

    Only returns that the sensor calls valid and unambiguous, as the devkit keeps by default.

    Args:
        dataroot: of the files.
        token: of the sample, for errors.
        sweeps: of all RADARs.
        timestamp: of the keyframe, microseconds.
        global_SE3_lidar: [4, 4] of the keyframe.

    Raises:
        BlobError: a file is missing or is not a RADAR point cloud.
    """
    clouds = [np.empty((0, 7), np.float32)]
    for n, file in enumerate(sweeps.files):
        returns = read_radar(dataroot / file, token)
        keep = (returns["invalid_state"] == 0) & (returns["dyn_prop"] < _VALID_DYNAMICS)
        returns = returns[keep & (returns["dyn_prop"] >= 0) & (returns["ambig_state"] == _UNAMBIGUOUS)]
        lidar_SE3_sweep = inverse(global_SE3_lidar) @ sweeps.global_SE3_sensor[n]
        columns = [returns[name].astype(np.float32) for name in ("x", "y", "z", "rcs", "vx_comp", "vy_comp")]
        age = np.full(len(returns), (timestamp - sweeps.timestamps[n]) * _MICROSECONDS, np.float32)
        cloud = np.stack([*columns, age], axis=1)
        cloud[:, :3] = transform_points(lidar_SE3_sweep, cloud[:, :3])
        cloud[:, 4:6] = cloud[:, 4:6] @ lidar_SE3_sweep[:2, :2].T
        clouds.append(cloud)
    return np.concatenate(clouds)


def read_radar(path: Path, token: str) -> NDArray[np.void]:
    """One RADAR sweep as a structured array with the fields that its PCD header names.

    Raises:
        BlobError: the file is missing, truncated, or not a binary PCD.
    """
    content = _read(path, token).tobytes()
    header, mark, body = content.partition(b"DATA binary\n")
    lines = [line.split() for line in header.decode("ascii", "replace").splitlines()]
    fields = {words[0]: words[1:] for words in lines if words}
    try:
        formats = [f"{_PCD_TYPES[kind]}{size}" for kind, size in zip(fields["TYPE"], fields["SIZE"], strict=True)]
        dtype = np.dtype(list(zip(fields["FIELDS"], formats, strict=True)))
        count = int(fields["POINTS"][0])
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise BlobError(f"{path} is not a RADAR point cloud: its PCD header is broken (sample {token}).") from error
    if not mark or len(body) < count * dtype.itemsize:
        raise BlobError(f"{path} is truncated: {len(body)} bytes for {count} returns (sample {token}).")
    return np.frombuffer(body, dtype, count)


def depth_map(
    points: NDArray[np.float32],
    camera_SE3_lidar: Float64,
    pixels_from_camera: Float64,
    size: tuple[int, int],
    stride: int,
) -> NDArray[np.float32]:
    """The nearest LiDAR depth per feature cell, [N, H / stride, W / stride] in metres; 0 where no point falls.

    A cell is `stride` x `stride` network pixels; depth is along the optical axis.

    Args:
        points: [P, 3] or wider, in the LiDAR frame (not augmented).
        camera_SE3_lidar: [N, 4, 4].
        pixels_from_camera: [N, 3, 3], image_aug @ intrinsics.
        size: height and width of the network's images.
        stride: pixels per cell; divides both.
    """
    cameras, rows, columns = len(camera_SE3_lidar), size[0] // stride, size[1] // stride
    pixels, depth = project(points[:, :3], camera_SE3_lidar, pixels_from_camera)
    x, y = np.moveaxis(pixels, 2, 0)
    # A camera sees a seventh of the points, so that most are left out by comparing alone; the borders are exact below.
    near = np.flatnonzero((depth > 0) & (x > -1) & (x < size[1]) & (y > -1) & (y < size[0]))
    camera, depth = near // max(len(points), 1), depth.ravel()[near]
    column, row = (np.floor((axis.ravel()[near] + 0.5) / stride) for axis in (x, y))
    inside = (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
    cell = ((camera * rows + row) * columns + column)[inside].astype(np.int64)
    nearest = np.full(cameras * rows * columns, np.inf, np.float32)
    np.minimum.at(nearest, cell, depth[inside].astype(np.float32))
    nearest[np.isinf(nearest)] = 0.0
    return nearest.reshape(cameras, rows, columns)


def _reduction(image_aug: Float64) -> int:
    """The largest fraction 1/r to decode at that still leaves nothing to be enlarged."""
    scale = np.sqrt(abs(np.linalg.det(image_aug[:2, :2])))
    return max(reduction for reduction in _REDUCED if reduction == 1 or scale * reduction <= 1.0)


def _read(path: Path, token: str) -> NDArray[np.uint8]:
    try:
        content = np.fromfile(path, np.uint8)
    except FileNotFoundError:
        raise BlobError(f"{path} is missing (sample {token}).") from None
    if not len(content):
        raise BlobError(f"{path} is empty (sample {token}).")
    return content
