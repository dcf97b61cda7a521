"""What every launcher is given, and what those for other machines have in common."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from base.errors import PipelineError

if TYPE_CHECKING:
    from config.graph import StageSpec

# Seconds from SIGTERM until a stage elsewhere is killed: less than the flow's own limit, so that this process is still
# there to do it.
FAR_SECONDS = 45.0
UNDER = "PIPELINE_UNDER"  # environment: the launcher that started this process for another one, which has the last word
RENDEZVOUS = "PIPELINE_RENDEZVOUS"  # environment: host:port of the first of several nodes
NODE_RANK = "PIPELINE_NODE_RANK"  # environment: which of them this is

# What a stage on another machine is told of the environment here. CUDA_VISIBLE_DEVICES is that machine's own.
_PASSED = ("HOME", "LANG", "LD_LIBRARY_PATH", "LOGNAME", "PATH", "SHELL", "USER", "VIRTUAL_ENV")
_PREFIXES = ("AWS_", "DVC_", "GLOO_", "LC_", "MLFLOW_", "NCCL_", "OMP_", "PIPELINE_", "PYTHON", "TORCH_")
_PROXIES = ("http_proxy", "https_proxy", "no_proxy")


@dataclass(frozen=True)
class Job:
    """A stage that is to run, with the resources that its `meta` in dvc.yaml names."""

    name: str  # distill
    key: str | None  # baseline-0
    address: str  # distill@baseline-0
    root: Path
    fingerprint: str
    here: Callable[[], int]  # runs the stage in this process; returns its exit code
    gpus: int  # on each node
    nodes: int
    cpus: int | None  # of each node; None: what the scheduler gives by itself
    timeout_h: float | None
    distributed: bool  # whether the stage can run in several processes

    @classmethod
    def of(cls, spec: StageSpec, root: Path, here: Callable[[], int]) -> Job:
        """The job of a stage. Raises PipelineError: a resource in its `meta` is no number, or too small."""
        gpus, nodes = _whole(spec, "gpus", 0) or 0, _whole(spec, "nodes", 1) or 1
        cpus, hours = _whole(spec, "cpus", 1), spec.meta.get("timeout_h")
        if hours is not None and (not isinstance(hours, int | float) or hours <= 0):
            raise PipelineError(f"{spec.address}: meta.timeout_h is {hours!r} in dvc.yaml: hours above 0 are needed")
        distributed = bool(spec.meta.get("distributed"))
        if nodes > 1 and not distributed:
            raise PipelineError(f"{spec.address}: meta.nodes is {nodes} in dvc.yaml, which needs `distributed: true`")
        return cls(
            spec.name, spec.key, spec.address, root, spec.fingerprint, here, gpus, nodes, cpus, hours, distributed
        )

    @property
    def module(self) -> list[str]:
        """The stage's module and arguments, for `python -m`."""
        return ["pipeline", "stage", self.name, *(["--key", self.key] if self.key else [])]

    @property
    def argv(self) -> list[str]:
        """The stage command."""
        return [sys.executable, "-m", *self.module]

    @property
    def label(self) -> str:
        """The stage's name in file names."""
        return f"{self.name}-{self.key}" if self.key else self.name

    def far_environment(self, launcher: str, *, gpus_given: bool) -> dict[str, str]:
        """Environment of the stage command on another machine, where `launcher` starts it.

        Args:
            launcher: its name.
            gpus_given: whether its scheduler gives GPUs to this job alone, so that they must not be leased again.
        """
        passed = {k: v for k, v in os.environ.items() if k in _PASSED or k.startswith(_PREFIXES)}
        passed |= {k: v for k, v in os.environ.items() if k.lower() in _PROXIES}
        passed["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        return (
            passed
            | {UNDER: launcher, "PIPELINE_LAUNCHER": "torchrun"}
            | ({"PIPELINE_GPU_LEASES": ""} if gpus_given else {})
        )


class Stopping:
    """While entered, SIGTERM and Ctrl-C are noted, and passed on once, instead of ending this process."""

    def __init__(self) -> None:
        self.asked = False
        self.insisted = False  # by a second Ctrl-C: do not wait until something was saved
        self._pass_on: Callable[[], None] | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def pass_on_to(self, stop: Callable[[], None]) -> None:
        """Call `stop` when the signal comes, or now, if it has come."""
        self._pass_on = stop
        if self.asked:
            stop()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.asked = not self.asked, True
        self.insisted |= not first and number == signal.SIGINT  # the parent's death repeats SIGTERM
        if first and self._pass_on:
            self._pass_on()


def _whole(spec: StageSpec, key: str, least: int) -> int | None:
    value = spec.meta.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        raise PipelineError(
            f"{spec.address}: meta.{key} is {value!r} in dvc.yaml: a whole number, {least} or more, is needed"
        )
    return value
