"""Cheap integrity checks of sensor files: existence, size and markers, without decoding."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from base.errors import PipelineError

POINT_BYTES: Final = 20  # a LiDAR return: x, y, z, intensity, ring as float32
JPEG_START: Final = b"\xff\xd8"
JPEG_END: Final = b"\xff\xd9"
_JPEG_TAIL: Final = 64  # some writers pad after the end marker
_AT_ONCE: Final = 256  # files that a thread looks at before it asks for more; asking costs as much as looking


class BlobError(PipelineError, ValueError):
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


def check_blob(path: str) -> tuple[int, str | None]:
    """Size in bytes of a sensor file, and what is wrong with it as far as the size and a JPEG's ends tell."""
    try:
        if not path.endswith(".jpg"):
            size = os.stat(path).st_size
            return size, points_fault(size) if path.endswith(".pcd.bin") else None if size else "is empty"
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            return size, jpeg_fault(file.read(2), os.pread(file.fileno(), _JPEG_TAIL, max(0, size - _JPEG_TAIL)))
    except FileNotFoundError:
        return 0, "is missing"
    except OSError as error:
        return 0, f"cannot be read ({error.strerror})"


def check_blobs(dataroot: Path, files: Sequence[str], threads: int = 16) -> tuple[NDArray[np.int64], dict[str, str]]:
    """Sizes [F] of files, which are relative to the dataroot, and what is wrong with the faulty ones."""
    root = f"{dataroot}{os.sep}"

    def check_some(start: int) -> list[tuple[int, str | None]]:
        return [check_blob(root + file) for file in files[start : start + _AT_ONCE]]

    with ThreadPoolExecutor(threads) as pool:
        results = [result for some in pool.map(check_some, range(0, len(files), _AT_ONCE)) for result in some]
    faults = {file: fault for file, (_, fault) in zip(files, results, strict=True) if fault}
    return np.array([size for size, _ in results], dtype=np.int64), faults
