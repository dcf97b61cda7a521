"""Detections in LiDAR frames -> the JSON that the nuScenes devkit evaluates; data.scoring.submitted reads it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from base.errors import PipelineError
from data.reading.boxes import global_from_lidar_boxes
from data.reading.classes import CLASSES, attributes_from_speed
from data.reading.geometry import Float64
from data.reading.index import Index

SUBMISSION: Final = "results_nusc.json"  # in a folder of predictions
MODEL: Final = "model.json"  # beside it: what predicted
MAX_BOXES: Final = 500  # per sample; the devkit refuses more
MODALITIES: Final = ("camera", "lidar", "radar")


class SubmissionError(PipelineError, ValueError):
    """Detections that the devkit would refuse, or silently score wrongly."""


@dataclass(frozen=True)
class SampleDetections:
    """Detections of one keyframe in its LiDAR frame, un-augmented. Arrays and CPU tensors are both taken."""

    boxes: ArrayLike  # [K, 9], see data.reading.boxes
    scores: ArrayLike  # [K]
    labels: ArrayLike  # [K], positions in CLASSES


def build_submission(
    detections: Mapping[str, SampleDetections], index: Index, split: str, modalities: Iterable[str]
) -> dict[str, Any]:
    """The submission of a split or a part of it: every sample token, each with its best boxes in the global frame.

    Samples that the index left out as broken get an empty list, because the devkit demands every token of the split.

    Args:
        detections: sample token -> detections; exactly the tokens of the index's split.
        index: gives the poses.
        split: the devkit's name of the split, or a part of it such as train[-16:].
        modalities: sensors that the model saw, of `camera`, `lidar` and `radar`.

    Raises:
        SubmissionError: tokens are missing or foreign, values are not finite, or shapes, sizes or labels are wrong.
    """
    modalities = set(modalities)
    if not modalities or modalities - set(MODALITIES):
        raise SubmissionError(f"modalities {sorted(modalities)}: allowed are one or more of {', '.join(MODALITIES)}.")
    rows = dict(zip(index.tokens(split), index.rows(split).tolist(), strict=True))
    missing, foreign = rows.keys() - detections.keys(), detections.keys() - rows.keys()
    if missing or foreign:
        example = min(missing or foreign)
        raise SubmissionError(
            f"detections do not fit split {split!r} of {len(rows)} samples: {len(missing)} have none, {len(foreign)} "
            f"belong elsewhere, such as {example}. Give empty arrays where nothing was found."
        )
    results = {token: _results(token, detections[token], index.global_SE3_lidar(row)) for token, row in rows.items()}
    results.update({token: [] for token in index.skipped(split)})
    used = {f"use_{name}": name in modalities for name in MODALITIES}
    return {"meta": {**used, "use_map": False, "use_external": False}, "results": results}


def write_submission(submission: dict[str, Any], path: Path) -> None:
    """Write a submission as JSON."""
    path.write_text(json.dumps(submission, allow_nan=False, separators=(",", ":")))


def _results(token: str, detections: SampleDetections, global_SE3_lidar: Float64) -> list[dict[str, Any]]:
    """Up to MAX_BOXES entries of one sample, best score first."""
    boxes, scores, labels = _checked(token, detections)
    best = np.argsort(-scores, kind="stable")[:MAX_BOXES]
    boxes, scores, labels = boxes[best], scores[best], labels[best]
    translation, size, rotation, velocity = global_from_lidar_boxes(boxes, global_SE3_lidar)
    attributes = attributes_from_speed(labels, np.linalg.norm(velocity, axis=1))
    columns = [column.tolist() for column in (translation, size, rotation, velocity, scores, labels)]
    return [
        {
            "sample_token": token,
            "translation": centre,
            "size": extent,
            "rotation": turn,
            "velocity": speed,
            "detection_name": CLASSES[label],
            "detection_score": score,
            "attribute_name": attribute,
        }
        for centre, extent, turn, speed, score, label, attribute in zip(*columns, attributes, strict=True)
    ]


def _checked(token: str, detections: SampleDetections) -> tuple[Float64, Float64, NDArray[np.int64]]:
    """Boxes [K, 9], scores [K] and labels [K] that the devkit can take."""
    boxes = np.asarray(detections.boxes, dtype=np.float64)
    scores = np.asarray(detections.scores, dtype=np.float64)
    labels = np.asarray(detections.labels, dtype=np.int64)
    count = len(boxes)
    if boxes.shape != (count, 9) or scores.shape != (count,) or labels.shape != (count,):
        raise SubmissionError(
            f"sample {token}: boxes {boxes.shape}, scores {scores.shape} and labels {labels.shape} "
            "must be [K, 9], [K] and [K]."
        )
    broken = ~(np.isfinite(boxes).all(axis=1) & np.isfinite(scores))
    if broken.any():
        first = int(np.flatnonzero(broken)[0])
        raise SubmissionError(
            f"sample {token}: {int(broken.sum())} of {count} detections are not finite, the first is number {first}: "
            f"box {boxes[first].tolist()}, score {scores[first]}."
        )
    if (boxes[:, 3:6] <= 0).any():
        raise SubmissionError(f"sample {token}: sizes must be positive, one is {boxes[:, 3:6].min()} m.")
    if ((labels < 0) | (labels >= len(CLASSES))).any():
        raise SubmissionError(f"sample {token}: labels {labels.min()} to {labels.max()}, allowed are 0 to 9.")
    return boxes, scores, labels
