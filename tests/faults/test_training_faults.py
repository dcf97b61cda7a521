"""Faults of a training run, injected into real processes: kill -9, SIGTERM, a full disk, several ranks."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from base.stopping import PREEMPTED
from tests.training.toy import ROOT, run, trace

TOY = str(ROOT / "tests/training/toy.py")
PAUSE = {"pause": 0.02}  # seconds per step, so that a signal finds the run alive
EXACT = {"norm": False, "dropout": 0.0}
FORK = multiprocessing.get_context("fork")


def run_logged(folder: Path, settings: dict[str, Any], file_limit: int | None) -> None:
    """Body of a training process: the toy, with its output in a file and optionally a limit on the size of files."""
    sys.stdout = sys.stderr = (folder.parent / f"{folder.name}.log").open("w", buffering=1)
    logging.basicConfig(force=True)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    run(folder, **settings)


def start(folder: Path, *, file_limit: int | None = None, **settings: Any) -> ForkProcess:
    """Start the toy in a process of its own, a fork, which spares it the imports."""
    folder.mkdir(exist_ok=True)
    process = FORK.Process(target=run_logged, args=(folder, settings, file_limit))
    process.start()
    return process


def end(process: ForkProcess, folder: Path) -> str:
    """Wait for a process; returns its output."""
    process.join(60)
    assert not process.is_alive()
    return (folder.parent / f"{folder.name}.log").read_text()


def finish(folder: Path, **settings: Any) -> str:
    """Run the toy to its end; returns its output."""
    process = start(folder, **settings)
    output = end(process, folder)
    assert process.exitcode == 0, output
    return output


def torchrun(folder: Path, **settings: Any) -> subprocess.Popen[str]:
    """Start the toy in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", TOY, str(folder)]
    command += [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env)


def finish_torchrun(folder: Path, **settings: Any) -> None:
    """Run the toy in two processes to its end."""
    process = torchrun(folder, **settings)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output


def lines(folder: Path) -> int:
    """Steps in the trace."""
    path = folder / "trace.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for(condition: Callable[[], bool], alive: Callable[[], bool], seconds: float = 60) -> None:
    """Poll until a condition holds, the process being alive."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert alive(), "the process ended early"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def kill(process: ForkProcess) -> None:
    process.kill()
    process.join()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "whole"
    finish(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def assert_same_run(folder: Path, reference: Path) -> None:
    """Same loss trace and, byte for byte, the same published weights."""
    assert trace(folder) == trace(reference)
    assert (folder / "weights.safetensors").read_bytes() == (reference / "weights.safetensors").read_bytes()


def test_kill_at_several_steps(uninterrupted: Path, folder: Path) -> None:
    """With a checkpoint after every step, or (0.001 minutes) after some, so that steps are repeated too."""
    for done, minutes in ((2, 0), (6, 0.001), (11, 0)):
        process = start(folder, task=PAUSE, workers=1, checkpoint_minutes=minutes)
        wait_for(lambda done=done: lines(folder) >= done, process.is_alive)  # type: ignore[misc]
        kill(process)
        assert not (folder / "weights.safetensors").exists()
    finish(folder)
    assert_same_run(folder, uninterrupted)


def test_kill_while_a_checkpoint_is_written(folder: Path) -> None:
    """Kill when the temporary file of a write is seen."""
    wide, checkpoints = {"width": 10000}, folder / "checkpoints"  # 25 MB: a write takes a while
    process = start(folder, task=wide, epochs=1)
    wait_for(lambda: lines(folder) >= 2 and any(checkpoints.glob("*.tmp-*")), process.is_alive)
    kill(process)
    assert list(checkpoints.glob("*.tmp-*")), "the kill missed the write"
    assert list(checkpoints.glob("*.safetensors"))
    finish(folder, task=wide, epochs=1)
    assert not list(checkpoints.glob("*.tmp-*"))
    reference = folder.parent / "whole"
    finish(reference, task=wide, epochs=1)
    assert_same_run(folder, reference)


def test_sigterm_saves_and_exits_with_its_code(uninterrupted: Path, folder: Path) -> None:
    process = start(folder, task=PAUSE, checkpoint_minutes=60, workers=1)
    wait_for(lambda: lines(folder) >= 4, process.is_alive)
    asked = time.monotonic()
    process.terminate()
    output = end(process, folder)
    assert process.exitcode == PREEMPTED, output
    assert time.monotonic() - asked < 10
    done = lines(folder)
    assert (folder / "checkpoints" / f"step-{done:08d}.safetensors").exists()
    assert 4 <= done < 15
    finish(folder, checkpoint_minutes=60)
    assert_same_run(folder, uninterrupted)


def test_truncated_newest_checkpoint(uninterrupted: Path, folder: Path) -> None:
    process = start(folder, task=PAUSE)
    wait_for(lambda: lines(folder) >= 5, process.is_alive)
    kill(process)
    newest = max((folder / "checkpoints").glob("*.safetensors"))
    os.truncate(newest, newest.stat().st_size // 2)
    assert f"{newest} is damaged" in finish(folder)
    assert_same_run(folder, uninterrupted)


def test_full_disk(uninterrupted: Path, folder: Path) -> None:
    """A file-size limit stands in for a full disk: the write fails in the middle, what was there stays usable."""
    wide = {"width": 100}  # 200 kB
    failing = start(folder, task=wide, file_limit=20_000)
    output = end(failing, folder)
    assert failing.exitcode == 1
    assert "cannot write" in output
    assert "disk is full" in output
    assert not list((folder / "checkpoints").iterdir())
    finish(folder)
    assert_same_run(folder, uninterrupted)


def test_nan_with_workers_ends_the_process(folder: Path) -> None:
    """The error holds the loader alive; its workers must not keep the process from ending."""
    failing = start(folder, data={"poison": 3}, workers=2)
    output = end(failing, folder)
    assert failing.exitcode == 1
    assert "NonFiniteError" in output
    assert "token-3" in output


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "whole"
    finish_torchrun(folder, task=EXACT)
    return folder


def test_two_processes_equal_one(two_processes: Path, folder: Path) -> None:
    finish(folder, task=EXACT)
    for one, two in zip(trace(folder), trace(two_processes), strict=True):
        for name in ("loss", "mse", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-7)
    one_state, two_state = (load_file(run / "weights.safetensors") for run in (folder, two_processes))
    for name, tensor in one_state.items():
        torch.testing.assert_close(two_state[name], tensor, rtol=1e-5, atol=1e-5)


def test_resume_under_ddp_and_refusal_of_another_world(two_processes: Path, folder: Path) -> None:
    process = torchrun(folder, task=EXACT | PAUSE, checkpoint_minutes=0.001)
    wait_for(lambda: lines(folder) >= 6, lambda: process.poll() is None)
    process.kill()
    process.communicate()
    kill_ranks(folder)
    alone = start(folder, task=EXACT)
    output = end(alone, folder)
    assert alone.exitcode == 1
    assert "was made by 2 processes and this run has 1" in output
    finish_torchrun(folder, task=EXACT, gradients_every=2)  # looking at gradients changes nothing between ranks either
    assert_same_run(folder, two_processes)


def kill_ranks(folder: Path) -> None:
    """kill -9 of torchrun leaves its ranks, which have this test's folder in their command: kill those too."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in entry.read_bytes():
                os.kill(int(entry.parent.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue
    time.sleep(0.2)


def test_a_rank_that_fails_ends_the_others(folder: Path) -> None:
    process = torchrun(folder, task=EXACT, data={"poison": 3}, workers=1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "token-3" in output
    assert "NonFiniteError" in output
