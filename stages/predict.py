"""Stages `predict`, `predict_teacher`, `predict_fusion` and `predict_large`: published weights -> a submission.

Beside it stands what the model is, so that evaluating needs neither the model nor torch.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch.utils.data import DataLoader

from base.environment import cores
from base.progress import ProgressBar
from config.params import split_key
from data.reading.batch import collate
from data.reading.dataset import NuScenesDataset
from data.scoring.submission import (
    MODEL,
    SUBMISSION,
    SampleDetections,
    build_submission,
    write_submission,
)
from models.detectors.detector import Detector
from stages.context import StageContext
from stages.inputs.datasets import plain_dataset
from stages.inputs.weights import load_detector

logger = logging.getLogger(__name__)

MODALITY: Final = {"images": "camera", "points": "lidar", "radar": "radar"}  # a batch's sensor -> the devkit's word


@dataclass(frozen=True)
class Subject:
    """What predicts: a teacher, or a variant's student of one seed."""

    kind: str  # "teacher" or "student"
    key: str
    variant: str
    seed: int | None  # None: a teacher's seed is in its weights

    @property
    def weights(self) -> str:
        """Folder of the published weights, relative to the root."""
        return f"outputs/{self.kind}s/{self.key}"


def run(context: StageContext) -> None:
    """Run the model over the split, publish its boxes."""
    _run(context, subject(context.name, context.item))


def subject(stage: str, key: str) -> Subject:
    """The stage's key taken apart; variants may have hyphens in their names."""
    if stage != "predict":
        return Subject("teacher", key, key, None)
    return Subject("student", key, *split_key(key))


def _run(context: StageContext, subject: Subject) -> None:
    params, folder = context.params, context.scratch / "predictions"
    folder.mkdir(parents=True, exist_ok=True)
    split = getattr(params.data.splits, params.evaluate.split)
    detector = load_detector(context.root / subject.weights)
    parameters = sum(parameter.numel() for parameter in detector.parameters())
    dataset = plain_dataset(context.root, params, split, detector)
    detections = predict(detector.to(context.device), dataset, params.evaluate.batch_size, subject.key)
    modalities = {MODALITY[name] for name in detector.sensors}
    write_submission(build_submission(detections, dataset.index, split, modalities), folder / SUBMISSION)
    model = {"kind": subject.kind, "key": subject.key, "variant": subject.variant, "seed": subject.seed,
             "split": split, "parameters": parameters}  # fmt: skip
    (folder / MODEL).write_text(json.dumps(model, indent=2) + "\n")
    boxes = sum(len(np.asarray(found.scores)) for found in detections.values())
    logger.info("%s: %d boxes in %d keyframes of %s", subject.key, boxes, len(detections), split)
    context.publish(folder, f"outputs/predictions/{subject.key}")


def predict(detector: Detector, dataset: NuScenesDataset, batch_size: int, title: str) -> dict[str, SampleDetections]:
    """Decoded boxes per sample token, in the LiDAR frame of each keyframe, on the CPU."""
    device = next(detector.parameters()).device
    workers = min(cores(), 8) if device.type == "cuda" else 0  # on a CPU the model leaves no core to them
    loader = DataLoader(dataset, batch_size, collate_fn=collate, num_workers=workers, pin_memory=device.type == "cuda")
    detections: dict[str, SampleDetections] = {}
    detector.eval()
    with torch.inference_mode(), ProgressBar(title, len(dataset)) as bar:
        for batch in loader:
            for token, found in zip(batch.tokens, detector.decode(detector(batch.to(device))), strict=True):
                detections[token] = SampleDetections(found.boxes.cpu(), found.scores.cpu(), found.labels.cpu())
            bar.advance(by=len(batch))
    return detections
