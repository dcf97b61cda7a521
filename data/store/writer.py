"""Building a store: planned, shard by shard, visible only when whole."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from data.store.layout import (
    ALIGNMENT,
    FORMAT,
    MANIFEST,
    SHARD_NAME,
    Contents,
    DamagedShardError,
    StoreError,
    StoreIdentity,
    TapSpec,
    checksum,
    read_contents,
    trailer,
)

log = logging.getLogger(__name__)
_TEMPORARY = ".tmp-"
_SAMPLE_OVERHEAD = 512  # bytes of padding, checksums and tokens per sample, rounded up


@dataclass(frozen=True)
class Plan:
    """What a build will write."""

    folder: Path
    samples: int
    sizes: dict[str, int]  # bytes per tap; of ragged taps the largest possible
    present: int  # bytes that finished shards hold already
    free: int

    @property
    def needed(self) -> int:
        """Bytes still to be written."""
        return max(sum(self.sizes.values()) + self.samples * _SAMPLE_OVERHEAD - self.present, 0)

    def __str__(self) -> str:
        taps = ", ".join(f"{name} {_readable(size)}" for name, size in self.sizes.items())
        present = f", {_readable(self.present)} of it there already" if self.present else ""
        total = _readable(sum(self.sizes.values()))
        return (
            f"{self.samples} samples, at most {total} ({taps}){present}; {_readable(self.free)} free in {self.folder}"
        )

    def check(self) -> None:
        """Refuse what cannot fit.

        Raises:
            StoreError: with what is needed and what is free.
        """
        if self.needed > self.free:
            raise StoreError(
                f"the store needs {_readable(self.needed)} and {_readable(self.free)} are free in {self.folder}: "
                "free space, or keep fewer taps"
            )


def plan(folder: Path, taps: Mapping[str, TapSpec], samples: int, most_rows: int = 500) -> Plan:
    """Bytes of a store before anything of it is written; `most_rows` bounds the rows of ragged taps."""
    there = folder
    while not there.exists():
        there = there.parent
    present = sum(path.stat().st_size for path in folder.glob("shard-*.bin")) if folder.exists() else 0
    sizes = {name: spec.bytes(most_rows) * samples for name, spec in taps.items()}
    return Plan(folder, samples, sizes, present, shutil.disk_usage(there).free)


def _readable(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


class StoreWriter:
    """Builds a store in `folder`, continuing what an earlier build has finished.

    A shard is written under a temporary name, flushed and renamed: it is there whole or not at all, and is checked in
    full when a build continues. The manifest comes last, so a folder without one is not a store.

    With several processes, shard i belongs to rank i mod world; rank 0 calls `finish` when all are done.
    """

    def __init__(
        self,
        folder: Path,
        identity: StoreIdentity,
        taps: Mapping[str, TapSpec],
        tokens: Sequence[str],
        shard_samples: int,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not tokens:
            raise StoreError(f"store {folder}: there are no samples to store")
        if len(set(tokens)) != len(tokens):
            raise StoreError(f"store {folder}: sample tokens repeat")
        self.folder, self.identity, self.taps = folder, identity, dict(taps)
        self.shards = [list(tokens[i : i + shard_samples]) for i in range(0, len(tokens), shard_samples)]
        self.rank, self.world = rank, world
        self.finished: dict[int, tuple[Contents, str]] = {}

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / f".lock-{self.rank}").open("a")
        except OSError as error:
            raise StoreError(f"store {self.folder} cannot be written ({error}): give a writable folder") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise StoreError(f"store {self.folder} is being built by another process: wait for it") from None
        try:
            self._look()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    def path(self, shard: int) -> Path:
        """File of a shard."""
        return self.folder / f"shard-{shard:05d}.bin"

    def missing(self) -> list[int]:
        """Shards that this rank still has to write."""
        return [i for i in range(self.rank, len(self.shards), self.world) if i not in self.finished]

    def write(self, shard: int, outputs: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        """Write one shard.

        Args:
            shard: one of `missing()`.
            outputs: for each of `shards[shard]`, in that order, its token and its arrays by tap.

        Raises:
            StoreError: samples in another order, a value that is not finite, a wrong shape, a full disk. The shard is
                then absent; finished ones stay.
        """
        path = self.path(shard)
        temporary = path.with_name(f"{path.name}{_TEMPORARY}{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                contents = self._write_chunks(file, self.shards[shard], outputs)
                text = contents.dump()
                file.write(text + trailer(text))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _flush_folder(self.folder)
        except OSError as error:
            raise StoreError(self._explain(path, error)) from error
        finally:
            temporary.unlink(missing_ok=True)
        self.finished[shard] = contents, checksum(text)

    def _write_chunks(
        self, file: IO[bytes], tokens: list[str], outputs: Iterable[tuple[str, Mapping[str, Any]]]
    ) -> Contents:
        chunks: dict[str, list[tuple[int, int, str]]] = {tap: [] for tap in self.taps}
        sums = {tap: Sums(spec.shape[0]) for tap, spec in self.taps.items() if spec.shape[0] is not None}
        for expected, (token, arrays) in zip(tokens, outputs, strict=True):
            if token != expected:
                raise StoreError(f"store {self.folder}: got sample {token} where {expected} comes")
            for tap, spec in self.taps.items():
                array = spec.encode(arrays[tap], tap, token)
                file.write(bytes(-file.tell() % ALIGNMENT))
                chunks[tap].append((file.tell(), array.nbytes, checksum(array.data)))
                file.write(array.data)
                if tap in sums:
                    sums[tap].add(array)
        return Contents(self.identity, self.taps, tokens, chunks, {tap: s.dump() for tap, s in sums.items()})

    def finish(self) -> None:
        """Write the manifest: from here on the folder is a store.

        Raises:
            StoreError: shards are missing.
        """
        for shard in range(len(self.shards)):
            if shard not in self.finished and self.path(shard).exists():  # another rank's
                self.finished[shard] = read_contents(self.path(shard))
        absent = [self.path(i).name for i in range(len(self.shards)) if i not in self.finished]
        if absent:
            raise StoreError(f"store {self.folder} lacks {len(absent)} of {len(self.shards)} shards, first {absent[0]}")
        write_manifest(self.folder, self.identity, self.taps, [self.finished[i] for i in range(len(self.shards))])
        for lock in self.folder.glob(".lock-*"):
            lock.unlink()

    def _look(self) -> None:
        """Remove what killed writes left, keep the finished shards that are whole."""
        for path in sorted(self.folder.glob(f"*{_TEMPORARY}*")):
            if self.world == 1 or self._owns(path.name):
                path.unlink()
        for shard in range(self.rank, len(self.shards), self.world):
            path = self.path(shard)
            if not path.exists():
                continue
            try:
                contents, digest = read_contents(path)
                contents.identity.check(self.identity, path)
                if contents.tokens != self.shards[shard] or contents.taps != self.taps:
                    raise StoreError(f"{path} holds other samples or taps: delete {self.folder} to start anew")
                check_chunks(path, contents)
                self.finished[shard] = contents, digest
            except DamagedShardError as error:
                log.warning("%s: writing it again", error)
                path.unlink()
        if len(self.finished) < len(self.shards) and self.world == 1:
            (self.folder / MANIFEST).unlink(missing_ok=True)

    def _owns(self, name: str) -> bool:
        found = SHARD_NAME.match(name)
        return bool(found) and int(name[6:11]) % self.world == self.rank

    def _explain(self, path: Path, error: OSError) -> str:
        done = f"{len(self.finished)} of {len(self.shards)} shards are finished and stay; run the stage again"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return f"cannot write {path}: the disk is full ({error.strerror}). {done} when there is space"
        return f"cannot write {path}: {error}. {done}"


class Sums:
    """Per-channel sums of a dense tap [C, ...] over samples and cells."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.sum, self.square = np.zeros(channels), np.zeros(channels)

    def add(self, array: NDArray[Any]) -> None:
        """Take in one sample."""
        values = array.reshape(len(self.sum), -1).astype(np.float32)
        self.count += values.shape[1]
        self.sum += values.sum(1, dtype=np.float64)
        self.square += np.square(values).sum(1, dtype=np.float64)

    def dump(self) -> dict[str, Any]:
        """As JSON."""
        return {"count": self.count, "sum": self.sum.tolist(), "square": self.square.tolist()}


def statistics(sums: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Mean and standard deviation per channel out of the sums of shards."""
    count = sum(part["count"] for part in sums)
    mean = np.sum([part["sum"] for part in sums], axis=0) / count
    variance = np.sum([part["square"] for part in sums], axis=0) / count - mean**2
    return {"mean": mean.tolist(), "std": np.sqrt(variance.clip(0)).tolist()}


def write_manifest(
    folder: Path, identity: StoreIdentity, taps: Mapping[str, TapSpec], shards: Sequence[tuple[Contents, str]]
) -> None:
    """Write manifest.json, whole or not at all."""
    manifest = {
        "format": FORMAT,
        "identity": asdict(identity),
        "taps": {name: asdict(spec) for name, spec in taps.items()},
        "samples": sum(len(contents.tokens) for contents, _ in shards),
        "statistics": {tap: statistics([contents.sums[tap] for contents, _ in shards]) for tap in shards[0][0].sums},
        "shards": [
            {
                "file": f"shard-{i:05d}.bin",
                "bytes": (folder / f"shard-{i:05d}.bin").stat().st_size,
                "samples": len(contents.tokens),
                "checksum": digest,
            }
            for i, (contents, digest) in enumerate(shards)
        ],
    }
    manifest["checksum"] = checksum(json.dumps(manifest, sort_keys=True).encode())
    temporary = folder / f"{MANIFEST}{_TEMPORARY}{os.getpid()}"
    with temporary.open("w") as file:
        json.dump(manifest, file, sort_keys=True, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / MANIFEST)
    _flush_folder(folder)


def check_chunks(path: Path, contents: Contents) -> None:
    """Read a shard whole and compare every chunk with its checksum.

    Raises:
        DamagedShardError: naming shard, tap and sample.
    """
    with path.open("rb") as file:
        for row, token in enumerate(contents.tokens):
            for tap, rows in contents.chunks.items():
                offset, length, digest = rows[row]
                file.seek(offset)
                if checksum(file.read(length)) != digest:
                    raise DamagedShardError(f"shard {path} is damaged: tap {tap} of sample {token} changed")


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
