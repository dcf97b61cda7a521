"""A published segmenter, and what it finds as instances of the ten detection classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import torch
from torch import Tensor

from config.sections import SegmenterParams
from data.reading.classes import CLASSES
from data.reading.instances import ImageInstances
from models.detectors.segmenter import Segmenter, build_segmenter
from stages.context import StageError
from stages.inputs.weights import load_published

KIND: Final = "Segmenter"  # `type` in config.json, where detectors have the name of their class
PREFIX: Final = "detector."  # of the names of all weights: the mmdet model in a Segmenter


def segmenter_config(settings: SegmenterParams) -> dict[str, Any]:
    """The config.json of a segmenter: what it is built from, and what goes in and comes out."""
    return {
        "type": KIND,
        "model": settings.model,
        "classes": list(settings.classes or CLASSES),
        "class_map": dict(settings.class_map),
        "image": list(settings.image),
    }


def detection_names(classes: Sequence[str], class_map: Mapping[str, str]) -> list[str | None]:
    """The detection class that each of a segmenter's classes counts as; None: of no interest.

    Raises:
        StageError: `class_map` maps to something else, or maps a class that the segmenter does not have.
    """
    if wrong := sorted(set(class_map.values()) - set(CLASSES)):
        raise StageError(f"class_map: {', '.join(wrong)}: allowed are {', '.join(CLASSES)}")
    if unknown := sorted(set(class_map) - set(classes)):
        raise StageError(f"class_map: {', '.join(unknown)}: the segmenter has the classes {', '.join(classes)}")
    names = [class_map.get(name, name) for name in classes]
    if not set(names) & set(CLASSES):
        raise StageError(f"none of the classes {', '.join(classes)} is a detection class: map some in class_map")
    return [name if name in CLASSES else None for name in names]


@dataclass(frozen=True)
class InstanceFinder:
    """A segmenter in evaluation mode whose labels are positions in CLASSES."""

    segmenter: Segmenter
    size: tuple[int, int]  # height, width of its images
    labels: Tensor  # [C] position in CLASSES of each of its own classes, -1: none
    threshold: float = 0.0  # least score

    @classmethod
    def load(cls, folder: Path, device: torch.device, threshold: float = 0.0) -> Self:
        """A published segmenter.

        Args:
            folder: of its weights.
            device: to run on.
            threshold: least score of what it finds.

        Raises:
            StageError: the folder does not hold a whole segmenter.
        """
        segmenter, config = load_published(folder, make_segmenter)
        height, width = config["image"]
        names = detection_names(config["classes"], config["class_map"])
        labels = torch.tensor([-1 if name is None else CLASSES.index(name) for name in names], device=device)
        # What nobody will see needs no mask. mmdet keeps what is above, so the threshold itself must be.
        below = float(np.nextafter(np.float32(threshold), np.float32(0)))
        config = segmenter.detector.roi_head.test_cfg
        config.score_thr = max(config.score_thr, below)
        return cls(segmenter.to(device).requires_grad_(False), (height, width), labels, threshold)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> list[ImageInstances]:
        """What it finds in images [B, 3, H, W] uint8 of its size, on its device: on the CPU, best first."""
        found = []
        for image in self.segmenter.predict(images):
            labels = self.labels[image.labels]
            shown = image.masks.flatten(1).any(1)  # what has no pixel left is no instance
            keep = (labels >= 0) & (image.scores >= self.threshold) & shown
            parts = (image.boxes[keep].float(), labels[keep], image.scores[keep].float(), image.masks[keep].byte())
            found.append(ImageInstances(*(part.cpu() for part in parts)))
        return found


def make_segmenter(config: Mapping[str, Any]) -> Segmenter:
    """The segmenter of a config.json.

    Raises:
        StageError: it is not one, or mmdet cannot build its model.
    """
    if config.get("type") != KIND:
        raise StageError(f"type {config.get('type')!r} in config.json: expected {KIND!r}, a folder of a segmenter")
    try:
        return build_segmenter({"model": config["model"], "classes": config["classes"]})
    except (ValueError, KeyError, TypeError, ImportError) as error:
        raise StageError(f"the model of the segmenter cannot be built: {error}") from error
