"""Stage `features`: where a student's simulated LiDAR features are strong, beside its fusion teacher's LiDAR features.

The strength of a cell is the mean of |x| over its channels. Pictures show it on the keyframes that `evaluate` draws; a
number beside each is Pearson's correlation of student and teacher over the cells, before and after the compensation in
BEV. Only the teacher reads LiDAR.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from config.params import split_key
from data.drawing import pictures
from data.reading.batch import collate
from data.reading.dataset import NuScenesDataset
from models.detectors.detector import Detector
from stages.context import StageContext, StageError
from stages.featured import AFTER, BEFORE, LIDAR, fusion_teacher
from stages.inputs.datasets import plain_dataset
from stages.inputs.weights import load_detector

logger = logging.getLogger(__name__)

DIGITS: Final = 6

Strength = NDArray[np.float32]


@dataclass(frozen=True)
class Keyframe:
    """Strengths [H, W] of one keyframe; H along y and W along x of the LiDAR frame."""

    view: pictures.View
    teacher: Strength
    before: Strength
    after: Strength


def run(context: StageContext) -> None:
    """Draw and compare the features of one variant with one seed."""
    variant, seed = split_key(context.item)
    context.entry("variant", context.params.variants, variant)
    name = fusion_teacher(context.params, variant)
    student = _load(context.root / f"outputs/students/{context.key}", (BEFORE, AFTER))
    teacher = _load(context.root / f"outputs/teachers/{name}", (LIDAR,))
    split = getattr(context.params.data.splits, context.params.evaluate.split)
    dataset = plain_dataset(context.root, context.params, split, teacher)
    dataset.modalities |= set(student.sensors)
    found = list(keyframes(context, dataset, teacher, student))
    folder = context.scratch / "features"
    folder.mkdir(parents=True, exist_ok=True)
    extent = student.targets.grid.range
    entries = _draw(context, found, name, extent, folder)
    head = {"key": context.key, "variant": variant, "seed": seed, "teacher": name, "split": split}
    content = {**head, "mean": {when: mean(entries, when) for when in ("before", "after")}, "keyframes": entries}
    numbers = {f"correlation/{when}": value for when, value in content["mean"].items() if value is not None}
    logger.info("%s: %s", context.key, ", ".join(f"{when} {value:.3f}" for when, value in numbers.items()))
    context.tracker.log_metrics(numbers, 0)
    (folder / "features.json").write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    context.publish(folder, f"outputs/evaluations/features/{context.key}")


def _load(folder: Path, taps: Sequence[str]) -> Detector:
    """A published detector that has some taps."""
    detector = load_detector(folder)
    if missing := [tap for tap in taps if tap not in detector.tap_channels]:
        raise StageError(
            f"{folder} holds a {type(detector).__name__}, which has no tap {', '.join(missing)}: study.featured takes "
            "variants of a SimulatedFusion student with a BEVFusion teacher"
        )
    return detector


def keyframes(
    context: StageContext, dataset: NuScenesDataset, teacher: Detector, student: Detector
) -> Iterator[Keyframe]:
    """The keyframes that `evaluate` draws, each with the strengths of both models."""
    teacher.to(context.device)
    student.to(context.device)
    count = min(context.params.evaluate.pictures, len(dataset))
    for position in np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist():
        batch = collate([dataset[position]]).to(context.device)
        with torch.inference_mode():
            taps = teacher(batch, [LIDAR]).taps | student(batch, [BEFORE, AFTER]).taps
        strengths = {tap: features[0].abs().mean(dim=0).cpu().numpy() for tap, features in taps.items()}
        view = pictures.load_view(dataset.index, int(dataset.rows[position]), dataset.dataroot)
        yield Keyframe(view, strengths[LIDAR], strengths[BEFORE], strengths[AFTER])


def correlation(first: Strength, second: Strength) -> float | None:
    """Pearson's over the cells; None where one of them is the same everywhere."""
    a, b = (values.astype(np.float64).ravel() - values.mean(dtype=np.float64) for values in (first, second))
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return None if size == 0 else round(float(a @ b / size), DIGITS)


def mean(entries: Sequence[dict[str, Any]], when: str) -> float | None:
    """Over the keyframes where the correlation is defined."""
    known = [entry[when] for entry in entries if entry[when] is not None]
    return round(fmean(known), DIGITS) if known else None


def _draw(
    context: StageContext, found: Sequence[Keyframe], teacher: str, extent: float, folder: Path
) -> list[dict[str, Any]]:
    """One picture per keyframe; returns the entries of features.json, `before` null without a compensation in BEV."""
    compensated = any((keyframe.before != keyframe.after).any() for keyframe in found)
    entries = []
    for number, keyframe in enumerate(found):
        view, file = keyframe.view, f"{number:02d}.png"
        before = correlation(keyframe.teacher, keyframe.before) if compensated else None
        after = correlation(keyframe.teacher, keyframe.after)
        panels = [(f"{teacher}: LiDAR features", keyframe.teacher)]
        if compensated:
            panels.append((_titled(f"{context.key}: simulated, before compensation", before), keyframe.before))
        after_words = "simulated, after compensation" if compensated else "simulated"
        panels.append((_titled(f"{context.key}: {after_words}", after), keyframe.after))
        drawn = [pictures.draw_strength(strength, extent, view.truth, title) for title, strength in panels]
        pictures.save(pictures.compose_row(drawn, view.caption), folder / file)
        context.tracker.log_artifact(folder / file, "pictures")
        entries.append({"token": view.token, "caption": view.caption, "file": file, "before": before, "after": after})
    return entries


def _titled(words: str, value: float | None) -> str:
    return words if value is None else f"{words}, r = {value:.2f}"
