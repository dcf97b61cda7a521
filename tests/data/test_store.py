"""The teacher-output store: contents, plan, statistics, identity."""

from __future__ import annotations

import dataclasses
import errno
import gc
import json
import multiprocessing
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.reading.instances import pack, unpack
from data.store import (
    Calibration,
    DamagedShardError,
    Encoding,
    StaleStoreError,
    Store,
    StoreError,
    StoreWriter,
    TapSpec,
    find_damage,
    mean_bytes,
    plan,
    read_calibration,
)
from tests.data.store_builder import CALIBRATION, COMPACT, IDENTITY, SHARD, TAPS, TOKENS, arrays, build, calibrate


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
        np.testing.assert_array_equal(read["inst2d"], expected["inst2d"])
        np.testing.assert_array_equal(read["bev_lift"], np.moveaxis(expected["bev_lift"], 0, -1).astype(np.float16))
        np.testing.assert_array_equal(read["bev_neck.present"], expected["bev_neck.keep"])
        assert read["bev_neck"].shape == (8, 8, 2)
        assert read["bev_neck"].dtype == np.int8
        assert all(array.flags.writeable for array in read.values())  # the caller's own
    assert list(store.read("token-01", ["boxes"])) == ["boxes"]
    assert find_damage(folder) == {}


def test_few_files_and_equal_bytes(folder: Path, tmp_path: Path) -> None:
    build(tmp_path / "again")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["calibration.safetensors", "manifest.json", *(f"shard-{i:05d}.bin" for i in range(6))]
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_statistics_are_numpys(folder: Path) -> None:
    """Of the teacher's floats, over all its channels and cells, whatever the encoding keeps of them."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for tap in ("bev_lift", "bev_neck"):
        maps = np.stack([arrays(token)[tap].astype(np.float64) for token in TOKENS])
        np.testing.assert_allclose(Store.open(folder).std(tap), maps.std(axis=(0, 2, 3)), rtol=1e-6)
        np.testing.assert_allclose(manifest["statistics"][tap]["mean"], maps.mean(axis=(0, 2, 3)), rtol=1e-6)
    with pytest.raises(StoreError, match="no statistics of 'boxes'"):
        Store.open(folder).std("boxes")


def test_calibration_is_kept(folder: Path) -> None:
    store = Store.open(folder)
    for tap, expected in CALIBRATION.items():
        np.testing.assert_array_equal(store.calibration(tap).scale, expected.scale)
        np.testing.assert_array_equal(store.calibration(tap).zero, expected.zero)
    np.testing.assert_array_equal(store.calibration("bev_neck").basis, CALIBRATION["bev_neck"].basis)
    assert store.calibration("bev_lift").basis is None
    with pytest.raises(StoreError, match="no calibration of 'boxes': of bev_lift, bev_neck only"):
        store.calibration("boxes")
    file, _ = read_calibration(folder, IDENTITY)
    assert file.taps == TAPS == store.taps
    with pytest.raises(StaleStoreError, match=r"calibration.safetensors is stale: weights is w1, expected w2"):
        read_calibration(folder, dataclasses.replace(IDENTITY, weights="w2"))


def test_boxes_alone(tmp_path: Path) -> None:
    build(tmp_path, taps={"boxes": TapSpec.boxes()}, calibration={})
    store = Store.open(tmp_path, IDENTITY)
    np.testing.assert_array_equal(store.read("token-09")["boxes"], arrays("token-09")["boxes"])
    assert list(store.taps) == ["boxes"]
    with pytest.raises(StoreError, match="no statistics of 'boxes': of none only"):
        store.std("boxes")


def test_instances_alone(tmp_path: Path) -> None:
    """A store of a segmenter: bytes as they were packed, and no statistics or calibration."""
    build(tmp_path, taps={"inst2d": TapSpec.instances()}, calibration={})
    store = Store.open(tmp_path, IDENTITY)
    for token in TOKENS:
        packed = store.read(token)["inst2d"]
        assert packed.dtype == np.uint8
        np.testing.assert_array_equal(pack(unpack(packed)), arrays(token)["inst2d"])
    assert TapSpec.instances().ragged
    assert store.taps == {"inst2d": TapSpec.instances()}  # out of the manifest's JSON
    assert build(tmp_path / "new", finished_from=tmp_path, taps=store.taps, calibration={}) == []


def test_bytes_of_a_tap(folder: Path) -> None:
    store = Store.open(folder)
    assert store.bytes("bev_lift") == 22 * 4 * 8 * 8 * 2
    assert store.bytes("boxes") == 44 * sum(number % 5 for number in range(22))
    assert store.bytes("inst2d") == sum(arrays(token)["inst2d"].size for token in TOKENS)
    means = mean_bytes(TAPS, CALIBRATION, [(token, arrays(token)) for token in TOKENS])
    assert {tap: store.bytes(tap) / 22 for tap in TAPS} == pytest.approx(means)


# --- threads and processes


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def total(store: Store) -> float:
    return sum(float(array.sum()) for token in TOKENS for array in store.read(token).values())


def test_workers_read_for_themselves(folder: Path) -> None:
    store = Store.open(folder)
    expected = total(store)
    with multiprocessing.get_context("fork").Pool(2) as pool:  # these get it pickled
        assert pool.map(total, [store] * 4) == [expected] * 4


def test_a_fork_verifies_anew(folder: Path) -> None:
    store = Store.open(folder)
    store.read("token-07")
    path = folder / "shard-00001.bin"
    offset = store._contents[1].chunks["bev_lift"][3].offset
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    with path.open("rb+") as file:  # in place: the file that is open
        file.write(content)
    store.read("token-07")  # verified before
    child = os.fork()
    if not child:
        try:
            store.read("token-07")
        except DamagedShardError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_threads_share_a_store(folder: Path) -> None:
    store = Store.open(folder)
    expected = total(Store.open(folder))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(total, [store] * 32)) == [expected] * 32


def test_few_files_are_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.store.reader.MOST_OPEN", 2)
    gc.collect()
    before, store = open_files(), Store.open(folder)
    expected = total(store)
    assert open_files() == before + 2
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(total, [store] * 16)) == [expected] * 16


def test_files_are_closed_with_their_store(folder: Path) -> None:
    gc.collect()
    before = open_files()
    store = Store.open(folder)
    assert open_files() == before  # nothing is open before it is read
    total(store)
    assert open_files() == before + 6
    copy = pickle.loads(pickle.dumps(store))
    assert open_files() == before + 6
    del store
    gc.collect()
    assert open_files() == before
    total(copy)


def test_ranks_share_the_shards(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, IDENTITY, TAPS, TOKENS, SHARD, CALIBRATION) as one:
        assert one.missing() == [0, 1, 2, 3, 4, 5]
    assert build(tmp_path / "two", rank=1, world=2) == [1, 3, 5]
    assert build(tmp_path / "two", rank=0, world=2) == [0, 2, 4]
    with pytest.raises(StoreError, match="unfinished"):
        Store.open(tmp_path / "two")
    with StoreWriter(tmp_path / "two", IDENTITY, TAPS, TOKENS, SHARD, CALIBRATION, rank=0, world=2) as writer:
        writer.finish()
    build(tmp_path / "alone")
    for path in (tmp_path / "alone").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


# --- plan


def test_plan_bounds_what_is_written(folder: Path) -> None:
    made = plan(folder.parent / "elsewhere" / "deep", TAPS, 22, most_rows=4)
    written = sum(path.stat().st_size for path in folder.glob("shard-*"))
    dense = {"bev_lift": 22 * 4 * 8 * 8 * 2, "bev_neck": 22 * (8 + 2 * 8 * 8)}
    assert made.sizes == dense | {"boxes": 22 * 4 * 11 * 4, "inst2d": 22 * 4 * 1024}
    assert made.most == sum(made.sizes.values())
    assert written <= made.needed
    assert plan(folder, TAPS, 22, most_rows=4).needed == made.needed - written  # finished shards count


def test_plan_expects_what_was_measured(folder: Path) -> None:
    measured = mean_bytes(TAPS, CALIBRATION, [(token, arrays(token)) for token in TOKENS[::3]])
    made, store = plan(folder.parent / "elsewhere", TAPS, 22, measured), Store.open(folder)
    assert made.sizes["bev_lift"] == store.bytes("bev_lift")  # its bound: no margin is needed
    assert made.sizes["boxes"] == int(1.1 * 22 * measured["boxes"])
    for tap in ("bev_neck", "boxes", "inst2d"):
        assert 0.8 * store.bytes(tap) < made.sizes[tap] < 1.6 * store.bytes(tap)
    assert made.most == 22 * (4 * 8 * 8 * 2 + 8 + 2 * 8 * 8 + 500 * (44 + 1024))
    assert "22 samples, 18.6 kB, at most 11.8 MB (bev_lift 11.3 kB, bev_neck 1.24 kB, boxes " in str(made)
    assert "free in" in str(made)
    beside = plan(folder.parent / "elsewhere", TAPS, 22, measured, finished_from=folder)
    assert beside.present == sum(path.stat().st_size for path in folder.glob("shard-*"))
    assert plan(Path("/dev/shm/none"), TAPS, 22, measured, finished_from=folder).present == 0  # another file system


def test_plan_that_cannot_fit_is_refused(tmp_path: Path) -> None:
    spec = TapSpec.dense((256, 4096, 4096), Encoding(cells="occupied"), 100.0)
    huge = plan(tmp_path, {"bev_lift": spec}, 10**6)
    with pytest.raises(StoreError, match=r"needs 8.59e\+03 TB and .* are free"):
        huge.check()
    plan(tmp_path, {"bev_lift": spec}, 10**6, {"bev_lift": 2.0}).check()  # refused on what is expected
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
    with StoreWriter(tmp_path, IDENTITY, TAPS, TOKENS, SHARD, CALIBRATION) as writer:
        writer.write(0, ((token, arrays(token)) for token in writer.shards[0]))
    with pytest.raises(StoreError, match="other samples or taps"):
        build(tmp_path, tokens=TOKENS[1:])
    other = TAPS | {"bev_lift": TapSpec.dense((4, 8, 8), Encoding(compression="zstd"), 25.6)}
    with pytest.raises(StoreError, match="other samples or taps"):
        build(tmp_path, taps=other)


def test_missing_samples_and_taps_are_named(folder: Path) -> None:
    store = Store.open(folder)
    store.require(TOKENS, ["boxes"])
    with pytest.raises(StoreError, match="lacks 2 of 24 samples, first x"):
        store.require([*TOKENS, "x", "y"])
    with pytest.raises(StoreError, match="no sample x"):
        store.read("x")
    with pytest.raises(StoreError, match="no tap 'pv': it has bev_lift, bev_neck, boxes, inst2d"):
        store.read("token-00", ["pv"])


# --- what is refused on write


ENCODINGS = [Encoding(), Encoding("float32"), Encoding("int8"), Encoding("float8_e4m3"), COMPACT]


@pytest.mark.parametrize(
    ("encoding", "value"),
    [
        *((encoding, value) for encoding in ENCODINGS for value in (np.nan, np.inf, -np.inf)),
        (Encoding(), 1e5),  # finite, and too large for float16
        (Encoding("float16", cells="occupied", compression="lz4"), -1e5),
    ],
)
def test_values_that_are_not_finite_are_refused_by_token(tmp_path: Path, encoding: Encoding, value: float) -> None:
    broken: dict[str, Any] = arrays("token-02")
    broken["bev_neck"][1, 2, 3] = value  # in a cell that is not kept, where not all are
    broken["bev_neck.keep"][2, 3] = False
    taps = {"bev_neck": TapSpec.dense((4, 8, 8), encoding, 25.6)}
    with StoreWriter(tmp_path, IDENTITY, taps, TOKENS, SHARD, calibrate(taps, TOKENS[:2])) as writer:
        outputs = [(t, broken if t == "token-02" else arrays(t)) for t in writer.shards[0]]
        message = rf"bev_neck of sample token-02 has 1 of \d+ values that are not finite in {encoding.dtype}"
        with pytest.raises(StoreError, match=message):
            writer.write(0, outputs)
        assert writer.missing()[0] == 0
    assert not list(tmp_path.glob("shard*"))


def test_wrong_shape_and_order_are_refused(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, IDENTITY, TAPS, TOKENS, SHARD, CALIBRATION) as writer:
        with pytest.raises(StoreError, match=r"bev_lift of sample token-00 is \[4, 8, 9\], declared \[4, 8, 8\]"):
            writer.write(0, [("token-00", arrays("token-00") | {"bev_lift": np.zeros((4, 8, 9))})])
        with pytest.raises(StoreError, match=r"keep of sample token-00 is float64 \[8\], declared bool \[8, 8\]"):
            writer.write(0, [("token-00", arrays("token-00") | {"bev_neck.keep": np.zeros(8)})])
        bare = {name: array for name, array in arrays("token-00").items() if name != "bev_neck.keep"}
        with pytest.raises(StoreError, match=r"keeps its foreground only: give the cells as bev_neck\.keep"):
            writer.write(0, [("token-00", bare)])
        with pytest.raises(StoreError, match=r"boxes of sample token-00 is \[2, 9\], declared \[None, 11\]"):
            writer.write(0, [("token-00", arrays("token-00") | {"boxes": np.zeros((2, 9))})])
        with pytest.raises(StoreError, match=r"inst2d of sample token-00 is \[2, 3\], declared \[None\]"):
            writer.write(0, [("token-00", arrays("token-00") | {"inst2d": np.zeros((2, 3), np.uint8)})])
        with pytest.raises(StoreError, match="inst2d of sample token-00 is of float32, declared uint8"):
            writer.write(0, [("token-00", arrays("token-00") | {"inst2d": np.zeros(3, np.float32)})])
        with pytest.raises(StoreError, match="boxes of sample token-00 is of uint8, declared float32"):
            writer.write(0, [("token-00", arrays("token-00") | {"boxes": np.zeros((2, 11), np.uint8)})])
        with pytest.raises(StoreError, match="got sample token-01 where token-00 comes"):
            writer.write(0, [("token-01", arrays("token-01"))])
        with pytest.raises(StoreError, match="lacks 6 of 6 shards"):
            writer.finish()
    with pytest.raises(StoreError, match="tokens repeat"):
        StoreWriter(tmp_path, IDENTITY, TAPS, ["a", "a"], SHARD, CALIBRATION)
    with pytest.raises(StoreError, match="no calibration of bev_neck"):
        StoreWriter(tmp_path, IDENTITY, TAPS, ["a"], SHARD, {"bev_lift": CALIBRATION["bev_lift"]})
    with pytest.raises(StoreError, match=r"tap '\.\./boxes': only names of"):
        StoreWriter(tmp_path, IDENTITY, {"../boxes": TapSpec.boxes()}, ["a"], SHARD, {})


@pytest.mark.parametrize(
    "changes", [{"shape": (8, 8, 3)}, {"dtype": "int8"}, {"shape": (8, -8, 4)}, {"channels_of_teacher": None}]
)
def test_specs_that_no_tap_has_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match=r"make it with TapSpec\.dense, TapSpec\.boxes or"):
        dataclasses.replace(TAPS["bev_lift"], **changes)


# --- shards of a published store


def test_whole_shards_are_taken_over(folder: Path, tmp_path: Path) -> None:
    assert build(tmp_path / "new", finished_from=folder) == []
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "new" / path.name).read_bytes()
        assert path.samefile(tmp_path / "new" / path.name) == path.name.startswith("shard-")
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in (tmp_path / "new").iterdir())
    assert build(tmp_path / "newer", finished_from=tmp_path / "nowhere") == list(range(6))


def test_shards_are_copied_where_they_cannot_be_linked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(source: Path, path: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    assert build(tmp_path / "new", finished_from=folder) == []
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "new" / path.name).read_bytes()
        assert not path.samefile(tmp_path / "new" / path.name)


@pytest.mark.parametrize(
    "changes",
    [
        {"identity": dataclasses.replace(IDENTITY, weights="w2")},
        {"calibration": CALIBRATION | {"bev_lift": Calibration(*[np.full(4, 2, np.float32)] * 2)}},
        {"tokens": TOKENS[1:]},
        {"shard_samples": 5},
        {"taps": {"boxes": TapSpec.boxes()}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_shards_of_another_store_are_not_taken_over(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    assert len(build(tmp_path / "new", finished_from=folder, **changes)) in (5, 6)
    build(tmp_path / "alone", **changes)
    for path in (tmp_path / "alone").iterdir():
        assert path.read_bytes() == (tmp_path / "new" / path.name).read_bytes()


def test_another_calibration_makes_new_shards(folder: Path, tmp_path: Path) -> None:
    """A build that goes on cannot mix values of two meanings."""
    other = CALIBRATION | {"bev_neck": calibrate(TAPS, TOKENS[:1])["bev_neck"]}
    assert build(folder, calibration=other) == list(range(6))
    build(tmp_path / "alone", calibration=other)
    for path in (tmp_path / "alone").iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()
