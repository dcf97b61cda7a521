"""Faults of the teacher-output store, injected for real: kill -9, damage, full disk, read-only, two builders."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data.store import DamagedShardError, Store, StoreError, StoreWriter
from data.store.layout import checksum
from tests.data.store_builder import IDENTITY, ROOT, SHARD, TAPS, TOKENS, build

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


def test_kill_between_last_shard_and_manifest(store: Path, whole: Path) -> None:
    (store / "manifest.json").rename(store / "manifest.json.tmp-1")
    assert build(store) == []
    assert same(store, whole)


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


DAMAGE = [truncate, empty, flip_data, flip_contents, remove]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_detected_and_named(store: Path, damage: Callable[[Path], None]) -> None:
    damage(store / "shard-00002.bin")

    def read_all() -> None:
        reader = Store.open(store)
        for token in TOKENS:
            reader.read(token)

    with pytest.raises(DamagedShardError, match=r"shard-00002\.bin"):
        read_all()


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
    damage = Store.open(store).verify()
    assert len(damage) == 2
    assert "shard-00001.bin is damaged: tap bev_lift of sample token-04 changed" in damage[0]


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


@pytest.mark.parametrize("name", ["../secret.bin", "/etc/passwd", "shard-00000.bin/../../x", "shard-00000.bin\n", ""])
def test_a_manifest_cannot_lead_out_of_its_folder(store: Path, name: str) -> None:
    edit(store, lambda manifest: manifest["shards"][0].update(file=name))
    with pytest.raises(StoreError, match="names the shard"):
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


def test_chunks_cannot_lie_outside_their_shard(store: Path) -> None:
    import struct

    import xxhash

    path = store / "shard-00000.bin"
    content = path.read_bytes()
    length = struct.unpack("<Q", content[-24:-16])[0]
    contents = json.loads(content[-24 - length : -24])
    contents["chunks"]["boxes"][0] = [0, 10**9, "0" * 16]
    text = json.dumps(contents).encode()
    path.write_bytes(
        content[: -24 - length] + text + struct.pack("<Q8s8s", len(text), xxhash.xxh3_64_digest(text), b"BEVSHARD")
    )
    edit(store, lambda m: m["shards"][0].update(bytes=path.stat().st_size, checksum=checksum(text)))
    with pytest.raises(DamagedShardError, match="do not lie inside it"):
        Store.open(store)


def test_two_builders_at_once(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with StoreWriter(folder, IDENTITY, TAPS, TOKENS, SHARD):
        process = start(folder, 0)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 1
        assert "is being built by another process" in output
    assert build(folder) == list(range(6))
    assert same(folder, whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 kB."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(mounted)], capture_output=True)
    if done.returncode:
        pytest.skip(f"mounting a small file system needs root: {done.stderr.decode().strip()}")
    yield mounted
    subprocess.run(["umount", str(mounted)], check=True)


def test_full_disk(whole: Path, small_disk: Path) -> None:
    folder = small_disk / "store"
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(12 << 10))
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
    command = f"ulimit -f 1; exec {sys.executable} {BUILDER} {tmp_path / 'store'}"
    failed = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30)
    assert failed.returncode == 1
    assert "the disk is full (File too large). 0 of 6 shards are finished" in failed.stderr
    assert not list((tmp_path / "store").glob("shard-*"))


def test_read_only(store: Path, small_disk: Path) -> None:
    """Reading needs no right to write; building says what it needs."""
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    shutil.copytree(store, small_disk / "store")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert len(Store.open(small_disk / "store", IDENTITY).read("token-07")) == 2
    with pytest.raises(StoreError, match=r"cannot be written .*give a writable folder"):
        build(small_disk / "store")
    with pytest.raises(StoreError, match=r"cannot be written .*give a writable folder"):
        build(small_disk / "new")
