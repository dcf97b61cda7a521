"""Cheap integrity checks of sensor files: existence, size and markers, without decoding."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

POINT_BYTES: Final = 20  # a LiDAR return: x, y, z, intensity, ring as float32
JPEG_START: Final = b"\xff\xd8"
JPEG_END: Final = b"\xff\xd9"
_JPEG_TAIL: Final = 64  # some writers pad after the end marker


class BlobError(ValueError):
    """A sensor file is absent, truncated or unreadable."""


def jpeg_fault(head: bytes, tail: bytes) -> str | None:
    """What is wrong with a JPEG, read off its first and last bytes; None when nothing is."""
    if not head:
        return "is empty"
    if not head.startswith(JPEG_START):
        return "is not a JPEG"
    return None if JPEG_END in tail[-_JPEG_TAIL:] else "is a truncated JPEG"


def points_fault(size: int) -> str | None:
    """What is wrong with the size in bytes of a LiDAR sweep; None when nothing is."""
    if size == 0:
        return "is empty"
    return f"is truncated: {size} bytes is not a multiple of {POINT_BYTES}" if size % POINT_BYTES else None


def blob_fault(path: Path) -> str | None:
    """What is wrong with a sensor file, as far as its size and, for a JPEG, its ends tell; None when nothing is."""
    try:
        size = path.stat().st_size
        if path.name.endswith(".pcd.bin"):
            return points_fault(size)
        if path.suffix != ".jpg":
            return None if size else "is empty"
        with path.open("rb") as file:
            head = file.read(2)
            file.seek(max(0, size - _JPEG_TAIL))
            return jpeg_fault(head, file.read())
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def blob_faults(dataroot: Path, files: Sequence[str], threads: int = 16) -> dict[str, str]:
    """The faulty ones among files (relative to the dataroot) and what is wrong with each."""
    with ThreadPoolExecutor(threads) as pool:
        faults = pool.map(blob_fault, (dataroot / file for file in files))
    return {file: fault for file, fault in zip(files, faults, strict=True) if fault}
