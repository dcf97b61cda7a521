"""The film of a scene, and a keyframe of the scenes where the best variant gains and loses most."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from results.report.pictures import picture_uri
from results.report.results import ReportError, Study, read_published

COMMAND = "run `dvc repro film`"
REQUIRED = ("keys", "threshold", "scene", "keyframes", "file", "scenes")
STILL_WIDTH = 1320  # pixels on the page


@dataclass(frozen=True)
class Picture:
    """As a data URI, with its size in pixels."""

    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Film:
    """What the stage `film` drew."""

    keys: list[str]  # of the runs, from left to right
    threshold: float  # score from which on a box is drawn
    scene: str
    keyframes: int
    moving: Picture
    stills: dict[str, Picture]  # scene -> one of its keyframes


def read_film(folder: Path, study: Study) -> Film:
    """Read what was drawn for a study.

    Raises:
        ReportError: a file is missing, or was drawn for another study; names it and what to run.
    """
    path = folder / "film.json"
    content = read_published(path, COMMAND, REQUIRED)
    if unknown := sorted(set(content["keys"]) - {arm.first_key for arm in study.arms}):
        raise ReportError(f"{path} was drawn for another study, with {', '.join(unknown)}: {COMMAND}")
    return Film(
        content["keys"],
        content["threshold"],
        content["scene"],
        content["keyframes"],
        _moving(folder / content["file"]),
        {entry["scene"]: Picture(*picture_uri(folder / entry["file"], STILL_WIDTH)) for entry in content["scenes"]},
    )


def _moving(path: Path) -> Picture:
    """An animated WebP as it is."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ReportError(f"{path} is missing, though the JSON beside it names it: {COMMAND}") from None
    size = Image.open(path).size
    return Picture("data:image/webp;base64," + base64.b64encode(data).decode(), *size)
