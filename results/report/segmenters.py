"""The instance segmentation teachers: COCO's metrics and pictures of what they find."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from results.report.pictures import picture_uri
from results.report.results import read_published
from results.report.statistics import Interval
from results.report.tables import number

KINDS = {"bbox": "box", "mask": "mask"}
METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR")
REQUIRED = (*KINDS, "classes", "images", "parameters")
PICTURE_WIDTH = 1320  # pixels on the page


@dataclass(frozen=True)
class Overlay:
    """A picture as a data URI: the truth beside what was found in one image."""

    image: str
    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Segmenter:
    """One instance segmentation teacher, numbers as text."""

    name: str
    images: int
    parameters: str
    metrics: list[tuple[str, list[str]]]  # "box" or "mask" -> the values of METRICS
    classes: list[tuple[str, str, str, str]]  # class, AP of boxes, AP of masks, instances of truth
    overlays: list[Overlay]


def segmenters(metrics: Path, evaluations: Path, names: Sequence[str], count: int) -> list[Segmenter]:
    """The segmenters of a study, each with the first `count` pictures.

    Raises:
        ReportError: metrics or a picture are missing; names the file and what to run.
    """
    return [_segmenter(metrics, evaluations / name, name, count) for name in names]


def _segmenter(metrics: Path, evaluations: Path, name: str, count: int) -> Segmenter:
    command = f"run `dvc repro evaluate_segmenter@{name}`"
    content = read_published(metrics / f"{name}.json", command, REQUIRED)
    manifest = read_published(evaluations / "pictures.json", command)
    overlays = [
        Overlay(Path(entry["image"]).name, *picture_uri(evaluations / entry["file"], PICTURE_WIDTH))
        for entry in manifest["images"][:count]
    ]
    return Segmenter(
        name,
        content["images"],
        f"{content['parameters'] / 1e6:.2f} M",
        [(word, [_text(content[kind][metric]) for metric in METRICS]) for kind, word in KINDS.items()],
        [
            (label, *(_text(values[kind]["AP"]) for kind in KINDS), str(values["truth"]))
            for label, values in content["classes"].items()
        ],
        overlays,
    )


def _text(value: float | None) -> str:
    return number(None if value is None else Interval(value, None, 1))
