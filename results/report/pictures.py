"""Pictures of the evaluation stages, made small enough to travel inside one HTML page."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from results.report.results import Arm, ReportError, Study, read_published

QUALITY = 80
VIEWS = {"bev": 560, "cameras": 1320}  # view -> greatest width in pixels on the page
PANELS = 20  # of a view that the page holds at that width; of more, each is smaller, so that the page is not larger


@dataclass(frozen=True)
class Panel:
    """One picture as a data URI; `arm` is None for the truth."""

    label: str
    arm: Arm | None
    view: str
    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Scene:
    """One keyframe as seen by the truth and by every arm."""

    token: str
    caption: str
    panels: dict[str, list[Panel]]  # view -> the truth, then the arms


@dataclass(frozen=True)
class Gallery:
    """The keyframes of the page, and the score above which a predicted box is drawn."""

    scenes: list[Scene]
    threshold: float | None


def gallery(study: Study, evaluations: Path, count: int) -> Gallery:
    """The first `count` keyframes that every arm has pictures of.

    Raises ReportError where a manifest or a picture that it names is missing.
    """
    manifests = {arm.first_key: _manifest(evaluations / arm.first_key, arm) for arm in study.arms}
    by_token = {key: {entry["token"]: entry for entry in manifest["scenes"]} for key, manifest in manifests.items()}
    first = by_token[study.baseline.first_key]
    tokens = [token for token in first if all(token in entries for entries in by_token.values())][:count]
    entries = [{key: known[token] for key, known in by_token.items()} for token in tokens]
    share = math.sqrt(min(1.0, PANELS / max(1, len(tokens) * (1 + len(study.arms)))))
    widths = {view: round(width * share) for view, width in VIEWS.items()}
    scenes = [_scene(study, evaluations, entry, widths) for entry in entries]
    return Gallery(scenes, manifests[study.baseline.first_key]["threshold"])


def _manifest(folder: Path, arm: Arm) -> dict[str, Any]:
    manifest: dict[str, Any] = read_published(folder / "pictures.json", f"run `dvc repro {arm.stage}@{arm.first_key}`")
    return manifest


def _scene(study: Study, evaluations: Path, entries: dict[str, dict[str, Any]], widths: dict[str, int]) -> Scene:
    truth_key = study.baseline.first_key
    entry = entries[truth_key]
    panels = {}
    for view, width in widths.items():
        truth = _panel("truth", None, view, evaluations / truth_key / entry["files"][f"truth-{view}"], width)
        others = [
            _panel(arm.name, arm, view, evaluations / arm.first_key / entries[arm.first_key]["files"][view], width)
            for arm in study.arms
        ]
        panels[view] = [truth, *others]
    return Scene(entry["token"], entry["caption"], panels)


def _panel(label: str, arm: Arm | None, view: str, path: Path, width: int) -> Panel:
    return Panel(label, arm, view, *picture_uri(path, width))


def picture_uri(path: Path, width: int) -> tuple[str, int, int]:
    """A picture file, made no wider than `width` pixels: its data URI, width and height.

    Raises:
        ReportError: the file is missing.
    """
    try:
        picture = Image.open(path).convert("RGB")
    except FileNotFoundError:
        raise ReportError(f"{path} is missing, though the JSON beside it names it: draw it again") from None
    if picture.width > width:
        picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    return data_uri(picture), picture.width, picture.height


def data_uri(picture: Image.Image) -> str:
    """The picture as a WebP data URI."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
