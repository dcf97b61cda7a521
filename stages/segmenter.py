"""Stage `segmenter`: train an instance segmentation teacher, or take over imported weights; publish it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from config.sections import SegmenterParams
from data.reading.classes import CLASSES
from data.reading.coco import CocoInstances, collate_images
from data.reading.config import ImageConfig
from models.detectors.segmenter import Segmenter
from stages.context import StageContext
from stages.inputs.segmenters import detection_names, make_segmenter, segmenter_config
from stages.inputs.weights import save_detector, start_from
from training.seeding import MODEL, seed_everything
from training.trainer import train


class SupervisedSegmenter:
    """A segmenter and its losses against the instances of the images."""

    def __init__(self, segmenter: Segmenter) -> None:
        self.module = self.student = segmenter

    def loss(self, batch: Any, progress: float) -> dict[str, Tensor]:
        """The segmenter's own losses."""
        return self.module.loss(batch.images, batch.instances)


def run(context: StageContext) -> None:
    """Publish one entry of `segmenters`."""
    settings = context.entry("segmenter", context.params.segmenters)
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
    instances, image = context.params.instances, context.params.input.image
    names = detection_names(list(settings.classes or CLASSES), settings.class_map)
    config = ImageConfig(**image.model_dump() | {"size": settings.image})
    root = context.root / instances.root
    return CocoInstances(context.root / instances.train, root, config, names, train=True, seed=context.seed)


def trained(context: StageContext, settings: SegmenterParams, segmenter: Segmenter) -> dict[str, Tensor]:
    """Weights after the training on `data.instances.train`."""
    assert settings.train is not None
    images = training_images(context, settings)
    return train(SupervisedSegmenter(segmenter), images, collate_images, settings.train, context.training(context.seed))
