"""The life of a teacher with sparse convolutions: killed, resumed, published, started from, stored, served, scored."""

from __future__ import annotations

import copy
import json
import multiprocessing
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from base.environment import ROOMS
from config.graph import StageSpec
from config.nested import merge
from config.params import Params
from data.preparing.build import build_index
from data.reading.batch import Batch, collate
from data.store import Store
from distill.terms import TermConfig
from models.detectors.build import build_detector
from models.detectors.detector import Detector
from pipeline.commands import export
from results.tracking.runs import NullTracker
from stages import distill, evaluate, extract, predict, teacher
from stages.context import StageContext, StageError, Stop
from stages.inputs.datasets import plain_dataset
from stages.inputs.weights import (
    WEIGHTS,
    checksum_of,
    load_detector,
    save_detector,
    start_as_set,
    start_from,
    start_in_part,
)
from stages.teaching.frozen import grown
from tests.models.factory import GRID, VOXELS, camera_config, fusion_config, voxel_config
from tests.params_files import read_params, write_params
from tests.stages.tasks import task_of

ROOT = Path(__file__).resolve().parents[2]
SAMPLES, STEPS, KILLED_AT = 3, 6, 4  # keyframes of the city's training scene; two epochs of single samples
HALO = 6.4
FUSION = fusion_config(lidar={**VOXELS, "channels": 6})
TAPS = {"boxes": {"serve": "cached-exact"}, "bev_neck": {"serve": "cached-warp", "dtype": "float32"},
        "bev_lift": {"serve": "cached-warp", "halo": HALO}}  # fmt: skip
NECK = {"student": "bev_neck", "distance": "l2", "weight": 1.0}
TERMS = {"cached": NECK | {"teacher": "lidar.bev_neck"}, "online": NECK | {"teacher": "live.bev_neck"}}


def values(city: Path) -> dict[str, Any]:
    """Parameters with a voxel teacher, the same one once more, a fusion teacher and a student that has two terms."""
    raw = copy.deepcopy(read_params(ROOT))
    train = {"epochs": 1, "batch_size": 1, "lr": 1e-3, "precision": "bf16-mixed", "workers": 0}
    long = train | {"epochs": STEPS // SAMPLES, "lr": 0.01, "ema_decay": 0.9, "checkpoint_minutes": 0, "log_every": 1}
    raw["teachers"] |= {name: {"model": voxel_config(), "train": long} for name in ("lidar", "undisturbed")}
    raw["teachers"]["fusion"] |= {"model": FUSION, "train": train}
    raw["stores"] = {
        "lidar": {"teacher": "lidar", "score_threshold": 0.1, "taps": TAPS},
        "live": {"teacher": "lidar", "score_threshold": 0.1, "taps": {"bev_neck": {"serve": "online"}}},
    }
    raw["students"] = {"camera": {"model": camera_config(), "train": train}}
    raw["variants"] = {"taught": {"student": "camera", "terms": TERMS}}
    raw["study"] |= {"segmenters": [], "stores": ["lidar"], "variants": ["taught"], "featured": [], "baselines": []}
    overlay = {
        "data": {"worlds": [], "dataroot": str(city), "version": "v1.0-trainval",
                 "splits": {"train": "train", "val": "val"}},
        "input": {"sweeps": 1, "image": {"size": [32, 64], "resize": [1.0, 1.0], "rotate": 0.0, "flip": 0.0},
                  "bev": {"flip_x": 0.0, "flip_y": 0.0, "rotate": 0.0, "scale": [1.0, 1.0]}},
        "grid": GRID,
        "store": {"shard_samples": 2, "calibration_samples": SAMPLES, "gap_samples": 0},
        "evaluate": {"pictures": 0},
    }  # fmt: skip
    return merge(raw, overlay)


@pytest.fixture(scope="module")
def params(city: Path) -> Params:
    return Params.model_validate(values(city))


def context_of(root: Path, params: Params, stage: str, key: str) -> StageContext:
    outs = (f"outputs/teachers/{key}", f"outputs/stores/{key}", f"reports/stores/{key}.json", f"outputs/students/{key}",
            f"outputs/predictions/{key}", f"outputs/evaluations/{key}", f"reports/metrics/{key}.json")  # fmt: skip
    scratch = root / f".scratch/{stage}-{key}"
    scratch.mkdir(parents=True, exist_ok=True)
    spec = StageSpec(stage, key, "", {}, {}, outs)
    return StageContext(stage, key, params, spec, root, scratch, NullTracker(), Stop(), 0)


class Waiting(NullTracker):
    """A tracker that never comes back from the step in which the run is to be killed."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        if step == KILLED_AT:
            threading.Event().wait()


def kill_in_step(context: StageContext) -> None:
    """Train in a process of its own, and kill -9 it when a step is done whose checkpoint is not written."""
    context.tracker = Waiting()
    process = multiprocessing.get_context("fork").Process(target=teacher.run, args=(context,))
    process.start()
    trace, deadline = context.scratch / "trace.jsonl", time.monotonic() + 120
    while not trace.exists() or trace.read_text().count("\n") < KILLED_AT:
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.join()


@pytest.fixture(scope="module")
def root(city: Path, params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with the voxel teacher that was killed and resumed, and an untrained camera part."""
    root = tmp_path_factory.mktemp("project")
    for name in ROOMS:
        (root / name).symlink_to(ROOT / name)
    write_params(root, values(city))
    build_index(city, "v1.0-trainval", ("train", "val"), root / "outputs/index")
    kill_in_step(context_of(root, params, "teacher", "lidar"))
    teacher.run(context_of(root, params, "teacher", "lidar"))
    torch.manual_seed(1)
    save_detector(root / "outputs/teachers/start", camera_config(), build_detector(camera_config()).state_dict())
    return root


@pytest.fixture(scope="module")
def student(root: Path, params: Params) -> StageContext:
    """The stage that trained a student from the teacher's store and from the teacher itself."""
    extract.run(context_of(root, params, "extract", "lidar"))
    context = context_of(root, params, "distill", "taught-0")
    distill.run(context)
    return context


def published(root: Path, name: str = "lidar") -> dict[str, Tensor]:
    return load_file(root / f"outputs/teachers/{name}" / WEIGHTS)


def by_hand(root: Path) -> Detector:
    """The published voxel teacher, tensor by tensor: no loader can turn a kernel around."""
    detector = build_detector(voxel_config())
    weights = published(root)
    for name, value in detector.state_dict().items():
        value.copy_(weights[name])
    return detector.eval()


def a_batch(root: Path, params: Params, detector: Detector) -> Batch:
    return next(iter(DataLoader(plain_dataset(root, params, "train", detector), SAMPLES, collate_fn=collate)))


@torch.no_grad()
def test_it_says_what_its_published_weights_say(root: Path, params: Params) -> None:
    found, expected = load_detector(root / "outputs/teachers/lidar"), by_hand(root)
    batch = a_batch(root, params, found)
    ours, theirs = (detector(batch, ["bev_lift", "head"]).taps for detector in (found, expected))
    assert theirs["bev_lift"].std() > 0
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_a_killed_run_resumes_bit_for_bit(root: Path, params: Params) -> None:
    """Against a run that was never interrupted, so that never loaded a weight; its average is what is published."""
    teacher.run(context_of(root, params, "teacher", "undisturbed"))
    traces = [(root / f".scratch/teacher-{name}/trace.jsonl").read_text() for name in ("lidar", "undisturbed")]
    assert traces[0] == traces[1]
    assert len(traces[0].splitlines()) == STEPS
    files = [root / f"outputs/teachers/{name}" / WEIGHTS for name in ("lidar", "undisturbed")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_other_models_start_from_it(root: Path, params: Params) -> None:
    weights, folder = published(root), root / "outputs/teachers/lidar"
    same = build_detector(voxel_config())
    start_from(same, folder, checksum_of((folder / WEIGHTS).read_bytes()))
    assert all(torch.equal(value, weights[name]) for name, value in same.state_dict().items())
    part = build_detector(voxel_config())
    assert start_in_part(part, folder, ["middle"]) == {name for name in weights if name.startswith("middle.")}
    assert all(torch.equal(value, weights[f"middle.{name}"]) for name, value in part.middle.state_dict().items())  # type: ignore[operator,union-attr]
    wider = grown(folder, load_detector(folder), HALO)
    assert all(torch.equal(value, weights[name]) for name, value in wider.state_dict().items())


def test_a_fusion_teacher_starts_from_it_and_trains(root: Path, params: Params) -> None:
    context = context_of(root, params, "fusion", "fusion")
    detector, weights = build_detector(FUSION), published(root)
    start_as_set(detector, params.teachers["fusion"].start, root, params.study.parts("fusion"))
    for name, value in detector.lidar.middle.state_dict().items():  # type: ignore[operator,union-attr]
        assert torch.equal(value, weights[f"middle.{name}"]), name
    teacher.run(context)
    trained = load_detector(root / "outputs/teachers/fusion").state_dict()
    for name in ("conv_input.0.weight", "encoder_layers.encoder_layer1.0.conv1.weight"):
        assert 0 < (trained[f"lidar.middle.{name}"] - weights[f"middle.{name}"]).abs().max() < 0.02  # of a few steps


def test_it_teaches_a_student_from_its_store_and_in_the_step(root: Path, params: Params, student: StageContext) -> None:
    expected = by_hand(root)
    batch = a_batch(root, params, expected)
    with torch.no_grad():
        maps = expected(batch, ["bev_neck"]).taps["bev_neck"]
    store = Store.open(root / "outputs/stores/lidar")
    side = int(2 * (GRID["range"] + HALO) / GRID["cell"])
    for token, value in zip(batch.tokens, maps, strict=True):
        stored = store.read(token)
        # A sample's map is equal whatever it shares a batch with, but for the last bits.
        np.testing.assert_allclose(stored["bev_neck"], value.permute(1, 2, 0).numpy(), rtol=1e-4, atol=1e-5)
        assert stored["bev_lift"].shape == (side, side, 6)
    terms = {name: TermConfig(**term) for name, term in TERMS.items()}
    task, batches = task_of(student, build_detector(camera_config()), terms, 2)
    served = task.sources(batches[0])
    torch.testing.assert_close(served["lidar.bev_neck"], served["live.bev_neck"], rtol=1e-4, atol=1e-5)
    steps = [json.loads(line) for line in (student.scratch / "trace.jsonl").read_text().splitlines()]
    assert len(steps) == SAMPLES
    for step in steps:
        assert step["distill/cached"] == pytest.approx(step["distill/online"], rel=1e-3)
    assert load_detector(root / "outputs/students/taught-0").sensors == ("images",)


@pytest.mark.usefixtures("student")
def test_it_is_scored_and_its_student_leaves(root: Path, params: Params) -> None:
    predict.run(context_of(root, params, "predict_teacher", "lidar"))
    evaluate.run(context_of(root, params, "evaluate_teacher", "lidar"))
    metrics = json.loads((root / "reports/metrics/lidar.json").read_text())
    assert metrics["parameters"] == sum(p.numel() for p in by_hand(root).parameters())
    assert 0 <= metrics["NDS"] <= 1
    assert export.run(root, key="taught-0", out=None, formats=["torch"], samples=1) == 0
    with pytest.raises(StageError, match="'lidar': LidarCenterPoint reads LiDAR; only detectors that read"):
        export.run(root, key="lidar", out=None, formats=["onnx"], samples=1)
