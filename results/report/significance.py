"""Which differences between variants are more than the spread of the seeds: paired t-tests, corrected after Holm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from results.report.results import Arm, Study
from results.report.search import DIGITS, METRICS
from results.report.statistics import LEVEL, TESTED, Interval, holm, paired_difference
from results.report.tables import DASH, Table, difference


@dataclass(frozen=True)
class Tested:
    """A difference, paired by seed, with p of its test in the interval and p corrected for its family."""

    difference: Interval | None
    corrected: float | None

    @property
    def holds(self) -> bool:
        """Whether it counts after the correction."""
        return self.corrected is not None and self.corrected < LEVEL

    @property
    def numbers(self) -> dict[str, float | int | None]:
        """For machines."""
        if self.difference is None:
            return {"difference": None, "half": None, "n": 0, "p": None, "p_holm": None}
        values = {"difference": self.difference.mean, "half": self.difference.half}
        tests = {"p": self.difference.p, "p_holm": self.corrected}
        shown = {key: None if value is None else round(value, DIGITS) for key, value in {**values, **tests}.items()}
        return {**shown, "n": self.difference.count}


@dataclass(frozen=True)
class Matrix:
    """All pairs of variants by one metric: cells[row][column] is row minus column, below the diagonal only."""

    metric: str
    arms: list[Arm]
    cells: list[list[Tested]]
    largest: float  # of the differences, without their signs

    @property
    def held(self) -> int:
        """How many pairs differ."""
        return sum(cell.holds for row in self.cells for cell in row)

    @property
    def pairs(self) -> int:
        """How many there are."""
        return len(self.arms) * (len(self.arms) - 1) // 2


@dataclass(frozen=True)
class Significance:
    """The tests of a study; `rows`: variant -> of METRICS its difference to its baseline."""

    note: str
    rows: dict[str, list[Tested]]
    matrices: list[Matrix]  # none with too few seeds, or a single variant
    table: Table


def significance(study: Study) -> Significance:
    """Test every variant against its baseline, and every pair of variants; each metric is a family of its own."""
    arms = [arm for arm in study.variants if arm not in study.baselines]
    columns = [_family([study.gain(arm, metric) for arm in arms]) for metric in METRICS]
    rows = {arm.name: list(tests) for arm, *tests in zip(arms, *columns, strict=True)}
    enough = len(study.seeds) >= TESTED and len(study.variants) > 1
    matrices = [_matrix(study, metric) for metric in METRICS] if enough else []
    return Significance(_note(study), rows, matrices, _table(study, rows))


def probability(p: float | None) -> str:
    """Three digits; a dash where no test was made."""
    if p is None:
        return DASH
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def numbers(tests: Significance) -> dict[str, Any]:
    """The tests against baselines for machines: variant -> metric -> numbers."""
    return {
        name: {metric: test.numbers for metric, test in zip(METRICS, row, strict=True)}
        for name, row in tests.rows.items()
    }


def _family(differences: Sequence[Interval | None]) -> list[Tested]:
    corrected = holm([interval.p if interval else None for interval in differences])
    return [Tested(*pair) for pair in zip(differences, corrected, strict=True)]


def _matrix(study: Study, metric: str) -> Matrix:
    arms = study.variants
    values = [arm.values(metric) for arm in arms]
    places = list(combinations(range(len(arms)), 2))  # column, row
    tests = _family([paired_difference(values[row], values[column]) for column, row in places])
    found = dict(zip(places, tests, strict=True))
    cells = [[found[column, row] for column in range(row)] for row in range(len(arms))]
    sizes = [abs(test.difference.mean) for test in tests if test.difference]
    return Matrix(metric, arms, cells, max(sizes, default=0.0))


def _table(study: Study, rows: dict[str, list[Tested]]) -> Table:
    head = ["variant", "baseline", "n", *(text for metric in METRICS for text in (f"Δ {metric}", "p", "p, Holm"))]
    return Table(head, [_row(study, arm, rows[arm.name]) for arm in study.variants if arm.name in rows])


def _row(study: Study, arm: Arm, tests: Sequence[Tested]) -> list[str]:
    counts = sorted({test.difference.count for test in tests if test.difference})
    texts = [
        text
        for test in tests
        for text in (
            difference(test.difference),
            probability(test.difference.p if test.difference else None),
            probability(test.corrected),
        )
    ]
    return [arm.name, study.baseline_of(arm).name, ", ".join(map(str, counts)) or DASH, *texts]


def _note(study: Study) -> str:
    count = len(study.seeds)
    if count < TESTED:
        return (
            f"{count} seed{'s' * (count > 1)} per variant: nothing can be said about significance. "
            f"Tests begin at {TESTED} seeds."
        )
    return (
        f"Two-sided paired t-test over {count} seeds. p, Holm: corrected for the number of tests of that metric in the "
        f"same table; below {LEVEL:.2f} a difference holds. It speaks of new seeds on these scenes, not of new scenes."
    )
