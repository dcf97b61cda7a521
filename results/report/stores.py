"""What the teacher outputs cost and how faithful they are, out of the cards that extraction publishes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results.report.results import read_published
from results.report.tables import DASH

UNITS = ("B", "kB", "MB", "GB")


@dataclass(frozen=True)
class StoredTap:
    """One row of the table of teacher outputs, each part as text."""

    store: str
    tap: str
    serve: str
    encoding: str
    sample_bytes: str
    share: str  # of the same in float16
    error: str  # mean, against the teacher's own values
    gaps: dict[str, str]  # by augmentation, against the teacher run again


def stored_taps(cards: Path, stores: Sequence[str]) -> list[StoredTap]:
    """Rows of all taps of a study's stores.

    Raises:
        ReportError: a card is missing; names it and what to run.
    """
    return [_row(store, tap, entry) for store in stores for tap, entry in _read(cards, store)["taps"].items()]


def augmentations(rows: Sequence[StoredTap]) -> list[str]:
    """The augmentations for which a gap was measured, in their order."""
    return list(dict.fromkeys(name for row in rows for name in row.gaps))


def readable(size: float) -> str:
    """Bytes in decimal units."""
    for unit in UNITS:
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _read(cards: Path, store: str) -> Any:
    return read_published(cards / f"{store}.json", f"run `dvc repro extract@{store}`")


def _row(store: str, tap: str, entry: Mapping[str, Any]) -> StoredTap:
    plain, error = entry.get("float16_bytes_per_sample"), entry.get("error")
    return StoredTap(
        store,
        tap,
        entry["serve"],
        entry["encoding"],
        readable(entry["bytes_per_sample"]),
        f"{100 * entry['bytes_per_sample'] / plain:.0f} %" if plain else DASH,
        _percent(error["mean"]) if error else DASH,
        {name: _percent(value) for name, value in (entry.get("gap") or {}).items()},
    )


def _percent(value: float) -> str:
    return "0" if value == 0 else f"{100 * value:.2g} %"
