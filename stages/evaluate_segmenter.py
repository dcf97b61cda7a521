"""Stage `evaluate_segmenter`: a segmenter's predictions -> COCO's metrics on `data.instances.val`, pictures."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.drawing import pictures
from data.reading.coco_json import RESULTS, InstanceArrays
from data.scoring.coco_metrics import InstanceTruth
from data.scoring.submission import MODEL
from stages import predictions
from stages.context import StageContext

logger = logging.getLogger(__name__)


def run(context: StageContext) -> None:
    """Score one entry of `segmenters`, publish its pictures and metrics."""
    context.entry("segmenter", context.params.segmenters)
    key, instances = context.item, context.params.instances
    folder = context.scratch / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    truth = InstanceTruth(context.root / instances.val)
    model, results = (predictions.read(context, file) for file in (MODEL, RESULTS))
    metrics = {
        "kind": "segmenter",
        "key": key,
        "images": len(truth.images),
        "parameters": model["parameters"],
        **truth.score(results),
    }
    logger.info("%s", _words(metrics))
    context.tracker.log_metrics(flat_metrics(metrics), 0)
    _draw(context, context.root / instances.root, truth, results, folder)
    made = context.scratch / "metrics.json"
    made.write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    context.publish(folder, f"outputs/evaluations/{key}")
    context.publish(made, f"reports/metrics/{key}.json")


def spread(count: int, total: int) -> list[int]:
    """At most `count` positions of `total`, from the first to the last."""
    return sorted({int(position) for position in np.linspace(0, total - 1, min(count, total)).round()})


def flat_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of the metrics file under flat names for the tracker; undefined ones are left out."""
    flat = {f"{kind}/{name}": metrics[kind][name] for kind in ("bbox", "mask") for name in metrics[kind]}
    for name, values in metrics["classes"].items():
        flat |= {f"{name}/{kind}_AP": values[kind]["AP"] for kind in ("bbox", "mask")}
    return {name: value for name, value in flat.items() if value is not None}


def _words(metrics: Mapping[str, Any]) -> str:
    parts = [
        f"{kind} AP {_figure(metrics[kind]['AP'])}, AP50 {_figure(metrics[kind]['AP50'])}" for kind in ("bbox", "mask")
    ]
    return f"{metrics['key']}: {', '.join(parts)} on {metrics['images']:,} images"


def _figure(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _draw(
    context: StageContext,
    root: Path,
    truth: InstanceTruth,
    results: Sequence[Mapping[str, Any]],
    folder: Path,
) -> None:
    """Pictures of the truth and of what was found, and a list of them in pictures.json."""
    threshold, entries, images = context.params.evaluate.score_threshold, [], list(truth.images.items())
    for number, position in enumerate(spread(context.params.evaluate.pictures, len(images))):
        (image_id, name), file = images[position], f"{number:02d}.jpg"
        found = truth.found(image_id, results).above(threshold)
        picture = draw_image(root / name, truth.of(image_id), found, context.key or "", threshold)
        pictures.save(picture, folder / file)
        context.tracker.log_artifact(folder / file, "pictures")
        entries.append({"image": name, "file": file})
    manifest = {"threshold": threshold, "images": entries}
    (folder / "pictures.json").write_text(json.dumps(manifest, indent=2) + "\n")


def draw_image(
    file: Path, truth: InstanceArrays, shown: InstanceArrays, title: str, threshold: float
) -> pictures.Picture:
    """The truth of an image, beside it what was found above a score."""
    image = pictures.read_image(file, file.name)
    left = pictures.draw_instances(image, truth, f"truth, {len(truth.boxes)} instances", scores=False)
    words = f"{title}, score ≥ {threshold:g}, {len(shown.boxes)} instances"
    return pictures.compose_instances(left, pictures.draw_instances(image, shown, words, scores=True), file.name)
