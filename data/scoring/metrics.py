"""The nuScenes detection metrics, computed by the devkit's own DetectionEval.

The devkit's numbers are the official ones. Beside them stands the mean over the classes that the truth has: the devkit
gives a class without truth an AP of 0 and errors of 1, which says nothing about the model on a small set.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nuscenes import NuScenes
from nuscenes.eval.common.config import config_factory
from nuscenes.eval.common.data_classes import EvalBoxes
from nuscenes.eval.detection.algo import accumulate, calc_ap
from nuscenes.eval.detection.data_classes import DetectionMetricDataList, DetectionMetrics
from nuscenes.eval.detection.evaluate import DetectionEval
from nuscenes.eval.detection.utils import category_to_detection_name
from nuscenes.utils.splits import get_scenes_of_split

from base.errors import PipelineError
from data.reading.classes import CLASSES
from data.reading.index import devkit_split, scenes_of_split

CONFIG: Final = "detection_cvpr_2019"
MEAN_ERRORS: Final = {
    "mATE": "trans_err",
    "mASE": "scale_err",
    "mAOE": "orient_err",
    "mAVE": "vel_err",
    "mAAE": "attr_err",
}
DIGITS: Final = 6

_FAR_BOX: Final = {
    "translation": [1.0e6, 1.0e6, 0.0],
    "size": [1.0, 1.0, 1.0],
    "rotation": [1.0, 0.0, 0.0, 0.0],
    "velocity": [0.0, 0.0],
    "detection_name": "car",
    "detection_score": 0.0,
    "attribute_name": "",
}


class MetricsError(PipelineError):
    """A submission, split or dataroot that cannot be evaluated; the message says why and what to do."""


@dataclass(frozen=True)
class SceneScore:
    """One scene by itself: mean over the classes that it has, None where it has none, and over the match distances."""

    scene: str
    mean_ap: float | None
    boxes: int  # of truth that the devkit kept
    samples: int


@dataclass(frozen=True)
class Evaluation:
    """What the devkit computed for one submission.

    `truth` and `predicted` count the boxes per class that the devkit kept: inside the class's range, for the truth
    also with a LiDAR or RADAR point inside, and bicycles and motorcycles outside bicycle racks.
    """

    metrics: DetectionMetrics
    details: DetectionMetricDataList
    truth: dict[str, int]
    predicted: dict[str, int]
    samples: int
    scenes: list[SceneScore]  # in order of name


def open_tables(dataroot: Path, version: str) -> NuScenes:
    """The devkit's tables of a dataroot. Raises MetricsError where a table is missing or is not JSON."""
    try:
        return NuScenes(version=version, dataroot=str(dataroot), verbose=False)
    except (AssertionError, OSError, json.JSONDecodeError) as error:
        raise MetricsError(
            f"the devkit cannot open version {version!r} in {dataroot}: {error}; check data.dataroot and data.version"
        ) from error


def split_tokens(nusc: NuScenes, split: str) -> list[str]:
    """Tokens of all keyframes of a devkit split or of a part of it, in the order of the sample table.

    Raises MetricsError where the split is unknown or the dataroot has none of its scenes.
    """
    try:
        whole, _ = devkit_split(split)
        official = set(get_scenes_of_split(whole, nusc))
    except ValueError as error:
        raise MetricsError(f"unknown split {split!r}: {error}") from error
    scenes = {scene["name"]: scene["token"] for scene in nusc.scene if scene["name"] in official}
    try:
        chosen = {scenes[name] for name in scenes_of_split(split, scenes)}
    except ValueError as error:
        raise MetricsError(
            f"version {nusc.version!r} in {nusc.dataroot}: {error} Check data.version too "
            "(v1.0-mini goes with mini_train and mini_val)"
        ) from error
    return [sample["token"] for sample in nusc.sample if sample["scene_token"] in chosen]


def evaluate_submission(nusc: NuScenes, submission: Path, split: str) -> Evaluation:
    """Score a submission file on a split, or on a part of it, with the devkit (detection_cvpr_2019).

    A submission without a single box scores 0: the devkit itself cannot read one, so it is given a box far out of
    every class's range, which its distance filter removes.

    Raises:
        MetricsError: tokens that do not fit the split, a split without truth, or the devkit's own refusal (more
            than 500 boxes in a sample, NaN in a field, a split of another version).
    """
    content = json.loads(submission.read_text())
    tokens = split_tokens(nusc, split)
    _check_tokens(content["results"], tokens, split)
    _check_truth(nusc, tokens, split)
    if not any(content["results"].values()):
        content["results"][tokens[0]] = [{"sample_token": tokens[0], **_FAR_BOX}]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results_nusc.json"
        path.write_text(json.dumps(content))
        return _run_devkit(nusc, path, split, tokens)


class _SomeSamples:
    """The devkit's tables, of whose samples only some are listed; every record can still be looked up."""

    def __init__(self, nusc: NuScenes, tokens: Iterable[str]) -> None:
        self._nusc = nusc
        self.sample = [nusc.get("sample", token) for token in tokens]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._nusc, name)


def _run_devkit(nusc: NuScenes, path: Path, split: str, tokens: list[str]) -> Evaluation:
    config, tables = config_factory(CONFIG), _SomeSamples(nusc, tokens)
    whole, _ = devkit_split(split)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the devkit's progress bar cannot be turned off
            devkit = DetectionEval(tables, config, str(path), whole, output_dir=str(path.parent), verbose=False)
    except (AssertionError, ValueError) as error:
        raise MetricsError(f"the devkit refuses the submission for split {split!r}: {error}") from error
    metrics, details = devkit.evaluate()
    return Evaluation(
        metrics,
        details,
        _count(devkit.gt_boxes.all),
        _count(devkit.pred_boxes.all),
        len(devkit.sample_tokens),
        _scene_scores(nusc, devkit),
    )


def _scene_scores(nusc: NuScenes, devkit: DetectionEval) -> list[SceneScore]:
    """The devkit's AP on the boxes of each scene alone."""
    tokens: dict[str, list[str]] = {}
    for token in devkit.sample_tokens:
        scene = nusc.get("scene", nusc.get("sample", token)["scene_token"])["name"]
        tokens.setdefault(scene, []).append(token)
    return [_scene_score(devkit, scene, tokens[scene]) for scene in sorted(tokens)]


def _scene_score(devkit: DetectionEval, scene: str, tokens: Sequence[str]) -> SceneScore:
    config, truth, found = devkit.cfg, _boxes_of(devkit.gt_boxes, tokens), _boxes_of(devkit.pred_boxes, tokens)
    aps = [
        calc_ap(
            accumulate(truth, found, name, config.dist_fcn_callable, distance), config.min_recall, config.min_precision
        )
        for name in sorted({box.detection_name for box in truth.all})
        for distance in config.dist_ths
    ]
    return SceneScore(scene, sum(aps) / len(aps) if aps else None, len(truth.all), len(tokens))


def _boxes_of(boxes: EvalBoxes, tokens: Sequence[str]) -> EvalBoxes:
    some = EvalBoxes()
    for token in tokens:
        some.add_boxes(token, boxes[token])
    return some


def _check_tokens(results: dict[str, Any], tokens: list[str], split: str) -> None:
    missing, foreign = sorted(set(tokens) - set(results)), sorted(set(results) - set(tokens))
    if missing or foreign:
        example = f"first missing {missing[0]}" if missing else f"first foreign {foreign[0]}"
        raise MetricsError(
            f"the submission does not fit split {split!r} of {len(tokens)} keyframes: {len(missing)} missing, "
            f"{len(foreign)} of other splits; {example}. "
            "Every keyframe needs an entry, an empty list where nothing was found"
        )


def _check_truth(nusc: NuScenes, tokens: list[str], split: str) -> None:
    annotations = (token for sample in tokens for token in nusc.get("sample", sample)["anns"])
    categories = (nusc.get("sample_annotation", token)["category_name"] for token in annotations)
    if not any(category_to_detection_name(name) for name in categories):
        raise MetricsError(
            f"split {split!r} has no annotated box of a detection class: there is nothing to score against"
        )


def _count(boxes: Iterable[Any]) -> dict[str, int]:
    counts = Counter(box.detection_name for box in boxes)
    return {name: counts[name] for name in CLASSES}


def summary(evaluation: Evaluation) -> dict[str, Any]:
    """The metrics as plain numbers, rounded to six digits; None where a metric is not defined.

    Keys: mAP, NDS, mATE (m), mASE (1 - IoU), mAOE (rad), mAVE (m/s), mAAE (1 - accuracy), as the devkit averages them;
    the same with `_present`, over the classes that have truth; `classes`: name -> AP, AP at each distance, the five
    errors, numbers of truth and predicted boxes; `samples`; `boxes`: their totals; `scenes`: a list with each scene's
    name, mAP over the classes that it has truth of, boxes of truth and samples.
    """
    metrics = evaluation.metrics
    present = [name for name in CLASSES if evaluation.truth[name]]
    aps = metrics.mean_dist_aps
    errors = {name: _mean(metrics.get_label_tp(c, key) for c in present) for name, key in MEAN_ERRORS.items()}
    return {
        "mAP": _number(metrics.mean_ap),
        "NDS": _number(metrics.nd_score),
        **{name: _number(metrics.tp_errors[key]) for name, key in MEAN_ERRORS.items()},
        "mAP_present": _mean(aps[name] for name in present),
        **{f"{name}_present": value for name, value in errors.items()},
        "samples": evaluation.samples,
        "boxes": {"truth": sum(evaluation.truth.values()), "predicted": sum(evaluation.predicted.values())},
        "classes": {name: _class_summary(evaluation, name) for name in CLASSES},
        "scenes": [_scene_summary(score) for score in evaluation.scenes],
    }


def _class_summary(evaluation: Evaluation, name: str) -> dict[str, Any]:
    metrics = evaluation.metrics
    return {
        "AP": _number(metrics.mean_dist_aps[name]),
        **{f"AP@{distance}": _number(metrics.get_label_ap(name, distance)) for distance in metrics.cfg.dist_ths},
        **{error[1:]: _number(metrics.get_label_tp(name, key)) for error, key in MEAN_ERRORS.items()},
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
    content = evaluation.metrics.serialize()
    del content["eval_time"]
    _write(folder / "metrics_summary.json", content, indent=2)
    _write(folder / "metrics_details.json", evaluation.details.serialize(), indent=None)


def _write(path: Path, content: Any, indent: int | None) -> None:
    path.write_text(json.dumps(_without_nan(content), indent=indent, allow_nan=False) + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
