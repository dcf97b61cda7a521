"""The DAG on the real keyframes: profile `real` at a smaller size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import Project
from tests.params_files import edit_params

pytestmark = [pytest.mark.whole, pytest.mark.xdist_group("real")]


@pytest.mark.timeout(600)
def test_models_overfit_a_real_keyframe(project: Project, real_dataroot: Path) -> None:
    """Teacher and student find the objects of the keyframe that they were trained on; the devkit says so."""
    (project.root.parent / "shared").symlink_to(real_dataroot.parents[1])
    project.profile("real")
    assert "worlds: []" in (project.root / "params.yaml").read_text()
    smaller = [
        (r"size: \[256, 704\]", "size: [128, 352]"),
        ("cell: 0.8", "cell: 1.6"),
        (r"size: \[0.4, 0.4\]", "size: [0.8, 0.8]"),
        (r"variants: \[baseline, xod-xfd\]", "variants: [baseline]"),
    ]
    edit_params(project.root, smaller)

    assert "generate" not in project.run("dvc", "stage", "list", "--name-only").stdout
    project.run("dvc", "repro")

    metrics = {name: json.loads(content) for name, content in project.metrics().items()}
    assert metrics["lidar.json"]["mAP_present"] >= 0.5
    assert metrics["baseline-0.json"]["mAP_present"] >= 0.2
    lock = (project.root / "dvc.lock").read_text()
    assert str(real_dataroot) not in lock, "dvc.lock holds a path of this machine"
