"""Many flat JSON records to Arrow tables, fast and in little memory: nuScenes' tables and submissions.

A file is mapped and its records are found by their braces. Arrow's reader takes a record per line, so a block of them
is copied, and what stands between two records becomes line breaks. No object is made of a record, and nothing but the
block is held beside the tables.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.json as pj
from numpy.typing import NDArray

BLOCK: Final = 1 << 25  # bytes of records that are parsed at a time, but for a longer record
_OPEN, _CLOSE, _COMMA = b"{},"
_BLANKS: Final = np.frombuffer(b" \t\r\n", np.uint8)

Bytes = NDArray[np.uint8]
Positions = NDArray[np.int64]


class NotFlatError(ValueError):
    """The records are not flat, or braces stand in a text: the file must be read another way."""


def mapped(path: Path) -> mmap.mmap:
    """A file as bytes that are read when they are looked at.

    Raises:
        OSError: it cannot be read.
        ValueError: it is empty.
    """
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _let_go(file: mmap.mmap) -> None:
    """Hold nothing of a file that was read; it is in the kernel's page cache if it is needed again."""
    file.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True)
class Records:
    """Where the records of a file are."""

    file: mmap.mmap
    content: Bytes
    starts: Positions  # [M], of their opening braces
    ends: Positions  # [M], of their closing braces
    stop: int  # where what holds them ends: the first closing brace that closes none of them, or the end that was given
    cuts: Positions  # those records behind which more stands than blanks and a comma; the last is not among them

    def tables(self, schema: pa.Schema) -> Iterator[pa.Table]:
        """All records, about BLOCK bytes of them at a time; fields that are not in the schema are left out.

        Raises:
            NotFlatError: what stands between two braces is not one record.
            ArrowInvalid: a record is no JSON, or a field has another type.
        """
        first = 0
        while first < len(self.starts):
            last = max(int(np.searchsorted(self.ends, self.starts[first] + BLOCK)), first + 1)
            table = pj.read_json(
                pa.BufferReader(self._lines(first, last)),
                read_options=pj.ReadOptions(block_size=int(self.ends[last - 1] - self.starts[first]) + 2),
                parse_options=pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
            )
            _let_go(self.file)
            if len(table) != last - first:
                raise NotFlatError
            yield table.select(schema.names)
            first = last

    def _lines(self, first: int, last: int) -> Bytes:
        """Some records, one per line."""
        begin = self.starts[first]
        lines = self.content[begin : self.ends[last - 1] + 1].copy()
        for newline in b"\r\n":  # of a file that is indented
            lines[lines == newline] = ord(" ")
        before, after = self.ends[first : last - 1] + 1 - begin, self.starts[first + 1 : last] - begin
        for same, length in _by_length(after - before):
            lines[before[same, None] + np.arange(length)] = ord("\n")
        return lines


def find_records(file: mmap.mmap, begin: int, end: int | None = None) -> Records:
    """The records of a file from a position on, up to another one or to the first brace that closes none of them.

    Raises:
        NotFlatError: a brace opens within a record, or none closes at the end.
    """
    content, stop = np.frombuffer(file, np.uint8), len(file) if end is None else end
    starts, ends = _positions(file, content, begin, stop)
    both = min(len(starts), len(ends))
    early = np.flatnonzero(ends[:both] < starts[:both])
    count = int(early[0]) if len(early) else both
    if end is None:
        if count >= len(ends):
            raise NotFlatError
        stop = int(ends[count])
    elif count < max(len(starts), len(ends)):
        raise NotFlatError
    starts, ends = starts[:count], ends[:count]
    if (ends[:-1] > starts[1:]).any():
        raise NotFlatError
    return Records(file, content, starts, ends, stop, _cuts(content, starts, ends))


def _positions(file: mmap.mmap, content: Bytes, begin: int, stop: int) -> tuple[Positions, Positions]:
    """Where braces open and close; the content is looked at in pieces, which are all that is held in memory."""
    found: tuple[list[Positions], list[Positions]] = ([], [])
    for at in range(begin, stop, BLOCK):
        piece = content[at : min(at + BLOCK, stop)]
        for positions, brace in zip(found, (_OPEN, _CLOSE), strict=True):
            positions.append(np.flatnonzero(piece == brace) + at)
        _let_go(file)
    starts, ends = (np.concatenate([*positions, np.zeros(0, dtype=np.int64)]) for positions in found)
    return starts, ends


def _cuts(content: Bytes, starts: Positions, ends: Positions) -> Positions:
    """The records behind which more stands than blanks and a comma."""
    before, after = ends[:-1] + 1, starts[1:]
    plain = np.zeros(len(before), dtype=bool)
    for same, length in _by_length(after - before):
        gaps = content[before[same, None] + np.arange(length)]
        commas = gaps == _COMMA
        plain[same] = (commas.sum(axis=1) == 1) & (commas | np.isin(gaps, _BLANKS)).all(axis=1)
    return np.flatnonzero(~plain)


def _by_length(lengths: Positions) -> Iterator[tuple[Positions, int]]:
    """Positions of equal lengths, and the length: a writer has few ways to separate records."""
    for length in np.unique(lengths).tolist():
        yield np.flatnonzero(lengths == length), length
