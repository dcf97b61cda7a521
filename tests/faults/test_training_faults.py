"""Faults of a training run, injected into real processes: kill -9, SIGTERM, a full disk, several ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.launch import PREEMPTED
from tests.pipeline.toy import ROOT, trace

TOY = str(ROOT / "tests/pipeline/toy.py")
SLOW = 'task={"pause": 0.02}'  # seconds per step, so that a signal finds the run alive
EXACT = 'task={"norm": false, "dropout": 0.0}'


def start(folder: Path, *settings: str, processes: int = 1) -> subprocess.Popen[str]:
    """Start the toy; with several processes under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), TOY, str(folder), *settings]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env)


def finish(folder: Path, *settings: str, processes: int = 1) -> str:
    """Run the toy to its end; returns its output."""
    process = start(folder, *settings, processes=processes)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def lines(folder: Path) -> int:
    """Steps in the trace."""
    path = folder / "trace.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 60) -> None:
    """Poll until a condition holds, the process being alive."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.001)


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    finish(folder)
    return folder


def assert_same_run(folder: Path, reference: Path) -> None:
    """Same loss trace and, byte for byte, the same published weights."""
    assert trace(folder) == trace(reference)
    assert (folder / "weights.safetensors").read_bytes() == (reference / "weights.safetensors").read_bytes()


def test_kill_at_several_steps(uninterrupted: Path, tmp_path: Path) -> None:
    """With a checkpoint after every step, or (0.001 minutes) after some, so that steps are repeated too."""
    for done, minutes in ((2, 0), (6, 0.001), (11, 0)):
        process = start(tmp_path, SLOW, "workers=1", f"checkpoint_minutes={minutes}")
        wait_for(lambda done=done: lines(tmp_path) >= done, process)  # type: ignore[misc]
        kill(process)
        assert not (tmp_path / "weights.safetensors").exists()
    finish(tmp_path)
    assert_same_run(tmp_path, uninterrupted)


def test_kill_while_a_checkpoint_is_written(uninterrupted: Path, tmp_path: Path) -> None:
    """Stop the process when the temporary file is seen; if it is still there, the kill falls into the write."""
    del uninterrupted
    wide, checkpoints = 'task={"width": 20000}', tmp_path / "checkpoints"  # 50 MB: a write takes a while
    process = start(tmp_path, wide, "epochs=1")
    wait_for(lambda: lines(tmp_path) >= 2 and any(checkpoints.glob("*.tmp-*")), process)
    kill(process)
    whole = sorted(checkpoints.glob("*.safetensors"))
    assert list(checkpoints.glob("*.tmp-*")), "the kill missed the write"
    assert whole
    finish(tmp_path, wide, "epochs=1")
    assert not list(checkpoints.glob("*.tmp-*"))
    finish(tmp_path / "whole", wide, "epochs=1")
    assert_same_run(tmp_path, tmp_path / "whole")


def test_sigterm_saves_and_exits_with_its_code(uninterrupted: Path, tmp_path: Path) -> None:
    process = start(tmp_path, SLOW, "checkpoint_minutes=60", "workers=1")
    wait_for(lambda: lines(tmp_path) >= 4, process)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == PREEMPTED, output
    assert time.monotonic() - asked < 10
    done = lines(tmp_path)
    assert (tmp_path / "checkpoints" / f"step-{done:08d}.safetensors").exists()
    assert 4 <= done < 15
    finish(tmp_path, "checkpoint_minutes=60")
    assert_same_run(tmp_path, uninterrupted)


def test_truncated_newest_checkpoint(uninterrupted: Path, tmp_path: Path) -> None:
    process = start(tmp_path, SLOW)
    wait_for(lambda: lines(tmp_path) >= 5, process)
    kill(process)
    newest = max((tmp_path / "checkpoints").glob("*.safetensors"))
    os.truncate(newest, newest.stat().st_size // 2)
    assert f"{newest} is damaged" in finish(tmp_path)
    assert_same_run(tmp_path, uninterrupted)


def test_full_disk(uninterrupted: Path, tmp_path: Path) -> None:
    """A file-size limit stands in for a full disk: the write fails in the middle, the earlier state stays usable."""
    command = f"ulimit -f 3; exec {sys.executable} {TOY} {tmp_path} 'task={{\"width\": 40}}'"  # 3 kB of 60
    failed = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert failed.returncode == 1
    assert "cannot write" in failed.stderr
    assert "disk is full" in failed.stderr
    assert not list((tmp_path / "checkpoints").iterdir())
    (tmp_path / "trace.jsonl").unlink()
    finish(tmp_path)
    assert_same_run(tmp_path, uninterrupted)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    finish(folder, EXACT, processes=2)
    return folder


def test_two_processes_equal_one(two_processes: Path, tmp_path: Path) -> None:
    finish(tmp_path, EXACT)
    for one, two in zip(trace(tmp_path), trace(two_processes), strict=True):
        for name in ("loss", "mse", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6)
    one_state, two_state = (load_file(folder / "weights.safetensors") for folder in (tmp_path, two_processes))
    for name, tensor in one_state.items():
        torch.testing.assert_close(two_state[name], tensor, rtol=1e-5, atol=1e-5)


def test_resume_under_ddp_and_refusal_of_another_world(two_processes: Path, tmp_path: Path) -> None:
    slow = 'task={"norm": false, "dropout": 0.0, "pause": 0.02}'
    process = start(tmp_path, slow, "checkpoint_minutes=0.001", processes=2)
    wait_for(lambda: lines(tmp_path) >= 6, process)
    kill(process)
    wait_for_orphans(tmp_path)
    alone = start(tmp_path, EXACT)
    output, _ = alone.communicate(timeout=60)
    assert alone.returncode == 1
    assert "was made by 2 processes and this run has 1" in output
    finish(tmp_path, EXACT, processes=2)
    assert_same_run(tmp_path, two_processes)


def wait_for_orphans(folder: Path) -> None:
    """kill -9 of torchrun leaves its ranks; end the ones of this folder and wait until they are gone."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in entry.read_bytes():
                os.kill(int(entry.parent.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue
    time.sleep(0.2)


def test_a_dead_rank_ends_the_others(tmp_path: Path) -> None:
    """One rank meets a NaN and stops: torchrun ends the other, the message names the samples."""
    process = start(tmp_path, EXACT, 'data={"poison": 3}', "workers=1", processes=2)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "token-3" in output
    assert "NonFiniteError" in output
