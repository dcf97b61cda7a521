"""nuScenes JSON tables as Arrow tables, joined by vectorised look-ups; an index is built from them."""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj
from numpy.typing import NDArray

from base.errors import PipelineError
from data.reading.flat_json import NotFlatError, find_records, mapped

Rows = NDArray[np.int64]
MISSING: Final = -1  # a row that does not exist

_UNKNOWN: Final = -2  # a reference that nobody asked for

_TEXT, _INTEGER, _NUMBERS = pa.string(), pa.int64(), pa.list_(pa.float64())
SCHEMAS: Final[dict[str, dict[str, pa.DataType]]] = {
    "scene": {"token": _TEXT, "name": _TEXT},
    "sample": {"token": _TEXT, "timestamp": _INTEGER, "scene_token": _TEXT, "prev": _TEXT},
    "sample_data": {
        "token": _TEXT,
        "sample_token": _TEXT,
        "ego_pose_token": _TEXT,
        "calibrated_sensor_token": _TEXT,
        "timestamp": _INTEGER,
        "is_key_frame": pa.bool_(),
        "height": _INTEGER,
        "width": _INTEGER,
        "filename": _TEXT,
        "prev": _TEXT,
    },
    "ego_pose": {"token": _TEXT, "translation": _NUMBERS, "rotation": _NUMBERS},
    "calibrated_sensor": {
        "token": _TEXT,
        "sensor_token": _TEXT,
        "translation": _NUMBERS,
        "rotation": _NUMBERS,
        "camera_intrinsic": pa.list_(_NUMBERS),
    },
    "sensor": {"token": _TEXT, "channel": _TEXT},
    "sample_annotation": {
        "token": _TEXT,
        "sample_token": _TEXT,
        "instance_token": _TEXT,
        "visibility_token": _TEXT,
        "attribute_tokens": pa.list_(_TEXT),
        "translation": _NUMBERS,
        "size": _NUMBERS,
        "rotation": _NUMBERS,
        "prev": _TEXT,
        "next": _TEXT,
        "num_lidar_pts": _INTEGER,
        "num_radar_pts": _INTEGER,
    },
    "instance": {"token": _TEXT, "category_token": _TEXT},
    "category": {"token": _TEXT, "name": _TEXT},
    "attribute": {"token": _TEXT, "name": _TEXT},
    "visibility": {"token": _TEXT, "level": _TEXT},
}
_END_OF_RECORD: Final = re.compile(rb"\}\s*,(?=\s*\{\s*\"\w+\"\s*:)")
_FEW: Final = 1 << 12  # bytes; only an array that is shorter can be empty
_OPTIONAL: Final = {"height", "width", "visibility_token", "camera_intrinsic"}


class TableError(PipelineError, ValueError):
    """A nuScenes table is absent, unreadable, incomplete or inconsistent with another one."""


class Tables:
    """The tables of one version of a dataroot, each read once and on demand."""

    def __init__(self, dataroot: Path, version: str) -> None:
        self.folder = dataroot / version
        if not self.folder.is_dir():
            found = sorted(path.parent.name for path in dataroot.glob("*/sample.json"))
            raise TableError(
                f"version {version!r} is not in the dataroot {dataroot}, which has {', '.join(found) or 'none'}. "
                "Set data.dataroot to the folder that holds the version's folder, and data.version to its name."
            )
        absent = [f"{name}.json" for name in SCHEMAS if not (self.folder / f"{name}.json").is_file()]
        if absent:
            raise TableError(f"{self.folder} lacks the tables {', '.join(absent)}: unpack the metadata again.")
        self._tables: dict[str, pa.Table] = {}
        self._references: dict[tuple[str, str], Rows] = {}

    def __getitem__(self, name: str) -> pa.Table:
        if name not in self._tables:
            self._tables[name] = _read_table(self.folder / f"{name}.json", SCHEMAS[name])
        return self._tables[name]

    def reference(self, table: str, field: str, target: str, rows: Rows | None = None, *, empty: bool = False) -> Rows:
        """Rows [R] of `target` that a field names, of all of a table or of some rows. Each is looked up once.

        Raises:
            TableError: see `look_up`.
        """
        known = self._references.setdefault((table, field), np.full(len(self[table]), _UNKNOWN))
        wanted = known if rows is None else known[rows]
        if (wanted == _UNKNOWN).any():
            new = np.flatnonzero(known == _UNKNOWN) if rows is None else np.unique(rows[wanted == _UNKNOWN])
            known[new] = self.look_up(target, self.column(table, field, new), empty=empty)
        return known.copy() if rows is None else known[rows]

    def column(self, table: str, field: str, rows: Rows | None = None) -> pa.ChunkedArray:
        """One column, or its values at `rows`."""
        column = self[table][field]
        return column if rows is None else column.take(pa.array(rows))

    def integers(self, table: str, field: str, rows: Rows) -> Rows:
        """An integer column at `rows`, [R]; what the table leaves open is 0."""
        return self.column(table, field, rows).fill_null(0).to_numpy().astype(np.int64)

    def vectors(self, table: str, field: str, size: int, rows: Rows) -> NDArray[np.float64]:
        """A column of lists of `size` numbers at `rows`, [R, size]."""
        column = self.column(table, field, rows)
        lengths = pc.list_value_length(column)
        if len(column) and (pc.min(lengths).as_py(), pc.max(lengths).as_py()) != (size, size):
            raise TableError(f"{self.folder / table}.json: every {field} must have {size} numbers.")
        return pc.list_flatten(column).to_numpy().reshape(-1, size)

    def look_up(self, table: str, tokens: pa.ChunkedArray, *, empty: bool = False) -> Rows:
        """Rows of `table` that carry the tokens, [R].

        Args:
            table: the table that is searched.
            tokens: [R] strings.
            empty: whether "" is allowed; it gives MISSING.

        Raises:
            TableError: a token is not in the table.
        """
        rows = pc.index_in(tokens, value_set=self[table]["token"]).fill_null(MISSING).to_numpy().astype(np.int64)
        dangling = rows == MISSING
        if empty:
            dangling &= pc.not_equal(tokens, "").to_numpy(zero_copy_only=False).astype(bool)
        if dangling.any():
            token = tokens[int(np.flatnonzero(dangling)[0])].as_py()
            raise TableError(
                f"{self.folder / table}.json has no record {token!r}, which another table names "
                f"({int(dangling.sum())} such references): the tables do not belong together, unpack them again."
            )
        return rows


def _read_table(path: Path, fields: dict[str, pa.DataType]) -> pa.Table:
    """The named fields of a JSON array of flat records."""
    schema = pa.schema(list(fields.items()))
    try:
        content = mapped(path)
    except ValueError:
        raise TableError(f"{path} is empty: unpack the metadata again.") from None
    begin, end = content.find(b"["), content.rfind(b"]")
    if begin < 0 or end < begin or content[:begin].strip() or content[end + 1 :].strip():
        raise TableError(f"{path} is not a whole JSON array, it may be truncated: unpack the metadata again.")
    if end - begin < _FEW and not content[begin + 1 : end].strip():
        return schema.empty_table()
    try:
        table = _fast(content, begin + 1, end, schema)
    except (NotFlatError, pa.ArrowInvalid):
        table = _plain(content, begin + 1, end, schema, path)
    for name in schema.names:
        if name not in _OPTIONAL and table[name].null_count:
            raise TableError(f"{path}: {table[name].null_count} of {len(table)} records have no {name!r}.")
    return table


def _fast(content: mmap.mmap, begin: int, end: int, schema: pa.Schema) -> pa.Table:
    """The records between two positions of a file without braces in a text. Raises NotFlatError, ArrowInvalid."""
    records = find_records(content, begin, end)
    if not len(records.starts) or len(records.cuts):
        raise NotFlatError
    if content[begin : int(records.starts[0])].strip() or content[int(records.ends[-1]) + 1 : end].strip():
        raise NotFlatError
    return _joined(list(records.tables(schema)))


def _joined(tables: list[pa.Table]) -> pa.Table:
    """Tables behind each other, each column in one piece; the pieces of a column are let go of once it is whole."""
    names = tables[0].column_names
    pieces = {name: [chunk for table in tables for chunk in table[name].chunks] for name in names}
    tables.clear()
    return pa.table({name: pa.concat_arrays(pieces.pop(name)) for name in names})


def _plain(content: mmap.mmap, begin: int, end: int, schema: pa.Schema, path: Path) -> pa.Table:
    """The same of a file with braces in its texts.

    nuScenes records are flat, so a closing brace, a comma and the first key of a record end the one before. A text
    cannot hold that sequence: JSON escapes the quotes inside it.
    """
    with memoryview(content) as view:
        records = _END_OF_RECORD.sub(b"}\n", view[begin:end])
    parse = pj.ParseOptions(explicit_schema=schema, newlines_in_values=True, unexpected_field_behavior="ignore")
    try:
        read = pj.ReadOptions(block_size=len(records) + 1)
        table = pj.read_json(pa.BufferReader(records), read_options=read, parse_options=parse)
        return table.select(schema.names).combine_chunks()
    except pa.ArrowInvalid as error:
        raise TableError(f"{path} is not a nuScenes table: {error}") from error
