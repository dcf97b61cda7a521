"""Stage `fusion`: the second step of a fusion teacher: it starts from the weights of its parts and trains whole."""

from __future__ import annotations

import logging
from typing import Final

from models.detectors.detector import Detector
from stages.context import StageContext
from stages.inputs.weights import start_in_part
from stages.teacher import train_teacher

logger = logging.getLogger(__name__)

CAMERA_MODULES: Final = ("images", "lift")  # of the camera part: its BEV encoder and head know no LiDAR


def run(context: StageContext) -> None:
    """Train and publish one entry of `study.fusions`."""
    train_teacher(context, lambda detector: start_from_parts(context, detector))


def start_from_parts(context: StageContext, detector: Detector) -> None:
    """Give a fusion teacher what fits of its parts: image encoder and lift of the camera's, all of the LiDAR's."""
    parts, teachers = context.params.study.parts, context.root / "outputs/teachers"
    filled = start_in_part(detector, teachers / parts.camera, CAMERA_MODULES)
    filled |= start_in_part(detector, teachers / parts.lidar)
    new = sorted({name.rpartition(".")[0] for name in detector.state_dict().keys() - filled})
    logger.info("from %s and %s: %d weights; new: %s", parts.lidar, parts.camera, len(filled), ", ".join(new))
