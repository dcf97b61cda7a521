"""Simulated LiDAR features beside the fusion teacher's: pictures, and how they correlate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from results.report.pictures import picture_uri
from results.report.results import read_published
from results.report.statistics import Interval, mean_interval, paired_difference

PICTURE_WIDTH = 1320  # pixels on the page
REQUIRED = ("teacher", "mean", "keyframes")


@dataclass(frozen=True)
class FeaturePicture:
    """One keyframe as a data URI: teacher and student side by side."""

    caption: str
    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Features:
    """Of one variant: correlations over the seeds, and pictures of the first."""

    variant: str
    teacher: str
    before: Interval | None  # None: no compensation in BEV
    after: Interval | None
    change: Interval | None  # after - before, paired by seed
    pictures: list[FeaturePicture]


def features(folder: Path, variants: Sequence[str], seeds: Sequence[int], count: int) -> list[Features]:
    """The variants whose features are compared, each with the first `count` pictures.

    Args:
        folder: with one folder per run.
        variants: their names.
        seeds: of the study.
        count: of pictures.

    Raises:
        ReportError: a file is missing or of another version; names it and what to run.
    """
    return [_features(folder, name, seeds, count) for name in variants]


def _features(folder: Path, variant: str, seeds: Sequence[int], count: int) -> Features:
    keys = {seed: f"{variant}-{seed}" for seed in seeds}
    runs = {
        seed: read_published(folder / key / "features.json", f"run `dvc repro features@{key}`", REQUIRED)
        for seed, key in keys.items()
    }
    before, after = ({seed: run["mean"][when] for seed, run in runs.items()} for when in ("before", "after"))
    first, place = runs[seeds[0]], folder / f"{variant}-{seeds[0]}"
    return Features(
        variant,
        first["teacher"],
        mean_interval(list(before.values())),
        mean_interval(list(after.values())),
        paired_difference(after, before),
        [
            FeaturePicture(entry["caption"], *picture_uri(place / entry["file"], PICTURE_WIDTH))
            for entry in first["keyframes"][:count]
        ],
    )
