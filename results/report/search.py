"""A study in numbers for machines, and what such numbers of an earlier study say about the choice of the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results.report.results import ReportError, Study
from results.report.statistics import Interval, mean_interval, paired_difference
from results.report.tables import difference, number

DIGITS = 6
METRICS = ("mAP", "NDS")


def summary(
    study: Study, profile: str, learned_from: Mapping[str, str], variants: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The study as plain numbers: its profile, splits and seeds; per variant the weights of its terms and the results.

    Args:
        study: the runs.
        profile: name of the profile.
        learned_from: teachers and "students" -> split.
        variants: the study's variants in order, name -> its entry of the parameters.
    """
    run = study.baseline.first
    return {
        "profile": profile,
        "split": run["split"],
        "learned_from": dict(learned_from),
        "keyframes": run["samples"],
        "boxes": run["boxes"]["truth"],
        "seeds": study.seeds,
        "teachers": {arm.name: {metric: rounded(arm.mean(metric)) for metric in METRICS} for arm in study.teachers},
        "variants": {
            arm.name: {
                "row": arm.row,
                "student": variants[arm.name]["student"],
                "baseline": study.baseline_of(arm).name,
                "terms": _weights(variants[arm.name]),
                **{metric: rounded(arm.mean(metric)) for metric in METRICS},
                "runs": {str(seed): {metric: run[metric] for metric in METRICS} for seed, run in arm.runs.items()},
            }
            for arm in study.variants
        },
    }


def rounded(interval: Interval | None) -> float | None:
    """The mean as a plain number."""
    return None if interval is None else round(interval.mean, DIGITS)


def _weights(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {term: parts["weight"] for term, parts in entry["terms"].items()}


@dataclass(frozen=True)
class Trial:
    """One line of the search: a variant with its weights, each part as text."""

    variant: str
    terms: list[tuple[str, str]]  # name, weight
    values: list[tuple[str, str]]  # of METRICS: mean, difference to the first variant
    used: bool  # whether all its weights are those of the report's study


@dataclass(frozen=True)
class Search:
    """How weights were chosen: another study's results. No trials: it has not been run, or its numbers not kept."""

    name: str
    note: str
    trials: list[Trial]


def search(folder: Path, name: str, variants: Mapping[str, Mapping[str, Any]]) -> Search:
    """Read `<name>.json`, a `summary` that a person has kept.

    Args:
        folder: where such summaries are.
        name: of the study.
        variants: those of the report, whose weights are looked up among the trials.

    Raises:
        ReportError: the file is not such a summary.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        return Search(name, "", [])
    used = {pair for entry in variants.values() for pair in _weights(entry).items()}
    try:
        content = json.loads(path.read_text())
        trials = [_trial(trial, content["variants"], used) for trial in content["variants"]]
        return Search(name, _note(content), trials)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ReportError(
            f"{path} is not the summary of a study ({error!r}): copy reports/summary.json of that study there"
        ) from None


def _trial(name: str, trials: Mapping[str, Mapping[str, Any]], used: set[tuple[str, Any]]) -> Trial:
    first, trial = next(iter(trials)), trials[name]
    values = []
    for metric in METRICS:
        own, base = ({seed: run[metric] for seed, run in trials[key]["runs"].items()} for key in (name, first))
        gain = "" if name == first else difference(paired_difference(own, base))
        values.append((number(mean_interval(list(own.values()))), gain))
    terms = trial["terms"]
    return Trial(
        name,
        [(term, f"{weight:g}") for term, weight in terms.items()],
        values,
        bool(terms) and used.issuperset(terms.items()),
    )


def _note(content: Mapping[str, Any]) -> str:
    seeds: Sequence[int] = content["seeds"]
    students = content["learned_from"]["students"]
    return (
        f"Profile {content['profile']}, students learn from {students}, scored on {content['split']} "
        f"({content['keyframes']} keyframes, {content['boxes']} boxes), seed{'s' * (len(seeds) > 1)} "
        f"{', '.join(map(str, seeds))}."
    )
