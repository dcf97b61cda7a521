"""Stages in actors of a real Ray of two nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import psutil
import pytest

from base.stopping import PREEMPTED
from tests.cluster.stages import NAME, prepared
from tests.pipeline.project import ROOT, Project, free_port, wait_until

pytest.importorskip("ray", reason="Ray is absent: pip install ray")

STAGE = ("pipeline", "stage", "distill", "--key", "baseline-0")
# The last one makes Ray keep to 127.0.0.1, which it otherwise takes for an address that others should not be told.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# Two nodes of 4 CPUs and a GPU each, 3 and 5 (numbers: there are none), until stdin ends.
CLUSTER = """
import os, sys
from ray.cluster_utils import Cluster

node = {"num_cpus": 4, "num_gpus": 1, "object_store_memory": 80 * 1024 * 1024, "node_ip_address": "127.0.0.1"}
os.environ["CUDA_VISIBLE_DEVICES"] = "3"
cluster = Cluster(initialize_head=True, head_node_args=node | {"gcs_server_port": int(sys.argv[1])})
os.environ["CUDA_VISIBLE_DEVICES"] = "5"
cluster.add_node(**node)
cluster.wait_for_nodes()
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
pytestmark = pytest.mark.xdist_group("ray")  # in one test process, so that one cluster does


@pytest.fixture(scope="module")
def ray_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a cluster of two nodes."""
    folder = tmp_path_factory.mktemp("ray")
    environment = os.environ | QUIET | {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": "/tmp"}
    with (folder / "cluster.log").open("w") as log:
        cluster = subprocess.Popen(
            [sys.executable, "-c", CLUSTER, str(free_port())],
            env=environment,
            cwd=folder,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
        assert cluster.stdout is not None
        address = cluster.stdout.readline().strip()
        assert address, (folder / "cluster.log").read_text()
        yield address
        family = psutil.Process(cluster.pid).children(recursive=True)
        with suppress(subprocess.TimeoutExpired):
            cluster.communicate(timeout=30)
        for process in [p for p in family if p.is_running()]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture
def project(ray_address: str, make_project: Callable[..., Project]) -> Project:
    """A project whose stages run on the cluster."""
    environment = {"PIPELINE_LAUNCHER": "ray", "RAY_ADDRESS": ray_address, **QUIET}
    return prepared(make_project(**environment), gpus=1, timeout_h=1)


def seen(project: Project, key: str = "baseline-0", rank: int = 0) -> dict[str, Any]:
    return json.loads((project.root / f"seen-{key}-{rank}.json").read_text())


def hanging(project: Project, key: str = "baseline-0", rank: int = 0) -> int:
    """Wait until a stage runs; returns its process id."""
    file = project.root / f"seen-{key}-{rank}.json"
    wait_until(file.exists)
    return int(seen(project, key, rank)["pid"])


def left(project: Project) -> list[psutil.Process]:
    """Stage commands of the project that still run."""
    return [process for process in project.processes() if "stage" in process.cmdline()]


def test_extraction_and_two_variants_at_once(project: Project) -> None:
    """As the flow starts them; each stage with a GPU has one of its own, on whichever node that is."""
    code = (project.root / "stages" / "distill.py").read_text()
    project.write("stages/extract.py", code.replace("outputs/students/{context.key}", "outputs/stores/{context.key}"))
    extract = (
        "  extract:\n    matrix: {store: [lidar]}\n    cmd: exec python -m pipeline stage extract --key lidar\n"
        "    deps: [stages/extract.py]\n    outs: [outputs/stores/lidar]\n    meta: {gpus: 0}\n"
    )
    project.edit("dvc.yaml", "stages:\n", f"stages:\n{extract}")
    project.write("hang", "")
    names = {"lidar": "extract@lidar", "baseline-0": NAME, "xod-0": "distill@xod-0"}
    repro = ("dvc", "--wait-for-lock", "repro", "--single-item")
    runs = [project.start(*repro, name) for name in names.values()]
    for key in names:
        hanging(project, key)
    assert {seen(project, key)["CUDA_VISIBLE_DEVICES"] for key in ("baseline-0", "xod-0")} == {"3", "5"}
    (project.root / "hang").unlink()
    for run, key in zip(runs, names, strict=True):
        output, _ = run.communicate(timeout=60)
        assert run.returncode == 0, output
        assert f"says {key}" in output
    assert project.lines("outputs/stores/lidar") == ["lidar"]
    assert project.repro(*names.values()) == []


def test_failures_have_one_last_word(project: Project) -> None:
    project.write("fail", "")
    output = project.run("dvc", "repro", NAME, code=None)
    assert output.count("ValueError: no such luck") == 1
    assert output.count("failed: distill@baseline-0\n") == 1
    (project.root / "fail").unlink()
    project.write("die", "")
    output = project.run(*STAGE, code=1)
    assert "distill@baseline-0 ended with exit code -9" in output
    assert output.count("failed: distill@baseline-0\n") == 1


def test_sigterm_saves_and_leaves_no_process(project: Project) -> None:
    project.write("hang", "")
    run = project.start(*STAGE)
    hanging(project)
    run.terminate()
    output, _ = run.communicate(timeout=60)
    assert run.returncode == PREEMPTED, output
    assert project.lines("saved") == ["baseline-0"]
    assert left(project) == []


def test_a_killed_coordinator_takes_the_stage_along(project: Project) -> None:
    project.write("hang", "")
    run = project.start(*STAGE)
    pid = hanging(project)
    run.kill()
    run.communicate()
    wait_until(lambda: not psutil.pid_exists(pid), 30)
    wait_until(lambda: left(project) == [], 30)
    (project.root / "hang").unlink()
    project.run(*STAGE)


def test_time_is_limited_from_the_start_of_the_stage(project: Project) -> None:
    project.edit("dvc.yaml", "timeout_h: 1", "timeout_h: 0.001")
    project.write("hang", "")
    output = project.run(*STAGE, code=PREEMPTED)
    assert "meta.timeout_h is over" in output
    assert left(project) == []


def test_a_stage_that_waits_for_cpus_can_be_stopped(project: Project) -> None:
    project.edit("dvc.yaml", "gpus: 1", "gpus: 1, cpus: 64")
    run = project.start(*STAGE)
    assert run.stdout is not None
    lines = iter(run.stdout.readline, "")
    assert any("waits for Ray: 1 nodes with 64 CPU, 1 GPU free on each" in line for line in lines)
    run.terminate()
    output, _ = run.communicate(timeout=60)
    assert run.returncode == PREEMPTED, output
    assert "was stopped while it waited for Ray" in output


def test_two_nodes_are_one_run_of_torchrun(project: Project) -> None:
    project.edit("dvc.yaml", "gpus: 1", "gpus: 1, nodes: 2, distributed: true")
    output = project.run(*STAGE, OMP_NUM_THREADS="1")
    ranks = [seen(project, rank=rank) for rank in (0, 1)]
    assert [rank["world"] for rank in ranks] == [2, 2], output
    assert {rank["CUDA_VISIBLE_DEVICES"] for rank in ranks} == {"3", "5"}
    assert output.count("says baseline-0") == 2


@pytest.mark.parametrize(
    ("environment", "message"),
    [({"RAY_ADDRESS": "127.0.0.1:1"}, "no Ray cluster at RAY_ADDRESS=127.0.0.1:1"), ({}, "ray needs RAY_ADDRESS")],
)
def test_no_cluster(make_project: Callable[..., Project], environment: dict[str, str], message: str) -> None:
    project = prepared(make_project(PIPELINE_LAUNCHER="ray", **environment), gpus=1)
    assert message in project.run(*STAGE, code=1)
