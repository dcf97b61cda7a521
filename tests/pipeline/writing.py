"""Processes that write to one tracking store at once, forked from a process that has imported MLflow."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path

from results.tracking import runs as tracking

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["mlflow.store.tracking.sqlalchemy_store", "mlflow.tracking", "results.tracking.runs"])


def write_at_once(root: Path, uri: str, names: Sequence[str], steps: int, params: int) -> None:
    """Have a process per name write a run of that name, with two metrics, parameters and a text."""
    writers = [CONTEXT.Process(target=_write, args=(root, uri, name, steps, params)) for name in names]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(250)
    assert [writer.exitcode for writer in writers] == [0] * len(names)


def _write(root: Path, uri: str, name: str, steps: int, params: int) -> None:
    os.environ["MLFLOW_TRACKING_URI"] = uri
    os.environ.pop(tracking.LATER, None)
    tracker = tracking.MlflowTracker(name, root, {"writer": name})
    tracker.log_params({str(number): number for number in range(params)})
    for step in range(steps):
        tracker.log_metrics({"train/loss": step / 2, "train/lr": -step}, step)
    tracker.log_text(name * 1000, "texts/name.txt")
    tracker.close("FINISHED", 120)
