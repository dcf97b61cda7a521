"""Puts the report together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipeline.report import charts
from pipeline.report.pictures import gallery
from pipeline.report.recipes import profile_note, recipes
from pipeline.report.results import UNITS, Arm, ReportError, Study, load_study
from pipeline.report.stores import augmentations, stored_taps
from pipeline.report.tables import comparison, difference, markdown, notes, number, plain

TEACHER_SLOTS = 3  # colours of the page's style sheet, given out in turn
VARIANT_SLOTS = 8


@dataclass(frozen=True)
class Report:
    """The finished texts: the page, the Markdown table, and the table for the terminal."""

    html: str
    markdown: str
    plain: str


def build(
    metrics: Path,
    predictions: Path,
    cards: Path,
    *,
    profile: str,
    teachers: Sequence[str],
    stores: Sequence[str],
    variants: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    stages: Mapping[str, int],
    edges: Sequence[tuple[str, str]],
    scenes: int = 3,
) -> Report:
    """Compare the runs of a study.

    Args:
        metrics: folder of `<teacher>.json` and `<variant>-<seed>.json`.
        predictions: folder with one folder per run: metrics_details.json, pictures.json and the pictures.
        cards: folder of `<store>.json`, what extraction says of each store.
        profile: name of the profile, for the note on what it can show.
        teachers: names of the teachers of the study.
        stores: names of the stores of the study.
        variants: the study's variants in order, name -> its entry of params.yaml; the first is the baseline.
        seeds: seeds of the study.
        stages: stage name -> number of instances, for the picture of the DAG.
        edges: (from, to) pairs of stage names.
        scenes: how many keyframes to show.

    Raises:
        ReportError: a file is missing or does not fit the others; the message names it and what to run.
    """
    study = load_study(metrics, teachers, list(variants), seeds)
    table, lines = comparison(study), notes(study)
    taps = stored_taps(cards, stores)
    html = _template().render(
        study=study,
        best=_best(study),
        table=table,
        notes=lines,
        units=UNITS,
        profile=profile,
        profile_note=profile_note(profile, len(seeds)),
        recipes=recipes(variants),
        taps=taps,
        augmentations=augmentations(taps),
        charts=[charts.bar_chart(study, metric) for metric in ("mAP", "NDS")],
        heat=charts.heat_map(study),
        curves=charts.curves(study, _details(study, predictions)),
        pr_size=charts.PR_SIZE,
        graph=charts.graph(stages, edges),
        node=charts.NODE,
        gallery=gallery(study, predictions, scenes),
        colour=_colours(study),
        number=number,
        difference=difference,
    )
    return Report(html, markdown(table, lines), plain(comparison(study, brief=True), lines))


def _best(study: Study) -> Arm | None:
    """The variant with the highest mean mAP, the baseline left out."""
    means = [(mean.mean, arm) for arm in study.variants[1:] if (mean := arm.mean("mAP"))]
    return max(means, key=lambda pair: pair[0])[1] if means else None


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("pipeline.report", "."),
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


def _details(study: Study, predictions: Path) -> dict[str, Any]:
    """The devkit's metric details of the first seed of every arm."""
    return {arm.first_key: _read_details(predictions, arm) for arm in study.arms}


def _read_details(predictions: Path, arm: Arm) -> Any:
    path = predictions / arm.first_key / "metrics_details.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        stage = "evaluate_teacher" if arm.kind == "teacher" else "evaluate"
        raise ReportError(f"{path} is missing: run `dvc repro {stage}@{arm.first_key}`") from None
