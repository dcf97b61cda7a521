"""Launchers: how a stage's processes are started. Chosen by environment; in the stage's cmd it would invalidate it.

`local` runs the stage in this process. `torchrun` starts several processes on this host, for stages whose `meta` says
`distributed: true`: as many as PIPELINE_PROCESSES says, else one per leased GPU.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

from pipeline.environment import die_with_parent
from pipeline.errors import PipelineError

LAUNCHERS = ("local", "torchrun")
PREEMPTED = 75  # exit code (EX_TEMPFAIL): stopped by SIGTERM, what is in scratch resumes


def processes(meta: Mapping[str, Any], gpus: int) -> int:
    """Number of processes that a stage is to run in; 1 means here."""
    launcher = os.environ.get("PIPELINE_LAUNCHER", "torchrun" if gpus > 1 else "local")
    if launcher not in LAUNCHERS:
        raise PipelineError(f"PIPELINE_LAUNCHER={launcher!r}: allowed are {', '.join(LAUNCHERS)}")
    if launcher == "local" or not meta.get("distributed") or "RANK" in os.environ:
        return 1
    wanted = os.environ.get("PIPELINE_PROCESSES", str(max(gpus, 1)))
    if not wanted.isdigit() or int(wanted) < 1:
        raise PipelineError(f"PIPELINE_PROCESSES={wanted!r}: a number of processes, 1 or more, is needed")
    return int(wanted)


def torchrun(module_arguments: list[str], count: int) -> int:
    """Run `python -m <module_arguments>` in `count` processes on this host; returns the exit code.

    SIGTERM is passed on and the ranks may take their time to save; a stop that was asked for ends with PREEMPTED.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m"]
    stopped = False
    child: subprocess.Popen[bytes] | None = None

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        if child is not None:
            child.terminate()

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        child = subprocess.Popen([*command, *module_arguments], preexec_fn=die_with_parent)
        if stopped:  # between the handler's installation and the start
            child.terminate()
        code = child.wait()
    finally:
        signal.signal(signal.SIGTERM, previous)
    return PREEMPTED if stopped and code else code
