"""What is in a store: identity, calibration, shards.

A shard holds the chunks (one sample's encoded array of one tap) of some samples one after the other, then its contents
as JSON, then a trailer: length and xxh3-64 of that JSON, and a magic word. A file without a whole trailer is no shard.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
import xxhash
from numpy.typing import NDArray

from data.store.encoding import Calibration
from data.store.errors import DamagedShardError, StaleStoreError, StoreError
from data.store.taps import TapSpec, dump_taps, parse_taps

FORMAT = "bev-distillery store 2"
MANIFEST = "manifest.json"
CALIBRATION = "calibration.safetensors"
ALIGNMENT = 64  # bytes; chunks start at multiples
SHARD_NAME = re.compile(r"shard-\d{5}\.bin")
_TRAILER = struct.Struct("<Q8s8s")
_MAGIC = b"BEVSHARD"


@dataclass(frozen=True)
class StoreIdentity:
    """What the contents of a store depend on; each field a hash, or a value that stands for itself."""

    weights: str  # of the teacher
    preprocessing: str  # input and grid settings, taps and threshold
    index: str  # the samples and what is known of them
    code: str  # sources of the extraction and of the models
    encoding: str  # of the taps, in words

    def check(self, expected: StoreIdentity, where: Path) -> None:
        """Compare with the identity that is asked for.

        Raises:
            StaleStoreError: naming each field that differs, with both values.
        """
        names = [field.name for field in fields(self) if getattr(self, field.name) != getattr(expected, field.name)]
        if names:
            pairs = "; ".join(f"{name} is {getattr(self, name)}, expected {getattr(expected, name)}" for name in names)
            raise StaleStoreError(f"store {where} is stale: {pairs}. Run its extract stage again")


class Chunk(NamedTuple):
    """Where a chunk is in its shard."""

    offset: int
    length: int  # bytes
    size: int  # bytes before compression
    checksum: str  # xxh3-64 of the stored bytes


class Contents(NamedTuple):
    """The JSON of a shard."""

    identity: StoreIdentity
    taps: dict[str, TapSpec]
    calibration: str  # checksum of the calibration file
    tokens: list[str]
    chunks: dict[str, list[Chunk]]  # per tap, in the order of the samples
    sums: dict[str, dict[str, Any]]  # per dense tap: values per channel, and over them sum and sum of squares

    def dump(self) -> bytes:
        """As bytes; equal contents give equal bytes."""
        value = {**self._asdict(), "format": FORMAT, "identity": asdict(self.identity), "taps": dump_taps(self.taps)}
        return json.dumps(value, sort_keys=True).encode()

    @classmethod
    def parse(cls, text: bytes) -> Contents:
        """The reverse of `dump`."""
        value = json.loads(text)
        if value.pop("format") != FORMAT:
            raise ValueError(f"not of format {FORMAT!r}")
        value["identity"], value["taps"] = StoreIdentity(**value["identity"]), parse_taps(value["taps"])
        value["chunks"] = {
            tap: [Chunk(int(o), int(n), int(m), str(h)) for o, n, m, h in rows] for tap, rows in value["chunks"].items()
        }
        return cls(**value)

    def check(self, end: int) -> None:
        """Make sure that every sample has its chunks, that they lie before `end` and declare what their tap can have.

        Raises:
            ValueError: they do not.
        """
        lengths = {tap: len(rows) for tap, rows in self.chunks.items()}
        if lengths != dict.fromkeys(self.taps, len(self.tokens)):
            raise ValueError("its chunks are not those of its samples and taps")
        for tap, rows in self.chunks.items():
            for chunk in rows:
                self.taps[tap].check_sizes(chunk.length, chunk.size)
                if chunk.offset < 0 or chunk.offset + chunk.length > end:
                    raise ValueError("its chunks do not lie inside it")


class CalibrationFile(NamedTuple):
    """The calibrations of a store's dense taps, and of which store they are."""

    identity: StoreIdentity
    taps: dict[str, TapSpec]
    calibrations: dict[str, Calibration]

    def dump(self) -> bytes:
        """As bytes; equal calibrations give equal bytes."""
        named = {
            f"{tap}.{name}": array
            for tap, calibration in self.calibrations.items()
            for name in ("scale", "zero", "basis")
            if (array := getattr(calibration, name)) is not None
        }
        described = {"format": FORMAT, "identity": asdict(self.identity), "taps": dump_taps(self.taps)}
        described["checksum"] = _sum_tensors(described, named)
        # One entry, because safetensors writes several in an order that differs between processes.
        return safetensors.numpy.save(named, {"store": json.dumps(described, sort_keys=True)})

    @classmethod
    def parse(cls, text: bytes) -> CalibrationFile:
        """The reverse of `dump`.

        Raises:
            ValueError: the bytes changed, or the arrays are not those of the taps.
        """
        try:
            named = safetensors.numpy.load(text)
        except safetensors.SafetensorError as error:
            raise ValueError(str(error)) from error
        described = json.loads(json.loads(text[8 : 8 + struct.unpack("<Q", text[:8])[0]])["__metadata__"]["store"])
        if described.pop("checksum") != _sum_tensors(described, named):
            raise ValueError("it changed after it was written")
        if described["format"] != FORMAT:
            raise ValueError(f"not of format {FORMAT!r}")
        identity, taps = StoreIdentity(**described["identity"]), parse_taps(described["taps"])
        calibrations = {
            tap: Calibration(*(named.get(f"{tap}.{name}") for name in ("scale", "zero", "basis")))  # type: ignore[arg-type]
            for tap, spec in taps.items()
            if spec.encoding is not None
        }
        return cls(identity, taps, calibrations)


def _sum_tensors(described: Mapping[str, Any], named: Mapping[str, NDArray[Any]]) -> str:
    state = xxhash.xxh3_64(json.dumps(described, sort_keys=True).encode())
    for name, array in sorted(named.items()):
        state.update(f"{name} {array.dtype} {list(array.shape)}\n".encode())
        state.update(np.ascontiguousarray(array).data)
    return state.hexdigest()


def read_calibration(folder: Path | str, expected: StoreIdentity | None = None) -> tuple[CalibrationFile, str]:
    """The calibration file of a store, finished or not, and its checksum.

    Args:
        folder: of the store.
        expected: the identity that it must have; None reads any.

    Raises:
        StaleStoreError: the identity differs; names the fields.
        StoreError: it is absent or damaged.
    """
    path = Path(folder) / CALIBRATION
    try:
        text = path.read_bytes()
        parsed = CalibrationFile.parse(text)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StoreError) as error:
        state = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged: {error}"
        raise StoreError(f"calibration {path} {state}. Run its extract stage again") from error
    if expected is not None:
        parsed.identity.check(expected, path)
    return parsed, checksum(text)


def checksum(data: Any) -> str:
    """xxh3-64 of a buffer."""
    return xxhash.xxh3_64_hexdigest(data)


def trailer(contents: bytes) -> bytes:
    """The end of a shard whose JSON is `contents`."""
    return _TRAILER.pack(len(contents), xxhash.xxh3_64_digest(contents), _MAGIC)


def read_contents(path: Path) -> tuple[Contents, str]:
    """Contents of a shard and their checksum.

    Raises:
        DamagedShardError: the file is absent, empty, truncated or changed in its contents.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < _TRAILER.size:
                raise ValueError(f"{size} bytes are too few")
            file.seek(size - _TRAILER.size)
            length, digest, magic = _TRAILER.unpack(file.read(_TRAILER.size))
            if magic != _MAGIC or length > size - _TRAILER.size:
                raise ValueError("truncated: its end is missing")
            file.seek(size - _TRAILER.size - length)
            text = file.read(length)
        if xxhash.xxh3_64_digest(text) != digest:
            raise ValueError("its contents changed")
        contents = Contents.parse(text)
        contents.check(end=size - _TRAILER.size - length)
        return contents, digest.hex()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StoreError) as error:
        raise DamagedShardError(f"shard {path} is damaged: {error}") from error
