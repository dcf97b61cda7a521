"""What the evaluation stages published, grouped into the arms of a study."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.errors import PipelineError
from results.report.statistics import Interval, mean_interval, paired_difference

ERRORS = ("mATE", "mASE", "mAOE", "mAVE", "mAAE")
HEADLINES = ("mAP", "NDS", *ERRORS)
UNITS = {"mATE": "m", "mASE": "1 - IoU", "mAOE": "rad", "mAVE": "m/s", "mAAE": "1 - accuracy"}
METRICS = (*HEADLINES, "mAP_present", "samples", "boxes", "parameters")  # DVC's metrics of a run
EVALUATION = ("kind", "split", "official", "classes", "scenes")  # the rest of its evaluation


class ReportError(PipelineError):
    """Something that the report needs is missing or unreadable; the message says what to run."""


@dataclass(frozen=True)
class Arm:
    """One line of the table: a teacher, a start of students, or a variant with one run per seed."""

    name: str
    kind: str  # "teacher", "start" (trained as teachers are) or "student"
    stage: str  # that evaluates it
    runs: dict[int, dict[str, Any]]  # seed -> its published metrics and the rest of its evaluation
    keys: dict[int, str]  # seed -> name of the run's folder in outputs/evaluations
    row: str = ""  # of a paper's table that the variant reproduces

    def values(self, metric: str) -> dict[int, float | None]:
        """One of the headline metrics, per seed."""
        return {seed: run[metric] for seed, run in self.runs.items()}

    def class_values(self, class_name: str, metric: str) -> dict[int, float | None]:
        """A metric of one class ("AP", "ATE", ...), per seed."""
        return {seed: run["classes"][class_name][metric] for seed, run in self.runs.items()}

    def mean(self, metric: str) -> Interval | None:
        """Mean of a headline metric over the seeds."""
        return mean_interval(list(self.values(metric).values()))

    def class_mean(self, class_name: str, metric: str) -> Interval | None:
        """Mean of a class's metric over the seeds."""
        return mean_interval(list(self.class_values(class_name, metric).values()))

    @property
    def first(self) -> dict[str, Any]:
        """The metrics of the first seed: whatever does not depend on the seed is read here."""
        return next(iter(self.runs.values()))

    @property
    def first_key(self) -> str:
        """The folder of the first seed's evaluation; its pictures stand for the arm."""
        return next(iter(self.keys.values()))

    @property
    def tag(self) -> str:
        """The label after an arm's name: its kind, unless it is a student or its name already is its kind."""
        return "" if self.kind in ("student", self.name) else self.kind


@dataclass(frozen=True)
class Study:
    """Teachers and variants that belong in one table. The first variant is a baseline; there may be more."""

    teachers: list[Arm]  # and starts; then fusion teachers, then large ones
    variants: list[Arm]
    seeds: list[int]
    later_baselines: frozenset[str] = frozenset()  # names of variants

    @property
    def baseline(self) -> Arm:
        """The first baseline: the first variant of the study."""
        return self.variants[0]

    @property
    def baselines(self) -> list[Arm]:
        """All of them, in the order of the study."""
        return [self.baseline, *(arm for arm in self.variants[1:] if arm.name in self.later_baselines)]

    def baseline_of(self, arm: Arm) -> Arm:
        """What an arm is compared with: the last baseline up to it, for teachers the first one."""
        names = [variant.name for variant in self.variants]
        upto = names.index(arm.name) if arm.kind == "student" else 0
        return [other for other in self.baselines if names.index(other.name) <= upto][-1]

    @property
    def arms(self) -> list[Arm]:
        """Teachers first, then the variants in the order of the study."""
        return [*self.teachers, *self.variants]

    @property
    def classes(self) -> list[str]:
        """The detection classes, in the order of the evaluations."""
        return list(self.arms[0].first["classes"])

    @property
    def absent(self) -> list[str]:
        """Classes without one box of truth: their AP is 0 by the devkit's definition."""
        classes = self.arms[0].first["classes"]
        return [name for name in classes if classes[name]["truth"] == 0]

    @property
    def has_rows(self) -> bool:
        """Whether a variant reproduces a row of a paper's table."""
        return any(arm.row for arm in self.variants)

    @property
    def best(self) -> Arm | None:
        """The variant with the highest mean mAP, baselines left out."""
        means = [(mean.mean, arm) for arm in self.variants if arm not in self.baselines and (mean := arm.mean("mAP"))]
        return max(means, key=lambda pair: pair[0])[1] if means else None

    def compared_with(self, arm: Arm) -> Arm | None:
        """The arm's baseline; None for a baseline itself and for teachers, which have no difference."""
        baseline = self.baseline_of(arm)
        return None if arm.kind != "student" or arm.name == baseline.name else baseline

    def gain(self, arm: Arm, metric: str) -> Interval | None:
        """Difference to the arm's baseline, paired by seed; None where there is none."""
        baseline = self.compared_with(arm)
        return paired_difference(arm.values(metric), baseline.values(metric)) if baseline else None

    def class_gain(self, arm: Arm, class_name: str, metric: str) -> Interval | None:
        """The same of a metric of one class."""
        baseline = self.compared_with(arm)
        if baseline is None:
            return None
        return paired_difference(arm.class_values(class_name, metric), baseline.class_values(class_name, metric))


def read_published(path: Path, command: str, required: Sequence[str] = (), or_else: str = "") -> Any:
    """A JSON file that a stage published.

    Args:
        path: of the file.
        command: what to run where it cannot be read.
        required: keys that it must have.
        or_else: what may be done instead where it is missing, behind the command.

    Raises:
        ReportError: it is missing, not JSON or lacks a key; names it and the command.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ReportError(f"{path} is missing: {command}{or_else}") from None
    except json.JSONDecodeError as error:
        raise ReportError(f"{path} is not JSON ({error}): {command}") from None
    if missing := [name for name in required if name not in content]:
        raise ReportError(f"{path} lacks {', '.join(missing)}: it is of another version: {command}")
    return content


@dataclass(frozen=True)
class _Folders:
    """Where the evaluation stages publish: metrics, and all else."""

    metrics: Path
    evaluations: Path

    def read(self, key: str, stage: str) -> dict[str, Any]:
        command, or_else = f"run `dvc repro {stage}@{key}`", f", or take {key!r} out of `study` in params.yaml"
        metrics = read_published(self.metrics / f"{key}.json", command, METRICS, or_else)
        evaluation = read_published(self.evaluations / key / "evaluation.json", command, EVALUATION, or_else)
        return {**evaluation, **metrics}

    def teacher(self, name: str, kind: str, stage: str) -> Arm:
        return Arm(name, kind, stage, {0: self.read(name, stage)}, {0: name})

    def variant(self, name: str, row: str, seeds: Sequence[int]) -> Arm:
        keys = {seed: f"{name}-{seed}" for seed in seeds}
        runs = {seed: self.read(key, "evaluate") for seed, key in keys.items()}
        return Arm(name, "student", "evaluate", runs, keys, row)


def load_study(
    metrics: Path,
    evaluations: Path,
    teachers: Sequence[str],
    variants: Mapping[str, str],
    seeds: Sequence[int],
    starts: Collection[str] = (),
    fusions: Sequence[str] = (),
    large: Sequence[str] = (),
    baselines: Collection[str] = (),
) -> Study:
    """Read `<key>.json` of a study's metrics and `<key>/evaluation.json` of its evaluations.

    A key is a teacher's name or `<variant>-<seed>`. `variants` are given with the row of a paper's table, or "";
    `starts` are those of the teachers that others start from; `fusions` and `large` are teachers too; `baselines` are
    those of the variants that the ones behind them are compared with, beside the first. Files of other studies in the
    folders are left alone. Raises ReportError naming the file and the command that makes it, where one is missing, is
    not JSON or lacks a field; and where runs disagree about the samples.
    """
    if not variants or not seeds:
        raise ReportError(f"a study needs a variant and a seed, not variants {list(variants)} and seeds {list(seeds)}")
    folders = _Folders(metrics, evaluations)
    study = Study(
        [folders.teacher(name, "start" if name in starts else "teacher", "evaluate_teacher") for name in teachers]
        + [folders.teacher(name, "teacher", "evaluate_fusion") for name in fusions]
        + [folders.teacher(name, "teacher", "evaluate_large") for name in large],
        [folders.variant(name, row, seeds) for name, row in variants.items()],
        list(seeds),
        frozenset(baselines),
    )
    _check_comparable(metrics, study)
    return study


def _check_comparable(folder: Path, study: Study) -> None:
    """Refuse runs that were evaluated on different truth."""
    seen: dict[tuple[str, int, int], str] = {}
    for arm in study.arms:
        for seed, run in arm.runs.items():
            seen.setdefault((run["split"], run["samples"], run["boxes"]["truth"]), arm.keys[seed])
    if len(seen) > 1:
        which = "; ".join(f"{key}: {s} samples of {split!r}, {b} boxes" for (split, s, b), key in seen.items())
        raise ReportError(f"{folder} holds runs that were evaluated on different truth ({which}): evaluate them again")
