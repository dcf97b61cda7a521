"""GPU leases between real processes. The ids are only names: no GPU is touched."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import gpus
from tests.pipeline.project import ROOT

HOLD = """
import os, sys, time
from pipeline import gpus
with gpus.lease(int(sys.argv[1]), lambda text: print(text, flush=True)) as held:
    print("held", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
    sys.stdin.read()
"""


def hold(count: int, folder: Path) -> subprocess.Popen[str]:
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "3,5",
        "PIPELINE_GPU_LEASES": str(folder),
        "PYTHONPATH": str(ROOT),
    }
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", HOLD, str(count)], env=environment, text=True, **pipes)  # type: ignore[call-overload]


def says(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def test_two_stages_never_share_a_gpu(tmp_path: Path) -> None:
    first, second = hold(1, tmp_path), hold(1, tmp_path)
    assert {says(first), says(second)} == {"held 3", "held 5"}
    third = hold(2, tmp_path)
    assert says(third) == "waiting for 2 of the GPUs 3,5: other stages hold them"
    first.kill()  # the lease ends with the process, however it ends
    time.sleep(1.5)
    assert third.poll() is None
    second.communicate("")
    assert says(third) == "held 3,5"
    third.communicate("")
    first.communicate()


def test_fewer_gpus_than_asked_for(tmp_path: Path) -> None:
    child = hold(8, tmp_path)
    assert says(child) == "held 3,5"
    child.communicate("")


def test_without_gpus_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PIPELINE_GPU_LEASES", str(tmp_path / "leases"))
    with gpus.lease(4) as held:
        assert held == []
    assert not (tmp_path / "leases").exists()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_gpus_of_a_scheduler_are_not_leased_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind Slurm's cgroups every job calls its GPU 0: a lease of that name would let one wait for the other."""
    first = hold(2, tmp_path)
    assert says(first) == "held 3,5"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setenv("PIPELINE_GPU_LEASES", "")
    with gpus.lease(1) as held:
        assert held == ["3"]
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,5"
    first.communicate("")
