"""What large camera teachers and their students cost, and what distillation is worth in multiply-adds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from results.report.cost import Costs
from results.report.results import Arm, Study
from results.report.search import rounded
from results.report.tables import DASH, Table, number

NOTE = (
    "Compression at equal NDS: the multiply-adds that an undistilled model needs for a student's NDS, over the "
    "student's own, read off the line from the student alone to the teacher, straight over the logarithm of the "
    "multiply-adds; 1 where a student is not above the student alone, ≥ where it is above the teacher. Means over the "
    "seeds, without an interval."
)


@dataclass(frozen=True)
class Pair:
    """A teacher and a student that learns from it, by the names of what was run."""

    teacher: str
    student: str
    family: str  # of the student's model
    alone: list[str]  # variants of the student that no large teacher had a part in; the line begins at the first
    taught: list[str]  # variants that learn or start from the teacher


@dataclass(frozen=True)
class Compression:
    """How many times its own cost a student is worth; `bound`: at least."""

    factor: float
    bound: bool = False

    def __str__(self) -> str:
        return f"{'≥ ' * self.bound}{self.factor:.2f} ×"


@dataclass(frozen=True)
class PairCost:
    """A pair with its numbers as text, and for machines."""

    pair: Pair
    teacher: Arm
    alone: list[Arm]
    taught: list[Arm]
    costs: Table  # a row per quantity: teacher, student, ratio
    results: Table  # a row per arm
    warning: str  # why there is no compression, where there is none
    numbers: dict[str, Any]

    @property
    def arms(self) -> list[Arm]:
        """Teacher, students alone, students taught."""
        return [self.teacher, *self.alone, *self.taught]


def efficiency(study: Study, pairs: Sequence[Pair], costs: Costs) -> list[PairCost]:
    """The pairs of a study in numbers.

    Args:
        study: the runs.
        pairs: in the order of the page.
        costs: of its models.
    """
    return [_pair_cost(study, pair, costs) for pair in pairs]


def compression(value: float, alone: tuple[float, float], teacher: tuple[float, float]) -> Compression | None:
    """The cost of an undistilled model of some NDS, over that of the student.

    Args:
        value: NDS of the distilled student.
        alone: multiply-adds and NDS of the student alone.
        teacher: the same of the teacher.

    Returns:
        None where the teacher is not both dearer and better than the student alone.
    """
    ratio, gap = teacher[0] / alone[0], teacher[1] - alone[1]
    if ratio <= 1 or gap <= 0:
        return None
    if value > teacher[1]:
        return Compression(ratio, bound=True)
    return Compression(math.exp(max(0.0, value - alone[1]) / gap * math.log(ratio)))


def _pair_cost(study: Study, pair: Pair, costs: Costs) -> PairCost:
    teacher = next(arm for arm in study.teachers if arm.name == pair.teacher)
    variants = {arm.name: arm for arm in study.variants}
    alone, taught = ([variants[name] for name in names] for names in (pair.alone, pair.taught))
    factors = _factors(teacher, alone, taught, costs)
    arms = [teacher, *alone, *taught]
    rows = [[arm.name, number(arm.mean("mAP")), number(arm.mean("NDS")), str(factors.get(arm.name) or DASH)]
            for arm in arms]  # fmt: skip
    return PairCost(
        pair,
        teacher,
        alone,
        taught,
        _cost_table(pair, costs.of(teacher), costs.of(taught[0]), costs),
        Table(["model", "mAP", "NDS", "compression at equal NDS"], rows),
        _warning(pair, factors),
        _numbers(pair, teacher, alone + taught, factors, costs),
    )


def _factors(teacher: Arm, alone: Sequence[Arm], taught: Sequence[Arm], costs: Costs) -> dict[str, Compression | None]:
    """By name of the students that were taught; empty without a student alone."""
    ends = [(costs.of(arm)["multiply_adds"], mean.mean) for arm in (*alone[:1], teacher) if (mean := arm.mean("NDS"))]
    if len(ends) < 2:
        return {}
    return {arm.name: compression(mean.mean, ends[0], ends[1]) for arm in taught if (mean := arm.mean("NDS"))}


def _cost_table(pair: Pair, teacher: dict[str, float], student: dict[str, float], costs: Costs) -> Table:
    rows = [
        [quantity.head, quantity.text(teacher), quantity.text(student), f"{_ratio(teacher, student, quantity.key):.2f}"]
        for quantity in costs.quantities
    ]
    return Table(["one sample", pair.teacher, pair.student, "teacher / student"], rows)


def _ratio(teacher: dict[str, float], student: dict[str, float], key: str) -> float:
    return round(teacher[key] / student[key], 4)


def _warning(pair: Pair, factors: dict[str, Compression | None]) -> str:
    if not pair.alone:
        return f"The study has no {pair.student} alone, so there is no line to read compression off."
    if not any(factors.values()):
        return f"{pair.teacher} is not dearer and better in NDS than {pair.alone[0]}: compression cannot be read off."
    return ""


def _numbers(
    pair: Pair, teacher: Arm, students: Sequence[Arm], factors: dict[str, Compression | None], costs: Costs
) -> dict[str, Any]:
    own, base = costs.of(teacher), costs.of(students[0])
    return {
        "teacher": pair.teacher,
        "student": pair.student,
        "family": pair.family,
        "alone": pair.alone,
        "teacher_over_student": {item.key: _ratio(own, base, item.key) for item in costs.quantities},
        "variants": {
            arm.name: {
                **{metric: rounded(arm.mean(metric)) for metric in ("mAP", "NDS")},
                "compression": round(factor.factor, 4) if (factor := factors.get(arm.name)) else None,
                "at_least": factor.bound if factor else False,
            }
            for arm in students
        },
    }
