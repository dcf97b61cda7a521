"""The studies of the methods at smoke size, by the commands behind `make study`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pipeline.params import load_params
from tests.e2e.conftest import Project

# The largest on one process of the suite, the others on another.
STUDIES = {"x3kd": "studies", "simdistill": "studies", "structured": "structured", "combined": "studies"}


@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    "study", [pytest.param(name, marks=pytest.mark.xdist_group(group)) for name, group in STUDIES.items()]
)
def test_study_runs_all_its_rows(project: Project, study: str) -> None:
    """Every variant is trained, scored and in the table."""
    project.run(sys.executable, "-m", "pipeline", "study", study, "--profile", "smoke")
    project.run(sys.executable, "-m", "pipeline", "run", "--max-parallel", "2")
    check_table(project.root)


def check_table(root: Path) -> None:
    """Every variant has its line of metrics, with its row of the paper if it has one, and behind it a line of costs."""
    params = load_params(root / "params.yaml")
    lines = (root / "reports/table.md").read_text().splitlines()
    for variant in params.study.variants:
        line, *others = [line for line in lines if line.startswith((f"| {variant} |", f"| {variant} ("))]
        assert (params.variants[variant].row or "") in line
        assert any("×" in other for other in others)
        metrics = json.loads((root / f"reports/metrics/{variant}-0.json").read_text())
        assert f"| {metrics['mAP']:.3f}" in line
