"""Teacher outputs in a batch: boxes follow the sample exactly, maps stay as they are stored."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.augment import bev_matrix
from data.batch import Sample
from data.boxes import transform_boxes
from data.store import Calibration, Encoding, Store, StoreError, StoreIdentity, StoreWriter, TapSpec
from data.teacher import TaughtDataset, collate_taught

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
            writer.write(shard, (
                (t, {"boxes": boxes_of(t), "bev_lift": maps_of(t), "bev_lift.keep": keep_of(t)})
                for t in writer.shards[shard]
            ))
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
    loader: Any = torch.utils.data.DataLoader(dataset, sampler=keys, batch_size=3, collate_fn=collate_taught,  # type: ignore[arg-type]
                                              num_workers=1)
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
