"""Checkpoint files: whole or absent."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch

from training.checkpoint import CheckpointError, Checkpoints, replacing


def state(value: float) -> dict[str, torch.Tensor]:
    return {
        "weight": torch.full((20, 30), value),
        "half": torch.full((3,), value, dtype=torch.bfloat16),
        "count": torch.tensor(int(value)),
        "empty": torch.zeros(0, 4),
        "flag": torch.tensor([True, False]),
    }


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    made = Checkpoints(tmp_path / "checkpoints")
    made.prepare()
    for step in (10, 20, 30):
        made.save(step, state(step), {"note": "a"})
    return made


def test_round_trip_and_newest_two_stay(checkpoints: Checkpoints) -> None:
    assert checkpoints.steps() == [20, 30]
    latest = checkpoints.latest()
    assert latest is not None
    assert (latest.step, latest.metadata) == (30, {"note": "a"})
    for name, tensor in state(30).items():
        assert torch.equal(latest.tensors[name], tensor)
        assert latest.tensors[name].dtype == tensor.dtype


def test_none_at_the_start(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "absent").latest() is None


def test_equal_states_have_equal_bytes(checkpoints: Checkpoints, tmp_path: Path) -> None:
    other = Checkpoints(tmp_path / "other")
    other.prepare()
    assert other.save(30, state(30), {"note": "a"}).read_bytes() == checkpoints.path(30).read_bytes()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 7)


def truncate_header(path: Path) -> None:
    os.truncate(path, 20)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, truncate_header, empty, flip_bit])
def test_damaged_newest_falls_back_with_its_name(
    checkpoints: Checkpoints, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    damage(checkpoints.path(30))  # type: ignore[operator]
    with caplog.at_level(logging.WARNING):
        latest = checkpoints.latest()
    assert latest is not None
    assert latest.step == 20
    assert str(checkpoints.path(30)) in caplog.text
    assert "damaged" in caplog.text
    checkpoints.save(25, state(25), {})  # the damaged one is of an abandoned future
    assert checkpoints.steps() == [20, 25]


def test_all_damaged_is_a_start_anew(checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture) -> None:
    for step in checkpoints.steps():
        empty(checkpoints.path(step))
    assert checkpoints.latest() is None
    assert "step-00000020" in caplog.text
    assert "step-00000030" in caplog.text


def test_leftovers_of_killed_writes_are_removed(checkpoints: Checkpoints) -> None:
    leftover = checkpoints.folder / "step-00000040.safetensors.tmp-123"
    leftover.write_bytes(b"half")
    assert checkpoints.latest().step == 30  # type: ignore[union-attr]
    checkpoints.prepare()
    assert not leftover.exists()
    assert checkpoints.steps() == [20, 30]


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def fail() -> None:
        with replacing(target) as temporary:
            temporary.write_text("new")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_of_something_else_is_refused(checkpoints: Checkpoints) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, checkpoints.path(30))
    with pytest.raises(CheckpointError, match=r"step-00000030.*damaged"):
        checkpoints.load(30)
