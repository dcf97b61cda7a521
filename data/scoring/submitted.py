"""A submission read into arrays: hundreds of megabytes of JSON and a million boxes in seconds.

nuScenes' JSON maps a keyframe's token to a list of flat records. A JSON parser for documents makes a dictionary of
each, which for 1.2 million boxes takes more memory than a laptop has; data.reading.flat_json does without. What is
between the records is a small JSON document of its own (`{"token": [0], ...}`, a 0 for each run of records) and is
parsed as one, so nothing in the file goes unread. A file for which that does not work, one with NaN in it for
instance, is read the plain way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data.reading.boxes import lidar_boxes_from_global
from data.reading.classes import ATTRIBUTES, CLASSES
from data.reading.flat_json import NotFlatError, Records, find_records, mapped
from data.reading.geometry import Float64
from data.reading.index import Index
from data.reading.truth import GlobalBoxes, Int64
from data.scoring.submission import SampleDetections, SubmissionError

_WIDTHS: Final = {"translation": 3, "size": 3, "rotation": 4, "velocity": 2}
_NAMES: Final = {"detection_name": CLASSES, "attribute_name": ATTRIBUTES}
_SCHEMA: Final = pa.schema(
    {
        "sample_token": pa.string(),
        **dict.fromkeys(_WIDTHS, pa.list_(pa.float64())),
        **dict.fromkeys(_NAMES, pa.string()),
        "detection_score": pa.float64(),
        "num_pts": pa.int64(),
    }
)
_RESULTS: Final = re.compile(rb'"results"\s*:\s*\{')


@dataclass(frozen=True)
class Submitted:
    """What a submission says."""

    path: Path
    tokens: list[str]  # [S], of its keyframes, in the order of the file
    boxes: GlobalBoxes  # of all of them, likewise; `points` is -1 unless the file has num_pts
    scores: Float64  # [M]


def read_submission(path: Path) -> Submitted:
    """A submission's boxes; meta is not looked at.

    Raises:
        FileNotFoundError: there is no such file.
        SubmissionError: it is no submission; a record lacks a field or has one of another type, an unknown class or
            attribute, another keyframe's token; a number is not finite, which only a velocity need not be (NaN).
    """
    try:
        return _put_together(path, *_fast(path))
    except (NotFlatError, pa.ArrowInvalid):
        return _put_together(path, *_plain(path))


def detections_of(submitted: Submitted, index: Index, rows: Iterable[int]) -> dict[str, SampleDetections]:
    """What a submission says of some rows of the index, in the LiDAR frame of each: sample token -> detections.

    Their order is that of the file, in which build_submission has the best score first.

    Raises:
        SubmissionError: it lacks a sample.
    """
    wanted = {index.token(row): row for row in rows}
    place = {token: number for number, token in enumerate(submitted.tokens)}
    if missing := wanted.keys() - place.keys():
        raise SubmissionError(f"{submitted.path} lacks {len(missing)} of {len(wanted)} samples, one is {min(missing)}.")
    poses = np.full((len(place), 4, 4), np.nan)
    for token, row in wanted.items():
        poses[place[token]] = index.global_SE3_lidar(row)
    chosen = np.isin(submitted.boxes.sample, [place[token] for token in wanted])
    found, scores = submitted.boxes.take(chosen), submitted.scores[chosen]
    boxes = lidar_boxes_from_global(found.translation, found.size, found.rotation, found.velocity, poses[found.sample])
    ends = np.searchsorted(found.sample, [[place[token], place[token] + 1] for token in wanted]).tolist()
    return {
        token: SampleDetections(boxes[start:end], scores[start:end], found.label[start:end])
        for token, (start, end) in zip(wanted, ends, strict=True)
    }


def _put_together(path: Path, tokens: list[str], counts: Int64, tables: Iterable[pa.Table]) -> Submitted:
    """What was read, as arrays; of the tables only one is held at a time."""
    boxes, scores, first = [], [np.zeros(0)], 0
    sample = np.repeat(np.arange(len(tokens)), counts)
    for table in tables:
        part, part_scores = _arrays(table, sample, first, tokens, path)
        boxes.append(part)
        scores.append(part_scores)
        first += len(table)
    return Submitted(path, tokens, _joined(boxes), np.concatenate(scores))


def _fast(path: Path) -> tuple[list[str], Int64, Iterator[pa.Table]]:
    """Tokens [S], how many records [S] each has, and all records in tables.

    Raises:
        NotFlatError, ArrowInvalid: braces in a text, NaN, a token twice, no JSON at all; as the tables are made, too.
    """
    try:
        text = mapped(path)
    except ValueError:
        raise NotFlatError from None
    begin = _RESULTS.search(text)
    if begin is None:
        raise NotFlatError
    records = find_records(text, begin.end())
    _check_around(text[: begin.end()] + text[records.stop :])
    tokens, counts = _runs(records, begin.end())
    return tokens, counts, records.tables(_SCHEMA)


def _check_around(text: bytes) -> None:
    """What is left of a submission without its results must be one."""
    try:
        outer = json.loads(text)
    except ValueError:
        raise NotFlatError from None
    if not isinstance(outer, dict) or outer.get("results") != {}:
        raise NotFlatError


def _runs(records: Records, begin: int) -> tuple[list[str], Int64]:
    """Tokens [S] and the number of records of each [S]; the results begin at `begin`."""
    starts, ends, cuts = records.starts, records.ends, records.cuts
    froms = [begin, *(ends[[*cuts, -1]] + 1).tolist()] if len(starts) else [begin]
    untils = [*starts[[0, *(cuts + 1)]].tolist(), records.stop] if len(starts) else [records.stop]
    between = (records.content[start:stop].tobytes() for start, stop in zip(froms, untils, strict=True))
    try:
        lists = json.loads(b"{" + b"0".join(between) + b"}", object_pairs_hook=list)
    except ValueError:
        raise NotFlatError from None
    if len(dict(lists)) != len(lists) or any(values not in ([], [0]) for _, values in lists):
        raise NotFlatError
    filled = np.array([bool(values) for _, values in lists], dtype=bool)
    counts = np.zeros(len(lists), dtype=np.int64)
    counts[filled] = np.diff([0, *(cuts + 1).tolist(), len(starts)]) if len(starts) else 0
    return [token for token, _ in lists], counts


def _plain(path: Path) -> tuple[list[str], Int64, list[pa.Table]]:
    """As `_fast`, of any JSON."""
    try:
        results = json.loads(path.read_bytes())["results"]
        lists = {token: list(records) for token, records in results.items()}
        records = [record for records in lists.values() for record in records]
        table = pa.Table.from_pylist(
            [{name: record.get(name) for name in _SCHEMA.names} for record in records], _SCHEMA
        )
    except FileNotFoundError:
        raise
    except (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, OSError, ValueError) as error:
        raise SubmissionError(f"{path} is no submission: {error!r}.") from error
    return list(lists), np.array([len(records) for records in lists.values()], dtype=np.int64), [table.combine_chunks()]


def _arrays(table: pa.Table, samples: Int64, first: int, tokens: list[str], path: Path) -> tuple[GlobalBoxes, Float64]:
    """Boxes and scores of some records, from record `first` of the file on; `samples` are the keyframes of all."""
    sample = samples[first : first + len(table)]

    def refuse(wrong: NDArray[np.bool_] | pa.ChunkedArray, what: str) -> None:
        where = np.flatnonzero(np.asarray(wrong))
        if len(where):
            own = sample[where[0]]
            at = first + int(where[0]) - int(np.searchsorted(samples, own))
            raise SubmissionError(
                f"{path}: box {at} of sample {tokens[own]} {what} ({len(where)} such boxes in this part of the file). "
                "Every box needs what the nuScenes submission format says."
            )

    for name in _SCHEMA.names:
        if name != "num_pts":
            refuse(pc.is_null(table[name]), f"lacks {name}")
    own = pa.array(tokens, pa.string()).take(pa.array(sample))
    refuse(pc.not_equal(table["sample_token"], own), "has the sample_token of another one")
    numbers = {}
    for name, width in _WIDTHS.items():
        column = table[name].combine_chunks()
        refuse(pc.not_equal(pc.list_value_length(column), width), f"has a {name} of other than {width} numbers")
        flat = column.flatten()
        nulls = pc.is_null(flat).to_numpy(zero_copy_only=False)
        refuse(nulls.reshape(-1, width).any(axis=1), f"has null in its {name}")
        values = flat.to_numpy(zero_copy_only=False).reshape(-1, width)
        odd = np.isinf(values) if name == "velocity" else ~np.isfinite(values)
        refuse(odd.any(axis=1), f"has a {name} that is not finite")
        numbers[name] = values
    scores = table["detection_score"].to_numpy()
    refuse(~np.isfinite(scores), "has a detection_score that is not finite")
    refuse(scores < 0, "has a detection_score below 0")  # the devkit fails at one that is matched
    found = {}
    for name, known in _NAMES.items():
        positions = pc.index_in(table[name], value_set=pa.array(known))
        refuse(pc.is_null(positions), f"has an unknown {name}")
        found[name] = positions.to_numpy().astype(np.int64)
    points = table["num_pts"].fill_null(-1).to_numpy()
    boxes = GlobalBoxes(sample, found["detection_name"], **numbers, attribute=found["attribute_name"], points=points)
    return boxes, scores


def _joined(parts: list[GlobalBoxes]) -> GlobalBoxes:
    if not parts:
        empty = np.zeros(0, dtype=np.int64)
        return GlobalBoxes(
            empty, empty, **{n: np.zeros((0, w)) for n, w in _WIDTHS.items()}, attribute=empty, points=empty
        )
    return GlobalBoxes(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])})
