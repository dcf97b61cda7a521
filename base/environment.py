"""The project's root, and the one place that makes its engines quiet, offline and project-local."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

from base import redaction
from base.errors import PipelineError

# The packages of the project.
ROOMS = ("base", "config", "data", "distill", "models", "pipeline", "results", "stages", "training")

# No telemetry, no update checks, no long wait for a server that is away, and no spinning.
_QUIET = {
    "DVC_NO_ANALYTICS": "1",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_LOGGING_LEVEL": "WARNING",
    "PREFECT_LOGGING_LOGGERS_PREFECT_TASK_RUNS_LEVEL": "CRITICAL",  # the flow itself says what failed
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # two lines for every run; failures come with their links
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "GIT_PYTHON_REFRESH": "quiet",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    # OpenMP threads that spin at their barriers stand in the way of whatever else runs: where two training processes
    # share two cores, a step of a camera student took 3-6 s with spinning threads and under 1 s with waiting ones.
    "OMP_WAIT_POLICY": "PASSIVE",
}
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)  # loaded here: a child between fork and exec must not import


def find_root(start: Path | None = None) -> Path:
    """Nearest folder at or above `start` (default: the working directory) that holds dvc.yaml."""
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "dvc.yaml").is_file():
            return folder
    raise PipelineError(f"no dvc.yaml in {start} or above it: run this inside the project")


def prepare(root: Path | None = None) -> Path:
    """Enter the project's root, set every default that is not set yet, learn what is secret; returns the root."""
    root = root or find_root()
    os.chdir(root)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("PREFECT_HOME", str(root / ".prefect"))
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
    redaction.start()
    redaction.learn_settings(root)
    return root


def die_with_parent(sig: int = signal.SIGTERM) -> None:
    """Ask the kernel to send `sig` to this process when its parent dies, even by kill -9 (Linux; elsewhere nothing)."""
    if hasattr(_libc, "prctl"):
        _libc.prctl(_PR_SET_PDEATHSIG, int(sig), 0, 0, 0)


def sync_file_system(handle: int) -> None:
    """Write everything that the file system of an open file still holds in memory to its disk."""
    if not hasattr(_libc, "syncfs") or _libc.syncfs(handle) != 0:
        os.sync()


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
