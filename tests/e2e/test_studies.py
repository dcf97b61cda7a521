"""The studies of the methods at smoke size. How DVC and the flow run a study is in test_smoke.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from config.files import load_params
from tests.e2e.conftest import Project
from tests.e2e.forks import run_all
from tests.params_files import edit_params

pytestmark = pytest.mark.whole


@pytest.mark.timeout(2400)
@pytest.mark.xdist_group("structured")  # the largest on one process of the suite, the others on another
def test_structured_runs_all_its_rows(project: Project) -> None:
    run_study(project, "structured")


@pytest.mark.timeout(2400)
@pytest.mark.xdist_group("studies")
def test_studies_run_all_their_rows_and_share_the_rest(project: Project) -> None:
    """One after the other in a workspace: what an earlier study has made is not made again."""
    first, *others = (run_study(project, name) for name in ("x3kd", "simdistill", "combined"))
    common = {"generate@city", "prepare", "teacher@lidar", "evaluate_teacher@lidar"}
    assert common <= first
    assert all(common.isdisjoint(stages) for stages in others)


def run_study(project: Project, name: str) -> set[str]:
    """Lay a study over the parameters and run its stages; every variant is trained, scored and in the table.

    Returns:
        The stages that ran.
    """
    project.run(sys.executable, "-m", "pipeline", "study", name, "--profile", "smoke")
    # Studies train some models for long; that evaluations draw pictures is seen in test_smoke.py.
    edit_params(project.root, [(r"epochs: \d+", "epochs: 1"), (r"pictures: \d+", "pictures: 0")])
    ran = run_all(project.root)
    check_table(project.root)
    return ran


def check_table(root: Path) -> None:
    """Every variant has its line of metrics, with its row of the paper if it has one, and behind it a line of costs."""
    params = load_params(root)
    lines = (root / "reports/table.md").read_text().splitlines()
    for variant in params.study.variants:
        line, *others = [line for line in lines if line.startswith((f"| {variant} |", f"| {variant} ("))]
        assert (params.variants[variant].row or "") in line
        assert any("×" in other for other in others)
        metrics = json.loads((root / f"reports/metrics/{variant}-0.json").read_text())
        assert f"| {metrics['mAP']:.3f}" in line
