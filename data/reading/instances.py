"""2D instances of camera images: boxes, classes and masks, as a store keeps them and as a student sees them.

A box is x0, y0, x1, y1 at the edges of pixels: an image covers [0, W] x [0, H]. The matrices of data.reading.augment
put integers at the centres of pixels, half a pixel off that.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, Self, overload

import cv2
import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from data.reading.classes import CLASSES
from data.reading.coco_json import encode_masks
from data.reading.geometry import Float64

LEAST_LEFT: Final = 0.25  # of an instance's area, that an augmented image must still show
LEAST_AREA: Final = 8  # pixels of an instance in the augmented image
LONGEST_SIDE: Final = 16384  # pixels; bounds what a damaged size can make a reader allocate
_LARGEST: Final = 1e6  # entry of a matrix of pixels
_MAGIC: Final = b"INST2D 1"
_HEADER: Final = struct.Struct("<8sHHH")  # magic, cameras, height, width
_DIGEST: Final = 8  # bytes of the xxh3-64 at the end
_LONGEST_RUN: Final = 7  # characters; 34 bits and a sign


class ImageInstances(NamedTuple):
    """K instances of one image of H x W pixels."""

    boxes: Tensor  # [K, 4] float32
    labels: Tensor  # [K] int64, positions in CLASSES
    scores: Tensor  # [K] float32
    masks: Tensor  # [K, H, W] uint8, 0 or 1


class CameraInstances(NamedTuple):
    """K instances of one image, their masks run-length encoded."""

    boxes: NDArray[np.float32]  # [K, 4]
    labels: NDArray[np.int64]  # [K], positions in CLASSES
    scores: NDArray[np.float32]  # [K]
    masks: list[bytes]  # K times the compressed `counts` of COCO


class StoredInstances(NamedTuple):
    """What a segmenter found in the cameras of a keyframe, in the pixels of its own images."""

    cameras: list[CameraInstances]
    image_aug: Float64  # [N, 3, 3], raw pixels -> the segmenter's pixels
    size: tuple[int, int]  # height, width of the segmenter's images

    @classmethod
    def of(cls, found: Sequence[ImageInstances], image_aug: Any, size: tuple[int, int]) -> Self:
        """Of instances with masks of pixels.

        Args:
            found: by camera, in the segmenter's pixels.
            image_aug: [N, 3, 3], raw pixels -> the segmenter's pixels.
            size: height and width of the segmenter's images.

        Raises:
            ValueError: masks of another size.
        """
        cameras = []
        for boxes, labels, scores, masks in found:
            if tuple(masks.shape) != (len(boxes), *size):
                raise ValueError(f"masks {list(masks.shape)}: expected {[len(boxes), *size]}")
            numbers = boxes.cpu().numpy().astype(np.float32), labels.cpu().numpy(), scores.cpu().numpy()
            rles = encode_masks(masks.cpu().numpy())
            cameras.append(CameraInstances(numbers[0], numbers[1], numbers[2].astype(np.float32), rles))
        return cls(cameras, np.asarray(image_aug, np.float64), size)


class InstanceBatch(Sequence[ImageInstances]):
    """Instances of several images, one after the other in four tensors: a worker sends four and not four per image."""

    def __init__(self, joined: ImageInstances, counts: Sequence[int]) -> None:
        self.joined, self.counts = joined, tuple(counts)
        self._ends = np.cumsum([0, *self.counts]).tolist()

    @classmethod
    def of(cls, images: Sequence[ImageInstances]) -> Self:
        """Join instances of images of one size."""
        joined = ImageInstances(*(torch.cat(parts) for parts in zip(*images, strict=True)))
        return cls(joined, [len(image.boxes) for image in images])

    def __len__(self) -> int:
        return len(self.counts)

    @overload
    def __getitem__(self, index: int) -> ImageInstances: ...

    @overload
    def __getitem__(self, index: slice) -> list[ImageInstances]: ...

    def __getitem__(self, index: int | slice) -> ImageInstances | list[ImageInstances]:
        """Views of an image's instances, or of those of several images."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        image = range(len(self))[index]
        return ImageInstances(*(tensor[self._ends[image] : self._ends[image + 1]] for tensor in self.joined))

    def map(self, function: Callable[[Tensor], Tensor]) -> InstanceBatch:
        """With `function` applied to the tensors."""
        return InstanceBatch(ImageInstances(*map(function, self.joined)), self.counts)


class CameraBatch(Sequence[list[ImageInstances]]):
    """Instances of B samples with N images each: a list over the cameras for every sample."""

    def __init__(self, images: InstanceBatch, cameras: int) -> None:
        self.images, self.cameras = images, cameras

    @classmethod
    def of(cls, samples: Sequence[Sequence[ImageInstances]]) -> Self:
        """Join the instances of samples with equally many images of one size."""
        return cls(InstanceBatch.of([image for sample in samples for image in sample]), len(samples[0]))

    def __len__(self) -> int:
        return len(self.images) // self.cameras

    @overload
    def __getitem__(self, index: int) -> list[ImageInstances]: ...

    @overload
    def __getitem__(self, index: slice) -> list[list[ImageInstances]]: ...

    def __getitem__(self, index: int | slice) -> list[ImageInstances] | list[list[ImageInstances]]:
        """Views of the instances of a sample, or of several."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        first = range(len(self))[index] * self.cameras
        return self.images[first : first + self.cameras]

    def map(self, function: Callable[[Tensor], Tensor]) -> CameraBatch:
        """With `function` applied to the tensors."""
        return CameraBatch(self.images.map(function), self.cameras)


def mask_runs(rles: Sequence[bytes], size: tuple[int, int]) -> list[NDArray[np.int64]]:
    """Lengths of the runs of 0 and 1 in turn, column by column, of masks that cover an image of a size.

    pycocotools reads beyond the end of others, or leaves pixels as it found them.

    Raises:
        ValueError: a mask that does not.
    """
    if not rles:
        return []
    codes = np.frombuffer(b"".join(rles), np.uint8).astype(np.int64) - 48
    stops = np.cumsum([len(rle) for rle in rles])
    last = (codes & 32) == 0
    if (np.diff(stops, prepend=0) == 0).any() or ((codes < 0) | (codes > 63)).any() or not last[stops - 1].all():
        raise ValueError("a mask is no run-length encoding")
    ends = np.flatnonzero(last)
    lengths = np.diff(ends, prepend=-1)
    if lengths.max() > _LONGEST_RUN:
        raise ValueError("a mask has a run that no image has")
    # Five bits per character, low ones first; the highest of the last is the sign.
    starts = ends - lengths + 1
    place = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((codes & 31) << place, starts) - (((codes[ends] & 16) >> 4) << (5 * lengths))
    bounds = np.searchsorted(ends, stops)
    counts = np.diff(bounds, prepend=0)
    first = np.repeat(bounds - counts, counts)
    # From the fourth on it is the difference to the run two before.
    number = np.arange(len(runs)) - first
    for chain in (number % 2 == 1, (number % 2 == 0) & (number > 0)):
        sums = np.cumsum(np.where(chain, runs, 0))
        runs = np.where(chain, sums - np.where(first > 0, sums[first - 1], 0), runs)
    if (runs < 0).any() or (np.add.reduceat(runs, bounds - counts) != size[0] * size[1]).any():
        raise ValueError(f"a mask does not cover {size[0]} x {size[1]} pixels")
    return np.split(runs, bounds[:-1])


def pack(instances: StoredInstances) -> NDArray[np.uint8]:
    """Instances as bytes [n]; exact, and equal for equal instances.

    Raises:
        ValueError: values that `unpack` would refuse.
    """
    cameras, (height, width) = instances.cameras, instances.size
    _check(instances)
    parts = [
        _HEADER.pack(_MAGIC, len(cameras), height, width),
        instances.image_aug.astype("<f8").tobytes(),
        np.array([len(camera.boxes) for camera in cameras], "<u4").tobytes(),
        *(camera.boxes.astype("<f4").tobytes() for camera in cameras),
        *(camera.scores.astype("<f4").tobytes() for camera in cameras),
        *(camera.labels.astype(np.uint8).tobytes() for camera in cameras),
        np.array([len(rle) for camera in cameras for rle in camera.masks], "<u4").tobytes(),
        *(rle for camera in cameras for rle in camera.masks),
    ]
    content = b"".join(parts)
    return np.frombuffer(content + xxhash.xxh3_64_digest(content), np.uint8).copy()


def unpack(packed: NDArray[np.uint8]) -> StoredInstances:
    """The reverse of `pack`.

    Raises:
        ValueError: `pack` did not make these bytes.
    """
    content = packed.tobytes()
    if len(content) < _HEADER.size + _DIGEST or not content.startswith(_MAGIC):
        raise ValueError("these are no packed instances")
    if xxhash.xxh3_64_digest(content[:-_DIGEST]) != content[-_DIGEST:]:
        raise ValueError("packed instances changed after they were packed")
    _, number, height, width = _HEADER.unpack_from(content)
    reader = _Reader(content[_HEADER.size : -_DIGEST])
    image_aug = reader.take("<f8", 9 * number).reshape(number, 3, 3)
    counts = reader.take("<u4", number).astype(np.int64)
    total, ends = int(counts.sum()), np.cumsum(counts)[:-1]
    boxes = np.split(reader.take("<f4", 4 * total).reshape(total, 4), ends)
    scores = np.split(reader.take("<f4", total), ends)
    labels = np.split(reader.take("u1", total).astype(np.int64), ends)
    masks = iter([reader.take("u1", int(length)).tobytes() for length in reader.take("<u4", total)])
    if reader.left:
        raise ValueError(f"packed instances end {reader.left} bytes too late")
    rles = [[next(masks) for _ in range(count)] for count in counts]
    cameras = [CameraInstances(*parts) for parts in zip(boxes, labels, scores, rles, strict=True)]
    instances = StoredInstances(cameras, image_aug, (height, width))
    _check(instances)
    return instances


def in_image(
    stored: StoredInstances,
    image_aug: Float64,
    size: tuple[int, int],
    *,
    least_left: float = LEAST_LEFT,
    least_area: int = LEAST_AREA,
) -> list[ImageInstances]:
    """Instances in a student's augmented images, by camera; what hardly shows there is dropped.

    Masks are resampled. Boxes are moved as boxes, for a segmenter's box is not that of its mask: exactly where the
    image is not turned; where it is, as the box around the ellipse in them, which hugs what turns with it more closely
    than the box around four corners (Kalra et al., Towards Rotation Invariance in Object Detection, ICCV 2021).

    Args:
        stored: what the segmenter found.
        image_aug: [N, 3, 3], raw pixels -> pixels of the augmented images.
        size: height and width of the augmented images.
        least_left: of the area of an instance's mask, in the augmented image.
        least_area: pixels of it there.

    Raises:
        ValueError: another number of cameras.
    """
    if len(image_aug) != len(stored.cameras):
        raise ValueError(f"instances of {len(stored.cameras)} cameras for images of {len(image_aug)}")
    results = []
    for camera, matrix in zip(stored.cameras, image_aug @ np.linalg.inv(stored.image_aug), strict=True):
        kept, masks, _ = warp_masks(camera.masks, stored.size, matrix, size, least_left, least_area)
        boxes = _move_boxes(camera.boxes[kept], matrix, size)
        arrays = (boxes, camera.labels[kept], camera.scores[kept], masks)
        results.append(ImageInstances(*map(torch.from_numpy, arrays)))
    return results


def warp_masks(
    rles: Sequence[bytes],
    source: tuple[int, int],
    matrix: Float64,
    size: tuple[int, int],
    least_left: float = LEAST_LEFT,
    least_area: int = LEAST_AREA,
) -> tuple[list[int], NDArray[np.uint8], NDArray[np.float32]]:
    """Masks under an affine map of an image: a pixel belongs to one where it covers half of it or more.

    Args:
        rles: K masks.
        source: height and width of their image.
        matrix: [3, 3] of the pixels, integers at their centres.
        size: height and width of the mapped image.
        least_left: of a mask's area, in the mapped image.
        least_area: pixels of a mask there.

    Returns:
        Which [L] of the K masks are left, these [L, H, W] of 0 and 1, and the boxes [L, 4] around them.
    """
    enlarged = abs(np.linalg.det(matrix[:2, :2]))
    kept: list[int] = []
    crops: list[_Crop] = []
    for k, runs in enumerate(mask_runs(rles, source)):
        crop = _warp(_crop(runs, source[0]), matrix, size)
        if cv2.countNonZero(crop.mask) >= max(least_area, least_left * enlarged * runs[1::2].sum(), 1):
            kept.append(k)
            crops.append(crop)
    masks, boxes = np.zeros((len(kept), *size), np.uint8), np.zeros((len(kept), 4), np.float32)
    for (mask, x, y), result, box in zip(crops, masks, boxes, strict=True):
        result[y : y + mask.shape[0], x : x + mask.shape[1]] = mask
        left, top, width, height = cv2.boundingRect(mask)
        box[:] = x + left, y + top, x + left + width, y + top + height
    return kept, masks, boxes


class _Crop(NamedTuple):
    """A part of a mask, outside of which it is 0."""

    mask: NDArray[np.uint8]  # of 0 and 1
    x: int
    y: int


def _crop(runs: NDArray[np.int64], height: int) -> _Crop:
    """The part of a mask of this height that is not 0."""
    runs = runs[: len(runs) // 2 * 2].copy()  # up to the last of ones
    if not runs[1::2].any():
        return _Crop(np.zeros((0, 0), np.uint8), 0, 0)
    x = int(runs[0]) // height
    runs[0] -= x * height
    columns = -(-int(runs.sum()) // height)
    mask = np.zeros((columns, height), np.uint8)
    mask.reshape(-1)[: runs.sum()] = np.repeat(np.arange(len(runs)) % 2, runs)
    y, _, rows, _ = cv2.boundingRect(mask)
    return _Crop(np.ascontiguousarray(mask[:, y : y + rows].T), x, y)


def _warp(crop: _Crop, matrix: Float64, size: tuple[int, int]) -> _Crop:
    """A crop in the mapped image of this height and width; empty where none of it is inside."""
    mask, x, y = crop
    height, width = mask.shape
    corners = np.array([[x, x + width, x, x + width], [y, y, y + height, y + height], [1.5] * 4]) - 0.5
    mapped = matrix[:2] @ corners
    low = np.floor(mapped.min(1)).astype(int).clip(0)
    high = np.minimum(np.ceil(mapped.max(1)).astype(int) + 1, size[::-1])
    if not mask.size or (high <= low).any():
        return _Crop(np.zeros((0, 0), np.uint8), 0, 0)
    shifted = matrix[:2].copy()
    shifted[:, 2] += matrix[:2, :2] @ (x, y) - low
    columns, rows = (high - low).tolist()
    warped = cv2.warpAffine(mask * np.uint8(255), shifted, (columns, rows), flags=cv2.INTER_LINEAR)
    return _Crop((warped >= 128).view(np.uint8), int(low[0]), int(low[1]))


def _move_boxes(boxes: NDArray[np.float32], matrix: Float64, size: tuple[int, int]) -> NDArray[np.float32]:
    """Boxes [K, 4] under an affine map of the pixels' centres, cut off at the edges of the image."""
    centre = (boxes[:, :2].astype(np.float64) + boxes[:, 2:]) / 2 - 0.5
    half = (boxes[:, 2:].astype(np.float64) - boxes[:, :2]) / 2
    centre = centre @ matrix[:2, :2].T + matrix[:2, 2] + 0.5
    half = np.sqrt(half**2 @ (matrix[:2, :2] ** 2).T)
    limit = np.array([size[1], size[0]])
    return np.concatenate([(centre - half).clip(0, limit), (centre + half).clip(0, limit)], 1).astype(np.float32)


class _Reader:
    """Takes arrays off bytes, one after the other."""

    def __init__(self, content: bytes) -> None:
        self.content, self.offset = content, 0

    @property
    def left(self) -> int:
        return len(self.content) - self.offset

    def take(self, dtype: str, count: int) -> NDArray[Any]:
        size = count * np.dtype(dtype).itemsize
        if size > self.left:
            raise ValueError(f"packed instances end {size - self.left} bytes too early")
        array = np.frombuffer(self.content, dtype, count, self.offset)
        self.offset += size
        return array.astype(array.dtype.newbyteorder("="))


def _check(instances: StoredInstances) -> None:
    """Refuse what no segmenter finds.

    Raises:
        ValueError: naming it.
    """
    cameras, image_aug, size = instances
    if not all(1 <= side <= LONGEST_SIDE for side in size):
        raise ValueError(f"instances of an image of {size[0]} x {size[1]} pixels: sides are 1 to {LONGEST_SIDE}")
    if image_aug.shape != (len(cameras), 3, 3) or not cameras:
        raise ValueError(f"image_aug {list(image_aug.shape)} of {len(cameras)} cameras: expected [N, 3, 3] of N >= 1")
    affine = (np.abs(image_aug) < _LARGEST).all() and (image_aug[:, 2] == (0, 0, 1)).all()
    if not affine or (np.abs(np.linalg.det(image_aug)) < 1 / _LARGEST).any():
        raise ValueError("image_aug has matrices that are no affine maps of pixels")
    for number, (boxes, labels, scores, masks) in enumerate(cameras):
        count = len(masks)
        if boxes.shape != (count, 4) or labels.shape != (count,) or scores.shape != (count,):
            shapes = f"boxes {list(boxes.shape)}, labels {list(labels.shape)}, scores {list(scores.shape)}"
            raise ValueError(f"camera {number}: {shapes} for {count} masks")
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()) or (boxes[:, 2:] < boxes[:, :2]).any():
            raise ValueError(f"camera {number}: boxes or scores that are not finite, or boxes with x1 < x0 or y1 < y0")
        if ((labels < 0) | (labels >= len(CLASSES))).any():
            raise ValueError(f"camera {number}: labels that are no positions in the {len(CLASSES)} classes")
        mask_runs(masks, size)
