"""Stage `segmenter`: train an instance segmentation teacher, or take over imported weights; publish it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from config.params import SegmenterParams
from data.reading.augment import ImageConfig
from data.reading.classes import CLASSES
from data.reading.coco import CocoInstances, collate_images
from models.detectors.segmenter import Segmenter
from stages.context import StageContext, StageError
from stages.inputs.segmenters import detection_names, make_segmenter, segmenter_config
from stages.inputs.weights import save_detector, start_from
from stages.training import train_stage
from training.seeding import MODEL, seed_everything


class Supervised:
    """A segmenter and its losses against the instances of the images."""

    def __init__(self, segmenter: Segmenter) -> None:
        self.module = segmenter

    def loss(self, batch: Any, progress: float) -> dict[str, Tensor]:
        """The segmenter's own losses."""
        return self.module.loss(batch.images, batch.instances)


def run(context: StageContext) -> None:
    """Publish one entry of `segmenters`."""
    if context.key not in context.params.segmenters:
        raise StageError(f"segmenter {context.key!r}: params.yaml has {', '.join(context.params.segmenters)}")
    settings = context.params.segmenters[context.key]
    seed_everything(MODEL, context.seed)
    segmenter = make_segmenter(segmenter_config(settings))
    if settings.start:
        start_from(segmenter, context.root / settings.start.folder, settings.start.checksum)
    weights = trained(context, settings, segmenter) if settings.train else segmenter.state_dict()
    if context.rank == 0:
        save_detector(context.scratch / "model", segmenter_config(settings), weights)
    context.publish(context.scratch / "model", f"outputs/teachers/{context.key}")


def training_images(context: StageContext, settings: SegmenterParams) -> CocoInstances:
    """`data.instances.train` in the segmenter's size, augmented as the cameras of students are.

    Raises:
        CocoError: the file is missing or no such JSON.
    """
    instances, image = context.params.data.instances, context.params.input.image
    if instances is None:
        raise StageError("data.instances: missing, and training a segmenter needs its images")
    names = detection_names(list(settings.classes or CLASSES), settings.class_map)
    config = ImageConfig(**image.model_dump() | {"size": settings.image})
    root = context.root / instances.root
    return CocoInstances(context.root / instances.train, root, config, names, train=True, seed=context.seed)


def trained(context: StageContext, settings: SegmenterParams, segmenter: Segmenter) -> dict[str, Tensor]:
    """Weights after the training on `data.instances.train`."""
    assert settings.train is not None
    images = training_images(context, settings)
    return train_stage(context, Supervised(segmenter), images, collate_images, settings.train, context.seed)
