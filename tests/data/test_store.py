"""The teacher-output store: contents, plan, statistics, identity."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.store import StaleStoreError, Store, StoreError, StoreWriter, TapSpec, hash_files, plan
from tests.data.store_builder import IDENTITY, SHARD, TAPS, TOKENS, arrays, build


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build(tmp_path / "store")
    return tmp_path / "store"


def test_reads_what_was_written(folder: Path) -> None:
    store = Store.open(folder, IDENTITY)
    assert store.tokens == TOKENS
    assert len(store) == 22
    assert "token-03" in store
    for token in reversed(TOKENS):
        read, expected = store.read(token), arrays(token)
        np.testing.assert_array_equal(read["boxes"], expected["boxes"])  # exact
        np.testing.assert_array_equal(read["bev_lift"], expected["bev_lift"].astype(np.float16))
        assert not read["bev_lift"].flags.writeable
    assert list(store.read("token-01", ["boxes"])) == ["boxes"]
    assert store.verify() == []


def test_few_files_and_equal_bytes(folder: Path, tmp_path: Path) -> None:
    build(tmp_path / "again")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["manifest.json", *(f"shard-{i:05d}.bin" for i in range(6))]
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_statistics_are_numpys(folder: Path) -> None:
    maps = np.stack([arrays(token)["bev_lift"].astype(np.float16).astype(np.float64) for token in TOKENS])
    np.testing.assert_allclose(Store.open(folder).std("bev_lift"), maps.std(axis=(0, 2, 3)), rtol=1e-6)
    manifest = json.loads((folder / "manifest.json").read_text())
    np.testing.assert_allclose(manifest["statistics"]["bev_lift"]["mean"], maps.mean(axis=(0, 2, 3)), rtol=1e-6)
    with pytest.raises(StoreError, match="no statistics of 'boxes'"):
        Store.open(folder).std("boxes")


def read_in_worker(store: Store) -> tuple[int, float]:
    return len(store._maps), float(store.read("token-07")["bev_lift"].sum())


def test_workers_map_for_themselves(folder: Path) -> None:
    store = Store.open(folder)
    expected = float(store.read("token-07")["bev_lift"].sum())
    assert len(pickle.loads(pickle.dumps(store))._maps) == 0
    with multiprocessing.get_context("fork").Pool(2) as pool:
        results = pool.map(read_in_worker, [store] * 4)
    assert all(value == expected for _, value in results)


def test_ranks_share_the_shards(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, IDENTITY, TAPS, TOKENS, SHARD) as one:
        assert one.missing() == [0, 1, 2, 3, 4, 5]
    assert build(tmp_path / "two", rank=1, world=2) == [1, 3, 5]
    assert build(tmp_path / "two", rank=0, world=2) == [0, 2, 4]
    with pytest.raises(StoreError, match="unfinished"):
        Store.open(tmp_path / "two")
    with StoreWriter(tmp_path / "two", IDENTITY, TAPS, TOKENS, SHARD, rank=0, world=2) as writer:
        writer.finish()
    build(tmp_path / "alone")
    for path in (tmp_path / "alone").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


# --- plan


def test_plan_bounds_what_is_written(folder: Path) -> None:
    made = plan(folder.parent / "elsewhere" / "deep", TAPS, 22, most_rows=4)
    written = sum(path.stat().st_size for path in folder.glob("shard-*"))
    assert made.sizes == {"bev_lift": 22 * 4 * 8 * 8 * 2, "boxes": 22 * 4 * 11 * 4}
    assert sum(made.sizes.values()) * 0.8 < written <= made.needed
    assert "22 samples, at most 15.1 kB (bev_lift 11.3 kB, boxes 3.87 kB)" in str(made)
    assert "free in" in str(made)
    assert plan(folder, TAPS, 22, most_rows=4).needed < 0.4 * made.needed  # finished shards count


def test_plan_that_cannot_fit_is_refused(tmp_path: Path) -> None:
    huge = plan(tmp_path, {"bev_lift": TapSpec("float16", (256, 4096, 4096))}, 10**6)
    with pytest.raises(StoreError, match=r"needs 8.59e\+03 TB and .* are free"):
        huge.check()
    assert list(tmp_path.iterdir()) == []


# --- identity


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(IDENTITY)])
def test_stale_store_is_refused_by_field(folder: Path, field: str) -> None:
    changed = dataclasses.replace(IDENTITY, **{field: "other"})
    with pytest.raises(StaleStoreError, match=f"{field} is {getattr(IDENTITY, field)}, expected other"):
        Store.open(folder, changed)
    with pytest.raises(StaleStoreError, match=f"{field} is"):  # nor does a build continue another one's shards
        build(folder, identity=changed)


def test_another_cut_of_the_samples_is_refused(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, IDENTITY, TAPS, TOKENS, SHARD) as writer:
        writer.write(0, ((token, arrays(token)) for token in writer.shards[0]))
    with pytest.raises(StoreError, match="other samples or taps"):
        build(tmp_path, tokens=TOKENS[1:])


def test_missing_samples_and_taps_are_named(folder: Path) -> None:
    store = Store.open(folder)
    store.require(TOKENS, ["boxes"])
    with pytest.raises(StoreError, match="lacks 2 of 24 samples, first x"):
        store.require([*TOKENS, "x", "y"])
    with pytest.raises(StoreError, match="no sample x"):
        store.read("x")
    with pytest.raises(StoreError, match="no tap 'pv': it has bev_lift, boxes"):
        store.read("token-00", ["pv"])


# --- what is refused on write


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e5])  # the last is finite, and too large for float16
def test_values_that_are_not_finite_are_refused_by_token(tmp_path: Path, value: float) -> None:
    broken: dict[str, Any] = arrays("token-02")
    broken["bev_lift"][1, 2, 3] = value
    with StoreWriter(tmp_path, IDENTITY, TAPS, TOKENS, SHARD) as writer:
        outputs = [(t, broken if t == "token-02" else arrays(t)) for t in writer.shards[0]]
        with pytest.raises(StoreError, match="bev_lift of sample token-02 has 1 of 256 values that are not finite"):
            writer.write(0, outputs)
        assert writer.missing()[0] == 0
    assert not list(tmp_path.glob("shard*"))


def test_wrong_shape_and_order_are_refused(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, IDENTITY, TAPS, TOKENS, SHARD) as writer:
        with pytest.raises(StoreError, match=r"boxes of sample token-00 is \[2, 9\], declared \[None, 11\]"):
            writer.write(0, [("token-00", arrays("token-00") | {"boxes": np.zeros((2, 9))})])
        with pytest.raises(StoreError, match="got sample token-01 where token-00 comes"):
            writer.write(0, [("token-01", arrays("token-01"))])
        with pytest.raises(StoreError, match="lacks 6 of 6 shards"):
            writer.finish()
    with pytest.raises(StoreError, match="dtype 'int8'"):
        TapSpec("int8", (1,))
    with pytest.raises(StoreError, match="tokens repeat"):
        StoreWriter(tmp_path, IDENTITY, TAPS, ["a", "a"], SHARD)


def test_hash_of_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.py").write_text("1")
    (tmp_path / "b.py").write_text("2")
    first = hash_files(tmp_path, ["a", "b.py"])
    assert first == hash_files(tmp_path, ["b.py", "a"])
    (tmp_path / "a/x.py").rename(tmp_path / "a/y.py")
    assert first != hash_files(tmp_path, ["a", "b.py"])
    with pytest.raises(StoreError, match=r"c\.py does not exist"):
        hash_files(tmp_path, ["c.py"])
