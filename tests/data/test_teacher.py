"""Teacher outputs in a batch, against the same boxes augmented as truth is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data.batch import Sample
from data.boxes import transform_boxes
from data.store import Store, StoreError, StoreIdentity, StoreWriter, TapSpec
from data.teacher import TaughtDataset, collate_taught

TOKENS = ["a", "b", "c"]


def boxes_of(token: str) -> np.ndarray:
    rng = np.random.default_rng(ord(token))
    return rng.normal(size=(ord(token) % 3, 11)).astype(np.float32)


def maps_of(token: str) -> np.ndarray:
    return np.full((2, 4, 4), ord(token), np.float16)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    taps = {"boxes": TapSpec("float32", (None, 11)), "bev_lift": TapSpec("float16", (2, 4, 4))}
    with StoreWriter(tmp_path, StoreIdentity("w", "p", "i", "c", "float16"), taps, TOKENS, 2) as writer:
        for shard in writer.missing():
            writer.write(shard, ((t, {"boxes": boxes_of(t), "bev_lift": maps_of(t)}) for t in writer.shards[shard]))
        writer.finish()
    return Store.open(tmp_path)


class Keyframes(torch.utils.data.Dataset):
    """Samples with an augmentation and nothing else."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, key: tuple[int, int, int]) -> Sample:
        turn, scale = 0.3 * key[1], 1.05
        bev_aug = torch.eye(4)
        bev_aug[:2, :2] = torch.tensor([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        bev_aug[:3, :3] *= scale
        bev_aug[:, 0] *= -1  # and a flip
        none = torch.empty(0)
        return Sample(self.tokens[key[2]], none, none, none, none, bev_aug, False, none, none, none, none.long(), none)


def test_boxes_follow_the_sample_and_maps_stay(store: Store) -> None:
    dataset = TaughtDataset(Keyframes(TOKENS), {"lidar": store}, {"lidar.boxes", "lidar.bev_lift"})  # type: ignore[arg-type]
    keys = [(0, 5, 2), (0, 6, 0)]
    batch = collate_taught([dataset[key] for key in keys])
    assert batch.tokens == ["c", "a"]
    for found, bev_aug, token in zip(batch.teacher["lidar.boxes"], batch.bev_aug, batch.tokens, strict=True):
        expected = transform_boxes(torch.from_numpy(boxes_of(token)), bev_aug)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        torch.testing.assert_close(found[:, 9:], torch.from_numpy(boxes_of(token))[:, 9:], rtol=0, atol=0)
    assert batch.teacher["lidar.bev_lift"].dtype == torch.float16
    assert torch.equal(batch.teacher["lidar.bev_lift"], torch.from_numpy(np.stack([maps_of("c"), maps_of("a")])))
    assert torch.equal(batch.to("cpu").teacher["lidar.boxes"][0], batch.teacher["lidar.boxes"][0])


def test_only_what_is_asked_for_is_read(store: Store) -> None:
    dataset = TaughtDataset(Keyframes(TOKENS), {"lidar": store}, {"lidar.boxes"})  # type: ignore[arg-type]
    assert list(collate_taught([dataset[(0, 0, 1)]]).teacher) == ["lidar.boxes"]


def test_missing_samples_and_taps_are_refused_at_once(store: Store) -> None:
    with pytest.raises(StoreError, match="lacks 1 of 4 samples, first d"):
        TaughtDataset(Keyframes([*TOKENS, "d"]), {"lidar": store}, {"lidar.boxes"})  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="no tap 'pv'"):
        TaughtDataset(Keyframes(TOKENS), {"lidar": store}, {"lidar.pv"})  # type: ignore[arg-type]
