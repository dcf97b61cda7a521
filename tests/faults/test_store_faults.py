"""Faults of the teacher-output store, injected for real: kill -9, damage, full disk, read-only, two builders."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from data.store import (
    DamagedShardError,
    Encoding,
    StaleStoreError,
    Store,
    StoreError,
    StoreWriter,
    TapSpec,
    find_damage,
    read_calibration,
)
from data.store.layout import checksum
from tests.data.store_builder import CALIBRATION, IDENTITY, ROOT, SHARD, TAPS, TOKENS, arrays, build, calibrate

BUILDER = str(ROOT / "tests/data/store_builder.py")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "whole"
    build(folder)
    return folder


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "store"))


def same(folder: Path, whole: Path) -> bool:
    names = {path.name for path in whole.iterdir()}
    return {path.name for path in folder.iterdir()} == names and all(
        (folder / name).read_bytes() == (whole / name).read_bytes() for name in names
    )


def start(folder: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, BUILDER, str(folder), str(seconds)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_kill_in_the_middle_keeps_finished_shards(whole: Path, tmp_path: Path) -> None:
    folder, stamps = tmp_path / "store", {}
    for last in (0, 2):
        process = start(folder, 0.02)
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == f"finished {last}":
                break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        with pytest.raises(StoreError, match=r"unfinished: it has no manifest"):
            Store.open(folder)
        for path in folder.glob("shard-*.bin"):
            assert stamps.setdefault(path.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
        assert {f"shard-{i:05d}.bin" for i in range(last + 1)} <= set(stamps)
    written = build(folder)
    assert written == list(range(len(stamps), 6))
    assert all((folder / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items())
    assert same(folder, whole)  # no temporary file is left either


def build_and_die(folder: Path, moment: int) -> bool:
    """Build in a child that kills itself with SIGKILL at its n-th flush to disk; whether it came so far."""
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        flush, seen = os.fsync, [0]

        def dying(descriptor: int) -> None:
            seen[0] += 1
            if seen[0] == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            flush(descriptor)

        os.fsync = dying
        build(folder)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_kill_at_every_flush(whole: Path, tmp_path: Path) -> None:
    """Before and after each rename: of the calibration, of every shard, of the manifest."""
    moments = 0
    while build_and_die(folder := tmp_path / str(moments), moments + 1):
        moments += 1
        stamps = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*.bin")}
        if (folder / "manifest.json").exists():
            assert find_damage(folder) == {}
        else:
            with pytest.raises(StoreError, match="unfinished: it has no manifest"):
                Store.open(folder)
        assert len(stamps) == max(0, (moments - 2) // 2) or len(stamps) == 6
        assert build(folder) == list(range(len(stamps), 6))
        assert all((folder / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items())
        assert same(folder, whole)
    assert moments == 2 * (1 + 6 + 1)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip_data(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


def flip_contents(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-200] ^= 1
    path.write_bytes(content)


def remove(path: Path) -> None:
    path.unlink()


def read_all(folder: Path) -> None:
    reader = Store.open(folder)
    for token in TOKENS:
        reader.read(token)


DAMAGE = [truncate, empty, flip_data, flip_contents, remove]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_detected_and_named(store: Path, damage: Callable[[Path], None]) -> None:
    damage(store / "shard-00002.bin")
    with pytest.raises(DamagedShardError, match=r"shard-00002\.bin"):
        read_all(store)
    assert list(find_damage(store)) == ["shard-00002.bin"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_only_the_damaged_shard_is_built_again(
    store: Path, whole: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    damage(store / "shard-00002.bin")
    with caplog.at_level(logging.WARNING):
        assert build(store) == [2]
    assert same(store, whole)
    assert damage is remove or "shard-00002.bin" in caplog.text


def test_verify_reads_everything(store: Path) -> None:
    flip_data(store / "shard-00001.bin")
    flip_data(store / "shard-00003.bin")
    damage = list(find_damage(store).values())
    assert len(damage) == 2
    assert "shard-00001.bin is damaged: tap bev_lift of sample token-04 changed" in damage[0]
    truncate(store / "shard-00000.bin")
    remove(store / "shard-00004.bin")
    flip_data(store / "calibration.safetensors")
    damaged = ["calibration.safetensors", *(f"shard-0000{i}.bin" for i in (0, 1, 3, 4))]
    assert list(find_damage(store)) == damaged  # all of it, though the store does not open


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_published_store_costs_its_damaged_shard(
    store: Path, whole: Path, tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    damage(store / "shard-00002.bin")
    good = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in store.glob("shard-*")}
    with caplog.at_level(logging.WARNING):
        assert build(tmp_path / "new", finished_from=store) == [2]
    assert same(tmp_path / "new", whole)
    made = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (tmp_path / "new").glob("shard-*")}
    assert [name for name in made if good.get(name) != made[name]] == ["shard-00002.bin"]
    assert damage is remove or "shard-00002.bin" in caplog.text
    read_all(tmp_path / "new")


def test_a_shard_that_is_truncated_while_it_is_open(store: Path) -> None:
    reader = Store.open(store)
    reader.read("token-08")
    os.truncate(store / "shard-00002.bin", 600)
    with pytest.raises(DamagedShardError, match=r"shard-00002\.bin is damaged: tap bev_lift of sample token-11"):
        reader.read("token-11")
    (store / "shard-00003.bin").unlink()
    with pytest.raises(DamagedShardError, match=r"shard-00003\.bin is damaged: .*No such file"):
        reader.read("token-12")
    reader.read("token-00")


def test_too_many_open_files_are_no_damage(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Store.open(store)

    def no_more(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", no_more)
        with pytest.raises(StoreError, match=r"shard-00000\.bin cannot be read: .*Too many open files") as raised:
            reader.read("token-00")
    assert not isinstance(raised.value, DamagedShardError)
    reader.read("token-00")


# --- the calibration


def change_scale(path: Path) -> None:
    """The last bit of the first stored number."""
    content = bytearray(path.read_bytes())
    content[8 + struct.unpack("<Q", content[:8])[0]] ^= 1
    path.write_bytes(content)


def change_description(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"25.6", b"25.7"))


CALIBRATION_DAMAGE = [truncate, empty, change_scale, change_description, flip_data, remove]


@pytest.mark.parametrize("damage", CALIBRATION_DAMAGE)
def test_a_damaged_calibration_is_named(store: Path, whole: Path, damage: Callable[[Path], None]) -> None:
    damage(store / "calibration.safetensors")
    state = "is missing" if damage is remove else "is damaged"
    for read in (Store.open, read_calibration):
        with pytest.raises(StoreError, match=rf"calibration\.safetensors {state}"):
            read(store)
    assert list(find_damage(store)) == ["calibration.safetensors"]
    assert build(store) == []  # the shards are those of the calibration that is made again
    assert same(store, whole)


def test_another_calibration_is_refused(store: Path, tmp_path: Path) -> None:
    """Whole, and not what the shards were encoded with."""
    build(tmp_path / "other", calibration=calibrate(TAPS, TOKENS[:2]))
    shutil.copy(tmp_path / "other/calibration.safetensors", store)
    with pytest.raises(StoreError, match=r"calibration\.safetensors is not the manifest's"):
        Store.open(store)
    shutil.copy(tmp_path / "other/manifest.json", store)
    with pytest.raises(StoreError, match=r"shard-00000\.bin"):
        Store.open(store)


def test_ranks_of_different_calibrations_are_refused(tmp_path: Path) -> None:
    build(tmp_path, rank=0, world=2)
    build(tmp_path, rank=1, world=2, calibration=calibrate(TAPS, TOKENS[:2]))
    with (
        StoreWriter(tmp_path, IDENTITY, TAPS, TOKENS, SHARD, CALIBRATION, rank=0, world=2) as writer,
        pytest.raises(StoreError, match=r"shard-00001\.bin is of another calibration"),
    ):
        writer.finish()


# --- manifests and shards that lie


def test_swapped_shards_are_detected(store: Path) -> None:
    """Whole shards of equal length in each other's place, or of another store."""
    first, second = store / "shard-00000.bin", store / "shard-00005.bin"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(DamagedShardError, match="shard-00000"):
        Store.open(store)


def edit(folder: Path, change: Callable[[dict], None], *, forge: bool = True) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    if forge:
        manifest.pop("checksum")
        manifest["checksum"] = checksum(json.dumps(manifest, sort_keys=True).encode())
    (folder / "manifest.json").write_text(json.dumps(manifest))


OUTSIDE = ["../secret.bin", "/etc/passwd", "shard-00000.bin/../../x", "shard-00000.bin\n", "", None, 7]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_cannot_lead_out_of_its_folder(store: Path, name: str) -> None:
    edit(store, lambda manifest: manifest["shards"][0].update(file=name))
    for read in (Store.open, find_damage):
        with pytest.raises(StoreError, match="names the shard"):
            read(store)


@pytest.mark.parametrize("name", ["../boxes", "/etc/passwd", "bev.present", "", "boxes\n"])
def test_a_manifest_names_plain_taps_only(store: Path, name: str) -> None:
    edit(store, lambda manifest: manifest["taps"].update({name: manifest["taps"]["boxes"]}))
    with pytest.raises(StoreError, match="only names of a-z"):
        Store.open(store)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["taps"]["bev_lift"].update(shape=[10**6, 10**6, 4]),
        lambda m: m["taps"]["bev_lift"].update(shape=["8", 8, 4]),
        lambda m: m["taps"]["bev_lift"]["encoding"].update(dtype="complex64"),
        lambda m: m["taps"]["bev_lift"].pop("encoding"),
        lambda m: m["taps"].pop("boxes"),
        lambda m: m.update(taps=[]),
        lambda m: m.update(shards=[{}]),
        lambda m: m.update(shards=m["shards"][1:]),
        lambda m: m["shards"][0].update(checksum="0" * 16),
        lambda m: m.update(calibration="0" * 16),
        lambda m: m.pop("statistics"),
        lambda m: m["identity"].pop("code"),
        lambda m: m.update(format="bev-distillery store 1"),
    ],
)
def test_a_forged_manifest_is_refused(store: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    edit(store, change)
    with pytest.raises(StoreError, match=str(store)):
        Store.open(store)


def test_a_changed_manifest_is_refused(store: Path) -> None:
    edit(store, lambda manifest: manifest["identity"].update(weights="w2"), forge=False)
    with pytest.raises(StoreError, match=r"manifest\.json is damaged"):
        Store.open(store)
    (store / "manifest.json").write_text('{"format": ')
    with pytest.raises(StoreError, match=r"manifest\.json is damaged"):
        Store.open(store)
    with pytest.raises(StoreError, match="does not exist"):
        Store.open(store / "nowhere")


def forge(folder: Path, change: Callable[[dict[str, Any], bytearray], Any]) -> None:
    """Change contents and data of the first shard, and every checksum above a chunk's with them."""
    path = folder / "shard-00000.bin"
    content = path.read_bytes()
    length = struct.unpack("<Q", content[-24:-16])[0]
    contents, data = json.loads(content[-24 - length : -24]), bytearray(content[: -24 - length])
    change(contents, data)
    text = json.dumps(contents).encode()
    path.write_bytes(data + text + struct.pack("<Q8s8s", len(text), xxhash.xxh3_64_digest(text), b"BEVSHARD"))
    edit(folder, lambda m: m["shards"][0].update(bytes=path.stat().st_size, checksum=checksum(text)))


@pytest.mark.parametrize(
    ("tap", "chunk", "message"),
    [
        ("boxes", [0, 44 * 10**9, 44 * 10**9, "0" * 16], "do not lie inside it"),
        ("boxes", [-64, 44, 44, "0" * 16], "do not lie inside it"),
        ("boxes", [0, -44, -44, "0" * 16], "cannot have"),
        ("boxes", [0, 43, 43, "0" * 16], "cannot have"),
        ("inst2d", [0, 10**12, 10**12, "0" * 16], "do not lie inside it"),
        ("inst2d", [0, 64, 65, "0" * 16], "cannot have"),
        ("bev_lift", [0, 512, 10**15, "0" * 16], "cannot have"),
        ("bev_neck", [0, 64, 10**15, "0" * 16], "cannot have"),
        ("bev_neck", [0, 64, 0, "0" * 16], "cannot have"),
        ("bev_neck", [0, 64, 100], "not enough values"),
        ("bev_neck", None, "cannot unpack"),
    ],
)
def test_chunks_lie_in_their_shard_and_fit_their_tap(store: Path, tap: str, chunk: Any, message: str) -> None:
    forge(store, lambda contents, data: contents["chunks"][tap].__setitem__(0, chunk))
    with pytest.raises(DamagedShardError, match=rf"shard-00000\.bin is damaged: .*{message}"):
        Store.open(store)
    assert build(store) == [0]
    read_all(store)


@pytest.mark.parametrize("change", [lambda c: c["chunks"].pop("boxes"), lambda c: c["tokens"].append("x")])
def test_a_shard_without_all_its_chunks(store: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    forge(store, lambda contents, data: change(contents))
    with pytest.raises(DamagedShardError, match="its chunks are not those of its samples and taps"):
        Store.open(store)


@pytest.mark.parametrize("cells", ["all", "occupied", "foreground"])
@pytest.mark.parametrize("compression", ["lz4", "zstd"])
@pytest.mark.parametrize("raw", [bytes(20), bytes(255), bytes(8 + 256) + b"x", bytes(10**6), b"\xff" * 8 + bytes(100)])
def test_a_chunk_that_decompresses_to_another_size(tmp_path: Path, cells: str, compression: str, raw: bytes) -> None:
    """Well-formed, with a checksum that fits, and not of the size that the contents declare."""
    taps = {"bev_neck": TapSpec.dense((4, 8, 8), Encoding("int8", None, cells, compression), 25.6)}
    build(tmp_path, taps=taps, calibration=calibrate(taps, TOKENS[:4]))
    compressed = pa.Codec(compression.replace("lz4", "lz4_raw")).compress(raw, asbytes=True)

    def swap(contents: dict[str, Any], data: bytearray) -> None:
        size = contents["chunks"]["bev_neck"][1][2]
        contents["chunks"]["bev_neck"][1] = [len(data), len(compressed), size, checksum(compressed)]
        data += compressed

    forge(tmp_path, swap)
    store = Store.open(tmp_path)
    store.read("token-00")
    before = pa.default_memory_pool().max_memory()
    with pytest.raises(DamagedShardError, match=r"shard-00000\.bin is damaged: tap bev_neck of sample token-01: "):
        store.read("token-01")
    assert pa.default_memory_pool().max_memory() < before + 100_000


def test_a_bitmap_that_disagrees_with_its_rows(tmp_path: Path) -> None:
    taps = {"bev_neck": TapSpec.dense((4, 8, 8), Encoding("int8", cells="foreground"), 25.6)}
    build(tmp_path, taps=taps, calibration=calibrate(taps, TOKENS[:4]))

    def add_cell(contents: dict[str, Any], data: bytearray) -> None:
        offset, length, size, _ = contents["chunks"]["bev_neck"][1]
        data[offset] ^= 1
        contents["chunks"]["bev_neck"][1] = [offset, length, size, checksum(bytes(data[offset : offset + length]))]

    forge(tmp_path, add_cell)
    with pytest.raises(DamagedShardError, match=r"tap bev_neck of sample token-01: its bitmap has \d+ cells, and"):
        Store.open(tmp_path).read("token-01")


# --- the wrong store, or a part of one


def test_a_partial_store_is_refused(store: Path) -> None:
    (store / "manifest.json").unlink()
    (store / "shard-00003.bin").unlink()
    with pytest.raises(StoreError, match=r"unfinished: it has no manifest\. Run its extract stage"):
        Store.open(store, IDENTITY)
    with pytest.raises(StoreError, match="lacks 1 of 6 shards"):
        forgetful(store).finish()
    assert build(store) == [3]
    read_all(store)


def forgetful(folder: Path) -> StoreWriter:
    with StoreWriter(folder, IDENTITY, TAPS, TOKENS, SHARD, CALIBRATION) as writer:
        return writer


def test_a_store_of_another_index_is_refused(store: Path) -> None:
    changed = replace(IDENTITY, index="i2", weights="w2")
    with pytest.raises(StaleStoreError, match="weights is w1, expected w2; index is i1, expected i2"):
        Store.open(store, changed)
    with pytest.raises(StaleStoreError, match="weights is w1, expected w2; index is i1, expected i2"):
        build(store, identity=changed)
    with pytest.raises(StoreError, match="lacks 1 of 23 samples, first of-another-index"):
        Store.open(store).require([*TOKENS, "of-another-index"])


def test_nothing_of_a_bad_sample_is_stored(whole: Path, tmp_path: Path) -> None:
    broken = arrays("token-05")
    broken["bev_neck"][0, 0, 0] = np.nan
    folder = tmp_path / "store"
    with StoreWriter(folder, IDENTITY, TAPS, TOKENS, SHARD, CALIBRATION) as writer:
        writer.write(0, [(token, arrays(token)) for token in writer.shards[0]])
        with pytest.raises(StoreError, match="tap bev_neck of sample token-05 has 1 of 256 values that are not finite"):
            writer.write(1, [(t, broken if t == "token-05" else arrays(t)) for t in writer.shards[1]])
    assert sorted(path.name for path in folder.glob("shard-*")) == ["shard-00000.bin"]
    assert build(folder) == [1, 2, 3, 4, 5]
    assert same(folder, whole)


def test_two_builders_at_once(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with StoreWriter(folder, IDENTITY, TAPS, TOKENS, SHARD, CALIBRATION):
        process = start(folder, 0)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 1
        assert "is being built by another process" in output
    assert build(folder) == list(range(6))
    assert same(folder, whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 kB."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(mounted)], capture_output=True)
    if done.returncode:
        pytest.skip(f"mounting a small file system needs root: {done.stderr.decode().strip()}")
    yield mounted
    subprocess.run(["umount", str(mounted)], check=True)


def test_full_disk(whole: Path, small_disk: Path) -> None:
    folder = small_disk / "store"
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(16 << 10))
    with pytest.raises(
        StoreError, match=r"the disk is full .*\d of 6 shards are finished and stay; run the stage again"
    ):
        build(folder)
    finished = sorted(path.name for path in folder.glob("shard-*"))
    assert all(name.endswith(".bin") for name in finished)
    with pytest.raises(StoreError, match="unfinished"):
        Store.open(folder)
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    assert build(folder) == list(range(len(finished), 6))
    assert same(folder, whole)


def test_file_size_limit(tmp_path: Path) -> None:
    """The same without root: a limit on the file size that a shard passes."""
    command = f"ulimit -f 3; exec {sys.executable} {BUILDER} {tmp_path / 'store'}"
    failed = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30)
    assert failed.returncode == 1
    assert "the disk is full (File too large). 0 of 6 shards are finished" in failed.stderr
    assert not list((tmp_path / "store").glob("*.tmp-*"))  # nor a half of a calibration


def test_read_only(store: Path, small_disk: Path) -> None:
    """Reading needs no right to write; building says what it needs."""
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    shutil.copytree(store, small_disk / "store")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert len(Store.open(small_disk / "store", IDENTITY).read("token-07")) == 5
    with pytest.raises(StoreError, match=r"cannot be written .*give a writable folder"):
        build(small_disk / "store")
    with pytest.raises(StoreError, match=r"cannot be written .*give a writable folder"):
        build(small_disk / "new")
