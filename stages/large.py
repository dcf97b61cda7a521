"""Stage `large`: a large camera teacher, in a second step that starts from the camera part."""

from __future__ import annotations

import logging

from models.detectors.detector import Detector
from stages.context import StageContext
from stages.fusion import CAMERA_MODULES
from stages.inputs.weights import start_in_part
from stages.teacher import train_teacher

logger = logging.getLogger(__name__)


def run(context: StageContext) -> None:
    """Train and publish one entry of `study.large`."""
    train_teacher(context, lambda detector: start_from_camera(context, detector))


def start_from_camera(context: StageContext, detector: Detector) -> None:
    """Give a camera teacher image encoder and lift of the camera part; a transformer has no lift.

    It stands for the pretrained image backbone that teachers of the papers' size name in their config. A teacher that
    needs no other belongs in `study.teachers`.
    """
    name, modules = context.params.study.parts.camera, modules_of(detector)
    filled = start_in_part(detector, context.root / "outputs/teachers" / name, modules)
    logger.info("from %s: %s, %d weights", name, " and ".join(modules), len(filled))


def modules_of(detector: Detector) -> list[str]:
    """The modules of a camera teacher that the camera part has, too."""
    return [module for module in CAMERA_MODULES if hasattr(detector, module)]
