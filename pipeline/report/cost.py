"""What the models of a study cost at inference, as the stage `cost` has measured it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.report.results import Arm, ReportError, Study, read_published
from pipeline.report.tables import Table

COMMAND = "run `dvc repro cost`"
QUANTITIES = {"parameters": ("params, M", 1e6, 2), "multiply_adds": ("multiply-adds, G", 1e9, 2),
              "latency_ms": ("latency, ms", 1.0, 1)}  # fmt: skip
"""Key of a number -> its column's head, what it is divided by, its digits."""


@dataclass(frozen=True)
class Costs:
    """The numbers of all arms, and what they were measured with in words."""

    table: Table
    note: str
    numbers: dict[str, Any]  # for machines: conditions, and by arm the numbers with `of_baseline`


def read_costs(path: Path, study: Study) -> Costs:
    """The costs of a study's arms, each with its ratio to the baseline's.

    Raises:
        ReportError: the file is missing, broken, or knows not all arms; names it and what to run.
    """
    content = read_published(path, COMMAND)
    try:
        found = {arm.first_key: content[_section(arm)][arm.name] for arm in study.arms}
        base = found[study.baseline.first_key]
        rows = [_row(arm, found[arm.first_key], base) for arm in study.arms]
        note = _note(content)
    except (KeyError, TypeError) as error:
        raise ReportError(f"{path} does not fit the study ({error!r}): {COMMAND}") from None
    heads = [head for name, _, _ in QUANTITIES.values() for head in (name, "of baseline")]
    sections: dict[str, Any] = {"teachers": {}, "variants": {}}
    for arm in study.arms:
        own = found[arm.first_key]
        sections[_section(arm)][arm.name] = {**own, "of_baseline": {key: _ratio(own, base, key) for key in QUANTITIES}}
    conditions = {key: value for key, value in content.items() if key not in sections}
    return Costs(Table(["model", *heads], rows), note, {**conditions, **sections})


def _section(arm: Arm) -> str:
    return "variants" if arm.kind == "student" else "teachers"


def _row(arm: Arm, own: Mapping[str, float], base: Mapping[str, float]) -> list[str]:
    cells = [arm.name]
    for key, (_, unit, digits) in QUANTITIES.items():
        cells += [f"{own[key] / unit:.{digits}f}", f"{_ratio(own, base, key):.2f} ×"]
    return cells


def _ratio(own: Mapping[str, float], base: Mapping[str, float], key: str) -> float:
    return round(own[key] / base[key], 4)


def _note(content: Mapping[str, Any]) -> str:
    """How the numbers came about, and what they leave out."""
    height, width = content["image"]
    threads = content["threads"]
    where = content["device"] + (f", {threads} thread{'s' * (threads > 1)}" if threads else "")
    frames = f" at {content['frames']} keyframes" * (content["frames"] > 1)
    return (
        f"Inference of one sample without what only training needs: six cameras of {height} × {width} pixels{frames}, "
        f"and LiDAR or RADAR for models that read them, made up at nuScenes' sizes. Latency: median of "
        f"{content['repeats']} forward passes at batch 1 in {content['precision']} on {where}, boxes not yet decoded; "
        "it differs from run to run. Multiply-adds: convolutions and matrix products; not counted are pooling into "
        "BEV, the sampling of deformable attention and sparse convolutions."
    )
