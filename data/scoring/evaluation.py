"""What an official evaluation says, whoever computed it: data.scoring.nuscenes or the devkit (data.scoring.devkit).

Beside the official numbers stands the mean over the classes that the truth has: officially a class without truth has
an AP of 0 and errors of 1, which says nothing about the model on a small set.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from base.errors import PipelineError
from data.reading.classes import CLASSES

CONFIG: Final = "detection_cvpr_2019"  # the devkit's name of the settings below
SETTINGS: Final[dict[str, Any]] = {
    "class_range": {
        "car": 50,
        "truck": 50,
        "bus": 50,
        "trailer": 50,
        "construction_vehicle": 50,
        "pedestrian": 40,
        "motorcycle": 40,
        "bicycle": 40,
        "traffic_cone": 30,
        "barrier": 30,
    },  # metres from the vehicle
    "dist_fcn": "center_distance",
    "dist_ths": [0.5, 1.0, 2.0, 4.0],  # metres
    "dist_th_tp": 2.0,  # metres: where the errors of matched boxes are taken
    "min_recall": 0.1,
    "min_precision": 0.1,
    "max_boxes_per_sample": 500,
    "mean_ap_weight": 5,
}
MEAN_ERRORS: Final = {
    "mATE": "trans_err",
    "mASE": "scale_err",
    "mAOE": "orient_err",
    "mAVE": "vel_err",
    "mAAE": "attr_err",
}
DIGITS: Final = 6


class MetricsError(PipelineError):
    """A submission, split or dataroot that cannot be evaluated; the message says why and what to do."""


@dataclass(frozen=True)
class SceneScore:
    """One scene by itself: mean over the classes that it has, None where it has none, and over the match distances."""

    scene: str
    mean_ap: float | None
    boxes: int  # of truth that counts
    samples: int


@dataclass(frozen=True)
class Evaluation:
    """The official numbers of one submission.

    `truth` and `predicted` count the boxes per class that count officially: inside the class's range, for the truth
    also with a LiDAR or RADAR point inside, and bicycles and motorcycles outside bicycle racks.
    """

    metrics: Mapping[str, Any]  # as in the devkit's metrics_summary.json, without its run time
    details: Mapping[str, Mapping[str, list[float]]]  # as in metrics_details.json: `<class>:<distance>` -> curves [101]
    truth: dict[str, int]
    predicted: dict[str, int]
    samples: int
    scenes: list[SceneScore]  # in order of name


def check_tokens(submitted: Iterable[str], tokens: Iterable[str], split: str) -> None:
    """Raise MetricsError unless a submission has exactly the keyframes of a split."""
    submitted, tokens = set(submitted), set(tokens)
    missing, foreign = sorted(tokens - submitted), sorted(submitted - tokens)
    if missing or foreign:
        example = f"first missing {missing[0]}" if missing else f"first foreign {foreign[0]}"
        raise MetricsError(
            f"the submission does not fit split {split!r} of {len(tokens)} keyframes: {len(missing)} missing, "
            f"{len(foreign)} of other splits; {example}. "
            "Every keyframe needs an entry, an empty list where nothing was found"
        )


def no_truth(split: str) -> MetricsError:
    """What is raised of a split without annotations."""
    return MetricsError(f"split {split!r} has no annotated box of a detection class: there is nothing to score against")


def summary(evaluation: Evaluation) -> dict[str, Any]:
    """The metrics as plain numbers, rounded to six digits; None where a metric is not defined.

    Keys: mAP, NDS, mATE (m), mASE (1 - IoU), mAOE (rad), mAVE (m/s), mAAE (1 - accuracy), as they are averaged
    officially; the same with `_present`, over the classes that have truth; `classes`: name -> AP, AP at each distance,
    the five errors, numbers of truth and predicted boxes; `samples`; `boxes`: their totals; `scenes`: a list with each
    scene's name, mAP over the classes that it has truth of, boxes of truth and samples.
    """
    metrics = evaluation.metrics
    present = [name for name in CLASSES if evaluation.truth[name]]
    aps, errors = metrics["mean_dist_aps"], metrics["label_tp_errors"]
    return {
        "mAP": _number(metrics["mean_ap"]),
        "NDS": _number(metrics["nd_score"]),
        **{name: _number(metrics["tp_errors"][key]) for name, key in MEAN_ERRORS.items()},
        "mAP_present": _mean(aps[name] for name in present),
        **{f"{name}_present": _mean(errors[c][key] for c in present) for name, key in MEAN_ERRORS.items()},
        "samples": evaluation.samples,
        "boxes": {"truth": sum(evaluation.truth.values()), "predicted": sum(evaluation.predicted.values())},
        "classes": {name: _class_summary(evaluation, name) for name in CLASSES},
        "scenes": [_scene_summary(score) for score in evaluation.scenes],
    }


def _class_summary(evaluation: Evaluation, name: str) -> dict[str, Any]:
    metrics = evaluation.metrics
    return {
        "AP": _number(metrics["mean_dist_aps"][name]),
        **{f"AP@{distance}": _number(ap) for distance, ap in metrics["label_aps"][name].items()},
        **{error[1:]: _number(metrics["label_tp_errors"][name][key]) for error, key in MEAN_ERRORS.items()},
        "truth": evaluation.truth[name],
        "predicted": evaluation.predicted[name],
    }


def _scene_summary(score: SceneScore) -> dict[str, Any]:
    mean_ap = None if score.mean_ap is None else _number(score.mean_ap)
    return {"scene": score.scene, "mAP": mean_ap, "boxes": score.boxes, "samples": score.samples}


def _number(value: float) -> float | None:
    return round(float(value), DIGITS) if math.isfinite(value) else None


def _mean(values: Iterable[float]) -> float | None:
    known = [float(value) for value in values if math.isfinite(value)]
    return _number(sum(known) / len(known)) if known else None


def write_devkit_files(evaluation: Evaluation, folder: Path) -> None:
    """The devkit's metrics_summary.json (without its run time, so that equal results are equal bytes) and
    metrics_details.json (recall, precision, confidence and errors per class and distance; NaN as null).
    """
    _write(folder / "metrics_summary.json", evaluation.metrics, indent=2)
    _write(folder / "metrics_details.json", evaluation.details, indent=None)


def _write(path: Path, content: Any, indent: int | None) -> None:
    path.write_text(json.dumps(_without_nan(content), indent=indent, allow_nan=False) + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
