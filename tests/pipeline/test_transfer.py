"""The order in which batches are copied to a GPU and handed out, on streams that only write down what they are told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from training.trainer import CopiedAhead


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens, in order; "copy" and "step" are the side stream and the one that computes."""
    events: list[str] = []
    active = ["step"]

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            events.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        active.append(chosen.name)
        yield
        active.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copy"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(active[-1]))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(Batch, "log", events)
    monkeypatch.setattr(Batch, "active", active)
    return events


class Batch:
    log: list[str] = []  # noqa: RUF012
    active: list[str] = []  # noqa: RUF012

    def __init__(self, number: int) -> None:
        self.number = number

    def to(self, device: torch.device, *, non_blocking: bool) -> int:
        assert non_blocking
        self.log.append(f"{self.active[-1]} stream copies {self.number}")
        return self.number


def ahead(count: int) -> Any:
    return CopiedAhead(iter([Batch(number) for number in range(count)]), torch.device("cuda", 0))


def test_a_copy_runs_beside_the_step_before_it(log: list[str]) -> None:
    for number in ahead(3):
        log.append(f"step {number}")
    assert log == [
        "copy waits for step",  # nothing
        "copy stream copies 0",
        "step waits for copy",  # batch 0 is whole
        "copy waits for step",  # nothing
        "copy stream copies 1",
        "step 0",
        "step waits for copy",  # batch 1 is whole
        "copy waits for step",  # step 0 has read its batch, whose memory may be given to batch 2
        "copy stream copies 2",
        "step 1",
        "step waits for copy",
        "step 2",
    ]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_every_batch_comes_once_and_in_order(log: list[str], count: int) -> None:
    batches = ahead(count)
    assert list(batches) == list(range(count))
    assert next(batches, None) is None
