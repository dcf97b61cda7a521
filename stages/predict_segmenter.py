"""Stage `predict_segmenter`: a published segmenter -> what it finds in the images of `data.instances.val`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import numpy as np
from torch.utils.data import DataLoader

from base.environment import cores
from base.progress import ProgressBar
from data.reading.classes import CLASSES
from data.reading.coco import CocoInstances, ImageBatch, collate_images
from data.reading.coco_json import RESULTS, InstanceArrays, as_results
from data.reading.config import ImageConfig
from data.reading.instances import ImageInstances, StoredInstances, in_image
from data.scoring.submission import MODEL
from stages.context import StageContext
from stages.inputs.segmenters import InstanceFinder

logger = logging.getLogger(__name__)


def run(context: StageContext) -> None:
    """Run one entry of `segmenters` over the images, publish its instances in COCO's form of results."""
    context.entry("segmenter", context.params.segmenters)
    key, instances = context.item, context.params.instances
    folder = context.scratch / "predictions"
    folder.mkdir(parents=True, exist_ok=True)
    finder = InstanceFinder.load(context.root / f"outputs/teachers/{key}", context.device)
    config = ImageConfig(size=finder.size, resize=(1.0, 1.0), rotate=0.0, flip=0.0)
    dataset = CocoInstances(context.root / instances.val, context.root / instances.root, config, CLASSES, train=False)
    results = [
        result
        for image_id, found in predict(finder, dataset, context.params.evaluate.batch_size, key)
        for result in as_results(image_id, InstanceArrays.of(found))
    ]
    parameters = sum(parameter.numel() for parameter in finder.segmenter.parameters())
    (folder / RESULTS).write_text(json.dumps(results, allow_nan=False) + "\n")
    model = {"kind": "segmenter", "key": key, "parameters": parameters}
    (folder / MODEL).write_text(json.dumps(model, indent=2) + "\n")
    logger.info("%s: %d instances in %d images", key, len(results), len(dataset))
    context.publish(folder, f"outputs/predictions/{key}")


def predict(
    finder: InstanceFinder, dataset: CocoInstances, batch_size: int, title: str
) -> Iterator[tuple[int, ImageInstances]]:
    """Id and what is found in raw pixels, of each image in turn."""
    device = finder.labels.device
    cuda = device.type == "cuda"
    workers = min(cores(), 8) if cuda else 0  # on a CPU the model leaves no core to them
    loader = DataLoader(dataset, batch_size, collate_fn=collate_images, num_workers=workers, pin_memory=cuda)
    with ProgressBar(title, len(dataset)) as bar:
        for batch in loader:
            found = finder(batch.images.to(device, non_blocking=True))
            yield from zip(batch.image_ids, _raw(batch, found, finder.size), strict=True)
            bar.advance(by=len(batch))


def _raw(batch: ImageBatch, found: list[ImageInstances], size: tuple[int, int]) -> Iterator[ImageInstances]:
    """What was found, in the pixels of the raw images: the way that a store's instances go into a student's image."""
    for instances, matrix, raw_size in zip(found, batch.image_aug.numpy(), batch.raw_sizes, strict=True):
        stored = StoredInstances.of([instances], matrix[None], size)
        yield in_image(stored, np.eye(3)[None], raw_size, least_left=0.0, least_area=1)[0]
