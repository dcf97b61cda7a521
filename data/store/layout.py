"""What is in a store: identity, taps, shards.

A shard holds the chunks (one sample's array of one tap) of some samples one after the other, then its contents as JSON,
then a trailer: length and xxh3-64 of that JSON, and a magic word. A file without a whole trailer is not a shard.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

FORMAT = "bev-distillery store 1"
MANIFEST = "manifest.json"
ALIGNMENT = 64  # bytes; chunks start at multiples, so that memory-mapped arrays are aligned for any dtype
SHARD_NAME = re.compile(r"shard-\d{5}\.bin")
_TRAILER = struct.Struct("<Q8s8s")
_MAGIC = b"BEVSHARD"
DTYPES = ("float16", "float32")


class StoreError(RuntimeError):
    """A store cannot be built or read; the message says where, why, and what to do."""


class StaleStoreError(StoreError):
    """A store of other weights, inputs or code."""


class DamagedShardError(StoreError):
    """A shard is truncated or its bytes changed."""


@dataclass(frozen=True)
class StoreIdentity:
    """What the contents of a store depend on; each field a hash, or a value that stands for itself."""

    weights: str  # of the teacher
    preprocessing: str  # input and grid settings, taps and threshold
    index: str  # the samples and what is known of them
    code: str  # sources of the extraction and of the models
    dtype: str  # of dense taps

    def check(self, expected: StoreIdentity, where: Path) -> None:
        """Compare with the identity that is asked for.

        Raises:
            StaleStoreError: naming each field that differs, with both values.
        """
        names = [field.name for field in fields(self) if getattr(self, field.name) != getattr(expected, field.name)]
        if names:
            pairs = "; ".join(f"{name} is {getattr(self, name)}, expected {getattr(expected, name)}" for name in names)
            raise StaleStoreError(f"store {where} is stale: {pairs}. Run its extract stage again")


@dataclass(frozen=True)
class TapSpec:
    """Type and shape of a tap's arrays. A first size of None makes it ragged: it differs between samples."""

    dtype: str
    shape: tuple[int | None, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise StoreError(f"dtype {self.dtype!r} of a tap: allowed are {', '.join(DTYPES)}")

    @property
    def ragged(self) -> bool:
        """Whether the number of rows differs between samples."""
        return self.shape[0] is None

    def bytes(self, rows: int) -> int:
        """Bytes of one sample; `rows` is the first size where that is ragged."""
        sizes = (rows if size is None else size for size in self.shape)
        return int(np.prod(list(sizes), dtype=np.int64)) * np.dtype(self.dtype).itemsize

    def array(self, buffer: Any, offset: int, length: int) -> NDArray[Any]:
        """A view of a chunk in a buffer."""
        dtype = np.dtype(self.dtype)
        flat = np.frombuffer(buffer, dtype, count=length // dtype.itemsize, offset=offset)
        return flat.reshape([-1 if size is None else size for size in self.shape])

    def encode(self, value: Any, tap: str, token: str) -> NDArray[Any]:
        """The array as it is stored.

        Raises:
            StoreError: a wrong shape, a NaN, or a value that the dtype cannot hold; names tap and sample.
        """
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(value, dtype=self.dtype)
        sizes = [size if size is not None else array.shape[0] for size in self.shape] if array.ndim else []
        if list(array.shape) != sizes:
            raise StoreError(f"tap {tap} of sample {token} is {list(array.shape)}, declared {list(self.shape)}")
        wrong = int(np.count_nonzero(~np.isfinite(array)))
        if wrong:
            raise StoreError(
                f"tap {tap} of sample {token} has {wrong} of {array.size} values that are not finite in {self.dtype}: "
                "look at the teacher's weights and at this sample; nothing of it was stored"
            )
        return array


class Contents(NamedTuple):
    """The JSON of a shard."""

    identity: StoreIdentity
    taps: dict[str, TapSpec]
    tokens: list[str]
    chunks: dict[str, list[tuple[int, int, str]]]  # per tap and sample: offset, length in bytes, xxh3-64
    sums: dict[str, dict[str, Any]]  # per dense tap: values per channel, and over them sum and sum of squares

    def dump(self) -> bytes:
        """As bytes; equal contents give equal bytes."""
        taps = {name: asdict(spec) for name, spec in self.taps.items()}
        value = {**self._asdict(), "format": FORMAT, "identity": asdict(self.identity), "taps": taps}
        return json.dumps(value, sort_keys=True).encode()

    @classmethod
    def parse(cls, text: bytes) -> Contents:
        """The reverse of `dump`."""
        value = json.loads(text)
        if value.pop("format") != FORMAT:
            raise ValueError(f"not of format {FORMAT!r}")
        value["identity"], value["taps"] = StoreIdentity(**value["identity"]), parse_taps(value["taps"])
        value["chunks"] = {tap: [(int(o), int(n), str(h)) for o, n, h in rows] for tap, rows in value["chunks"].items()}
        return cls(**value)


def parse_taps(value: Mapping[str, Any]) -> dict[str, TapSpec]:
    """Tap specs out of JSON."""
    return {name: TapSpec(spec["dtype"], tuple(spec["shape"])) for name, spec in value.items()}


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
        end = size - _TRAILER.size - length
        if any(o < 0 or n < 0 or o + n > end for rows in contents.chunks.values() for o, n, _ in rows):
            raise ValueError("its chunks do not lie inside it")
        return contents, digest.hex()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedShardError(f"shard {path} is damaged: {error}") from error


def hash_files(root: Path, paths: Iterable[str]) -> str:
    """xxh3-128 of names and bytes of files, or of all files in folders, named relative to `root`.

    Raises:
        StoreError: naming a path that does not exist.
    """
    state = xxhash.xxh3_128()
    for name in sorted(paths):
        top = root / name
        if not top.exists():
            raise StoreError(f"{top} does not exist, and a store's identity depends on it: run the stage that makes it")
        files = [top] if top.is_file() else sorted(p for p in top.rglob("*") if p.is_file() and p.suffix != ".pyc")
        for path in files:
            state.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    state.update(block)
    return state.hexdigest()
