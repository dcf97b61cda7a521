"""Which class a detector takes for which: its boxes matched with the truth by distance, whatever their classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from data.reading.classes import CLASSES
from data.reading.geometry import Float64
from data.reading.index import Index
from data.scoring.evaluation import SETTINGS
from data.scoring.submission import SampleDetections

DISTANCE: Final = 2.0  # metres between centres, seen from above: where the devkit takes the errors of matched boxes
MISSED: Final = "missed"  # column of truth without a prediction
NOTHING: Final = "nothing"  # row of predictions without truth


@dataclass(frozen=True)
class Confusion:
    """Numbers of boxes: counts[i, j] of truth of class i that was taken for class j.

    Behind the classes come the row of predictions where nothing is, and the column of truth that was missed.
    """

    counts: NDArray[np.int64]  # [C + 1, C + 1]
    score: float  # least one of the predictions

    @property
    def content(self) -> dict[str, Any]:
        """For machines."""
        return {
            "score": self.score,
            "distance": DISTANCE,
            "truth": [*CLASSES, NOTHING],
            "predicted": [*CLASSES, MISSED],
            "counts": self.counts.tolist(),
        }


@dataclass(frozen=True)
class _Boxes:
    """Boxes of all samples, padded to the sample that has most; a padded one has label -1."""

    centres: Float64  # [S, N, 2]
    labels: NDArray[np.int64]  # [S, N]


def confusion(detections: Mapping[str, SampleDetections], index: Index, split: str, score: float) -> Confusion:
    """Match predictions from `score` on with the truth of a split as the devkit does, but across classes.

    From the best score down, each prediction takes the nearest truth of its sample that is free, if it is nearer than
    DISTANCE. Both are counted inside their class's range, the truth where a LiDAR or RADAR point is inside.
    """
    ranges = SETTINGS["class_range"]
    reach = np.array([ranges[name] for name in CLASSES], dtype=np.float64)
    truth, found = [], []
    for token, row in zip(index.tokens(split), index.rows(split).tolist(), strict=True):
        record, annotations = index.sample(row), index.annotations(row)
        lidar_SE3_ego = np.linalg.inv(record.global_SE3_lidar) @ record.global_SE3_ego
        ego, valid = lidar_SE3_ego[:2, 3], annotations.valid
        truth.append(_near(annotations.boxes[valid], annotations.labels[valid], ego, reach))
        found.append(_near(*_best_first(detections[token], score), ego, reach))
    return Confusion(_match(_padded(truth), _padded(found)), score)


def _best_first(found: SampleDetections, score: float) -> tuple[Float64, NDArray[np.int64]]:
    """Boxes [K, 9] and labels [K] from a score on, the best first."""
    scores = np.asarray(found.scores, dtype=np.float64)
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] >= score]
    return np.asarray(found.boxes, dtype=np.float64)[order], np.asarray(found.labels, dtype=np.int64)[order]


def _near(boxes: Float64, labels: NDArray[np.int64], ego: Float64, reach: Float64) -> tuple[Float64, NDArray[np.int64]]:
    """Centres [N, 2] and labels [N] of the boxes inside their class's range around the vehicle."""
    inside = np.linalg.norm(boxes[:, :2] - ego, axis=1) < reach[labels]
    return boxes[inside, :2], labels[inside]


def _padded(samples: Sequence[tuple[Float64, NDArray[np.int64]]]) -> _Boxes:
    longest = max((len(labels) for _, labels in samples), default=0)
    centres = np.full((len(samples), longest, 2), np.inf)
    padded = np.full((len(samples), longest), -1)
    for sample, (places, labels) in enumerate(samples):
        centres[sample, : len(labels)], padded[sample, : len(labels)] = places, labels
    return _Boxes(centres, padded)


def _match(truth: _Boxes, found: _Boxes) -> NDArray[np.int64]:
    """The counts [C + 1, C + 1]; all samples at once, from the best prediction of each to its last."""
    last = len(CLASSES)
    counts = np.zeros((last + 1, last + 1), dtype=np.int64)
    free, samples = truth.labels >= 0, np.arange(len(truth.labels))
    for rank in range(found.labels.shape[1] if truth.labels.shape[1] else 0):
        label = found.labels[:, rank]
        with np.errstate(invalid="ignore"):  # of padded boxes, which are infinitely far
            distance = np.linalg.norm(truth.centres - found.centres[:, None, rank], axis=2)
        distance[~free] = np.inf
        nearest = distance.argmin(axis=1)
        hit = (label >= 0) & (distance[samples, nearest] < DISTANCE)
        free[samples[hit], nearest[hit]] = False
        np.add.at(counts, (truth.labels[samples[hit], nearest[hit]], label[hit]), 1)
    counts[last, :last] = np.bincount(found.labels[found.labels >= 0], minlength=last) - counts[:, :last].sum(axis=0)
    counts[:last, last] = np.bincount(truth.labels[free], minlength=last)
    return counts


def draw(found: Confusion, title: str) -> Figure:
    """The table, with each row's shares as colour."""
    figure = Figure(figsize=(8, 7), dpi=100)
    axes = figure.add_axes((0.2, 0.19, 0.77, 0.75))  # by hand, as in data.drawing.pictures.draw_curves
    totals = found.counts.sum(axis=1, keepdims=True)
    shares = found.counts / np.maximum(totals, 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(found.counts.shape):
        if count := found.counts[row, column]:
            ink = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", fontsize=8, color=ink)
    names = [name.replace("_", " ") for name in CLASSES]
    axes.set_xticks(range(len(names) + 1), [*names, MISSED], rotation=45, ha="right", fontsize=9)
    axes.set_yticks(range(len(names) + 1), [*names, NOTHING], fontsize=9)
    axes.set(xlabel=f"prediction, score ≥ {found.score:g}", ylabel=f"truth within {DISTANCE:g} m")
    axes.set_title(title, fontsize=11)
    return figure
