"""What the models of a study cost at inference, as the stage `cost` has measured it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results.report.results import Arm, ReportError, Study, read_published
from results.report.tables import Table

COMMAND = "run `dvc repro cost`"
REQUIRED = ("device", "threads", "precisions", "image", "frames", "repeats", "teachers", "variants")


@dataclass(frozen=True)
class Quantity:
    """One number of a model's costs."""

    key: str
    head: str  # with its unit
    unit: float  # what it is divided by
    digits: int

    def text(self, costs: Mapping[str, float]) -> str:
        """The number in its unit."""
        return f"{costs[self.key] / self.unit:.{self.digits}f}"


COUNTED = (Quantity("parameters", "params, M", 1e6, 2), Quantity("multiply_adds", "multiply-adds, G", 1e9, 2))
MEASURED = (
    Quantity("latency_ms", "latency, ms", 1.0, 1),
    Quantity("throughput_1", "samples/s at batch 1", 1.0, 1),
    Quantity("throughput_8", "samples/s at batch 8", 1.0, 1),
    Quantity("peak_memory", "peak memory, MB", 1e6, 1),
)


@dataclass(frozen=True)
class Costs:
    """The numbers of all arms, and what they were measured with in words."""

    table: Table
    note: str
    quantities: list[Quantity]
    numbers: dict[str, Any]  # for machines: conditions, and by arm the numbers with `of_baseline`

    def of(self, arm: Arm) -> dict[str, float]:
        """The numbers of an arm."""
        numbers: dict[str, float] = self.numbers[_section(arm)][arm.name]
        return numbers


def read_costs(path: Path, study: Study) -> Costs:
    """The costs of a study's arms, each with its ratio to its baseline's.

    Raises:
        ReportError: the file is missing, broken, or knows not all arms; names it and what to run.
    """
    content = read_published(path, COMMAND, REQUIRED)
    try:
        quantities = _quantities(content["precisions"])
        found = {arm.first_key: content[_section(arm)][arm.name] for arm in study.arms}
        ratios = {
            arm.first_key: _ratios(found[arm.first_key], found[study.baseline_of(arm).first_key], quantities)
            for arm in study.arms
        }
        rows = [_row(arm, found[arm.first_key], ratios[arm.first_key], quantities) for arm in study.arms]
        note = _note(content, study)
    except (KeyError, TypeError) as error:
        raise ReportError(f"{path} does not fit the study ({error!r}): {COMMAND}") from None
    sections: dict[str, Any] = {"teachers": {}, "variants": {}}
    for arm in study.arms:
        sections[_section(arm)][arm.name] = {**found[arm.first_key], "of_baseline": ratios[arm.first_key]}
    conditions = {key: value for key, value in content.items() if key not in sections}
    table = Table(["model", *(quantity.head for quantity in quantities)], rows)
    return Costs(table, note, quantities, {**conditions, **sections})


def _quantities(precisions: Sequence[str]) -> list[Quantity]:
    """What was measured: in float32, then in other precisions, which stand behind the names of their numbers."""
    halves = [
        Quantity(f"{quantity.key}_{precision}", f"{quantity.head}, {precision}", quantity.unit, quantity.digits)
        for precision in precisions
        if precision != "float32"
        for quantity in MEASURED
    ]
    return [*COUNTED, *MEASURED, *halves]


def _section(arm: Arm) -> str:
    return "variants" if arm.kind == "student" else "teachers"


def _row(arm: Arm, own: Mapping[str, float], ratios: Mapping[str, float], quantities: Sequence[Quantity]) -> list[str]:
    return [arm.name, *(f"{quantity.text(own)} ({ratios[quantity.key]:.2f} ×)" for quantity in quantities)]


def _ratios(own: Mapping[str, float], base: Mapping[str, float], quantities: Sequence[Quantity]) -> dict[str, float]:
    return {quantity.key: round(own[quantity.key] / base[quantity.key], 4) for quantity in quantities}


def _note(content: Mapping[str, Any], study: Study) -> str:
    """How the numbers came about, and what they leave out."""
    height, width = content["image"]
    threads, repeats = content["threads"], content["repeats"]
    where = content["device"] + (f", {threads} thread{'s' * (threads > 1)}" if threads else "")
    frames = f" at up to {content['frames']} keyframes, as many as a model reads" * (content["frames"] > 1)
    baseline = study.baseline.name if len(study.baselines) == 1 else "the model's baseline"
    return (
        f"×: ratio to {baseline}. Inference of one sample without what only training needs: six cameras of "
        f"{height} × {width} pixels{frames}, and LiDAR or RADAR for models that read them, made up at nuScenes' sizes. "
        f"Latency: median of {repeats['1']} forward passes at batch 1 in {content['precisions'][0]} on {where}, boxes "
        f"not yet decoded; samples/s: 1 and 8 over the median pass at batch 1 and 8 ({repeats['8']} passes). They "
        "differ from run to run. Peak memory: the most that a pass at batch 1 holds at once beside weights and input. "
        "Multiply-adds: convolutions and matrix products; not counted are pooling into BEV, the sampling of "
        "deformable attention and sparse convolutions."
    )
