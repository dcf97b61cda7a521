"""Launchers: which one, with what, how many processes, and how two agents of torchrun become one run."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from base.errors import PipelineError
from base.stopping import PREEMPTED
from config.graph import StageSpec
from pipeline import launchers
from pipeline.launchers import Job, slurm, torchrun
from pipeline.launchers.job import Stopping
from results.tracking.runs import NullTracker
from tests.pipeline.detecting import fit
from tests.pipeline.project import Project, free_port
from training.run import never

STAGE = ("pipeline", "stage", "distill", "--key", "baseline-0")


def job(**meta: Any) -> Job:
    """A job of a stage with these resources; run here, it answers 0."""
    spec = StageSpec("distill", "xod-0", "exec it", {}, {}, ("out",), meta)
    return Job.of(spec, Path("/project"), lambda: 0)


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIPELINE_")] + ["RANK"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    many = job(gpus=4, distributed=True)
    assert torchrun.processes(many, 0) == 1
    assert torchrun.processes(many, 1) == 1
    assert torchrun.processes(many, 4) == 4
    assert torchrun.processes(job(gpus=4), 4) == 1
    monkeypatch.setenv("PIPELINE_PROCESSES", "2")
    assert torchrun.processes(many, 0) == 2
    assert torchrun.processes(job(), 0) == 1
    monkeypatch.setenv("PIPELINE_PROCESSES", "two")
    with pytest.raises(PipelineError, match="PIPELINE_PROCESSES='two'"):
        torchrun.processes(many, 0)


def test_the_launcher_is_chosen_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launchers.chosen() == "torchrun"
    assert launchers.run(job(distributed=True)) == 0
    monkeypatch.setenv("PIPELINE_LAUNCHER", "local")
    monkeypatch.setenv("PIPELINE_PROCESSES", "2")
    assert launchers.run(job(distributed=True)) == 0
    monkeypatch.setenv("PIPELINE_LAUNCHER", "slorm")
    with pytest.raises(PipelineError, match="PIPELINE_LAUNCHER='slorm': allowed are local, torchrun, slurm, ray"):
        launchers.run(job())


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"gpus": -1}, r"distill@xod-0: meta.gpus is -1 in dvc.yaml: a whole number, 0 or more"),
        ({"gpus": "two"}, "meta.gpus is 'two'"),
        ({"nodes": 0, "distributed": True}, "meta.nodes is 0"),
        ({"nodes": True}, "meta.nodes is True"),
        ({"cpus": 0.5}, "meta.cpus is 0.5"),
        ({"timeout_h": 0}, "meta.timeout_h is 0 in dvc.yaml: hours above 0"),
        ({"nodes": 2}, "meta.nodes is 2 in dvc.yaml, which needs `distributed: true`"),
    ],
)
def test_resources_that_make_no_sense(meta: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        job(**meta)


def test_what_another_machine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"PIPELINE_PARENT_RUN": "7", "MLFLOW_TRACKING_URI": "http://x", "OMP_NUM_THREADS": "3", "DVC_SITE": "x"}
    for name, value in (told | {"PIPELINE_LAUNCHER": "ray", "SLURM_JOB_ID": "1", "SESSION": "mine"}).items():
        monkeypatch.setenv(name, value)
    there = job().far_environment("ray", gpus_given=False)
    assert told.items() <= there.items()
    assert there["PATH"].startswith(f"{Path(sys.executable).parent}:")
    assert there["PIPELINE_LAUNCHER"] == "torchrun"  # ray would start it once more
    assert not {"CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "SESSION", "PIPELINE_GPU_LEASES"} & there.keys()
    assert job().far_environment("slurm", gpus_given=True)["PIPELINE_GPU_LEASES"] == ""


def test_what_slurm_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = slurm.options(job(gpus=2, cpus=8, timeout_h=1.5), gpus=True)
    assert {"--gres=gpu:2", "--cpus-per-task=8", "--nodes=1", "--time=90", "--signal=B:TERM@120"} <= set(asked)
    plain = slurm.options(job(gpus=2, timeout_h=0.01), gpus=False)
    assert {"--time=1", "--signal=B:TERM@15"} <= set(plain)  # a minute: the signal must not come at its beginning
    assert not [option for option in plain if option.startswith(("--gres", "--cpus"))]
    monkeypatch.setenv("PIPELINE_SLURM_OPTIONS", "--partition='a b' --time=7")
    assert slurm.options(job(timeout_h=1), gpus=False)[-2:] == ["--partition=a b", "--time=7"]
    monkeypatch.setenv("PIPELINE_SLURM_OPTIONS", "--partition='a")
    with pytest.raises(PipelineError, match="PIPELINE_SLURM_OPTIONS"):
        slurm.options(job(), gpus=False)


@pytest.mark.parametrize("nodes", [1, 3])
def test_the_batch_script_is_a_script(nodes: int, tmp_path: Path) -> None:
    """Its last command replaces the shell, so that a signal to the batch step reaches the stage."""
    text = slurm.script(job(nodes=nodes, distributed=True))
    (tmp_path / "script").write_text(text)
    assert subprocess.run(["sh", "-n", tmp_path / "script"], check=False).returncode == 0
    assert text.splitlines()[-1] == f"exec {shlex.join(job().argv)}"


@pytest.mark.parametrize(
    ("state", "code", "expected"),
    [
        ("COMPLETED", "0:0", 0),
        ("FAILED", "1:0", 1),
        ("FAILED", "75:0", PREEMPTED),
        ("TIMEOUT", "0:15", PREEMPTED),
        ("PREEMPTED", "0:15", PREEMPTED),
        ("CANCELLED", "75:0", "CANCELLED"),
        ("FAILED", "0:9", "FAILED"),
        ("NODE_FAIL", "0:0", "NODE_FAIL"),
        ("OUT_OF_MEMORY", "0:125", r"OUT_OF_MEMORY \(Because\), exit code 0:125, nodes n1; it printed logs/7"),
    ],
)
def test_how_a_job_ended(state: str, code: str, expected: int | str) -> None:
    report = slurm.Report(state, "Because", code, "n1")
    if isinstance(expected, int):
        assert slurm._exit_code(job(), "7", report, Path("/project/logs/7")) == expected
    else:
        with pytest.raises(slurm.SlurmError, match=expected):
            slurm._exit_code(job(), "7", report, Path("/project/logs/7"))


def test_a_signal_is_passed_on_once() -> None:
    told: list[int] = []
    with Stopping() as stopping:
        os.kill(os.getpid(), 15)
        stopping.pass_on_to(lambda: told.append(1))  # it came before there was something to stop
        os.kill(os.getpid(), 15)
        assert told == [1]
        assert not stopping.insisted
        os.kill(os.getpid(), 2)
        assert stopping.insisted
    assert told == [1]


# --- several processes


TRAINING = """
import shutil
from tests.pipeline.detecting import fit

def run(context):
    state = fit(context.scratch, context.tracker, context.stop.is_set)
    if context.rank == 0:
        for name in ("trace.jsonl", "state.safetensors"):
            shutil.copy(context.scratch / name, name)
    context.publish(context.scratch / "state.safetensors", f"outputs/students/{context.key}")
"""


def test_two_agents_train_what_one_process_does(make_project: Callable[..., Project], tmp_path: Path) -> None:
    """Two "nodes" on this machine, a process each, meet as those of a cluster do; the losses are those of one process.

    The detector is a camera student with group norms: batch norm takes its statistics from the samples of a process.
    """
    project = make_project(OMP_NUM_THREADS="1")
    project.edit("dvc.yaml", "deps: [stages/distill.py, outputs/index]", "deps: [stages/distill.py]")
    project.edit("dvc.yaml", "meta: {gpus: 1, timeout_h: 1, distributed: true}", "meta: {nodes: 2, distributed: true}")
    project.write("stages/distill.py", TRAINING)
    alone = tmp_path / "alone"
    alone.mkdir()
    fit(alone, NullTracker(), never)
    meeting = {"PIPELINE_UNDER": "slurm", "PIPELINE_RENDEZVOUS": f"127.0.0.1:{free_port()}"}
    agents = [project.start(*STAGE, **meeting, PIPELINE_NODE_RANK=str(rank)) for rank in (1, 0)]
    for agent in agents:
        output, _ = agent.communicate(timeout=120)
        assert agent.returncode == 0, output
    traces = (alone / "trace.jsonl", project.root / "trace.jsonl")
    one, two = ([json.loads(line) for line in trace.read_text().splitlines()] for trace in traces)
    assert len(one) == len(two) == 4
    for own, shared in zip(one, two, strict=True):
        assert own.keys() == shared.keys()
        for name, value in own.items():
            assert shared[name] == pytest.approx(value, rel=1e-5, abs=1e-7), (name, own["step"])
    states = [load_file(path) for path in (alone / "state.safetensors", project.root / "state.safetensors")]
    assert max(float((states[0][name] - states[1][name]).abs().max()) for name in states[0]) < 1e-4
