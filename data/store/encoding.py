"""How a dense map is stored: dtype x channels x cells x compression, and the calibration that an encoding needs.

A map [C, H, W] becomes a chunk: its kept cells as rows of K values, after a bitmap of the cells where not all are kept,
compressed or not. The way back ends on the host at the stored values [H, W, K]; what they mean as [C] floats,
`Calibration.expand` computes on the device, after the warp, so that a warp moves K channels and not C.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import cv2
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.store.errors import StoreError

DTYPES = {"float32": np.float32, "float16": np.float16, "int8": np.int8, "float8_e4m3": np.uint8}
CELLS = ("all", "occupied", "foreground")
# Name in pyarrow and level. Higher levels of zstd take longer and save nothing: the maps [48, 64, 64] of a trained
# LiDAR teacher in float16 took 55.5 kB at level 1, 57.2 at 3 and 56.9 at 6.
CODECS: dict[str, tuple[str, int | None] | None] = {"none": None, "lz4": ("lz4_raw", None), "zstd": ("zstd", 1)}
FLOAT8_MAX = 448.0
_TINY = np.finfo(np.float32).tiny

Map = NDArray[Any]  # [C, H, W], floats
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Encoding:
    """How the maps of a dense tap are stored.

    Raises:
        StoreError: a value that is not allowed; names the field, the value and what is allowed.
    """

    dtype: str = "float16"
    channels: int | None = None  # principal components that are kept; None keeps the teacher's channels
    cells: str = "all"
    compression: str = "none"

    def __post_init__(self) -> None:
        for name, allowed in (("dtype", DTYPES), ("cells", CELLS), ("compression", CODECS)):
            value = getattr(self, name)
            if value not in allowed:
                raise StoreError(f"{name} {value!r} of a tap: allowed are {', '.join(allowed)}")
        if self.channels is not None and (not isinstance(self.channels, int) or self.channels < 1):
            raise StoreError(f"channels {self.channels!r} of a tap: allowed are 1 to the teacher's, or null for all")
        if self.dtype == "float8_e4m3" and not hasattr(torch, "float8_e4m3fn"):
            raise StoreError(f"dtype float8_e4m3 of a tap: torch {torch.__version__} lacks it; take int8 or float16")

    def __str__(self) -> str:
        channels = "all channels" if self.channels is None else f"{self.channels} channels"
        compression = () if self.compression == "none" else (self.compression,)
        return ", ".join((self.dtype, channels, f"{self.cells} cells", *compression))

    @property
    def shuffled(self) -> bool:
        """Whether values are stored byte plane by byte plane. It helps zstd; lz4's chunks grow by 4 % with it."""
        return self.compression == "zstd" and self.array_dtype.itemsize > 1

    @property
    def array_dtype(self) -> np.dtype[Any]:
        """Of the stored values in numpy; float8 is held as its bits."""
        return np.dtype(DTYPES[self.dtype])


@dataclass(frozen=True, eq=False)
class Calibration:
    """What the stored values of a tap mean: value = (stored - zero) * scale @ basis.

    Zero stays exactly zero: `zero` is an integer that int8 can hold, and the components are not centred.
    """

    scale: NDArray[np.float32]  # [K]
    zero: NDArray[np.float32]  # [K]
    basis: NDArray[np.float32] | None = None  # [K, C], rows orthonormal
    _constants: dict[torch.device, tuple[Tensor | None, Tensor, Tensor | None]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        arrays = [array for array in (self.scale, self.zero, self.basis) if array is not None]
        shapes = [array.shape for array in arrays]
        right = self.scale.ndim == 1 and self.zero.shape == self.scale.shape
        right &= self.basis is None or (self.basis.ndim == 2 and len(self.basis) == len(self.scale))
        if not right or any(array.dtype != np.float32 for array in arrays):
            raise StoreError(f"calibration of shapes {shapes}: expected scale [K], zero [K] and basis [K, C], float32")
        if not all(np.isfinite(array).all() for array in arrays) or (self.scale <= 0).any():
            raise StoreError("calibration with scales that are not positive, or values that are not finite")

    def __getstate__(self) -> dict[str, Any]:
        """Without the tensors, which belong to a process and its devices."""
        return self.__dict__ | {"_constants": {}}

    @classmethod
    def fit(cls, encoding: Encoding, maps: Iterable[Map], keeps: Iterable[Mask | None] | None = None) -> Self:
        """Fit scales and basis on a subset of the maps. Equal input gives an equal calibration.

        Args:
            encoding: of the tap.
            maps: the teacher's, each [C, H, W], all of one shape.
            keeps: for each map the cells [H, W] that are kept where `cells` is foreground; None are all.

        Raises:
            StoreError: no maps, values that are not finite, or more components than channels.
        """
        maps = list(maps)
        if not maps:
            raise StoreError("a calibration needs at least one map: set store.calibration_samples to 1 or more")
        masks = [None] * len(maps) if keeps is None else [None if keep is None else keep.reshape(-1) for keep in keeps]
        rows = [_rows(value, mask) for value, mask in zip(maps, masks, strict=True)]
        if not all(np.isfinite(part).all() for part in rows):
            raise StoreError("maps for the calibration have values that are not finite: look at the teacher's weights")
        basis = None if encoding.channels is None else _components(rows, encoding.channels)
        low, high = np.zeros((2, len(maps[0]) if basis is None else len(basis)))
        if encoding.dtype in ("int8", "float8_e4m3"):
            for part in rows:
                reduced = _project(part, basis)
                low, high = np.minimum(low, reduced.min(0, initial=0)), np.maximum(high, reduced.max(0, initial=0))
        return cls(*_affine(encoding.dtype, low, high), basis)

    def expand(self, values: Tensor) -> Tensor:
        """The teacher's channels out of stored values.

        Args:
            values: [..., K] of the stored dtype (uint8 are the bits of float8), or floats that a warp made of it.

        Returns:
            [..., C] float32, on the same device.
        """
        if values.dtype == torch.uint8:
            values = values.view(torch.float8_e4m3fn)
        if values.device not in self._constants:
            self._constants[values.device] = self._tensors(values.device)
        zero, scale, basis = self._constants[values.device]
        # Autocast would round to bfloat16 what the store keeps more exactly.
        with torch.autocast(values.device.type, enabled=False):
            result = values.float()
            result = result if zero is None else (result - zero).mul_(scale)
            return result if basis is None else result @ basis

    def _tensors(self, device: torch.device) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Zero (None where there is nothing to compute), scale and basis on a device."""
        plain = (self.scale == 1).all() and (self.zero == 0).all()
        zero, scale = (torch.tensor(array, device=device) for array in (self.zero, self.scale))
        return None if plain else zero, scale, None if self.basis is None else torch.tensor(self.basis, device=device)


class Encoded(NamedTuple):
    """A chunk."""

    data: Any  # buffer of what is stored
    size: int  # bytes before compression


def encode_map(value: Map, encoding: Encoding, calibration: Calibration, keep: Mask | None = None) -> Encoded:
    """A map [C, H, W] of finite values as a chunk.

    What lies outside the range of int8 or float8 is clipped to it.

    Args:
        value: the map.
        encoding: of its tap.
        calibration: of its tap.
        keep: the cells [H, W] that a foreground encoding keeps.

    Raises:
        OverflowError: a value that float16 cannot hold.
    """
    kept = _kept(value, encoding.cells, keep)
    rows = _quantise(_project(_rows(value, kept), calibration.basis), encoding, calibration)
    bitmap = b"" if kept is None else np.packbits(kept).tobytes()
    size = len(bitmap) + rows.nbytes
    codec = CODECS[encoding.compression]
    if codec is not None:
        payload = _shuffle(rows) if encoding.shuffled else rows
        return Encoded(_codec(codec).compress(bitmap + payload.tobytes(), asbytes=True), size)
    return Encoded(bitmap + rows.tobytes() if bitmap else rows.reshape(-1).view(np.uint8).data, size)


def decode_map(
    chunk: Encoded, shape: tuple[int, int, int], encoding: Encoding, calibration: Calibration
) -> tuple[NDArray[Any], Mask | None]:
    """The stored values [H, W, K] of a chunk, and for foreground the cells [H, W] that are present.

    Never allocates more than the shape needs. Without compression and with all cells it is a view of the chunk.

    Raises:
        ValueError: the chunk does not fit the shape.
    """
    height, width, channels = shape
    cells, row = height * width, channels * encoding.array_dtype.itemsize
    raw = _decompressed(chunk, encoding, most=most_bytes(shape, encoding))
    if encoding.cells == "all":
        if raw.size != cells * row:
            raise ValueError(f"{raw.size} bytes where {cells * row} are declared")
        return _unshuffle(raw, encoding).reshape(shape), None
    bitmap = -(-cells // 8)
    kept = np.unpackbits(raw[:bitmap], count=cells).view(np.bool_)
    if raw.size != bitmap + np.count_nonzero(kept) * row:
        raise ValueError(f"its bitmap has {np.count_nonzero(kept)} cells, and {raw.size - bitmap} bytes follow it")
    result = np.zeros((cells, channels), encoding.array_dtype)
    if encoding.dtype == "int8":
        result[:] = calibration.zero.astype(np.int8)
    # Rows as single items: one copy per row instead of one per value.
    item = np.dtype((np.void, row))
    result.view(item)[kept, 0] = _unshuffle(raw[bitmap:], encoding).view(item)
    return result.reshape(shape), kept.reshape(height, width) if encoding.cells == "foreground" else None


def check_filled(chunk: Encoded, encoding: Encoding) -> None:
    """Make sure that a chunk which `decode_map` took gives all the bytes it declares, not fewer.

    Raises:
        ValueError: it does not.
    """
    # LZ4 fills a part of too large a buffer, and pyarrow does not tell; one byte less must therefore be too little.
    if encoding.compression == "lz4":
        try:
            _codec(("lz4_raw", None)).decompress(chunk.data, chunk.size - 1)
        except (OSError, ValueError):
            return
        raise ValueError(f"it decompresses to fewer than its {chunk.size} bytes")


def most_bytes(shape: tuple[int, int, int], encoding: Encoding) -> int:
    """Bytes of a chunk before compression when every cell is kept."""
    cells = shape[0] * shape[1]
    return cells * shape[2] * encoding.array_dtype.itemsize + (0 if encoding.cells == "all" else -(-cells // 8))


def _kept(value: Map, cells: str, keep: Mask | None) -> Mask | None:
    """Cells [H W] whose rows are stored; None are all."""
    if cells == "all":
        return None
    if cells == "occupied":
        return value.any(0).reshape(-1)
    if keep is None:
        raise ValueError("a foreground encoding needs the cells to keep")
    return keep.reshape(-1)


def _rows(value: Map, kept: Mask | None) -> NDArray[Any]:
    """Cells [n, C] of a map, a view where all are kept."""
    flat = value.reshape(len(value), -1)
    return flat.T if kept is None else flat[:, kept].T


def _components(rows: list[NDArray[Any]], count: int) -> NDArray[np.float32]:
    """Uncentred principal components [count, C]; the largest entry of each is positive."""
    channels = rows[0].shape[1]
    if count > channels:
        raise StoreError(f"channels {count} of a tap: the teacher's map has {channels}")
    moments = torch.zeros(channels, channels, dtype=torch.float64)
    with _one_thread():
        for part in rows:
            exact = torch.from_numpy(np.ascontiguousarray(part, np.float64))
            moments += exact.T @ exact
        vectors = torch.linalg.eigh(moments)[1].numpy()
    basis = vectors[:, ::-1][:, :count].T
    largest = np.abs(basis).argmax(1)
    return np.ascontiguousarray(basis * np.sign(basis[np.arange(count), largest])[:, None], np.float32)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The last bits of eigenvectors depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _affine(dtype: str, low: NDArray[Any], high: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scale and zero of a dtype for values of a range that includes zero."""
    if dtype == "int8":
        span = high - low
        scale = np.where(span > 0, span / 255, 1).astype(np.float32).clip(_TINY)
        return scale, np.rint(-128 - low / scale).clip(-128, 127).astype(np.float32)
    most = np.maximum(high, -low)
    scale = np.where(most > 0, most / FLOAT8_MAX, 1).astype(np.float32).clip(_TINY)
    return scale, np.zeros_like(scale)


def _project(rows: NDArray[Any], basis: NDArray[np.float32] | None) -> NDArray[Any]:
    """Rows [n, K] of rows [n, C]."""
    if basis is None:
        return rows
    # In float64, so that the order of a BLAS's sums, which may depend on its threads, is lost in the rounding.
    return (rows.astype(np.float64) @ basis.T.astype(np.float64)).astype(np.float32)


def _quantise(rows: NDArray[Any], encoding: Encoding, calibration: Calibration) -> NDArray[Any]:
    """Rows [n, K] as they are stored, contiguous."""
    if encoding.dtype in ("float16", "float32"):
        with np.errstate(over="ignore"):
            stored = rows.astype(encoding.dtype, order="C")
        wrong = int(np.count_nonzero(~np.isfinite(stored)))
        if wrong:
            raise OverflowError(f"{wrong} of {stored.size} values")
        return stored
    scaled = np.divide(rows, calibration.scale, dtype=np.float32, order="C")
    if encoding.dtype == "int8":
        return np.rint(scaled + calibration.zero).clip(-128, 127).astype(np.int8)
    bits = torch.from_numpy(scaled.clip(-FLOAT8_MAX, FLOAT8_MAX)).to(torch.float8_e4m3fn).view(torch.uint8)
    return bits.numpy()


def _shuffle(rows: NDArray[Any]) -> NDArray[np.uint8]:
    """All first bytes, then all second bytes and so on: exponents side by side compress better."""
    return np.ascontiguousarray(rows.reshape(-1, 1).view(np.uint8).T)


def _unshuffle(raw: NDArray[np.uint8], encoding: Encoding) -> NDArray[Any]:
    """Values of a chunk's rows; a view where nothing was shuffled."""
    dtype = encoding.array_dtype
    if not encoding.shuffled:
        return raw.view(dtype)
    planes = raw.reshape(dtype.itemsize, -1)
    if planes.size == 0:
        return np.empty(0, dtype)
    return cv2.merge(list(planes)).reshape(-1).view(dtype)  # 9 times as fast as numpy's strided copies


def _codec(codec: tuple[str, int | None]) -> pa.Codec:
    return pa.Codec(codec[0], compression_level=codec[1])


def _decompressed(chunk: Encoded, encoding: Encoding, most: int) -> NDArray[np.uint8]:
    """Bytes of a chunk, before the size that it declares is allocated compared with the most that there can be."""
    codec = CODECS[encoding.compression]
    if codec is None:
        return np.frombuffer(chunk.data, np.uint8)
    if not 0 < chunk.size <= most:
        raise ValueError(f"it declares {chunk.size} bytes, of at most {most}")
    try:
        return np.frombuffer(_codec(codec).decompress(chunk.data, chunk.size), np.uint8)
    except OSError as error:
        raise ValueError(f"it does not decompress to {chunk.size} bytes: {error}") from error
