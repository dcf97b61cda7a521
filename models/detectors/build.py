"""Detectors by the names that configs give them."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from typing import Any

import models.detectors.bevformer
import models.detectors.camera
import models.detectors.fusion
import models.detectors.lidar
import models.detectors.radar
import models.detectors.simulated  # noqa: F401 (registers the detectors)
from models.detectors.detector import Detector
from models.layers.memory_layout import read_any_layout
from models.layers.registry import MODELS

DETECTORS = ("LidarCenterPoint", "RadarCenterPoint", "CameraBEVDepth", "BEVFormer", "BEVFusion", "SimulatedFusion")


def build_detector(config: Mapping[str, Any]) -> Detector:
    """Build a detector from a config dict through the registry, with its weights initialised.

    Raises:
        ValueError: if `type` is missing or not a detector of this project.
    """
    detector = make_detector(config)
    detector.init_weights()
    read_any_layout(detector)
    return detector


def make_detector(config: Mapping[str, Any]) -> Detector:
    """The modules of a detector, their weights as torch makes them, on torch's default device.

    Raises:
        ValueError: if `type` is missing or not a detector of this project.
    """
    name = config.get("type")
    kind = MODELS.get(name) if isinstance(name, str) else None
    if kind is None or not issubclass(kind, Detector):
        close = difflib.get_close_matches(str(name), DETECTORS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"model type {name!r} is unknown{hint}; there are: {', '.join(DETECTORS)}")
    detector: Detector = MODELS.build(copy.deepcopy(dict(config)))
    return detector
