"""GPU leases: a stage holds a lock file per GPU id while it runs, so that stages on one host never share a device."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from base.errors import PipelineError

LEASES = "PIPELINE_GPU_LEASES"  # environment: folder of the lock files


def visible_gpus() -> list[str]:
    """Ids of the GPUs this process may use: CUDA_VISIBLE_DEVICES where it is set, else every GPU of the host."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu for gpu in chosen.replace(" ", "").split(",") if gpu and gpu != "-1"]
    if shutil.which("nvidia-smi") is None:
        return []
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False, timeout=60).stdout
    return [str(i) for i, _ in enumerate(line for line in listing.splitlines() if line.startswith("GPU "))]


@contextlib.contextmanager
def lease(count: int, waiting: Callable[[str], None] = print) -> Iterator[list[str]]:
    """Hold `count` GPUs (fewer where the host has fewer, none where it has none) and set CUDA_VISIBLE_DEVICES to them.

    The locks are `flock`s on files of this host: they end with the process that holds them, however it ends.
    A stage that asks for more GPUs than are free waits holding none, so two stages cannot block each other.
    Where a scheduler gave the GPUs (an empty PIPELINE_GPU_LEASES) they are this stage's already. Their ids are no names
    then: behind Slurm's cgroups every job calls its first GPU 0.
    """
    pool = visible_gpus()
    count = min(count, len(pool))
    if count < 1 or os.environ.get(LEASES) == "":
        yield pool[:count]
        return
    handles: dict[str, int] = {}
    try:
        told = False
        while len(handles := _take(pool, count)) < count:
            if not told:
                waiting(f"waiting for {count} of the GPUs {','.join(pool)}: other stages hold them")
                told = True
            time.sleep(0.5 + random.random())
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(handles)
        yield list(handles)
    finally:
        _release(handles)


def _take(pool: list[str], count: int) -> dict[str, int]:
    """Lock `count` of the pool, or nothing at all."""
    handles: dict[str, int] = {}
    for gpu in pool:
        handle = os.open(_lock_file(gpu), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            continue
        handles[gpu] = handle
        if len(handles) == count:
            return handles
    _release(handles)
    return {}


def _release(handles: dict[str, int]) -> None:
    for handle in handles.values():
        os.close(handle)
    handles.clear()


def _lock_file(gpu: str) -> Path:
    folder = Path(os.environ.get(LEASES, Path(tempfile.gettempdir()) / "gpu-leases"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if folder.stat().st_uid == os.getuid():
            folder.chmod(0o1777)  # every user of the host leases from the same folder
    except OSError as error:
        raise PipelineError(f"GPU leases cannot be kept in {folder}: {error}; set {LEASES}") from error
    return folder / f"gpu-{gpu.replace('/', '_')}.lock"
