"""Building a store: planned, shard by shard, visible only when whole."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from data.store.encoding import Calibration
from data.store.errors import DamagedShardError, StoreError
from data.store.layout import (
    ALIGNMENT,
    CALIBRATION,
    FORMAT,
    MANIFEST,
    SHARD_NAME,
    CalibrationFile,
    Chunk,
    Contents,
    StoreIdentity,
    checksum,
    read_contents,
    trailer,
)
from data.store.taps import TapSpec, check_names, dump_taps

logger = logging.getLogger(__name__)
_TEMPORARY = ".tmp-"
_SAMPLE_OVERHEAD = 512  # bytes of padding, checksums and tokens per sample, rounded up
_MARGIN = 1.1  # of the expected bytes over the measured mean

Outputs = Iterable[tuple[str, Mapping[str, Any]]]  # token and arrays by tap


@dataclass(frozen=True)
class Plan:
    """What a build will write."""

    folder: Path
    samples: int
    sizes: dict[str, int]  # expected bytes per tap
    most: int  # upper bound in bytes of all taps; noise, which no compression makes smaller, may pass it slightly
    present: int  # bytes that finished shards hold already
    free: int

    @property
    def needed(self) -> int:
        """Bytes still to be written."""
        return max(sum(self.sizes.values()) + self.samples * _SAMPLE_OVERHEAD - self.present, 0)

    def __str__(self) -> str:
        taps = ", ".join(f"{name} {readable(size)}" for name, size in self.sizes.items())
        present = f", {readable(self.present)} of it there already" if self.present else ""
        total = f"{readable(sum(self.sizes.values()))}, at most {readable(self.most)}"
        return f"{self.samples} samples, {total} ({taps}){present}; {readable(self.free)} free in {self.folder}"

    def check(self) -> None:
        """Refuse what is not expected to fit.

        Raises:
            StoreError: with what is needed and what is free.
        """
        if self.needed > self.free:
            raise StoreError(
                f"the store needs {readable(self.needed)} and {readable(self.free)} are free in {self.folder}: "
                "free space, keep fewer taps, or encode them smaller (dtype, channels, cells, compression)"
            )


def plan(
    folder: Path,
    taps: Mapping[str, TapSpec],
    samples: int,
    measured: Mapping[str, float] | None = None,
    *,
    most_rows: int = 500,
    finished_from: Path | None = None,
) -> Plan:
    """Bytes of a store before anything of it is written.

    Args:
        folder: where it will be built.
        taps: specs by name.
        samples: how many.
        measured: mean bytes per sample by tap, as `mean_bytes` gives; a tap that is absent counts with its bound.
        most_rows: bounds the boxes or instances of a sample.
        finished_from: a store of the same identity, whose shards are taken over; on the same file system they are free.
    """
    there = folder
    while not there.exists():
        there = there.parent
    bounds = {name: spec.bytes(most_rows) * samples for name, spec in taps.items()}
    expected = {name: int(_MARGIN * samples * size) for name, size in (measured or {}).items()}
    sizes = {name: min(expected.get(name, bound), bound) for name, bound in bounds.items()}
    shards = {} if finished_from is None else _shards_beside(there, finished_from)
    shards |= {path.name: path.stat().st_size for path in folder.glob("shard-*.bin")}
    return Plan(folder, samples, sizes, sum(bounds.values()), sum(shards.values()), shutil.disk_usage(there).free)


def mean_bytes(
    taps: Mapping[str, TapSpec], calibration: Mapping[str, Calibration], outputs: Outputs
) -> dict[str, float]:
    """Mean stored bytes per sample by tap, of samples that are encoded for it.

    Raises:
        StoreError: as `StoreWriter.write`.
    """
    sizes = [
        [len(spec.encode(arrays, tap, token, calibration.get(tap)).data) for tap, spec in taps.items()]
        for token, arrays in outputs
    ]
    return dict(zip(taps, np.mean(sizes, axis=0).tolist(), strict=True))


def _shards_beside(there: Path, store: Path) -> dict[str, int]:
    """Bytes of the shards of a store on the same file system."""
    if not store.is_dir() or store.stat().st_dev != there.stat().st_dev:
        return {}
    return {path.name: path.stat().st_size for path in store.glob("shard-*.bin") if path.exists()}


def readable(size: float) -> str:
    """Bytes in decimal units with three digits: 8.39 MB, 236 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


class _OtherCalibrationError(StoreError):
    """A shard whose values mean something else."""


class StoreWriter:
    """Builds a store in `folder`, continuing what an earlier build has finished.

    A shard is written under a temporary name, flushed and renamed: it is there whole or not at all, and is checked in
    full when a build continues. The calibration comes first, the manifest last, so a folder without one is no store.

    With several processes, shard i belongs to rank i mod world, all have rank 0's calibration, and rank 0 calls
    `finish` when all are done.

    Args:
        folder: of the build.
        identity: of the store.
        taps: specs by name.
        tokens: of the samples, in the order in which they are stored.
        shard_samples: samples per shard.
        calibration: of every dense tap.
        rank: of this process.
        world: number of processes.
        finished_from: folder of a published store. Its shards are checked in full, and those that this build would make
            (same identity, calibration and samples) are linked, or copied from another file system.
    """

    def __init__(
        self,
        folder: Path,
        identity: StoreIdentity,
        taps: Mapping[str, TapSpec],
        tokens: Sequence[str],
        shard_samples: int,
        calibration: Mapping[str, Calibration],
        *,
        rank: int = 0,
        world: int = 1,
        finished_from: Path | None = None,
    ) -> None:
        if not tokens:
            raise StoreError(f"store {folder}: there are no samples to store")
        if len(set(tokens)) != len(tokens):
            raise StoreError(f"store {folder}: sample tokens repeat")
        check_names(taps)
        if missing := [tap for tap, spec in taps.items() if spec.encoding is not None and tap not in calibration]:
            raise StoreError(f"store {folder}: there is no calibration of {', '.join(missing)}")
        self.folder, self.identity, self.taps = folder, identity, dict(taps)
        self.shards = [list(tokens[i : i + shard_samples]) for i in range(0, len(tokens), shard_samples)]
        self.calibration = {tap: calibration[tap] for tap, spec in taps.items() if spec.encoding is not None}
        self._calibration_file = CalibrationFile(identity, self.taps, self.calibration).dump()
        self.rank, self.world, self.finished_from = rank, world, finished_from
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
            self._clean()
            self._look()
            self._adopt()
            self._begin()
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
        return [i for i in self._own() if i not in self.finished]

    def write(self, shard: int, outputs: Outputs) -> None:
        """Write one shard.

        Args:
            shard: one of `missing()`.
            outputs: for each of `shards[shard]`, in that order, its token and its arrays by tap: maps [C, H, W] of the
                teacher's floats, with `<tap>.keep` bool [H, W] where only the foreground is kept, boxes [K, 11], and
                instances as bytes [n].

        Raises:
            StoreError: samples in another order, a value that is not finite, a wrong shape, a full disk. The shard is
                then absent; finished ones stay.
        """
        with self._explained(self.path(shard)), whole_file(self.path(shard)) as file:
            contents = self._write_chunks(file, self.shards[shard], outputs)
            text = contents.dump()
            file.write(text + trailer(text))
        self.finished[shard] = contents, checksum(text)

    def finish(self) -> None:
        """Write the manifest: from here on the folder is a store.

        Raises:
            StoreError: shards are missing, or another rank's are of another calibration.
        """
        for shard in range(len(self.shards)):
            if shard not in self.finished and self.path(shard).exists():  # another rank's
                self.finished[shard] = self._contents(self.path(shard), shard)
        absent = [self.path(i).name for i in range(len(self.shards)) if i not in self.finished]
        if absent:
            raise StoreError(f"store {self.folder} lacks {len(absent)} of {len(self.shards)} shards, first {absent[0]}")
        shards = [self.finished[i] for i in range(len(self.shards))]
        with self._explained(self.folder / MANIFEST):
            write_manifest(self.folder, self.identity, self.taps, checksum(self._calibration_file), shards)
        for lock in self.folder.glob(".lock-*"):
            lock.unlink()

    def _write_chunks(self, file: IO[bytes], tokens: list[str], outputs: Outputs) -> Contents:
        chunks: dict[str, list[Chunk]] = {tap: [] for tap in self.taps}
        sums = {tap: Sums(spec.channels_of_teacher) for tap, spec in self.taps.items() if spec.channels_of_teacher}
        for expected, (token, arrays) in zip(tokens, outputs, strict=True):
            if token != expected:
                raise StoreError(f"store {self.folder}: got sample {token} where {expected} comes")
            for tap, spec in self.taps.items():
                data, size = spec.encode(arrays, tap, token, self.calibration.get(tap))
                file.write(bytes(-file.tell() % ALIGNMENT))
                chunks[tap].append(Chunk(file.tell(), len(data), size, checksum(data)))
                file.write(data)
                if tap in sums:
                    sums[tap].add(np.asarray(arrays[tap]))
        dumped = {tap: s.dump() for tap, s in sums.items()}
        return Contents(self.identity, self.taps, checksum(self._calibration_file), tokens, chunks, dumped)

    def _own(self) -> range:
        """Shards of this rank."""
        return range(self.rank, len(self.shards), self.world)

    def _clean(self) -> None:
        """Remove what killed writes of this rank left."""
        for path in sorted(self.folder.glob(f"*{_TEMPORARY}*")):
            rank = int(path.name[6:11]) % self.world if SHARD_NAME.match(path.name) else 0
            if rank == self.rank:
                path.unlink()

    def _look(self) -> None:
        """Keep this rank's finished shards that are whole."""
        for shard in self._own():
            path = self.path(shard)
            if not path.exists():
                continue
            try:
                self.finished[shard] = self._whole(path, shard)
            except (DamagedShardError, _OtherCalibrationError) as error:
                logger.warning("%s: writing it again", error)
                path.unlink()

    def _adopt(self) -> None:
        """Take over the whole shards of a published store that this build would make."""
        if self.finished_from is None:
            return
        for shard in self.missing():
            path = self.path(shard)
            source, temporary = self.finished_from / path.name, _temporary(path)
            if not source.exists():
                continue
            try:
                with self._explained(path):
                    _link(source, temporary)
                    self.finished[shard] = self._whole(temporary, shard)
                    temporary.replace(path)
            except DamagedShardError as error:
                logger.warning("%s: writing %s again", error, source)
            except StoreError as error:  # and so are the others
                logger.info("nothing is taken over from %s: %s", self.finished_from, error)
                break
            finally:
                temporary.unlink(missing_ok=True)

    def _begin(self) -> None:
        """Write the calibration; nothing looks like a store until it is finished."""
        if self.rank != 0:
            return
        if self.missing() or self.world > 1:
            (self.folder / MANIFEST).unlink(missing_ok=True)
        path = self.folder / CALIBRATION
        if not path.exists() or path.read_bytes() != self._calibration_file:
            with self._explained(path), whole_file(path) as file:
                file.write(self._calibration_file)

    def _whole(self, path: Path, shard: int) -> tuple[Contents, str]:
        """Contents and checksum of a shard file, all of which has been read.

        Raises:
            DamagedShardError: it is damaged.
            StoreError: it is of another store or calibration.
        """
        contents, digest = self._contents(path, shard)
        check_chunks(path, contents)
        return contents, digest

    def _contents(self, path: Path, shard: int) -> tuple[Contents, str]:
        contents, digest = read_contents(path)
        contents.identity.check(self.identity, path)
        if contents.tokens != self.shards[shard] or contents.taps != self.taps:
            raise StoreError(f"{path} holds other samples or taps: delete {self.folder} to start anew")
        if contents.calibration != checksum(self._calibration_file):
            raise _OtherCalibrationError(f"shard {path} is of another calibration")
        return contents, digest

    @contextmanager
    def _explained(self, path: Path) -> Iterator[None]:
        """What the system refuses, as an error that says what is safe and what to do."""
        try:
            yield
        except OSError as error:
            done = f"{len(self.finished)} of {len(self.shards)} shards are finished and stay; run the stage again"
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                full = f"the disk is full ({error.strerror})"
                raise StoreError(f"cannot write {path}: {full}. {done} when there is space") from error
            raise StoreError(f"cannot write {path}: {error}. {done}") from error


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
    folder: Path,
    identity: StoreIdentity,
    taps: Mapping[str, TapSpec],
    calibration: str,
    shards: Sequence[tuple[Contents, str]],
) -> None:
    """Write manifest.json, whole or not at all."""
    manifest = {
        "format": FORMAT,
        "identity": asdict(identity),
        "taps": dump_taps(taps),
        "calibration": calibration,
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
    with whole_file(folder / MANIFEST) as file:
        file.write(json.dumps(manifest, sort_keys=True, indent=1).encode())


def check_chunks(path: Path, contents: Contents) -> None:
    """Read a shard whole and compare every chunk with its checksum.

    Raises:
        DamagedShardError: naming shard, tap and sample.
    """
    with path.open("rb") as file:
        for row, token in enumerate(contents.tokens):
            for tap, rows in contents.chunks.items():
                chunk = rows[row]
                file.seek(chunk.offset)
                if checksum(file.read(chunk.length)) != chunk.checksum:
                    raise DamagedShardError(f"shard {path} is damaged: tap {tap} of sample {token} changed")


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name whole and flushed, or not at all."""
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}{_TEMPORARY}{os.getpid()}")


def _link(source: Path, path: Path) -> None:
    """Another name of a file; a flushed copy where the file system has no links or is another one."""
    try:
        os.link(source.resolve(), path)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        shutil.copyfile(source, path)
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
