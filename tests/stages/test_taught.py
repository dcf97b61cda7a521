"""Teacher outputs in a batch: boxes and instances follow the sample, maps stay as they are stored."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.reading.augment import bev_matrix, image_matrix
from data.reading.batch import Batch, Sample, collate
from data.reading.boxes import transform_boxes
from data.reading.instances import CameraBatch, ImageInstances, StoredInstances, in_image, pack
from data.store import Calibration, Encoding, Store, StoreError, StoreIdentity, StoreWriter, TapSpec
from stages.teaching.taught import TaughtDataset, collate_taught

TOKENS = ["a", "b", "c"]
BOXES, MAP = "lidar.boxes", "lidar.bev_lift"


def boxes_of(token: str) -> np.ndarray:
    rng = np.random.default_rng(ord(token))
    return rng.normal(size=(ord(token) % 3, 11)).astype(np.float32)


def maps_of(token: str) -> np.ndarray:
    return np.random.default_rng(ord(token)).normal(size=(2, 4, 4)).astype(np.float32)


def keep_of(token: str) -> np.ndarray:
    return np.random.default_rng(ord(token)).random((4, 4)) < 0.5


def build(folder: Path, encoding: Encoding) -> Store:
    taps = {"boxes": TapSpec.boxes(), "bev_lift": TapSpec.dense((2, 4, 4), encoding, 51.2)}
    calibration = {"bev_lift": Calibration.fit(encoding, [maps_of(token) for token in TOKENS])}
    identity = StoreIdentity("w", "p", "i", "c", str(encoding))
    with StoreWriter(folder, identity, taps, TOKENS, 2, calibration) as writer:
        for shard in writer.missing():
            writer.write(
                shard,
                (
                    (t, {"boxes": boxes_of(t), "bev_lift": maps_of(t), "bev_lift.keep": keep_of(t)})
                    for t in writer.shards[shard]
                ),
            )
        writer.finish()
    return Store.open(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return build(tmp_path_factory.mktemp("store"), Encoding())


class Keyframes(torch.utils.data.Dataset):
    """Samples with an augmentation and nothing else."""

    def __init__(self, tokens: list[str], matrix: torch.Tensor | None = None) -> None:
        self.tokens, self.matrix = tokens, matrix

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, key: tuple[int, int, int]) -> Sample:
        drawn = torch.from_numpy(bev_matrix(flip_x=True, degrees=20.0 * key[1], scale=1.05)).float()
        bev_aug = drawn if self.matrix is None else self.matrix
        none = torch.empty(0)
        return Sample(self.tokens[key[2]], none, none, none, none, bev_aug, False, none, none, none, none.long(), none)


def taught(store: Store, taps: set[str], tokens: list[str] = TOKENS, matrix: Any = None) -> TaughtDataset:
    return TaughtDataset(Keyframes(tokens, matrix), {"lidar": store}, taps)  # type: ignore[arg-type]


def test_boxes_follow_the_sample_and_maps_stay(store: Store) -> None:
    dataset = taught(store, {BOXES, MAP})
    keys = [(0, 5, 2), (0, 6, 0)]
    batch = collate_taught([dataset[key] for key in keys])
    assert batch.tokens == ["c", "a"]
    for found, bev_aug, token in zip(batch.teacher[BOXES], batch.bev_aug, batch.tokens, strict=True):
        expected = transform_boxes(torch.from_numpy(boxes_of(token)), bev_aug)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        torch.testing.assert_close(found[:, 9:], torch.from_numpy(boxes_of(token))[:, 9:], rtol=0, atol=0)
    expected_maps = np.stack([maps_of("c"), maps_of("a")]).transpose(0, 2, 3, 1).astype(np.float16)
    assert batch.teacher[MAP].dtype == torch.float16
    assert np.array_equal(batch.teacher[MAP].numpy(), expected_maps)
    assert torch.equal(batch.to("cpu").teacher[BOXES][0], batch.teacher[BOXES][0])


@given(st.booleans(), st.booleans(), st.floats(-180, 180), st.floats(0.9, 1.1))
@settings(max_examples=50, deadline=None)
def test_pose_size_and_velocity_follow_in_closed_form(
    store: Store, flip_x: bool, flip_y: bool, degrees: float, scale: float
) -> None:
    boxes = boxes_of("b")
    matrix = torch.from_numpy(bev_matrix(flip_x=flip_x, flip_y=flip_y, degrees=degrees, scale=scale)).float()
    moved = taught(store, {BOXES}, matrix=matrix)[(0, 0, 1)].teacher[BOXES]
    assert len(moved) == 2
    sign_x, sign_y = (-1 if flip_x else 1), (-1 if flip_y else 1)
    turn = math.radians(degrees)

    def turned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x, y = x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)
        return sign_x * scale * x, sign_y * scale * y

    for column in (0, 7):
        x, y = turned(boxes[:, column], boxes[:, column + 1])
        np.testing.assert_allclose(moved[:, column : column + 2], np.stack([x, y], 1), atol=1e-5)
    np.testing.assert_allclose(moved[:, 2:6], scale * boxes[:, 2:6], rtol=1e-5)
    yaw = boxes[:, 6] + turn
    yaw = math.pi - yaw if flip_x else yaw
    yaw = -yaw if flip_y else yaw
    np.testing.assert_allclose(np.cos(moved[:, 6] - yaw), 1, atol=1e-6)
    np.testing.assert_array_equal(moved[:, 9:], boxes[:, 9:])


@pytest.mark.parametrize(
    ("encoding", "dtype"),
    [
        (Encoding("int8"), torch.int8),
        (Encoding("float8_e4m3"), torch.uint8),
        (Encoding("float32", compression="zstd"), torch.float32),
        (Encoding("float16", channels=1, cells="foreground", compression="lz4"), torch.float16),
    ],
)
def test_the_batch_holds_what_is_stored(tmp_path: Path, encoding: Encoding, dtype: torch.dtype) -> None:
    store = build(tmp_path, encoding)
    dataset = taught(store, {MAP})
    teacher = collate_taught([dataset[(0, 0, i)] for i in range(3)]).teacher
    assert teacher[MAP].dtype == dtype
    assert teacher[MAP].shape == (3, 4, 4, encoding.channels or 2)
    read = [store.read(token, ["bev_lift"]) for token in TOKENS]
    assert np.array_equal(teacher[MAP].numpy(), np.stack([arrays["bev_lift"] for arrays in read]))
    if encoding.cells == "foreground":
        assert np.array_equal(teacher[f"{MAP}.present"].numpy(), np.stack([keep_of(token) for token in TOKENS]))
    else:
        assert list(teacher) == [MAP]


def test_a_workers_batch_is_the_same(tmp_path: Path) -> None:
    dataset = taught(build(tmp_path, Encoding("int8", cells="foreground", compression="zstd")), {BOXES, MAP})
    keys = [(0, i, i) for i in range(3)]
    here = collate_taught([dataset[key] for key in keys])
    loader: Any = torch.utils.data.DataLoader(
        dataset,
        sampler=keys,
        batch_size=3,
        collate_fn=collate_taught,  # type: ignore[arg-type]
        num_workers=1,
    )
    there = next(iter(loader))
    assert here.teacher.keys() == there.teacher.keys()
    assert torch.equal(here.teacher[MAP], there.teacher[MAP])
    assert torch.equal(here.teacher[f"{MAP}.present"], there.teacher[f"{MAP}.present"])
    assert all(map(torch.equal, here.teacher[BOXES], there.teacher[BOXES]))


def test_only_what_is_asked_for_is_read(store: Store) -> None:
    assert list(collate_taught([taught(store, {BOXES})[(0, 0, 1)]]).teacher) == [BOXES]


def test_missing_samples_and_taps_are_refused_at_once(store: Store) -> None:
    with pytest.raises(StoreError, match="lacks 1 of 4 samples, first d"):
        taught(store, {BOXES}, [*TOKENS, "d"])
    with pytest.raises(StoreError, match="no tap 'pv'"):
        taught(store, {"lidar.pv"})


# --- instances

RAW, SIZE, SEEN = (60, 120), (40, 80), (32, 64)  # a raw image's height and width, the segmenter's, the student's
INSTANCES = "segmenter.inst2d"


def found(token: str) -> StoredInstances:
    """In six cameras 0 to 2 boxes whose masks fill them."""
    rng = np.random.default_rng(ord(token))
    cameras = []
    for number in range(6):
        boxes = np.array([[8, 10, 30, 36], [40, 12, 70, 30]], np.float32)[: (number + ord(token)) % 3]
        boxes = boxes + rng.integers(0, 4, (len(boxes), 1)).astype(np.float32)
        masks = np.zeros((len(boxes), *SIZE), np.uint8)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.astype(int), strict=True):
            mask[y0:y1, x0:x1] = 1
        scores = rng.random(len(boxes)).astype(np.float32)
        arrays = boxes, rng.integers(0, 10, len(boxes)), scores, masks
        cameras.append(ImageInstances(*map(torch.from_numpy, arrays)))
    return StoredInstances.of(cameras, np.stack([image_matrix(RAW, SIZE)] * 6), SIZE)


def packed(token: str) -> np.ndarray:
    return pack(found(token))


def segmented(folder: Path, outputs: Any = packed) -> Store:
    taps, identity = {"inst2d": TapSpec.instances()}, StoreIdentity("w", "p", "i", "c", "inst2d")
    with StoreWriter(folder, identity, taps, TOKENS, 2, {}) as writer:
        for shard in writer.missing():
            writer.write(shard, ((token, {"inst2d": outputs(token)}) for token in writer.shards[shard]))
        writer.finish()
    return Store.open(folder)


class Cameras(torch.utils.data.Dataset):
    """Samples of two frames with images; frame 1 has another matrix."""

    tokens = TOKENS

    def __len__(self) -> int:
        return len(TOKENS)

    def __getitem__(self, key: tuple[int, int, int]) -> Sample:
        images = torch.zeros(2, 6, 3, *SEEN, dtype=torch.uint8)
        even = key[1] % 2
        matrices = [image_matrix(RAW, SEEN, factor=1.1, shift=0.2 * n, flip=n % 2 == even, degrees=n) for n in range(6)]
        image_aug = torch.from_numpy(np.stack([matrices, [np.eye(3)] * 6])).float()
        none, token = torch.empty(0), TOKENS[key[2]]
        return Sample(token, images, none, image_aug, none, torch.eye(4), True, none, none, none, none.long(), none)


def cameras_of(folder: Path) -> TaughtDataset:
    return TaughtDataset(Cameras(), {"segmenter": segmented(folder)}, {INSTANCES})  # type: ignore[arg-type]


def equal(first: Any, second: Any) -> bool:
    """Whether two lists over samples and cameras of instances agree."""
    return [len(sample) for sample in first] == [len(sample) for sample in second] and all(
        torch.equal(a, b)
        for sample, other in zip(first, second, strict=True)
        for image, same in zip(sample, other, strict=True)
        for a, b in zip(image, same, strict=True)
    )


def test_instances_follow_the_images_of_the_sample(tmp_path: Path) -> None:
    dataset = cameras_of(tmp_path)
    keys = [(0, 5, 2), (0, 6, 0)]
    batch = collate_taught([dataset[key] for key in keys])
    matrices = batch.image_aug[:, 0].double().numpy()
    expected = [in_image(found(token), matrix, SEEN) for token, matrix in zip("ca", matrices, strict=True)]
    assert equal(batch.teacher[INSTANCES], expected)
    assert [len(sample) for sample in batch.teacher[INSTANCES]] == [6, 6]
    assert {len(image.boxes) for sample in batch.teacher[INSTANCES] for image in sample} == {0, 1, 2}
    for sample in batch.teacher[INSTANCES]:
        for image in sample:
            assert image.masks.shape[1:] == batch.images.shape[-2:]
            for box, mask in zip(image.boxes, image.masks, strict=True):
                rows, columns = torch.nonzero(mask, as_tuple=True)
                around = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                assert (box - around).abs().max() < 2.5  # turned by up to 5 degrees


def test_instances_go_through_a_worker_and_to_a_device(tmp_path: Path) -> None:
    dataset = cameras_of(tmp_path)
    keys = [(0, i, i) for i in range(3)]
    here = collate_taught([dataset[key] for key in keys])
    loader: Any = torch.utils.data.DataLoader(
        dataset,
        sampler=keys,
        batch_size=3,
        collate_fn=collate_taught,  # type: ignore[arg-type]
        num_workers=1,
    )
    there = next(iter(loader))
    assert isinstance(there.teacher[INSTANCES], CameraBatch)
    assert equal(here.teacher[INSTANCES], there.teacher[INSTANCES])
    assert equal(here.teacher[INSTANCES], here.to("cpu").teacher[INSTANCES])
    moved = here.to("meta").teacher[INSTANCES]
    assert {part.device.type for sample in moved for image in sample for part in image} == {"meta"}


def test_a_plain_list_of_instances_goes_to_a_device(tmp_path: Path) -> None:
    image = ImageInstances(torch.zeros(1, 4), torch.zeros(1).long(), torch.ones(1), torch.ones(1, 2, 2))
    batch: Batch = collate([Cameras()[(0, 0, 0)]])
    batch.teacher[INSTANCES] = [[image] * 6]
    moved = batch.to("meta").teacher[INSTANCES]
    assert type(moved[0][5]) is ImageInstances
    assert moved[0][5].masks.device.type == "meta"


def test_what_is_no_packed_instance_is_refused_by_sample(tmp_path: Path) -> None:
    store = segmented(tmp_path, lambda token: packed(token)[: -1 if token == "b" else None])
    dataset = TaughtDataset(Cameras(), {"segmenter": store}, {INSTANCES})  # type: ignore[arg-type]
    assert len(dataset[(0, 0, 0)].teacher[INSTANCES]) == 6
    with pytest.raises(StoreError, match=r"tap inst2d of sample b: packed instances changed .* extract stage"):
        dataset[(0, 1, 1)]
