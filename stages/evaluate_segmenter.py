"""Stage `evaluate_segmenter`: a published segmenter -> COCO's metrics on `data.instances.val`, pictures."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from base.environment import cores
from base.progress import ProgressBar
from config.params import InstancesParams
from data.drawing import pictures
from data.reading.augment import ImageConfig
from data.reading.blobs import BlobError
from data.reading.classes import CLASSES
from data.reading.coco import CocoError, CocoInstances, ImageBatch, collate_images
from data.reading.instances import ImageInstances, StoredInstances, in_image
from data.scoring.coco_metrics import InstanceTruth, as_results
from stages.context import StageContext, StageError
from stages.inputs.segmenters import InstanceFinder

logger = logging.getLogger(__name__)


def run(context: StageContext) -> None:
    """Score one entry of `segmenters`, publish its pictures and metrics."""
    if context.key not in context.params.segmenters:
        raise StageError(f"segmenter {context.key!r}: params.yaml has {', '.join(context.params.segmenters)}")
    instances = context.params.data.instances
    if instances is None:
        raise StageError("data.instances: missing, and evaluating a segmenter needs its images")
    try:
        _run(context, context.key, instances)
    except (BlobError, CocoError) as error:
        raise StageError(str(error)) from error


def _run(context: StageContext, key: str, instances: InstancesParams) -> None:
    folder = context.scratch / "predictions"
    folder.mkdir(parents=True, exist_ok=True)
    finder = InstanceFinder.load(context.root / f"outputs/teachers/{key}", context.device)
    config = ImageConfig(size=finder.size, resize=(1.0, 1.0), rotate=0.0, flip=0.0)
    root, file = context.root / instances.root, context.root / instances.val
    dataset = CocoInstances(file, root, config, CLASSES, train=False)
    truth = InstanceTruth(file)
    drawn = set(spread(context.params.evaluate.pictures, len(dataset)))
    results: list[dict[str, Any]] = []
    kept: dict[str, tuple[int, ImageInstances]] = {}
    for position, (name, image_id, found) in enumerate(
        predict(finder, dataset, context.params.evaluate.batch_size, key)
    ):
        results += as_results(image_id, found)
        if position in drawn:
            kept[name] = image_id, found
    parameters = sum(parameter.numel() for parameter in finder.segmenter.parameters())
    metrics = {
        "kind": "segmenter",
        "key": key,
        "images": len(dataset),
        "parameters": parameters,
        **truth.score(results),
    }
    logger.info("%s", _words(metrics))
    context.tracker.log_metrics(flat_metrics(metrics), 0)
    _draw(context, root, truth, kept, folder)
    made = context.scratch / "metrics.json"
    made.write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    context.publish(folder, f"outputs/predictions/{key}")
    context.publish(made, f"reports/metrics/{key}.json")


def predict(
    finder: InstanceFinder, dataset: CocoInstances, batch_size: int, title: str
) -> Iterator[tuple[str, int, ImageInstances]]:
    """File name, id and what is found in raw pixels, of each image in turn."""
    device = finder.labels.device
    cuda = device.type == "cuda"
    workers = min(cores(), 8) if cuda else 0  # on a CPU the model leaves no core to them
    loader = DataLoader(dataset, batch_size, collate_fn=collate_images, num_workers=workers, pin_memory=cuda)
    with ProgressBar(title, len(dataset)) as bar:
        for batch in loader:
            found = finder(batch.images.to(device, non_blocking=True))
            yield from zip(batch.tokens, batch.image_ids, _raw(batch, found, finder.size), strict=True)
            bar.advance(by=len(batch))


def _raw(batch: ImageBatch, found: list[ImageInstances], size: tuple[int, int]) -> Iterator[ImageInstances]:
    """What was found, in the pixels of the raw images: the way that a store's instances go into a student's image."""
    for instances, matrix, raw_size in zip(found, batch.image_aug.numpy(), batch.raw_sizes, strict=True):
        stored = StoredInstances.of([instances], matrix[None], size)
        yield in_image(stored, np.eye(3)[None], raw_size, least_left=0.0, least_area=1)[0]


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
    kept: Mapping[str, tuple[int, ImageInstances]],
    folder: Path,
) -> None:
    """Pictures of the truth and of what was found, and a list of them in pictures.json."""
    threshold, entries = context.params.evaluate.score_threshold, []
    for number, (name, (image_id, found)) in enumerate(kept.items()):
        file = f"{number:02d}.jpg"
        picture = draw_image(root / name, truth.of(image_id), found, context.key or "", threshold)
        pictures.save(picture, folder / file)
        context.tracker.log_artifact(folder / file, "pictures")
        entries.append({"image": name, "file": file})
    manifest = {"threshold": threshold, "images": entries}
    (folder / "pictures.json").write_text(json.dumps(manifest, indent=2) + "\n")


def draw_image(
    file: Path, truth: ImageInstances, found: ImageInstances, title: str, threshold: float
) -> pictures.Picture:
    """The truth of an image, beside it what was found above a score."""
    keep = found.scores >= threshold
    shown = ImageInstances(*(part[keep] for part in found))
    image = pictures.read_image(file, file.name)
    left = pictures.draw_instances(image, truth, f"truth, {len(truth.boxes)} instances", scores=False)
    words = f"{title}, score ≥ {threshold:g}, {len(shown.boxes)} instances"
    return pictures.compose_instances(left, pictures.draw_instances(image, shown, words, scores=True), file.name)
