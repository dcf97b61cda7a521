"""Puts the report together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from results.report import charts
from results.report.about import About, Published
from results.report.cost import read_costs
from results.report.efficiency import NOTE, PairCost
from results.report.efficiency import efficiency as efficiency_of
from results.report.features import Features
from results.report.features import features as features_of
from results.report.film import read_film
from results.report.fusions import fusions as fusions_of
from results.report.pictures import gallery
from results.report.recipes import profile_note, recipes
from results.report.results import ERRORS, UNITS, Arm, Study, read_published
from results.report.scenes import extremes, scene_gains, scenes_of
from results.report.search import METRICS, rounded, summary
from results.report.search import search as read_search
from results.report.segmenters import METRICS as SEGMENTER_METRICS
from results.report.segmenters import segmenters as segmenters_of
from results.report.significance import numbers as test_numbers
from results.report.significance import probability, significance
from results.report.stores import augmentations, stored_taps
from results.report.tables import comparison, computed_by, difference, learning_notes, markdown, notes, number, plain
from results.report.tradeoff import SIZE, families, gains, tradeoff

TEACHER_SLOTS = 5  # colours of the page's style sheet, given out in turn
VARIANT_SLOTS = 8


@dataclass(frozen=True)
class Report:
    """The finished texts: the page, the Markdown table, the table for the terminal, and the numbers for machines."""

    html: str
    markdown: str
    plain: str
    summary: str


def build(study: Study, published: Published, about: About, scenes: int = 3) -> Report:
    """Compare the runs of a study.

    Args:
        study: the runs, see `lineage.results`.
        published: where all else is.
        about: what the parameters say of the study.
        scenes: how many keyframes to show.

    Raises:
        ReportError: a file is missing or does not fit the others; the message names it and what to run.
    """
    variants, profile = about.variants, about.profile
    split = study.baseline.first["split"]
    table, lines = comparison(study), notes(study, profile) + learning_notes(split, about.learned_from, about.seen)
    fused, costs = fusions_of(study, about.fusions), read_costs(published.cost, study)
    efficient = efficiency_of(study, about.pairs, costs)
    simulated = features_of(published.features, about.featured, study.seeds, scenes)
    taps, tested, best = stored_taps(published.cards, about.stores), significance(study), study.best
    html = _template().render(
        study=study,
        best=best,
        table=table,
        tested=tested,
        probability=probability,
        film=read_film(published.film, study),
        extremes=extremes(scene_gains(study, best)) if best else None,
        scene_count=len(scenes_of(study.baseline)),
        gains=[(metric, gains(study, costs, metric)) for metric in METRICS],
        notes=lines,
        computed_by=computed_by(study),
        units=UNITS,
        profile=profile,
        profile_note=profile_note(profile, len(study.seeds)),
        costs=costs,
        fusions=fused,
        efficient=efficient,
        efficiency_note=NOTE,
        tradeoffs=[tradeoff(efficient, costs, metric) for metric in METRICS] if efficient else [],
        families=families(efficient),
        size=SIZE,
        features=simulated,
        segmenters=segmenters_of(published.metrics, published.evaluations, about.segmenters, scenes),
        segmenter_metrics=SEGMENTER_METRICS,
        recipes=recipes(variants),
        search=read_search(published.kept, about.search, variants) if about.search else None,
        taps=taps,
        augmentations=augmentations(taps),
        charts=[charts.bar_chart(study, metric) for metric in METRICS],
        heat=charts.heat_map(study),
        errors=ERRORS,
        curves=charts.curves(study, _details(study, published.evaluations)),
        pr_size=charts.PR_SIZE,
        graph=charts.graph(about.stages, about.edges),
        node=charts.NODE,
        gallery=gallery(study, published.evaluations, scenes),
        colour=_colours(study),
        number=number,
        difference=difference,
    )
    numbers = summary(study, profile, about.learned_from, variants) | {
        "fusions": {
            fusion.name: {"parts": dict(about.fusions[fusion.name]), "ahead": fusion.ahead} for fusion in fused
        },
        "features": {entry.variant: _correlations(entry) for entry in simulated},
        "cost": costs.numbers,
        "efficiency": [pair.numbers for pair in efficient],
        "tests": test_numbers(tested),
    }
    verdicts = [fusion.verdict for fusion in fused]
    return Report(
        html,
        "\n".join(
            [
                markdown(table, [*lines, *verdicts]),
                markdown(tested.table, [tested.note]),
                markdown(costs.table, [costs.note]),
                *_texts(efficient),
            ]
        ),
        plain(comparison(study, brief=True), [*lines, *verdicts]),
        json.dumps(numbers, indent=2, allow_nan=False) + "\n",
    )


def _texts(pairs: Sequence[PairCost]) -> list[str]:
    """The tables of pairs in Markdown; what compression is stands under the last."""
    last = len(pairs) - 1
    return [
        part
        for index, pair in enumerate(pairs)
        for part in (
            f"{markdown(pair.costs, []).rstrip()}\n",
            markdown(pair.results, [*filter(None, [pair.warning]), *[NOTE] * (index == last)]),
        )
    ]


def _correlations(entry: Features) -> dict[str, Any]:
    """Of a variant's simulated features with its teacher's, means over the seeds."""
    return {"teacher": entry.teacher, "before": rounded(entry.before), "after": rounded(entry.after)}


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("results.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("template.html")


def _colours(study: Study) -> dict[str, str]:
    """First run of an arm -> class name of its colour in the style sheet."""
    teachers = {arm.first_key: f"t{index % TEACHER_SLOTS}" for index, arm in enumerate(study.teachers)}
    variants = {arm.first_key: f"v{index % VARIANT_SLOTS}" for index, arm in enumerate(study.variants)}
    return {**variants, **teachers}


def _details(study: Study, evaluations: Path) -> dict[str, Any]:
    """The devkit's metric details of the first seed of every arm."""
    return {arm.first_key: _read_details(evaluations, arm) for arm in study.arms}


def _read_details(evaluations: Path, arm: Arm) -> Any:
    path = evaluations / arm.first_key / "metrics_details.json"
    return read_published(path, f"run `dvc repro {arm.stage}@{arm.first_key}`")
