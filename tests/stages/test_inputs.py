"""What the parameters and the datasets must agree on with the models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from config.files import load_params
from models.detectors.build import build_detector
from stages.context import StageError
from stages.inputs.datasets import training_dataset
from stages.inputs.segmenters import make_segmenter, segmenter_config

PARAMS = load_params(Path(__file__).resolve().parents[2])


def models() -> dict[str, nn.Module]:
    """Every model of the repository that starts from nothing."""
    configs: dict[str, dict[str, Any]] = {name: teacher.model for name, teacher in PARAMS.teachers.items()}
    configs |= {name: student.model for name, student in PARAMS.students.items()}
    segmenters = {name: make_segmenter(segmenter_config(s)) for name, s in PARAMS.segmenters.items()}
    return {name: build_detector(config) for name, config in configs.items()} | segmenters


def test_every_norm_learns_its_statistics() -> None:
    """mmdet's ResNet keeps its batch norms at mean 0 and variance 1 unless norm_eval is false."""
    fixed = {
        f"{name}.{part}"
        for name, model in models().items()
        for part, module in model.train().named_modules()
        if isinstance(module, _BatchNorm) and not module.training
    }
    assert not fixed


def test_radar_that_is_not_loaded_is_refused() -> None:
    params = PARAMS.model_copy(update={"input": PARAMS.input.model_copy(update={"radar": False})})
    detector = build_detector(PARAMS.students["radar"].model)
    with pytest.raises(StageError, match=r"input.radar: false, and RadarCenterPoint reads RADAR"):
        training_dataset(Path("."), params, detector, 0, "train")
