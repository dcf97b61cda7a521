"""Reading a store: checked when opened, memory-mapped, every chunk verified when a process first reads it."""

from __future__ import annotations

import json
import mmap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.store.layout import (
    FORMAT,
    MANIFEST,
    SHARD_NAME,
    Contents,
    DamagedShardError,
    StoreError,
    StoreIdentity,
    TapSpec,
    checksum,
    parse_taps,
    read_contents,
)
from data.store.writer import check_chunks


class Store:
    """A whole store.

    Cheap to hand to a loader's workers: each process maps a shard when it first reads from it.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identity = StoreIdentity(**manifest["identity"])
        self.taps: dict[str, TapSpec] = parse_taps(manifest["taps"])
        self._statistics: dict[str, dict[str, list[float]]] = manifest["statistics"]
        self._paths: list[Path] = []
        self._contents: list[Contents] = []
        for entry in manifest["shards"]:
            path = _shard_path(folder, entry["file"])
            self._contents.append(_checked_contents(path, entry))
            self._paths.append(path)
        self._places = {
            token: (shard, row)
            for shard, contents in enumerate(self._contents)
            for row, token in enumerate(contents.tokens)
        }
        if len(self._places) != manifest["samples"]:
            raise StoreError(f"store {folder} has {len(self._places)} samples, its manifest says {manifest['samples']}")
        self._maps: dict[int, mmap.mmap] = {}
        self._verified: set[tuple[str, str]] = set()

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
            StoreIdentity(**manifest["identity"]).check(expected, folder)
        try:
            return cls(folder, manifest)
        except (KeyError, TypeError) as error:
            raise StoreError(f"store {folder}: its manifest lacks or misnames {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        """Without the maps, which belong to a process."""
        return self.__dict__ | {"_maps": {}, "_verified": set()}

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
                raise StoreError(f"store {self.folder} has no tap {tap!r}: it has {', '.join(self.taps)}")

    def std(self, tap: str) -> NDArray[np.float32]:
        """Standard deviation [C] of a dense tap's channels over all samples and cells."""
        if tap not in self._statistics:
            raise StoreError(f"store {self.folder} has no statistics of {tap!r}: of {', '.join(self._statistics)} only")
        return np.array(self._statistics[tap]["std"], np.float32)

    def read(self, token: str, taps: Collection[str] | None = None) -> dict[str, NDArray[Any]]:
        """Arrays of one sample by tap: read-only views of the mapped file.

        Args:
            token: of the sample.
            taps: which to read; None reads all.

        Raises:
            StoreError: the sample or the tap is not there.
            DamagedShardError: its bytes changed since they were written.
        """
        if token not in self._places:
            raise StoreError(f"store {self.folder} has no sample {token}: run its extract stage again")
        self.require((), taps or ())
        shard, row = self._places[token]
        return {tap: self._chunk(shard, row, token, tap) for tap in (self.taps if taps is None else taps)}

    def verify(self) -> list[str]:
        """Read everything and compare it with its checksums; returns the damage, a message per damaged shard."""
        damage = []
        for path, contents in zip(self._paths, self._contents, strict=True):
            try:
                check_chunks(path, contents)
            except DamagedShardError as error:
                damage.append(str(error))
        return damage

    def _chunk(self, shard: int, row: int, token: str, tap: str) -> NDArray[Any]:
        offset, length, digest = self._contents[shard].chunks[tap][row]
        buffer = self._map(shard)
        if (token, tap) not in self._verified:
            if checksum(memoryview(buffer)[offset : offset + length]) != digest:
                raise DamagedShardError(
                    f"shard {self._paths[shard]} is damaged: tap {tap} of sample {token} changed. "
                    "Run its extract stage again"
                )
            self._verified.add((token, tap))
        return self.taps[tap].array(buffer, offset, length)

    def _map(self, shard: int) -> mmap.mmap:
        if shard not in self._maps:
            with self._paths[shard].open("rb") as file:
                self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[shard]


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        state = "is unfinished: it has no manifest" if folder.is_dir() else "does not exist"
        raise StoreError(f"store {folder} {state}. Run its extract stage") from None
    except ValueError as error:
        raise StoreError(f"{path} is damaged: {error}. Run its extract stage again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StoreError(f"{path} is not the manifest of a {FORMAT!r}")
    digest = manifest.pop("checksum", None)
    if checksum(json.dumps(manifest, sort_keys=True).encode()) != digest:
        raise StoreError(f"{path} is damaged: it changed after it was written. Run its extract stage again")
    return manifest


def _shard_path(folder: Path, name: str) -> Path:
    """A manifest names files of its own folder, and nothing else."""
    if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
        raise StoreError(f"the manifest of {folder} names the shard {name!r}: only names like shard-00000.bin are read")
    return folder / name


def _checked_contents(path: Path, entry: Mapping[str, Any]) -> Contents:
    size = path.stat().st_size if path.exists() else None
    if size != entry["bytes"]:
        state = "is missing" if size is None else f"is damaged: {size} bytes of {entry['bytes']}"
        raise DamagedShardError(f"shard {path} {state}. Run its extract stage again")
    contents, digest = read_contents(path)
    if digest != entry["checksum"]:
        raise DamagedShardError(f"shard {path} is another one than the manifest's. Run its extract stage again")
    return contents
