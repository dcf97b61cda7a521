"""The estimate of memory in a dry run: one sample's, times what a GPU gets of a batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from config.graph import Node
from config.profiles import apply_profile
from pipeline import memory


def node(name: str, gpus: int, nodes: int = 1) -> Node:
    return Node(name, "", {"gpus": gpus, "nodes": nodes}, (), ())


@pytest.mark.parametrize(
    ("gpus", "nodes", "samples", "gigabytes"), [(1, 1, 64, 1.3 + 64 * 1.55), (8, 1, 8, 1.3 + 8 * 1.55), (8, 2, 4, 7.5)]
)
def test_a_batch_is_divided_among_the_gpus(folder: Path, gpus: int, nodes: int, samples: int, gigabytes: float) -> None:
    params = apply_profile("nuscenes-x3kd-r50", folder)
    (found,) = memory.estimates(params, [node("distill@x3kd-0", gpus, nodes), node("teacher@lidar", gpus)])
    assert found.of == memory.Training("camera", "distill", 64, samples, gpus * nodes)
    assert found.gigabytes == pytest.approx(gigabytes)


def test_micro_batches_take_less(folder: Path) -> None:
    params = apply_profile("nuscenes-structured-bevdepth", folder)
    (found,) = memory.estimates(params, [node("teacher@camera-large", 8)])
    assert found.of.samples == 4  # of 64 on eight GPUs, in two micro-batches


def test_what_was_not_measured_is_said_beside_what_was(folder: Path) -> None:
    params = apply_profile("nuscenes-x3kd-r50", folder)
    nodes = [node("prepare", 0), node("segmenter@instance", 8), node("teacher@lidar", 8)]
    nodes += [node("distill@x3kd-0", 8), node("distill@x3kd-1", 8)]
    assert memory.describe(params, nodes).splitlines()[2:] == ["  not measured: instance, lidar"]


def test_what_is_too_large_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    params = apply_profile("nuscenes-x3kd-r50", folder)
    nodes = [node(f"distill@x3kd-{seed}", 1) for seed in range(2)]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no GPU here" in memory.describe(params, nodes)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 81559\necho 40960\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    head, line = memory.describe(params, nodes).splitlines()  # both seeds are one line
    assert "estimated" in head
    assert "has 43 GB" in head
    assert line == (
        "  camera: about 100 GB, 64 samples at once of a batch of 64 on 1 GPU; more than there is: "
        "raise resources.distill.gpus, or train.accumulate of camera"
    )
    assert memory.describe(apply_profile("demo", folder), nodes) == ""  # nothing of it was measured
