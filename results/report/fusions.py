"""Whether fusion teachers are ahead of the teachers that they are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from results.report.results import Arm, Study
from results.report.tables import DASH, Table, number

METRICS = ("mAP", "NDS")


@dataclass(frozen=True)
class Fusion:
    """A fusion teacher beside its parts: a table, and the verdict in words."""

    name: str
    table: Table
    verdict: str
    ahead: bool  # of all parts in all metrics


def fusions(study: Study, parts: Mapping[str, Mapping[str, str]]) -> list[Fusion]:
    """The fusion teachers of a study.

    Args:
        study: the runs.
        parts: name of each -> sensor -> name of the teacher that it is made of.
    """
    arms = {arm.name: arm for arm in study.teachers}
    return [_fusion(arms[name], {sensor: arms[part] for sensor, part in own.items()}) for name, own in parts.items()]


def _fusion(fusion: Arm, parts: Mapping[str, Arm]) -> Fusion:
    behind = [
        f"{arm.name} in {metric} ({_text(fusion, metric)} against {_text(arm, metric)})"
        for arm in parts.values()
        for metric in METRICS
        if not (_value(fusion, metric) > _value(arm, metric))
    ]
    if behind:
        verdict = f"{fusion.name} is not ahead of {', '.join(behind)}."
    else:
        names = " and ".join(arm.name for arm in parts.values())
        verdict = f"{fusion.name} is ahead of its parts {names} in {' and '.join(METRICS)}."
    head = ["model", "part", *(text for metric in METRICS for text in (metric, f"{fusion.name} is ahead by"))]
    rows = [[fusion.name, "", *(text for metric in METRICS for text in (_text(fusion, metric), DASH))]]
    rows += [[arm.name, sensor, *_compared(fusion, arm)] for sensor, arm in parts.items()]
    return Fusion(fusion.name, Table(head, rows), verdict, not behind)


def _compared(fusion: Arm, part: Arm) -> list[str]:
    """Each metric of a part, and by how much the fusion is ahead of it."""
    pairs = [(_text(part, metric), f"{_value(fusion, metric) - _value(part, metric):+.3f}") for metric in METRICS]
    return [text for pair in pairs for text in pair]


def _value(arm: Arm, metric: str) -> float:
    return arm.first[metric]


def _text(arm: Arm, metric: str) -> str:
    return number(arm.mean(metric))
