"""`export` as a person types it, on the real keyframes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch

from config.files import load_params
from data.preparing.build import build_index
from models.detectors.build import build_detector
from stages.context import INDEX
from stages.inputs.weights import save_detector
from tests.e2e.conftest import Project
from tests.params_files import lay_text

pytestmark = [pytest.mark.whole, pytest.mark.xdist_group("real")]
VERSION, SPLITS = "v1.0-mini", ("mini_train", "mini_val")


@pytest.mark.timeout(600)
def test_a_student_leaves_with_real_calibration(project: Project, real_dataroot: Path) -> None:
    """A student of the parameters, at its size, on both keyframes: the files are there, and the figures are printed."""
    data = f"{{worlds: [], dataroot: {real_dataroot}, version: {VERSION}, splits: {{val: {SPLITS[1]}}}}}"
    lay_text(project.root, f"data: {data}\n")
    params = load_params(project.root)
    build_index(real_dataroot, VERSION, SPLITS, project.root / INDEX, sweeps=params.input.sweeps)
    torch.manual_seed(0)
    config = params.students["camera-small"].model
    student = build_detector(config)
    save_detector(project.root / "outputs/students/baseline-0", config, student.state_dict())

    done = project.run(sys.executable, "-m", "pipeline", "export", "baseline-0", "--format", "onnx", "--samples", "9")

    folder = project.root / "outputs/exports/baseline-0"
    assert {file.name for file in folder.iterdir()} == {"model.onnx", "model.json"}
    described = json.loads((folder / "model.json").read_text())
    assert described["checked"]["keyframes"] == 1
    assert max(described["checked"]["largest_difference"]["onnx"].values()) <= 1e-3
    assert re.search(r"baseline-0: CameraBEVDepth, \d\.\d+ M parameters, torch \d+\.\d ms", done.stdout)
    assert re.search(r"model\.onnx: \d+\.\d MB, \d+\.\d ms", done.stdout)
    inputs = onnxruntime.InferenceSession(folder / "model.onnx").get_inputs()
    size = config.get("image", params.input.image.size)
    assert {one.name: one.shape for one in inputs}["images"] == [1, student.frames, 6, 3, *size]
    assert str(real_dataroot) not in (folder / "model.json").read_text()

    refused = project.run(sys.executable, "-m", "pipeline", "export", "baseline-1", check=False)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith("error: export 'baseline-1': no such student")
