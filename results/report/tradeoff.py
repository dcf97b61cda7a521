"""Accuracy, and what is gained of it, over cost as marks in a plane. Pure geometry, no colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from results.report.charts import round_step
from results.report.cost import Costs, Quantity
from results.report.efficiency import PairCost
from results.report.results import Arm, Study
from results.report.statistics import Interval
from results.report.tables import difference, number

SIZE = (460.0, 290.0)  # width, height of the plot in SVG user units
SPREAD = 72.0  # user units that students of one cost share, side by side
APART = 10.0  # user units between them at most
RADII = {"teacher": 7.0, "alone": 5.0, "taught": 4.0, "baseline": 8.0, "gained": 7.0}
SPENT = ("parameters", "multiply_adds", "latency_ms")  # over which gains are drawn
ROOM = 1.2  # times the cheapest and the dearest, for the marks that stand beside them
SHAPES = ("circle", "square", "diamond")  # of families, in turn


@dataclass(frozen=True)
class Mark:
    """An arm in the plane, in SVG user units."""

    arm: Arm
    role: str  # "teacher", "alone" or "taught"; of gains "baseline" or "gained"
    x: float
    y: float
    low: float | None  # of the interval, where there is one
    high: float | None
    path: str
    title: str


@dataclass(frozen=True)
class Tradeoff:
    """A metric over a cost: marks, the lines of undistilled models, ticks (label, position)."""

    metric: str
    cost: str
    axis: str  # the cost with its unit
    marks: list[Mark]
    lines: list[str]
    x_ticks: list[tuple[str, float]]
    y_ticks: list[tuple[str, float]]


@dataclass(frozen=True)
class Plane:
    """Where costs and values lie."""

    costs: list[float]  # ticks, multiply-adds
    values: list[float]  # ticks

    def x(self, cost: float) -> float:
        """Of multiply-adds, on a logarithmic axis."""
        return SIZE[0] * math.log(cost / self.costs[0]) / math.log(self.costs[-1] / self.costs[0])

    def y(self, value: float) -> float:
        """Of a metric, upwards."""
        return SIZE[1] * (1 - (value - self.values[0]) / (self.values[-1] - self.values[0]))

    def ticks(self, unit: float) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
        """Labels and positions along both axes; costs are divided by `unit`."""
        digits = max(0, -math.floor(math.log10(self.values[1] - self.values[0]) + 1e-9))
        return (
            [(f"{cost / unit:g}", self.x(cost)) for cost in self.costs],
            [(f"{value:.{digits}f}", self.y(value)) for value in self.values],
        )


def tradeoff(pairs: Sequence[PairCost], costs: Costs, metric: str) -> Tradeoff:
    """All arms of the pairs by a metric and their multiply-adds.

    Args:
        pairs: with the arms.
        costs: of the study.
        metric: "mAP" or "NDS".
    """
    arms = {arm.first_key: arm for pair in pairs for arm in pair.arms}.values()
    means = [mean for arm in arms if (mean := arm.mean(metric))]
    spent = [costs.of(arm)["multiply_adds"] for arm in arms]
    ends = (min(mean.low for mean in means), max(mean.high for mean in means)) if means else (0.0, 1.0)
    plane = Plane(log_ticks(min(spent), max(spent)), span_ticks(*ends))
    marks = {mark.arm.first_key: mark for pair in pairs for mark in _marks(pair, pairs, plane, costs, metric)}
    return Tradeoff(
        metric,
        "multiply-adds",
        "multiply-adds of one sample, G",
        list(marks.values()),
        [line for pair in pairs if (line := _line(pair, plane, costs, metric))],
        *plane.ticks(1e9),
    )


def gains(study: Study, costs: Costs, metric: str) -> list[Tradeoff]:
    """What every variant gains on its baseline, over each of SPENT; a baseline is a mark at zero.

    Args:
        study: the runs.
        costs: of its models.
        metric: "mAP" or "NDS".
    """
    return [_gains(study, costs, metric, quantity) for quantity in costs.quantities if quantity.key in SPENT]


def _gains(study: Study, costs: Costs, metric: str, quantity: Quantity) -> Tradeoff:
    nothing = Interval(0.0, None, len(study.seeds))
    drawn = [
        (arm, costs.of(arm)[quantity.key], gain)
        for arm in study.variants
        if (gain := study.gain(arm, metric) if study.compared_with(arm) else nothing)
    ]
    name, _, unit = quantity.head.partition(", ")
    spent, found = [cost for _, cost, _ in drawn], [gain for _, _, gain in drawn]
    ends = min(gain.low for gain in found), max(gain.high for gain in found)
    plane = Plane(log_ticks(min(spent) / ROOM, max(spent) * ROOM), span_ticks(*ends))
    offsets = {cost: iter(side_by_side(spent.count(cost))) for cost in spent}
    marks = []
    for arm, cost, gain in drawn:
        gained = study.compared_with(arm) is not None
        words = f"Δ {metric} {difference(gain)}" if gained else "baseline"
        title = f"{arm.name}: {words}, {quantity.text(costs.of(arm))} {unit} {name}"
        role = "gained" if gained else "baseline"
        marks.append(_mark(arm, role, plane, cost, gain, next(offsets[cost]), "circle", title))
    zero = f"M0,{plane.y(0.0):.1f} H{SIZE[0]:g}"
    return Tradeoff(f"Δ {metric}", name, quantity.head, marks, [zero], *plane.ticks(quantity.unit))


def _mark(
    arm: Arm, role: str, plane: Plane, cost: float, value: Interval, offset: float, shape: str, title: str
) -> Mark:
    """An arm where its cost and a value put it, moved sideways by an offset."""
    x, y = plane.x(cost) + offset, plane.y(value.mean)
    low, high = (plane.y(end) if value.half is not None else None for end in (value.low, value.high))
    return Mark(arm, role, x, y, low, high, mark_path(shape, x, y, RADII[role]), title)


def families(pairs: Sequence[PairCost]) -> list[tuple[str, str]]:
    """The families of the pairs, each with its mark around the origin."""
    names = list(dict.fromkeys(pair.pair.family for pair in pairs))
    return [(name, mark_path(SHAPES[index % len(SHAPES)], 0.0, 0.0, 5.0)) for index, name in enumerate(names)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, from the last below `low` to the first above `high`; at least two."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    steps = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    first = max(index for index, step in enumerate(steps) if step < low)
    last = min(index for index, step in enumerate(steps) if step > high)
    return steps[first : last + 1]


def span_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round multiples of a round step that enclose both values, at least two."""
    step = round_step(max(high - low, 1e-3) / count)
    first, last = math.floor(low / step - 1e-9), math.ceil(high / step + 1e-9)
    return [step * index for index in range(first, last + 1)]


def mark_path(shape: str, x: float, y: float, radius: float) -> str:
    """SVG path of a circle, a square or a diamond of about one area around a point."""
    if shape == "circle":
        half = f"a{radius},{radius} 0 1 0"
        return f"M{x - radius:.1f},{y:.1f} {half} {2 * radius},0 {half} {-2 * radius},0 Z"
    side = radius * math.sqrt(math.pi) / 2
    if shape == "square":
        return f"M{x - side:.1f},{y - side:.1f} h{2 * side:.1f} v{2 * side:.1f} h{-2 * side:.1f} Z"
    reach = side * math.sqrt(2)
    return f"M{x:.1f},{y - reach:.1f} l{reach:.1f},{reach:.1f} l{-reach:.1f},{reach:.1f} l{-reach:.1f},{-reach:.1f} Z"


def side_by_side(count: int) -> list[float]:
    """Offsets of marks at one place: the first stays, the others stand right and left of it in turn."""
    apart = min(APART, SPREAD / max(1, count))
    return [apart * ((index + 1) // 2) * (1 if index % 2 else -1) for index in range(count)]


def _marks(pair: PairCost, pairs: Sequence[PairCost], plane: Plane, costs: Costs, metric: str) -> list[Mark]:
    names = [name for name, _ in families(pairs)]
    shape = SHAPES[names.index(pair.pair.family) % len(SHAPES)]
    roles = ["teacher", *["alone"] * len(pair.alone), *["taught"] * len(pair.taught)]
    offsets = [0.0, *side_by_side(len(roles) - 1)]
    marks = []
    for arm, role, offset in zip(pair.arms, roles, offsets, strict=True):
        if (mean := arm.mean(metric)) is None:
            continue
        cost = costs.of(arm)["multiply_adds"]
        title = f"{arm.name}: {metric} {number(mean)}, {cost / 1e9:.2f} G multiply-adds"
        marks.append(_mark(arm, role, plane, cost, mean, offset, shape, title))
    return marks


def _line(pair: PairCost, plane: Plane, costs: Costs, metric: str) -> str:
    """From the student alone to the teacher; nothing without either."""
    ends = [
        f"{plane.x(costs.of(arm)['multiply_adds']):.1f},{plane.y(mean.mean):.1f}"
        for arm in (*pair.alone[:1], pair.teacher)
        if (mean := arm.mean(metric))
    ]
    return f"M{ends[0]} L{ends[1]}" if len(ends) == 2 else ""
