"""What a training is given beside its task, its data and its settings. No torch: every stage has one at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class Curves(Protocol):
    """Where the values of the steps go."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Log values of a step."""
        ...


def never() -> bool:
    """Nobody asks the training to stop."""
    return False


@dataclass(frozen=True)
class Run:
    """Where a training keeps its state, where its curves go, and who may stop it."""

    seed: int  # of the order of samples and of every draw in the steps
    scratch: Path  # folder of the checkpoints and of `trace.jsonl`, one line per step
    tracker: Curves  # from rank 0
    stop: Callable[[], bool] = never  # asked after every step: when it answers True the state is saved
    label: str = "train"  # name in the progress bar
