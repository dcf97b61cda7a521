"""Stages `evaluate`, `evaluate_teacher`, `evaluate_fusion` and `evaluate_large`.

Published weights -> submission, the devkit's metrics, pictures.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch.utils.data import DataLoader

from base.environment import cores
from base.progress import ProgressBar
from config.params import split_key
from data.drawing import pictures
from data.reading.batch import collate
from data.reading.blobs import BlobError
from data.reading.classes import CLASSES
from data.reading.dataset import NuScenesDataset
from data.scoring import confusion
from data.scoring.metrics import (
    MEAN_ERRORS,
    Evaluation,
    MetricsError,
    evaluate_submission,
    open_tables,
    summary,
    write_devkit_files,
)
from data.scoring.submission import SampleDetections, SubmissionError, build_submission, write_submission
from models.detectors.detector import Detector
from results.tracking.runs import scores
from stages.context import StageContext, StageError
from stages.inputs.datasets import plain_dataset
from stages.inputs.weights import load_detector

logger = logging.getLogger(__name__)

SUBMISSION: Final = "results_nusc.json"
# Columns of `dvc metrics show`: what fits a screen. The rest of an evaluation stands beside the predictions.
HEADLINES: Final = ("mAP", "NDS", *MEAN_ERRORS, "mAP_present", "samples", "boxes", "parameters")
MODALITY: Final = {"images": "camera", "points": "lidar", "radar": "radar"}  # a batch's sensor -> the devkit's word


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a teacher, or a variant's student of one seed."""

    kind: str  # "teacher" or "student"
    key: str
    variant: str
    seed: int | None  # None: a teacher's seed is in its weights

    @property
    def weights(self) -> str:
        """Folder of the published weights, relative to the root."""
        return f"outputs/{self.kind}s/{self.key}"


def run(context: StageContext) -> None:
    """Run the model over the split, score it with the devkit, publish predictions and metrics."""
    try:
        _run(context, subject(context.name, context.key))
    except (BlobError, MetricsError, SubmissionError) as error:
        raise StageError(str(error)) from error


def subject(stage: str, key: str | None) -> Subject:
    """The stage's key taken apart; variants may have hyphens in their names."""
    if key is None:
        raise StageError(f"stage {stage} needs --key")
    if stage != "evaluate":
        return Subject("teacher", key, key, None)
    return Subject("student", key, *split_key(key))


def _run(context: StageContext, subject: Subject) -> None:
    params, folder = context.params, context.scratch / "predictions"
    folder.mkdir(parents=True, exist_ok=True)
    split = getattr(params.data.splits, params.evaluate.split)
    detector = load_detector(context.root / subject.weights)
    parameters = sum(parameter.numel() for parameter in detector.parameters())
    dataset = plain_dataset(context.root, params, split, detector)
    detections = predict(detector.to(context.device), dataset, params.evaluate.batch_size, subject.key)
    modalities = {MODALITY[name] for name in detector.sensors}
    write_submission(build_submission(detections, dataset.index, split, modalities), folder / SUBMISSION)
    nusc = open_tables(context.root / params.data.dataroot, params.data.version)
    evaluation = evaluate_submission(nusc, folder / SUBMISSION, split)
    write_devkit_files(evaluation, folder)
    head = {"kind": subject.kind, "key": subject.key, "variant": subject.variant, "seed": subject.seed, "split": split}
    metrics = {**head, "parameters": parameters, **summary(evaluation)}
    logger.info("%s", _words(metrics))
    context.tracker.log_metrics(scores(metrics), 0)
    _draw_curves(context, evaluation, metrics, folder)
    found = confusion.confusion(detections, dataset.index, split, params.evaluate.score_threshold)
    _draw_confusion(context, found, folder)
    _draw_scenes(context, dataset, detections, subject, folder)
    made = context.scratch / "metrics.json"
    _write(made, {name: metrics[name] for name in HEADLINES})
    _write(folder / "evaluation.json", {name: value for name, value in metrics.items() if name not in HEADLINES})
    context.publish(folder, f"outputs/predictions/{subject.key}")
    context.publish(made, f"reports/metrics/{subject.key}.json")


def predict(detector: Detector, dataset: NuScenesDataset, batch_size: int, title: str) -> dict[str, SampleDetections]:
    """Decoded boxes per sample token, in the LiDAR frame of each keyframe, on the CPU."""
    device = next(detector.parameters()).device
    workers = min(cores(), 8) if device.type == "cuda" else 0  # on a CPU the model leaves no core to them
    loader = DataLoader(dataset, batch_size, collate_fn=collate, num_workers=workers, pin_memory=device.type == "cuda")
    detections: dict[str, SampleDetections] = {}
    detector.eval()
    with torch.inference_mode(), ProgressBar(title, len(dataset)) as bar:
        for batch in loader:
            for token, found in zip(batch.tokens, detector.decode(detector(batch.to(device))), strict=True):
                detections[token] = SampleDetections(found.boxes.cpu(), found.scores.cpu(), found.labels.cpu())
            bar.advance(by=len(batch))
    return detections


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
    curves = {
        name: {distance: (data.recall, data.precision) for data, distance in evaluation.details.get_class_data(name)}
        for name in CLASSES
    }
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
    context: StageContext,
    dataset: NuScenesDataset,
    detections: Mapping[str, SampleDetections],
    subject: Subject,
    folder: Path,
) -> None:
    """Pictures of keyframes spread evenly over the split: the same ones for every model."""
    settings = context.params.evaluate
    count = min(settings.pictures, len(dataset))
    chosen = np.linspace(0, len(dataset) - 1, count).round().astype(int)
    scenes = []
    for number, position in enumerate(chosen.tolist()):
        view = pictures.load_view(dataset.index, int(dataset.rows[position]), dataset.dataroot)
        found = detections[view.token]
        panels = draw_panels(view, found, subject.key, settings.score_threshold)
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
