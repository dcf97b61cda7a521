"""Launchers: where a stage's processes are started. Chosen by environment; in the stage's cmd it would invalidate it.

`local` runs the stage in this process, `torchrun` in several of this host where it is worth it (the default), `slurm`
as a batch job, `ray` in actors of a cluster. The last two start the same stage command on another machine, which sees
the same files; this process then waits for it, passes its lines on and ends as it ended.
"""

from __future__ import annotations

import importlib
import os

from base.errors import PipelineError
from pipeline.launchers.job import UNDER, Job

__all__ = ["FAR", "LAUNCHERS", "UNDER", "Job", "chosen", "run"]

FAR = ("slurm", "ray")  # on other machines, whose GPUs are no matter of leases here, and whose queues take time
LAUNCHERS = ("local", "torchrun", *FAR)


def chosen() -> str:
    """The launcher that PIPELINE_LAUNCHER names."""
    launcher = os.environ.get("PIPELINE_LAUNCHER", "torchrun")
    if launcher not in LAUNCHERS:
        raise PipelineError(f"PIPELINE_LAUNCHER={launcher!r}: allowed are {', '.join(LAUNCHERS)}")
    return launcher


def run(job: Job) -> int:
    """Run a stage with the chosen launcher; returns its exit code: 0, 1 (failed) or PREEMPTED."""
    return int(importlib.import_module(f"pipeline.launchers.{chosen()}").run(job))
