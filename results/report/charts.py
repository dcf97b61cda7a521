"""Numbers to marks: bar tracks, heat map cells, precision-recall paths, the DAG's layout. Pure geometry, no colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from results.report.results import ERRORS, Arm, Study
from results.report.statistics import Interval
from results.report.tables import DASH, difference, number

PR_SIZE = (200, 132)  # width, height of one plot in SVG user units
CURVE_DISTANCE = "2.0"  # metres; the devkit's threshold for true-positive errors


@dataclass(frozen=True)
class Bar:
    """One row of a bar chart; positions are percentages of the track's length."""

    arm: Arm
    value: str
    gain: str
    length: float
    low: float | None
    high: float | None
    seeds: list[float]


@dataclass(frozen=True)
class BarChart:
    """A metric over all arms, with round ticks (label, position in percent)."""

    metric: str
    bars: list[Bar]
    ticks: list[tuple[str, float]]


def bar_chart(study: Study, metric: str) -> BarChart:
    """Mean as a bar, its interval as a whisker, every seed as a point, on an axis that starts at zero."""
    known = [value for arm in study.arms for value in arm.values(metric).values() if value is not None]
    highs = [interval.high for arm in study.arms if (interval := arm.mean(metric))]
    ticks = round_ticks(max([*known, *highs, 1e-3]))
    scale = 100.0 / ticks[-1]
    return BarChart(metric, [_bar(study, arm, metric, scale) for arm in study.arms], _labels(ticks, scale))


def _labels(ticks: Sequence[float], scale: float) -> list[tuple[str, float]]:
    digits = max(0, -math.floor(math.log10(ticks[1])) + 1)
    return [(f"{tick:.{digits}f}".rstrip("0").rstrip(".") or "0", tick * scale) for tick in ticks]


def _bar(study: Study, arm: Arm, metric: str, scale: float) -> Bar:
    mean = arm.mean(metric)
    gain = study.gain(arm, metric)
    whisker = mean is not None and mean.half is not None
    return Bar(
        arm,
        number(mean),
        difference(gain) if gain else "",
        mean.mean * scale if mean else 0.0,
        max(0.0, mean.low * scale) if mean and whisker else None,
        mean.high * scale if mean and whisker else None,
        [value * scale for value in arm.values(metric).values() if value is not None],
    )


def round_ticks(top: float, count: int = 5) -> list[float]:
    """Ticks 0, step, 2 step, ... that reach `top`, the step being 1, 2 or 5 times a power of ten."""
    step = round_step(top / count)
    return [step * index for index in range(math.ceil(top / step - 1e-9) + 1)]


def round_step(rough: float) -> float:
    """The first of 1, 2 and 5 times powers of ten that is not below a step."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))


@dataclass(frozen=True)
class Cell:
    """One cell of the heat map: text, a tooltip, and how much better than the baseline it is, in [-1, 1]."""

    text: str
    title: str
    strength: float
    resolved: bool  # the interval of the difference excludes zero


@dataclass(frozen=True)
class Heat:
    """Average precision per class and the mean errors, a row per arm.

    Colour is the difference to the arm's baseline; full colour is the largest difference of the column's scale.
    """

    columns: list[str]  # classes, then errors
    rows: list[tuple[Arm, list[Cell]]]
    scales: list[tuple[str, str]]  # what a scale is of, and its largest difference


Measured = list[tuple[Interval | None, Interval | None]]  # per arm: mean, difference to its baseline


def heat_map(study: Study) -> Heat:
    """All average precisions share one scale, each error has its own; an error that falls is better."""
    arms, classes = study.arms, study.classes
    aps: list[Measured] = [[(arm.class_mean(c, "AP"), study.class_gain(arm, c, "AP")) for arm in arms] for c in classes]
    errors: list[Measured] = [[(arm.mean(error), study.gain(arm, error)) for arm in arms] for error in ERRORS]
    shared, own = max(map(_largest, aps)), [_largest(column) for column in errors]
    columns = [
        _absent(name, arms) if name in study.absent else _column(f"{name}: AP", arms, column, shared)
        for name, column in zip(classes, aps, strict=True)
    ]
    columns += [_column(name, arms, column, -scale) for name, column, scale in zip(ERRORS, errors, own, strict=True)]
    scales = [(name, f"{scale:.3f}") for name, scale in zip(("AP", *ERRORS), (shared, *own), strict=True)]
    rows = [(arm, list(cells)) for arm, *cells in zip(arms, *columns, strict=True)]
    return Heat([*classes, *ERRORS], rows, scales)


def _largest(column: Measured) -> float:
    return max((abs(gain.mean) for _, gain in column if gain), default=0.0)


def _column(name: str, arms: Sequence[Arm], column: Measured, scale: float) -> list[Cell]:
    """The cells of one column; the scale is negative where less is better."""
    cells = []
    for arm, (mean, gain) in zip(arms, column, strict=True):
        title = f"{arm.name}, {name} {number(mean)}" + (f", {difference(gain)} to its baseline" if gain else "")
        strength = gain.mean / scale if gain and scale else 0.0
        cells.append(Cell(number(mean).partition(" ")[0], title, strength, bool(gain and gain.resolved)))
    return cells


def _absent(name: str, arms: Sequence[Arm]) -> list[Cell]:
    return [Cell(DASH, f"{arm.name}, {name}: not in the truth", 0.0, False) for arm in arms]


@dataclass(frozen=True)
class Curves:
    """Precision-recall plot of one class: the SVG path of every arm that has one."""

    class_name: str
    truth: int
    paths: list[tuple[Arm, str]]


def curves(study: Study, details: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> list[Curves]:
    """Precision over recall at a match distance of 2 m, one plot per class that has truth.

    Args:
        study: the arms; each is drawn from its first seed.
        details: run name -> the devkit's metric details, `<class>:<distance>` -> recall, precision, ...
    """
    plots = []
    for name in study.classes:
        if name in study.absent:
            continue
        data = [(arm, details[arm.first_key].get(f"{name}:{CURVE_DISTANCE}")) for arm in study.arms]
        paths = [(arm, curve_path(curve["recall"], curve["precision"])) for arm, curve in data if curve]
        plots.append(Curves(name, study.baseline.first["classes"][name]["truth"], paths))
    return plots


def curve_path(recall: Sequence[float], precision: Sequence[float]) -> str:
    """SVG path in a unit plot of PR_SIZE; it ends where the precision falls to 0, the highest recall reached."""
    width, height = PR_SIZE
    last = max((index for index, value in enumerate(precision) if value > 0), default=-1)
    points = zip(recall[: last + 1], precision[: last + 1], strict=True)
    text = " ".join(f"{x * width:.1f},{(1 - y) * height:.1f}" for x, y in points)
    return f"M{text}" if text else ""


@dataclass(frozen=True)
class Node:
    """A stage of the DAG: its name, how many instances it has, and the centre of its box in SVG user units."""

    name: str
    count: int
    x: float
    y: float


@dataclass(frozen=True)
class Graph:
    """The DAG laid out from left to right; `links` are the SVG paths of its edges."""

    nodes: list[Node]
    links: list[str]
    width: float
    height: float


NODE = (134.0, 46.0)  # width, height of a stage's box
PITCH = (172.0, 74.0)  # from one column, one row to the next
Point = tuple[float, float]


def graph(stages: Mapping[str, int], edges: Sequence[tuple[str, str]]) -> Graph:
    """Lay out a DAG of stages: column = longest path from a source; a long edge has a place in every column it crosses.

    Args:
        stages: name -> number of instances, in the order of the file.
        edges: (from, to) pairs of names.
    """
    direct = reduced(edges)
    chains = _chains(direct, depth := _depths(stages, direct))
    columns = _columns(stages, depth, chains)
    height = PITCH[1] * max(len(names) for names in columns)
    centre = {
        name: (NODE[0] / 2 + 2 + PITCH[0] * column, height / 2 + PITCH[1] * (row - (len(names) - 1) / 2))
        for column, names in enumerate(columns)
        for row, name in enumerate(names)
    }
    nodes = [Node(name, count, *centre[name]) for name, count in stages.items()]
    links = [_link([centre[place] for place in chain]) for chain in chains]
    return Graph(nodes, links, PITCH[0] * (len(columns) - 1) + NODE[0] + 4, height)


def _chains(edges: Sequence[tuple[str, str]], depth: Mapping[str, int]) -> list[list[str]]:
    """Per edge the places it visits, one per column: its ends, and between them places of its own."""
    return [[a, *(f"{a} > {b} {column}" for column in range(depth[a] + 1, depth[b])), b] for a, b in edges]


def _columns(stages: Mapping[str, int], depth: Mapping[str, int], chains: Sequence[Sequence[str]]) -> list[list[str]]:
    """The places of every column from top to bottom, sorted by the mean height of what leads to them."""
    columns: list[list[str]] = [[] for _ in range(max(depth.values()) + 1)]
    for name in stages:
        columns[depth[name]].append(name)
    for chain in chains:
        for offset, place in enumerate(chain[1:-1], depth[chain[0]] + 1):
            columns[offset].append(place)
    height: dict[str, float] = {}
    for column in columns:
        sources = {place: [a for chain in chains for a, b in pairwise(chain) if b == place] for place in column}
        column.sort(key=lambda place: sum(height[a] for a in sources[place]) / max(1, len(sources[place])))
        height |= {place: row - (len(column) - 1) / 2 for row, place in enumerate(column)}
    return columns


def _depths(stages: Mapping[str, int], edges: Sequence[tuple[str, str]]) -> dict[str, int]:
    depth = dict.fromkeys(stages, 0)
    for _ in stages:
        for source, target in edges:
            depth[target] = max(depth[target], depth[source] + 1)
    return depth


def reduced(edges: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The edges without those that a longer path implies (transitive reduction of a DAG)."""
    after: dict[str, set[str]] = {}
    for source, target in edges:
        after.setdefault(source, set()).add(target)

    def reachable(name: str) -> set[str]:
        return after.get(name, set()).union(*(reachable(other) for other in after.get(name, ())))

    unique = list(dict.fromkeys(edges))
    return [(a, b) for a, b in unique if not any(b in reachable(other) for other in after[a] if other != b)]


def _link(places: Sequence[Point]) -> str:
    """A smooth line from the right side of the first box, through the places between, to the left side of the last."""
    (x, y), *rest = places
    path = f"M{x + NODE[0] / 2:.0f},{y:.0f}"
    x += NODE[0] / 2
    for step, (next_x, next_y) in enumerate(rest, 1):
        entry, leave = next_x - NODE[0] / 2, next_x + NODE[0] / 2
        last = step == len(rest)
        entry -= 5 if last else 0  # room for the arrow's head
        middle = (x + entry) / 2
        path += f" C{middle:.0f},{y:.0f} {middle:.0f},{next_y:.0f} {entry:.0f},{next_y:.0f}"
        path += "" if last else f" H{leave:.0f}"
        x, y = leave, next_y
    return path
