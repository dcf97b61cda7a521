"""Who teaches and who learns in a study, read off the parameters."""

from __future__ import annotations

from pathlib import Path

from config.params import Params
from results.report.results import Study, load_study


def starts(params: Params) -> set[str]:
    """Models that only serve as a start: something in the study starts from them, and no store is made of them."""
    study = params.study
    begun = {start.teacher for name in study.variants for start in params.student(name).starts}
    parts = {part for name in study.detectors for part in study.parts(name).values()}
    return (begun | parts) - {params.stores[name].teacher for name in study.stores}


def teachers_of(params: Params, variant: str) -> set[str]:
    """The teachers that a variant's terms read, and those that its student inherits weights from."""
    stores = [term.teacher.store for term in params.variants[variant].terms.values()]
    inherited = [start.teacher for start in params.student(variant).starts if start.resample]
    return {*(params.stores[name].teacher for name in stores), *inherited}


def results(params: Params, root: Path) -> Study:
    """The study's runs, as the evaluation stages published them below the root.

    Raises:
        ReportError: one is missing, or does not fit the others; names it and what to run.
    """
    study = params.study
    rows = {name: params.variants[name].row or "" for name in study.variants}
    return load_study(
        root / "reports/metrics",
        root / "outputs/evaluations",
        study.teachers,
        rows,
        study.seeds,
        starts(params),
        [*study.fusions],
        [*study.large],
        study.baselines,
    )
