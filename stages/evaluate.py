"""Stages `evaluate`, `evaluate_teacher`, `evaluate_fusion` and `evaluate_large`.

A submission -> the official metrics, pictures. They need no model, no GPU and no torch, and the devkit if asked to.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from data.drawing import pictures
from data.reading.classes import CLASSES
from data.reading.index import Index
from data.scoring import confusion
from data.scoring.evaluation import MEAN_ERRORS, Evaluation, summary, write_devkit_files
from data.scoring.nuscenes import evaluate_submission
from data.scoring.submission import MODEL, SUBMISSION, SampleDetections
from data.scoring.submitted import Submitted, detections_of, read_submission
from results.tracking.runs import scores
from stages import predictions
from stages.context import INDEX, StageContext, StageError

logger = logging.getLogger(__name__)

# Columns of `dvc metrics show`: what fits a screen. The rest of an evaluation stands beside the predictions.
HEADLINES: Final = ("mAP", "NDS", *MEAN_ERRORS, "mAP_present", "samples", "boxes", "parameters")


def run(context: StageContext) -> None:
    """Score what was predicted, draw some of it, publish metrics and pictures."""
    if context.key is None:
        raise StageError(f"stage {context.name} needs --key")
    _run(context, context.key)


def _run(context: StageContext, key: str) -> None:
    params, folder = context.params, context.scratch / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    model, submission = predictions.read(context, MODEL), predictions.folder(context) / SUBMISSION
    split, index = getattr(params.data.splits, params.evaluate.split), Index.open(context.root / INDEX)
    if model["split"] != split:
        command = predictions.command(context)
        raise StageError(f"{submission} is of split {model['split']!r}, not of {split!r}: run `{command}`")
    submitted = read_submission(submission)
    evaluation = _evaluate(context, index, submitted, split)
    write_devkit_files(evaluation, folder)
    metrics = {**model, **summary(evaluation), "official": params.evaluate.official}
    logger.info("%s", _words(metrics))
    context.tracker.log_metrics(scores(metrics), 0)
    _draw_curves(context, evaluation, metrics, folder)
    detections = detections_of(submitted, index, index.rows(split).tolist())
    found = confusion.confusion(detections, index, split, params.evaluate.score_threshold)
    _draw_confusion(context, found, folder)
    _draw_scenes(context, index, split, detections, folder)
    made = context.scratch / "metrics.json"
    _write(made, {name: metrics[name] for name in HEADLINES})
    _write(folder / "evaluation.json", {name: value for name, value in metrics.items() if name not in HEADLINES})
    context.publish(folder, f"outputs/evaluations/{key}")
    context.publish(made, f"reports/metrics/{key}.json")


def _evaluate(context: StageContext, index: Index, submitted: Submitted, split: str) -> Evaluation:
    """The official numbers of a submission, from the index or from the dataroot's tables by the devkit."""
    params = context.params
    if params.evaluate.official == "vectorised":
        return evaluate_submission(index, submitted, split)
    from data.scoring import devkit  # late: it brings matplotlib, sklearn and OpenCV

    tables = devkit.open_tables(context.root / params.data.dataroot, params.data.version)
    return devkit.evaluate_submission(tables, submitted.path, split)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def _words(metrics: Mapping[str, Any]) -> str:
    errors = (
        f"{name} {metrics[name]:.3f}" for name in ("mATE", "mASE", "mAOE", "mAVE", "mAAE") if metrics[name] is not None
    )
    absent = [name for name, values in metrics["classes"].items() if not values["truth"]]
    present = f" ({metrics['mAP_present']:.3f} over the {len(CLASSES) - len(absent)} classes present)" if absent else ""
    return f"{metrics['key']}: mAP {metrics['mAP']:.3f}{present}, NDS {metrics['NDS']:.3f}, {', '.join(errors)}"


def _draw_curves(context: StageContext, evaluation: Evaluation, metrics: Mapping[str, Any], folder: Path) -> None:
    curves: dict[str, dict[float, tuple[Any, Any]]] = {name: {} for name in CLASSES}
    for which, curve in evaluation.details.items():
        name, distance = which.split(":")
        curves[name][float(distance)] = np.array(curve["recall"]), np.array(curve["precision"])
    average = {name: metrics["classes"][name]["AP"] if evaluation.truth[name] else None for name in CLASSES}
    title = f"{metrics['key']}, split {metrics['split']}: mAP {metrics['mAP']:.3f}"
    figure = pictures.draw_curves(curves, average, title)
    pictures.save_figure(figure, folder / "curves.png")
    context.tracker.log_file(folder / "curves.png", "figures/precision_recall.png")


def _draw_confusion(context: StageContext, found: confusion.Confusion, folder: Path) -> None:
    (folder / "confusion.json").write_text(json.dumps(found.content) + "\n")
    figure = confusion.draw(found, str(context.key))
    pictures.save_figure(figure, folder / "confusion.png")
    context.tracker.log_file(folder / "confusion.png", "figures/confusion.png")


def _draw_scenes(
    context: StageContext, index: Index, split: str, detections: Mapping[str, SampleDetections], folder: Path
) -> None:
    """Pictures of keyframes spread evenly over the split: the same ones for every model."""
    settings, rows = context.params.evaluate, index.rows(split).tolist()
    count = min(settings.pictures, len(rows))
    scenes = []
    for number, position in enumerate(np.linspace(0, len(rows) - 1, count).round().astype(int).tolist()):
        view = pictures.load_view(index, rows[position], context.root / context.params.data.dataroot)
        panels = draw_panels(view, detections[view.token], str(context.key), settings.score_threshold)
        files = {name: f"{number:02d}-{name}.{'jpg' if 'cameras' in name else 'png'}" for name in panels}
        for name, panel in panels.items():
            pictures.save(panel, folder / files[name])
        _log_scene(context, panels, view.caption, f"{number:02d}")
        scenes.append({"token": view.token, "caption": view.caption, "files": files})
    manifest = {"threshold": settings.score_threshold, "scenes": scenes}
    (folder / "pictures.json").write_text(json.dumps(manifest, indent=2) + "\n")


def draw_panels(
    view: pictures.View, found: SampleDetections, title: str, threshold: float
) -> dict[str, pictures.Picture]:
    """Truth and predictions of one keyframe: `truth-cameras`, `truth-bev`, `cameras`, `bev`."""
    boxes = pictures.Boxes(np.asarray(found.boxes, dtype=np.float64), np.asarray(found.labels, dtype=np.int64))
    shown = boxes.above(np.asarray(found.scores, dtype=np.float64), threshold)
    truth = f"truth, {len(view.truth.boxes)} boxes"
    predicted = f"{title}, score ≥ {threshold:g}, {len(shown.boxes)} boxes"
    return {
        "truth-cameras": pictures.draw_cameras(view, view.truth, truth),
        "truth-bev": pictures.draw_bev(view, view.truth, truth),
        "cameras": pictures.draw_cameras(view, shown, predicted),
        "bev": pictures.draw_bev(view, shown, predicted, beneath=view.truth),
    }


def _log_scene(context: StageContext, panels: Mapping[str, pictures.Picture], caption: str, name: str) -> None:
    """One picture with truth and predictions for the tracker."""
    truth, predicted = (panels["truth-cameras"], panels["truth-bev"]), (panels["cameras"], panels["bev"])
    path = context.scratch / f"scene-{name}.jpg"
    pictures.save(pictures.compose(truth, predicted, caption), path)
    context.tracker.log_artifact(path, "pictures")
