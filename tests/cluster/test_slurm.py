"""Stages as batch jobs of a real Slurm, under a real DVC."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from base.stopping import PREEMPTED
from tests.cluster.slurm_cluster import Slurm
from tests.cluster.stages import NAME, prepared
from tests.pipeline.project import Project, wait_until

STAGE = ("pipeline", "stage", "distill", "--key", "baseline-0")
pytestmark = pytest.mark.xdist_group("slurm")  # in one test process, so that one cluster does


@pytest.fixture
def project(slurm: Slurm, make_project: Callable[..., Project]) -> Project:
    """A project whose stages are jobs of the cluster."""
    return prepared(make_project(PIPELINE_LAUNCHER="slurm", **slurm.environment), gpus=0, timeout_h=1)


def seen(project: Project, key: str = "baseline-0", rank: int = 0) -> dict[str, Any]:
    return json.loads((project.root / f"seen-{key}-{rank}.json").read_text())


def hanging(project: Project, key: str = "baseline-0", rank: int = 0) -> int:
    """Wait until a stage runs; returns its process id."""
    file = project.root / f"seen-{key}-{rank}.json"
    wait_until(file.exists)
    return int(seen(project, key, rank)["pid"])


def test_a_stage_under_dvc_is_a_job(slurm: Slurm, project: Project) -> None:
    output = project.run("dvc", "repro", NAME, OMP_NUM_THREADS="3")
    assert "distill@baseline-0 is Slurm job" in output
    assert output.count("says baseline-0") == 1
    there = seen(project)
    assert there["SLURMD_NODENAME"] in slurm.nodes
    assert there["OMP_NUM_THREADS"] == "3"
    assert Path(there["python"]).parent == Path(sys.executable).parent
    assert project.lines("outputs/students/baseline-0") == ["baseline-0"]
    assert not list((project.root / "logs" / "slurm").iterdir())
    assert project.repro(NAME) == []


def test_gpus_are_slurms(slurm: Slurm, project: Project) -> None:
    """Two stages with a GPU each on a node: the ids are those that Slurm gave, and nobody leases them again."""
    project.edit("dvc.yaml", "gpus: 0", "gpus: 1")
    project.write("hang", "")
    options = {"PIPELINE_SLURM_OPTIONS": f"--nodelist={slurm.nodes[0]} --overcommit"}
    runs = [project.start(*STAGE[:-1], key, **options) for key in ("baseline-0", "xod-0")]
    for key in ("baseline-0", "xod-0"):
        hanging(project, key)
    assert {seen(project, key)["CUDA_VISIBLE_DEVICES"] for key in ("baseline-0", "xod-0")} == {"0", "1"}
    (project.root / "hang").unlink()
    for run in runs:
        output, _ = run.communicate(timeout=60)
        assert run.returncode == 0, output


def test_a_failing_stage_says_so_once(project: Project) -> None:
    project.write("fail", "")
    output = project.run("dvc", "repro", NAME, code=None)
    assert output.count("ValueError: no such luck") == 1
    assert output.count("failed: distill@baseline-0\n") == 1
    assert output.count("rerun: dvc repro --single-item distill@baseline-0") == 1
    assert "log: logs/distill-baseline-0.log" in output


def test_a_killed_stage_is_told_in_slurms_words(project: Project) -> None:
    project.write("die", "")
    output = project.run(*STAGE, code=1)
    assert "FAILED (JobLaunchFailure), exit code 0:9" in output
    assert output.count("failed: distill@baseline-0\n") == 1


def test_sigterm_here_saves_there_and_leaves_no_job(slurm: Slurm, project: Project) -> None:
    project.write("hang", "")
    run = project.start(*STAGE)
    hanging(project)
    run.terminate()
    output, _ = run.communicate(timeout=60)
    assert run.returncode == PREEMPTED, output
    assert project.lines("saved") == ["baseline-0"]
    assert slurm.jobs() == []
    assert project.processes() == []


def test_a_job_that_waits_is_taken_out_of_the_queue(slurm: Slurm, project: Project) -> None:
    run = project.start(*STAGE, PIPELINE_SLURM_OPTIONS="--hold")
    wait_until(slurm.jobs)
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == PREEMPTED, output
    assert slurm.jobs() == []


def test_a_job_that_an_administrator_cancels(slurm: Slurm, project: Project) -> None:
    project.write("hang", "")
    run = project.start(*STAGE)
    hanging(project)
    slurm.say("scancel", *slurm.jobs())
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 1, output
    assert "CANCELLED, exit code" in output
    assert output.count("failed: distill@baseline-0\n") == 1


def test_a_job_that_gives_way_to_another_is_preempted(slurm: Slurm, project: Project) -> None:
    project.write("hang", "")
    run = project.start(*STAGE, PIPELINE_SLURM_OPTIONS="--nodelist=node0 --exclusive")
    hanging(project)
    urgent = ["sbatch", "--partition=first", "--nodelist=node0", "--exclusive", "--output=/dev/null", "--wrap=true"]
    slurm.say(*urgent)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == PREEMPTED, output
    assert "was stopped: PREEMPTED" in output


def test_a_job_saves_before_its_time_is_over(slurm: Slurm, project: Project) -> None:
    project.edit("dvc.yaml", "timeout_h: 1", "timeout_h: 0.001")  # a minute, which is Slurm's least
    project.write("hang", "")
    output = project.run(*STAGE, code=PREEMPTED)
    assert project.lines("saved") == ["baseline-0"], output
    assert slurm.jobs() == []


def test_what_slurm_refuses(project: Project) -> None:
    output = project.run(*STAGE, code=1, PIPELINE_SLURM_OPTIONS="--partition=nowhere")
    assert "Slurm did not take distill@baseline-0" in output
    assert "invalid partition specified: nowhere" in output
    assert "--partition=nowhere" in output
    assert output.count("failed: distill@baseline-0\n") == 1


def test_what_a_killed_coordinator_left_is_ended_first(slurm: Slurm, project: Project) -> None:
    project.write("hang", "")
    first = project.start(*STAGE)
    pid = hanging(project)
    first.kill()
    first.communicate()
    assert len(slurm.jobs()) == 1
    (project.root / "seen-baseline-0-0.json").unlink()
    second = project.start(*STAGE)
    assert hanging(project) != pid
    assert not psutil.pid_exists(pid)
    assert project.lines("saved") == ["baseline-0"]
    (project.root / "hang").unlink()
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 0, output
    assert "which an earlier run left" in output
    assert slurm.jobs() == []


def test_two_nodes_are_one_run_of_torchrun(slurm: Slurm, project: Project) -> None:
    project.edit("dvc.yaml", "gpus: 0", "gpus: 0, nodes: 2, distributed: true")
    output = project.run("dvc", "repro", NAME, OMP_NUM_THREADS="1")
    ranks = [seen(project, rank=rank) for rank in (0, 1)]
    assert [rank["SLURMD_NODENAME"] for rank in ranks] == slurm.nodes, output
    assert [rank["world"] for rank in ranks] == [2, 2]
    assert output.count("says baseline-0") == 2
    assert project.lines("outputs/students/baseline-0") == ["baseline-0"]


def test_stopping_two_nodes(slurm: Slurm, project: Project) -> None:
    project.edit("dvc.yaml", "gpus: 0", "gpus: 0, nodes: 2, distributed: true")
    project.write("hang", "")
    run = project.start(*STAGE, OMP_NUM_THREADS="1")
    for rank in (0, 1):
        hanging(project, rank=rank)
    run.terminate()
    output, _ = run.communicate(timeout=90)
    assert run.returncode == PREEMPTED, output
    assert "baseline-0" in project.lines("saved")
    assert slurm.jobs() == []
    wait_until(lambda: project.processes() == [], 20)


def test_secrets_are_in_no_command_line(slurm: Slurm, project: Project) -> None:
    project.write("hang", "")
    run = project.start(*STAGE, MLFLOW_TRACKING_PASSWORD="open-sesame")
    stage = psutil.Process(hanging(project))
    assert stage.environ()["MLFLOW_TRACKING_PASSWORD"] == "open-sesame"
    commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not any("open-sesame" in argument for command in commands for argument in command)
    assert "open-sesame" not in slurm.say("scontrol", "show", "job", *slurm.jobs())
    (project.root / "hang").unlink()
    run.communicate(timeout=60)


def test_without_slurm(make_project: Callable[..., Project], tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").symlink_to("/usr/bin/git")
    project = prepared(make_project(PIPELINE_LAUNCHER="slurm", PATH=str(tmp_path / "bin")), gpus=0)
    output = project.run(*STAGE, code=1)
    assert "needs Slurm's command 'squeue', which is not on PATH" in output
