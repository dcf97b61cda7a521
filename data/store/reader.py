"""Reading a store: checked when opened, every chunk verified when a process first reads it."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.store.encoding import Calibration, Encoded, check_filled
from data.store.errors import REPAIR, DamagedShardError, StoreError
from data.store.layout import (
    CALIBRATION,
    FORMAT,
    MANIFEST,
    SHARD_NAME,
    Contents,
    StoreIdentity,
    checksum,
    read_calibration,
    read_contents,
)
from data.store.taps import TapSpec, parse_taps
from data.store.writer import check_chunks

MOST_OPEN = 256  # files per store and process; a process may often have 1024


class _Manifest(NamedTuple):
    """What manifest.json says."""

    identity: StoreIdentity
    taps: dict[str, TapSpec]
    calibration: str  # checksum of the file
    samples: int
    statistics: dict[str, dict[str, list[float]]]  # per dense tap: mean and std, [C]
    shards: dict[str, tuple[int, str]]  # by file name: bytes, checksum of the contents


class Store:
    """A whole store.

    Cheap to hand to a loader's workers: each process opens a shard when it first reads from it. Threads may share it.
    """

    def __init__(self, folder: Path, manifest: _Manifest) -> None:
        self.folder = folder
        self.identity, self.taps = manifest.identity, manifest.taps
        self._statistics = manifest.statistics
        self._calibrations = _checked_calibrations(folder, manifest)
        self._paths = [folder / name for name in manifest.shards]
        self._contents = [_checked_contents(path, manifest) for path in self._paths]
        self._places = {
            token: (shard, row)
            for shard, contents in enumerate(self._contents)
            for row, token in enumerate(contents.tokens)
        }
        if len(self._places) != manifest.samples:
            raise StoreError(f"store {folder} has {len(self._places)} samples, its manifest says {manifest.samples}")
        self._process: _Process | None = None

    @classmethod
    def open(cls, folder: Path | str, expected: StoreIdentity | None = None) -> Store:
        """Open a store.

        Args:
            folder: of the store.
            expected: the identity that it must have; None reads any.

        Raises:
            StaleStoreError: the identity differs; names the fields.
            StoreError: there is no store, an unfinished or a damaged one.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        if expected is not None:
            manifest.identity.check(expected, folder)
        return cls(folder, manifest)

    def __getstate__(self) -> dict[str, Any]:
        """Without the open files, which belong to a process."""
        return self.__dict__ | {"_process": None}

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, token: str) -> bool:
        return token in self._places

    @property
    def tokens(self) -> list[str]:
        """Sample tokens, in the order in which they are stored."""
        return list(self._places)

    def require(self, tokens: Sequence[str], taps: Collection[str] = ()) -> None:
        """Make sure that samples and taps are there.

        Raises:
            StoreError: naming what is missing.
        """
        absent = [token for token in tokens if token not in self._places]
        if absent:
            raise StoreError(
                f"store {self.folder} lacks {len(absent)} of {len(tokens)} samples, first {absent[0]}: "
                "run its extract stage again"
            )
        for tap in taps:
            if tap not in self.taps:
                raise StoreError(f"store {self.folder} has no tap {tap!r}: it has {_names(self.taps)}")

    def calibration(self, tap: str) -> Calibration:
        """What the stored values of a dense tap mean."""
        if tap not in self._calibrations:
            raise StoreError(f"store {self.folder} has no calibration of {tap!r}: of {_names(self._calibrations)} only")
        return self._calibrations[tap]

    def bytes(self, tap: str) -> int:
        """Stored bytes of a tap over all samples."""
        self.require((), [tap])
        return sum(chunk.length for contents in self._contents for chunk in contents.chunks[tap])

    def std(self, tap: str) -> NDArray[np.float32]:
        """Standard deviation [C] of a dense tap's channels before encoding, over all samples and cells."""
        if tap not in self._statistics:
            raise StoreError(f"store {self.folder} has no statistics of {tap!r}: of {_names(self._statistics)} only")
        return np.array(self._statistics[tap]["std"], np.float32)

    def read(self, token: str, taps: Collection[str] | None = None) -> dict[str, NDArray[Any]]:
        """Arrays of one sample by tap, as they are stored; float8 as its bits, uint8.

        Args:
            token: of the sample.
            taps: which to read; None reads all.

        Returns:
            Dense taps [H, W, K], boxes [K, 11], instances as bytes [n], and for taps of which only the foreground is
            kept `<tap>.present`, bool [H, W]. The arrays are the caller's own.

        Raises:
            StoreError: the sample or the tap is not there.
            DamagedShardError: its bytes changed since they were written.
        """
        if token not in self._places:
            raise StoreError(f"store {self.folder} has no sample {token}: run its extract stage again")
        self.require((), taps or ())
        shard, row = self._places[token]
        arrays: dict[str, NDArray[Any]] = {}
        for tap in self.taps if taps is None else taps:
            arrays |= self._decoded(shard, row, tap)
        return arrays

    def _decoded(self, shard: int, row: int, tap: str) -> dict[str, NDArray[Any]]:
        offset, length, size, digest = self._contents[shard].chunks[tap][row]
        process, spec = self._of_this_process(), self.taps[tap]
        try:
            chunk = Encoded(process.read(self._paths[shard], offset, length), size)
            first = (shard, row, tap) not in process.verified
            if first and checksum(chunk.data) != digest:
                raise ValueError("it changed")
            arrays = spec.decode(chunk, tap, self._calibrations.get(tap))
            if first and spec.encoding is not None:
                check_filled(chunk, spec.encoding)
        except (FileNotFoundError, ValueError) as error:
            token = self._contents[shard].tokens[row]
            raise DamagedShardError(
                f"shard {self._paths[shard]} is damaged: tap {tap} of sample {token}: {error}. {REPAIR}"
            ) from error
        except OSError as error:
            raise StoreError(f"shard {self._paths[shard]} cannot be read: {error}") from error
        process.verified.add((shard, row, tap))
        return arrays

    def _of_this_process(self) -> _Process:
        """What this process has opened and verified; a fork starts anew."""
        process = self._process
        if process is None or process.number != os.getpid():
            process = self._process = _Process()
        return process


class _Process:
    """Open files and verified chunks of a process."""

    def __init__(self) -> None:
        self.number = os.getpid()
        self.verified: set[tuple[int, int, str]] = set()
        self._open = lru_cache(MOST_OPEN)(_File)

    # Into a buffer and not mapped: for chunks of 0.1, 0.4, 1 and 4 MB a first read with its xxh3 took 11, 45, 129 and
    # 613 us, mapped 17, 53, 130 and 680; with a cold page cache 0.2, 0.5, 1.1 and 4.8 ms, mapped 3.5, 3.3, 3.5 and 4.1,
    # because faults read ahead what no one asks for. Later reads are faster mapped (at 1 MB 37 us instead of 113, with
    # the copy into a batch), which no step notices; and a mapped file that is truncated kills its reader.
    def read(self, path: Path, offset: int, length: int) -> NDArray[np.uint8]:
        """Bytes of a file in a new buffer.

        Raises:
            ValueError: the file ends before.
        """
        file = self._open(path)
        buffer = np.empty(length, np.uint8)
        if length and os.preadv(file.descriptor, [buffer.data], offset) != length:
            raise ValueError("it is truncated")
        return buffer


class _File:
    """A descriptor that is closed with its last reference; reads at offsets need no lock."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def find_damage(folder: Path | str) -> dict[str, str]:
    """Read a published store whole; returns a message by name of each damaged or missing file.

    Raises:
        StoreError: there is no manifest that names its files.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    damage = {}
    try:
        _checked_calibrations(folder, manifest)
    except StoreError as error:
        damage[CALIBRATION] = str(error)
    for name in manifest.shards:
        try:
            check_chunks(folder / name, _checked_contents(folder / name, manifest))
        except DamagedShardError as error:
            damage[name] = str(error)
    return damage


def _names(names: Collection[str]) -> str:
    return ", ".join(names) or "none"


def _read_manifest(folder: Path) -> _Manifest:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        state = "is unfinished: it has no manifest" if folder.is_dir() else "does not exist"
        raise StoreError(f"store {folder} {state}. Run its extract stage") from None
    except ValueError as error:
        raise StoreError(f"{path} is damaged: {error}. {REPAIR}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StoreError(f"{path} is not the manifest of a {FORMAT!r}. Run its extract stage again")
    digest = manifest.pop("checksum", None)
    if checksum(json.dumps(manifest, sort_keys=True).encode()) != digest:
        raise StoreError(f"{path} is damaged: it changed after it was written. {REPAIR}")
    try:
        return _parse_manifest(**manifest)
    except (KeyError, TypeError, AttributeError, StoreError) as error:
        raise StoreError(f"{path} is not one that a store writes: {error}. {REPAIR}") from error


def _parse_manifest(
    *,
    identity: Mapping[str, str],
    taps: Mapping[str, Any],
    shards: Sequence[Mapping[str, Any]],
    format: str,
    **others: Any,
) -> _Manifest:
    """A manifest names files of its own folder, and nothing else."""
    for name in (entry["file"] for entry in shards):
        if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
            raise StoreError(f"it names the shard {name!r}, and only names like shard-00000.bin are read")
    files = {entry["file"]: (entry["bytes"], entry["checksum"]) for entry in shards}
    return _Manifest(identity=StoreIdentity(**identity), taps=parse_taps(taps), shards=files, **others)


def _checked_calibrations(folder: Path, manifest: _Manifest) -> dict[str, Calibration]:
    file, digest = read_calibration(folder)
    if digest != manifest.calibration:
        raise StoreError(f"calibration {folder / CALIBRATION} is not the manifest's. {REPAIR}")
    return file.calibrations


def _checked_contents(path: Path, manifest: _Manifest) -> Contents:
    expected_size, expected_digest = manifest.shards[path.name]
    size = path.stat().st_size if path.exists() else None
    if size != expected_size:
        state = "is missing" if size is None else f"is damaged: {size} bytes of {expected_size}"
        raise DamagedShardError(f"shard {path} {state}. {REPAIR}")
    contents, digest = read_contents(path)
    expected = (expected_digest, manifest.calibration, manifest.taps)
    if (digest, contents.calibration, contents.taps) != expected:
        raise DamagedShardError(f"shard {path} is another one than the manifest's. {REPAIR}")
    return contents
