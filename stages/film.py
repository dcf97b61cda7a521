"""Stage `film`: a validation scene through the eyes of a teacher, the baseline and the best student, side by side.

Draws what evaluation has published and runs no model. The scene is that with the most boxes of truth; the teacher is
the one that the student learns from. Beside the film there is one keyframe of each scene where the student gains and
loses most against its baseline.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from base.progress import ProgressBar
from config.params import Params
from data.drawing import pictures
from data.reading.index import Index
from data.scoring.submission import SUBMISSION, SampleDetections
from data.scoring.submitted import detections_of, read_submission
from results.report.lineage import results, teachers_of
from results.report.results import Arm, Study
from results.report.scenes import extremes, fullest, scene_gains
from stages.context import INDEX, StageContext, StageError

logger = logging.getLogger(__name__)

FILM: Final = "film.webp"
MILLISECONDS: Final = 500  # keyframes are half a second apart
LIMIT: Final = 1_000_000  # bytes; the page holds a third more

Labels = NDArray[np.int64]
Seen = dict[str, pictures.Boxes]  # keyframe -> boxes in its LiDAR frame


def run(context: StageContext) -> None:
    """Choose models and scenes by the published metrics, draw, publish."""
    params, folder = context.params, context.scratch / "film"
    folder.mkdir(parents=True, exist_ok=True)
    study, index = results(params, context.root), Index.open(context.root / INDEX)
    rows = rows_of_scenes(index, study.baseline.first["split"])
    arms, scene = cast(params, study), fullest(study.baseline, rows)
    chosen = {name: fullest_row(index, rows[name]) for name in compared(study) if name in rows}
    needed = {*rows[scene], *chosen.values()}
    drawing = Drawing(context, index, [(arm, predictions(context, arm, index, needed)) for arm in arms])
    content = {
        "keys": [arm.first_key for arm in arms],
        "threshold": params.evaluate.score_threshold,
        "scene": scene,
        "keyframes": len(rows[scene]),
        "file": FILM,
        "scenes": drawing.scenes(chosen, folder),
    }
    drawing.film(rows[scene], folder / FILM)
    (folder / "film.json").write_text(json.dumps(content, indent=2) + "\n")
    context.publish(folder, "outputs/film")


def cast(params: Params, study: Study) -> list[Arm]:
    """A teacher if there is one, the baseline and the best variant if there is another one; each by its first seed."""
    best, teachers = study.best, [arm for arm in study.teachers if arm.kind == "teacher"]
    if best is None:
        return [*teachers[:1], study.baseline]
    own = [arm for arm in teachers if arm.name in teachers_of(params, best.name)]
    return [*(own or teachers)[:1], study.baseline_of(best), best]


def compared(study: Study) -> list[str]:
    """The scenes where the best variant gains most, then those where it loses most."""
    gains = scene_gains(study, study.best) if study.best else []
    return [entry.scene for part in extremes(gains) for entry in part]


def rows_of_scenes(index: Index, split: str) -> dict[str, list[int]]:
    """Scene -> its rows of the index, in time."""
    rows: dict[str, list[int]] = {}
    for row in index.rows(split).tolist():
        rows.setdefault(index.sample(row).scene, []).append(row)
    return rows


def fullest_row(index: Index, rows: Sequence[int]) -> int:
    """The keyframe with the most boxes of truth; the first of them."""
    return max(rows, key=lambda row: int(index.annotations(row).valid.sum()))


def predictions(context: StageContext, arm: Arm, index: Index, rows: Iterable[int]) -> Seen:
    """An arm's published boxes with a score of at least evaluate.score_threshold, of some rows of the index."""
    path = context.root / f"outputs/predictions/{arm.first_key}" / SUBMISSION
    try:
        found = detections_of(read_submission(path), index, rows)
    except FileNotFoundError:
        command = f"{arm.stage.replace('evaluate', 'predict')}@{arm.first_key}"
        raise StageError(f"{path} is missing: run `dvc repro {command}`") from None
    threshold = context.params.evaluate.score_threshold
    return {token: drawable(detections, threshold) for token, detections in found.items()}


def drawable(found: SampleDetections, threshold: float) -> pictures.Boxes:
    """The boxes with at least a score."""
    return pictures.Boxes(np.asarray(found.boxes), np.asarray(found.labels)).above(np.asarray(found.scores), threshold)


@dataclass(frozen=True)
class Drawing:
    """Draws keyframes with a column per model."""

    context: StageContext
    index: Index
    columns: list[tuple[Arm, Seen]]

    def film(self, rows: Sequence[int], path: Path) -> None:
        """All keyframes of a scene, one after the other."""
        labels = self._labels([self.index.sample(row).token for row in rows])
        frames = []
        with ProgressBar("film", len(rows)) as bar:
            for number, row in enumerate(rows, 1):
                frames.append(self._frame(row, f"keyframe {number} of {len(rows)}", labels))
                bar.advance()
        pictures.save_film(frames, path, MILLISECONDS, LIMIT)
        logger.info("%s: %d keyframes, %.0f kB", path.name, len(rows), path.stat().st_size / 1e3)
        self.context.tracker.log_artifact(path, "film")

    def scenes(self, chosen: Mapping[str, int], folder: Path) -> list[dict[str, str]]:
        """One picture per scene, of its row; returns the entries of film.json."""
        entries = []
        for scene, row in chosen.items():
            token, file = self.index.sample(row).token, f"{scene}.jpg"
            pictures.save(self._frame(row, f"keyframe {token}", self._labels([token])), folder / file)
            self.context.tracker.log_artifact(folder / file, "film")
            entries.append({"scene": scene, "token": token, "file": file})
        return entries

    def _frame(self, row: int, which: str, labels: Labels) -> pictures.Picture:
        view = pictures.load_view(self.index, row, self.context.root / self.context.params.data.dataroot)
        columns = [(f"{arm.first_key} {arm.tag}".strip(), seen[view.token]) for arm, seen in self.columns]
        return pictures.draw_columns(view, columns, f"{self.index.sample(row).scene}, {which}", labels)

    def _labels(self, tokens: Sequence[str]) -> Labels:
        """Classes of all that is drawn at some keyframes."""
        return np.concatenate([seen[token].labels for _, seen in self.columns for token in tokens])
