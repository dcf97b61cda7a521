"""What a store keeps of a teacher's output: shape and encoding of a tap, and the way into a chunk and back."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.store.encoding import Calibration, Encoded, Encoding, decode_map, encode_map, most_bytes
from data.store.errors import StoreError

BOX_SIZE = 11  # box, score, label
_INSTANCE_BYTES = 1024  # more than the box and the mask of an instance take, but for few
TAP_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class TapSpec:
    """Shape and encoding of a tap's arrays as they are stored.

    Dense maps are [H, W, K] with an encoding; ragged arrays, whose first size is None, are kept exactly: boxes [K, 11]
    and, as bytes [n], instances that `data.reading.instances.pack` made.
    """

    shape: tuple[int | None, ...]
    dtype: str  # of the stored values
    encoding: Encoding | None = None
    channels_of_teacher: int | None = None  # C
    extent: float | None = None  # metres, half the side of a map with its halo

    def __post_init__(self) -> None:
        if self.encoding is None:
            right = self.shape[:1] == (None,) and (self.dtype, len(self.shape)) in (("float32", 2), ("uint8", 1))
            sizes = self.shape[1:]
        else:
            channels = self.channels_of_teacher
            right = self.dtype == self.encoding.dtype and len(self.shape) == 3 and channels is not None
            right = right and self.shape[-1] == (self.encoding.channels or channels)
            sizes = (*self.shape, channels)
        if not right or not all(type(size) is int and size > 0 for size in sizes):
            raise StoreError(
                f"a tap of {self.dtype} {list(self.shape)}, encoding {self.encoding}, {self.channels_of_teacher} "
                "channels: make it with TapSpec.dense, TapSpec.boxes or TapSpec.instances"
            )

    @classmethod
    def dense(cls, map_shape: tuple[int, ...], encoding: Encoding, extent: float) -> Self:
        """Of a teacher's map.

        Args:
            map_shape: (C, H, W) of the teacher's map.
            encoding: how it is stored.
            extent: half its side in metres, with its halo.

        Raises:
            StoreError: more components than channels.
        """
        channels, height, width = map_shape
        kept = encoding.channels or channels
        if kept > channels:
            raise StoreError(f"channels {kept} of a tap: the teacher's map has {channels}")
        return cls((height, width, kept), encoding.dtype, encoding, channels, float(extent))

    @classmethod
    def boxes(cls) -> Self:
        """Of boxes [K, 11]."""
        return cls((None, BOX_SIZE), "float32")

    @classmethod
    def instances(cls) -> Self:
        """Of packed instances, bytes [n]."""
        return cls((None,), "uint8")

    @property
    def ragged(self) -> bool:
        """Whether the number of rows differs between samples."""
        return self.shape[0] is None

    @property
    def map_shape(self) -> tuple[int, int, int]:
        """(H, W, K) of a dense tap."""
        height, width, channels = self.shape
        assert height is not None
        assert width is not None
        assert channels is not None
        return height, width, channels

    def bytes(self, rows: int) -> int:
        """The most bytes of one sample before compression; of a ragged tap `rows` is how many boxes or instances."""
        if self.encoding is None:
            return rows * (_INSTANCE_BYTES if self.dtype == "uint8" else self._row_bytes)
        return most_bytes(self.map_shape, self.encoding)

    def encode(
        self, arrays: Mapping[str, Any], tap: str, token: str, calibration: Calibration | None = None
    ) -> Encoded:
        """A sample's array of this tap as a chunk.

        Args:
            arrays: of the sample by tap: [C, H, W], [K, 11] or bytes [n], and for a foreground encoding `<tap>.keep`
                [H, W].
            tap: name of this tap.
            token: of the sample, for messages.
            calibration: of a dense tap.

        Raises:
            StoreError: a wrong shape, a NaN, or a value that float16 cannot hold; names tap and sample.
        """
        value = self._checked(arrays, tap, token)
        if self.encoding is None:
            stored = np.ascontiguousarray(value, self.dtype)
            return Encoded(stored.reshape(-1).view(np.uint8).data, stored.nbytes)
        if calibration is None:
            raise StoreError(f"tap {tap} of sample {token} cannot be encoded without its calibration")
        keep = self._keep(arrays, tap, token)
        try:
            return encode_map(value, self.encoding, calibration, keep)
        except OverflowError as error:
            raise StoreError(_not_finite(tap, token, f"{error}", self.dtype)) from error

    def decode(self, chunk: Encoded, tap: str, calibration: Calibration | None = None) -> dict[str, NDArray[Any]]:
        """What `Store.read` gives of a chunk: the stored values, and for a foreground encoding `<tap>.present`.

        Raises:
            ValueError: the chunk does not fit this tap.
        """
        if self.encoding is None:
            return {tap: np.frombuffer(chunk.data, self.dtype).reshape(-1, *self.shape[1:])}
        if calibration is None:
            raise StoreError(f"tap {tap} cannot be decoded without its calibration")
        value, present = decode_map(chunk, self.map_shape, self.encoding, calibration)
        return {tap: value} if present is None else {tap: value, f"{tap}.present": present}

    def tensor(self, array: NDArray[Any]) -> Tensor:
        """An array of `Store.read`, or several stacked, as a tensor of the stored dtype: float8 instead of its bits."""
        tensor = torch.from_numpy(array)
        return tensor.view(torch.float8_e4m3fn) if self.dtype == "float8_e4m3" else tensor

    def check_sizes(self, length: int, size: int) -> None:
        """Make sure that a chunk declares what this tap can have, before anything of that size is allocated.

        Args:
            length: bytes of the chunk.
            size: bytes before compression.

        Raises:
            ValueError: it declares something else.
        """
        possible = size % self._row_bytes == 0 if self.encoding is None else 0 < size <= self.bytes(0)
        compressed = self.encoding is not None and self.encoding.compression != "none"
        if length < 0 or size < 0 or not possible or not (compressed or size == length):
            raise ValueError(f"a chunk of {length} bytes declares {size}, which its tap {list(self.shape)} cannot have")

    @property
    def _row_bytes(self) -> int:
        """Of a ragged tap."""
        return math.prod(size or 0 for size in self.shape[1:]) * np.dtype(self.dtype).itemsize

    def _checked(self, arrays: Mapping[str, Any], tap: str, token: str) -> NDArray[Any]:
        value = np.asarray(arrays[tap])
        if (value.dtype == np.uint8) != (self.dtype == "uint8"):
            raise StoreError(f"tap {tap} of sample {token} is of {value.dtype}, declared {self.dtype}")
        value = value if value.dtype in (np.uint8, np.float16, np.float32) else value.astype(np.float32)
        declared: list[int | None] = [self.channels_of_teacher, *self.shape[:2]] if self.encoding else [*self.shape]
        sizes = [size if size is not None else value.shape[0] for size in declared] if value.ndim else []
        if list(value.shape) != sizes:
            raise StoreError(f"tap {tap} of sample {token} is {list(value.shape)}, declared {declared}")
        wrong = int(np.count_nonzero(~np.isfinite(value)))
        if wrong:
            raise StoreError(_not_finite(tap, token, f"{wrong} of {value.size} values", self.dtype))
        return value

    def _keep(self, arrays: Mapping[str, Any], tap: str, token: str) -> NDArray[np.bool_] | None:
        if self.encoding is None or self.encoding.cells != "foreground":
            return None
        if f"{tap}.keep" not in arrays:
            raise StoreError(f"tap {tap} of sample {token} keeps its foreground only: give the cells as {tap}.keep")
        keep = np.asarray(arrays[f"{tap}.keep"])
        if keep.dtype != np.bool_ or keep.shape != self.map_shape[:2]:
            raise StoreError(
                f"{tap}.keep of sample {token} is {keep.dtype} {list(keep.shape)}, declared bool {list(self.shape[:2])}"
            )
        return keep


def _not_finite(tap: str, token: str, count: str, dtype: str) -> str:
    return (
        f"tap {tap} of sample {token} has {count} that are not finite in {dtype}: "
        "look at the teacher's weights and at this sample; nothing of it was stored"
    )


def dump_taps(taps: Mapping[str, TapSpec]) -> dict[str, Any]:
    """Tap specs as JSON."""
    return {name: asdict(spec) for name, spec in taps.items()}


def parse_taps(value: Mapping[str, Any]) -> dict[str, TapSpec]:
    """Tap specs out of JSON.

    Raises:
        StoreError: a spec or a name that this code does not make.
    """
    check_names(value)
    return {name: _parse_tap(**spec) for name, spec in value.items()}


def _parse_tap(shape: list[int | None], encoding: dict[str, Any] | None, **others: Any) -> TapSpec:
    return TapSpec(tuple(shape), encoding=None if encoding is None else Encoding(**encoding), **others)


def check_names(taps: Iterable[str]) -> None:
    """Make sure that tap names are plain, because files and arrays are named after them.

    Raises:
        StoreError: naming the first that is not.
    """
    for name in taps:
        if not TAP_NAME.fullmatch(name):
            raise StoreError(f"tap {name!r}: only names of a-z, 0-9 and _ are allowed")
