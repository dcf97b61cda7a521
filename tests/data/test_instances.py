"""Instances of camera images: packed exactly, moved with their image."""

from __future__ import annotations

import multiprocessing
import struct
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from data.reading.augment import image_matrix
from data.reading.coco_json import encode_masks
from data.reading.instances import (
    CameraBatch,
    CameraInstances,
    ImageInstances,
    InstanceBatch,
    StoredInstances,
    in_image,
    mask_runs,
    pack,
    unpack,
    warp_masks,
)
from data.reading.sensors import load_image

RAW, SIZE = (180, 320), (48, 96)  # raw image; a segmenter's


def blobs(rng: np.random.Generator, count: int, size: tuple[int, int]) -> np.ndarray:
    """Masks [K, H, W]: a union of two ellipses each, some of which the border cuts."""
    y, x = np.mgrid[: size[0], : size[1]]
    masks = np.zeros((count, *size), np.uint8)
    for mask in masks:
        centre = rng.uniform(0, 1, 2) * size
        for _ in range(2):
            middle, radii = centre + rng.uniform(-4, 4, 2), rng.uniform(2, 12, 2)
            mask |= (((y - middle[0]) / radii[0]) ** 2 + ((x - middle[1]) / radii[1]) ** 2 < 1).astype(np.uint8)
    return masks


def image_instances(rng: np.random.Generator, count: int, size: tuple[int, int] = SIZE) -> ImageInstances:
    masks = blobs(rng, count, size)
    boxes = np.sort(rng.uniform(0, 1, (count, 2, 2)) * (size[1], size[0]), axis=1).reshape(count, 4)
    arrays = boxes.astype(np.float32), rng.integers(0, 10, count), rng.random(count).astype(np.float32), masks
    return ImageInstances(*map(torch.from_numpy, arrays))


def stored(seed: int = 0, counts: tuple[int, ...] = (3, 0, 5, 1, 0, 2)) -> StoredInstances:
    rng = np.random.default_rng(seed)
    matrix = np.stack([image_matrix(RAW, SIZE)] * len(counts))
    return StoredInstances.of([image_instances(rng, count) for count in counts], matrix, SIZE)


def same(first: StoredInstances, second: StoredInstances) -> bool:
    cameras = zip(first.cameras, second.cameras, strict=True)
    numbers = all(np.array_equal(a, b) for one, other in cameras for a, b in zip(one[:3], other[:3], strict=True))
    masks = [camera.masks for camera in first.cameras] == [camera.masks for camera in second.cameras]
    return numbers and masks and np.array_equal(first.image_aug, second.image_aug) and first.size == second.size


# --- masks


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (48, 96), (400, 700)])
def test_runs_are_those_of_pycocotools(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    noise = (rng.random((4, *size)) < [[[0.5]], [[0.01]], [[0.0]], [[1.0]]]).astype(np.uint8)
    masks = np.concatenate([noise, blobs(rng, 3, size)])
    rles = encode_masks(masks)
    decoded = coco_mask.decode([{"size": list(size), "counts": rle} for rle in rles]).transpose(2, 0, 1)
    np.testing.assert_array_equal(decoded, masks)
    for runs, mask in zip(mask_runs(rles, size), masks, strict=True):
        values = np.repeat(np.arange(len(runs)) % 2, runs)
        np.testing.assert_array_equal(values.reshape(size[::-1]).T, mask)
    assert mask_runs([], size) == []
    assert encode_masks(np.zeros((0, *size), bool)) == []


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        (b"", "no run-length encoding"),
        (b"\x00", "no run-length encoding"),
        (b"\xff", "no run-length encoding"),
        (b"P", "no run-length encoding"),  # goes on, and ends
        (b"PPPPPPPP1", "a run that no image has"),
        (b"2", "does not cover 5 x 7"),
        (b"oooooo0", "does not cover 5 x 7"),
        (b"T1O", "does not cover 5 x 7"),  # 36 and then -1: the sum fits
    ],
)
@pytest.mark.parametrize("others", [0, 2])
def test_what_is_no_mask_is_refused(rle: bytes, message: str, others: int) -> None:
    good = encode_masks(np.ones((others, 5, 7)))
    with pytest.raises(ValueError, match=message):
        mask_runs([*good, rle, *good], (5, 7))


# --- packed


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 3), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_packing_is_exact(seed: int, counts: list[int]) -> None:
    instances = stored(seed, tuple(counts))
    packed = pack(instances)
    assert packed.dtype == np.uint8
    assert same(unpack(packed), instances)
    np.testing.assert_array_equal(pack(stored(seed, tuple(counts))), packed)


def test_every_flip_and_every_truncation_is_refused() -> None:
    packed = pack(stored(counts=(1, 0)))
    for bit in range(8 * packed.size):
        changed = packed.copy()
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="packed"):
            unpack(changed)
    for length in range(packed.size):
        with pytest.raises(ValueError, match="packed"):
            unpack(packed[:length])
    with pytest.raises(ValueError, match="changed after they were packed"):
        unpack(np.concatenate([packed, packed[:1]]))


def test_changes_with_a_fitting_checksum_are_refused_or_are_other_instances() -> None:
    """What is unpacked can be packed again to the same bytes, and used."""
    content, refused = bytearray(pack(stored(counts=(2, 1))).tobytes()[:-8]), 0
    for at in range(8, len(content)):
        for value in (0, 255, content[at] ^ 1, content[at] ^ 32):
            changed = content.copy()
            changed[at] = value
            packed = np.frombuffer(bytes(changed) + xxhash.xxh3_64_digest(bytes(changed)), np.uint8)
            try:
                found = unpack(packed)
            except ValueError:
                refused += 1
                continue
            np.testing.assert_array_equal(pack(found), packed)
            in_image(found, found.image_aug, found.size)
    assert refused > 500


def test_sizes_that_lie_allocate_nothing() -> None:
    content = pack(stored(counts=(1,))).tobytes()[:-8]
    for offset, form, value in ((8, "<H", 65535), (10, "<H", 65535), (14 + 72, "<I", 2**32 - 1)):
        changed = bytearray(content)
        changed[offset : offset + struct.calcsize(form)] = struct.pack(form, value)
        with pytest.raises(ValueError, match=r"too early|pixels"):
            unpack(np.frombuffer(bytes(changed) + xxhash.xxh3_64_digest(bytes(changed)), np.uint8))


def with_camera(**changes: Any) -> StoredInstances:
    instances = stored(counts=(2,))
    return instances._replace(cameras=[instances.cameras[0]._replace(**changes)])


@pytest.mark.parametrize(
    ("instances", "message"),
    [
        (with_camera(boxes=np.full((2, 4), np.nan, np.float32)), "camera 0: boxes or scores that are not finite"),
        (with_camera(boxes=np.array([[3, 0, 2, 1]] * 2, np.float32)), "x1 < x0"),
        (with_camera(scores=np.array([0.5, np.inf], np.float32)), "not finite"),
        (with_camera(scores=np.zeros(3, np.float32)), r"scores \[3\] for 2 masks"),
        (with_camera(labels=np.array([0, 10])), "no positions in the 10 classes"),
        (with_camera(labels=np.array([-1, 0])), "no positions in the 10 classes"),
        (with_camera(masks=encode_masks(np.ones((2, 5, 7)))), "does not cover 48 x 96 pixels"),
        (stored()._replace(image_aug=np.eye(3)[None]), r"image_aug \[1, 3, 3\] of 6 cameras"),
        (stored(counts=(1,))._replace(image_aug=np.diag([1.0, 0.0, 1.0])[None]), "no affine maps of pixels"),
        (stored(counts=(1,))._replace(image_aug=np.diag([1e9, 1.0, 1.0])[None]), "no affine maps of pixels"),
        (stored(counts=(1,))._replace(image_aug=np.diag([1.0, 1.0, 2.0])[None]), "no affine maps of pixels"),
        (stored(counts=(1,))._replace(image_aug=np.full((1, 3, 3), np.nan)), "no affine maps of pixels"),
        (stored(counts=(1,))._replace(size=(0, 96)), "image of 0 x 96 pixels"),
    ],
)
def test_what_cannot_be_is_not_packed(instances: StoredInstances, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(instances)


def test_masks_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"masks \[2, 48, 96\]: expected \[2, 48, 95\]"):
        StoredInstances.of([image_instances(np.random.default_rng(0), 2)], np.eye(3)[None], (48, 95))


# --- moved with the image


def brute_force(mask: np.ndarray, matrix: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """How much of each pixel of the mapped image a mask covers: between the four pixels where it comes from."""
    inverse = np.linalg.inv(matrix)
    covered = np.zeros(size)
    for v in range(size[0]):
        for u in range(size[1]):
            x, y, _ = inverse @ (u, v, 1.0)
            left, top = int(np.floor(x)), int(np.floor(y))
            for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                if 0 <= row < mask.shape[0] and 0 <= column < mask.shape[1]:
                    covered[v, u] += mask[row, column] * (1 - abs(x - column)) * (1 - abs(y - row))
    return covered


@given(
    seed=st.integers(0, 2**16),
    size=st.sampled_from([(24, 48), (40, 64)]),
    factor=st.floats(0.7, 1.6),
    shift=st.floats(0, 1),
    flip=st.booleans(),
    degrees=st.floats(-20, 20),
)
@settings(max_examples=15, deadline=None)
def test_masks_are_those_of_an_inverse_map_per_pixel(
    seed: int, size: tuple[int, int], factor: float, shift: float, flip: bool, degrees: float
) -> None:
    rng = np.random.default_rng(seed)
    found, source = image_instances(rng, 3), image_matrix(RAW, SIZE)
    image_aug = image_matrix(RAW, size, factor=factor, shift=shift, flip=flip, degrees=degrees)
    instances = StoredInstances.of([found], source[None], SIZE)
    moved = in_image(instances, image_aug[None], size, least_left=0.0, least_area=0)[0]
    matrix = image_aug @ np.linalg.inv(source)
    expected = [brute_force(mask, matrix, size) for mask in found.masks.numpy()]
    expected = [covered for covered in expected if (covered >= 0.5).any()]
    rest = [(covered >= 0.4).any() for covered in expected]
    assert sum(rest) - 1 <= len(moved.masks) <= len(expected)
    if len(moved.masks) < len(expected):
        return  # a pixel on the threshold decides whether anything is left
    for mask, covered in zip(moved.masks.numpy(), expected, strict=True):
        clear = np.abs(covered - 0.5) > 0.07  # OpenCV's positions have five bits behind the point
        np.testing.assert_array_equal(mask[clear], (covered >= 0.5)[clear])
        assert clear.mean() > 0.9


@pytest.mark.parametrize("flip", [False, True])
def test_an_image_that_is_only_mirrored_moves_everything_exactly(flip: bool) -> None:
    rng = np.random.default_rng(5)
    found = [image_instances(rng, 6) for _ in range(6)]
    matrix = image_matrix(RAW, SIZE)
    instances = unpack(pack(StoredInstances.of(found, np.stack([matrix] * 6), SIZE)))
    single = np.stack([image_matrix(RAW, SIZE, flip=flip).astype(np.float32)] * 6)  # as samples have it
    for before, after in zip(found, in_image(instances, single, SIZE), strict=True):
        areas = before.masks.flatten(1).sum(1)
        kept = areas >= 8
        assert torch.equal(after.masks, before.masks[kept].flip(2) if flip else before.masks[kept])
        mirrored = before.boxes[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1]) + torch.tensor([96, 0, 96, 0])
        torch.testing.assert_close(after.boxes, (mirrored if flip else before.boxes)[kept], rtol=0, atol=1e-4)
        assert torch.equal(after.labels, before.labels[kept])
        assert torch.equal(after.scores, before.scores[kept])
        assert [part.dtype for part in after] == [torch.float32, torch.int64, torch.float32, torch.uint8]


def boxed(box: tuple[float, ...], matrix: np.ndarray, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A box in an image of SIZE after a map of it."""
    camera = CameraInstances(
        np.array([box], np.float32), np.zeros(1, np.int64), np.ones(1, np.float32), encode_masks(np.ones((1, *SIZE)))
    )
    moved = in_image(StoredInstances([camera], np.eye(3)[None], SIZE), matrix[None], size, least_left=0.0)
    return moved[0].boxes[0].numpy()


def test_boxes_follow_scale_and_crop_in_closed_form() -> None:
    """Edges: the left edge of the image is 0 before and after."""
    matrix = image_matrix(SIZE, SIZE, factor=1.5, shift=0.0)  # loses 48 columns right and 24 rows at the top
    np.testing.assert_allclose(boxed((10, 20, 30, 40), matrix), [15, 6, 45, 36], atol=1e-4)
    np.testing.assert_allclose(boxed((10, 8, 90, 40), matrix), [15, 0, 96, 36], atol=1e-4)  # cut off
    np.testing.assert_allclose(boxed((0, 0, 96, 48), image_matrix(SIZE, (24, 48))), [0, 0, 48, 24], atol=1e-4)


@pytest.mark.parametrize("degrees", [0.0, 5.0, -17.0, 90.0])
def test_a_turned_box_holds_the_turned_ellipse(degrees: float) -> None:
    size, box = (96, 96), (20.0, 4.0, 70.0, 24.0)
    matrix = image_matrix(SIZE, size, degrees=degrees)
    angle = np.linspace(0, 2 * np.pi, 100001)
    ellipse = np.stack([45 + 25 * np.cos(angle), 14 + 10 * np.sin(angle)])
    points = matrix[:2, :2] @ (ellipse - 0.5) + matrix[:2, 2:] + 0.5
    np.testing.assert_allclose(boxed(box, matrix, size), [*points.min(1), *points.max(1)], atol=1e-3)


def test_what_hardly_shows_is_dropped() -> None:
    masks = np.zeros((4, *SIZE), np.uint8)
    masks[0, 20:40, 0:20] = 1  # a quarter of it stays
    masks[1, 20:40, 0:19] = 1  # less
    masks[2, 20:22, 40:44] = 1  # 8 pixels
    masks[3, 20:27, 40] = 1  # 7
    boxes = np.array([[0, 20, 20, 40], [0, 20, 19, 40], [40, 20, 44, 22], [40, 20, 41, 27]], np.float32)
    found = ImageInstances(*map(torch.from_numpy, (boxes, np.arange(4), np.ones(4, np.float32), masks)))
    instances = StoredInstances.of([found], np.eye(3)[None], SIZE)
    shifted = np.array([[1.0, 0, -15], [0, 1, 0], [0, 0, 1]])
    moved = in_image(instances, shifted[None], SIZE)[0]
    assert moved.labels.tolist() == [0, 2]
    assert moved.boxes[0].tolist() == [0, 20, 5, 40]
    assert in_image(instances, shifted[None], SIZE, least_left=0.0)[0].labels.tolist() == [0, 1, 2]
    assert in_image(instances, shifted[None], SIZE, least_area=7)[0].labels.tolist() == [0, 2, 3]
    # What a smaller image has fewer pixels of has not lost any.
    assert in_image(instances, np.diag([0.5, 0.5, 1.0])[None], (24, 48))[0].labels.tolist() == [0, 1]
    outside = np.array([[1.0, 0, -500], [0, 1, 0], [0, 0, 1]])
    nothing = in_image(instances, outside[None], SIZE, least_left=0.0, least_area=0)[0]
    assert [list(part.shape) for part in nothing] == [[0, 4], [0], [0], [0, *SIZE]]
    with pytest.raises(ValueError, match="instances of 1 cameras for images of 2"):
        in_image(instances, np.stack([shifted] * 2), SIZE)


def test_boxes_around_masks() -> None:
    masks = np.zeros((3, *SIZE), np.uint8)
    masks[0, 5:9, 10:30] = 1
    masks[0, 12, 50] = 1
    masks[1] = 1
    kept, warped, boxes = warp_masks(encode_masks(masks), SIZE, np.eye(3), SIZE)
    assert kept == [0, 1]  # the third is empty
    np.testing.assert_array_equal(warped, masks[:2])
    assert boxes.tolist() == [[10, 5, 51, 13], [0, 0, 96, 48]]


def test_runs_of_nothing_are_no_pixels() -> None:
    """Nobody writes them, and they are valid: 35 zeros, no one, no zero."""
    rle = coco_mask.frPyObjects({"size": [5, 7], "counts": [20, 0, 3, 9, 3]}, 5, 7)["counts"]
    empty = coco_mask.frPyObjects({"size": [5, 7], "counts": [35, 0]}, 5, 7)["counts"]
    kept, masks, _ = warp_masks([rle, empty], (5, 7), np.eye(3), (5, 7))
    assert kept == [0]
    np.testing.assert_array_equal(masks[0].T.reshape(-1), [0] * 23 + [1] * 9 + [0] * 3)


@pytest.mark.parametrize(("flip", "degrees"), [(False, 0.0), (True, 8.0), (False, -15.0)])
def test_masks_cover_what_the_images_show(tmp_path: Path, flip: bool, degrees: float) -> None:
    """An object that is drawn into the raw image lies, in the student's image, where its mask is."""
    mask = blobs(np.random.default_rng(11), 1, RAW)
    mask[0, 100:150, 100:190] |= 1
    cv2.imwrite(str(tmp_path / "raw.jpg"), 255 * mask[0], [cv2.IMWRITE_JPEG_QUALITY, 98])
    size, segmenter = (90, 160), (120, 256)
    source = image_matrix(RAW, segmenter)
    seen = load_image(tmp_path / "raw.jpg", "token", RAW, source, segmenter)[..., 0] > 127
    found = ImageInstances(torch.zeros(1, 4), torch.zeros(1).long(), torch.ones(1), torch.from_numpy(seen[None]))
    image_aug = image_matrix(RAW, size, factor=1.2, shift=0.3, flip=flip, degrees=degrees)
    moved = in_image(StoredInstances.of([found], source[None], segmenter), image_aug[None], size)[0]
    image = load_image(tmp_path / "raw.jpg", "token", RAW, image_aug, size)[..., 0] > 127
    both = moved.masks[0].numpy().astype(bool)
    assert (both & image).sum() > 0.97 * (both | image).sum()


# --- in batches


def test_a_batch_is_a_sequence_of_views() -> None:
    rng = np.random.default_rng(2)
    images = [image_instances(rng, count) for count in (2, 0, 3, 1)]
    batch = InstanceBatch.of(images)
    assert len(batch) == 4
    for found, expected in zip(batch, images, strict=True):
        assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, batch[-1], images[3]))
    assert [len(image.boxes) for image in batch[1:3]] == [0, 3]
    with pytest.raises(IndexError):
        batch[4]
    assert batch[2].masks.data_ptr() == batch.joined.masks[2:].data_ptr()
    samples = CameraBatch.of([images[:2], images[2:]])
    assert [[len(image.boxes) for image in sample] for sample in samples] == [[2, 0], [3, 1]]
    assert len(samples) == 2
    assert [len(image.boxes) for image in samples[-1]] == [3, 1]
    assert len(samples[:1]) == 1
    with pytest.raises(IndexError):
        samples[2]
    doubled = samples.map(lambda tensor: 2 * tensor)
    assert torch.equal(doubled[1][0].boxes, 2 * images[2].boxes)


def counts_of(batch: CameraBatch) -> list[list[int]]:
    return [[len(image.boxes) for image in sample] for sample in batch]


def test_a_batch_goes_to_another_process() -> None:
    rng = np.random.default_rng(3)
    batch = CameraBatch.of([[image_instances(rng, 2), image_instances(rng, 0)], [image_instances(rng, 1)] * 2])
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(counts_of, [batch]) == [[2, 0], [1, 1]]
