"""The shipped studies at smoke size, by the commands behind `make study`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pipeline.params import load_params
from tests.e2e.conftest import Project

pytestmark = pytest.mark.xdist_group("studies")
STUDIES = ("x3kd", "x3kd-ablations", "x3kd-radar")


@pytest.mark.timeout(1500)
def test_studies_run_all_their_rows(project: Project) -> None:
    """Every variant is trained, scored and in the table; the first study's teachers serve the others."""
    made: dict[str, int] = {}
    for name in STUDIES:
        project.run(sys.executable, "-m", "pipeline", "study", name, "--profile", "smoke")
        project.run(sys.executable, "-m", "pipeline", "run", "--max-parallel", "2")
        check_table(project.root)
        weights = project.root.glob("outputs/teachers/*/model.safetensors")
        teachers = {path.parent.name: path.stat().st_mtime_ns for path in weights}
        assert made.items() <= teachers.items(), f"{name} trained a teacher again"
        made = teachers
    assert made.keys() == {"lidar", "instance", "instance-wide"}


def check_table(root: Path) -> None:
    """Every variant of the study has its line, with the row of the paper where it has one."""
    params = load_params(root / "params.yaml")
    lines = (root / "reports/table.md").read_text().splitlines()
    for variant in params.study.variants:
        [line] = [line for line in lines if line.startswith((f"| {variant} |", f"| {variant} ("))]
        assert (params.variants[variant].row or "") in line
        metrics = json.loads((root / f"reports/metrics/{variant}-0.json").read_text())
        assert f"| {metrics['mAP']:.3f}" in line
