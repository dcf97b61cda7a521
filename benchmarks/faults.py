"""What each container makes of damage: a flipped bit, a truncated file, a writer that is killed. For `store_read.py`.

Everything happens in child processes: a truncated file that is mapped kills its reader.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.containers import CONTAINERS, Container, Half, sample_value

SHAPE = (64, 64, 48)
SAMPLES, SHARD = 64, 16
_fork = multiprocessing.get_context("fork")


class ChildDiedError(RuntimeError):
    """A child process was ended by a signal."""


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a process of its own, where libraries may start threads and crash.

    Raises:
        ChildDiedError: naming the signal or the exit code.
    """
    receiver, sender = _fork.Pipe(duplex=False)
    child = _fork.Process(target=lambda: sender.send(function(*arguments)))
    child.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        child.join()
        code = child.exitcode or 0
        raise ChildDiedError(signal.Signals(-code).name if code < 0 else f"exit code {code}") from None
    child.join()
    return result


def damage_table(scratch: Path, kills: int) -> list[dict[str, str]]:
    """A row per container: what a reader gets after each kind of damage.

    Args:
        scratch: folder for small containers.
        kills: how many writers are killed, at moments spread evenly over the time that writing takes.
    """
    values = [sample_value(sample, SHAPE) for sample in range(SAMPLES)]
    return [
        {
            "container": kind.name,
            "flipped bit": _after_damage(kind, values, scratch, _flip),
            "truncated": _after_damage(kind, values, scratch, _truncate),
            "kill -9": _after_kills(kind, values, scratch, kills),
        }
        for kind in CONTAINERS
    ]


def read_all(container: Container, values: Sequence[Half]) -> Counter[str]:
    """How many samples are read right, how many raise an `error`, how many are wrong and nobody says so."""
    outcomes: Counter[str] = Counter()
    try:
        container.open()
    except Exception:
        return Counter(error=len(values))
    for sample, value in enumerate(values):
        try:
            outcomes["right" if np.array_equal(container.read(sample), value) else "silent"] += 1
        except Exception:
            outcomes["error"] += 1
    return outcomes


def _after_damage(
    kind: type[Container], values: Sequence[Half], scratch: Path, damage: Callable[[Path, int, int], None]
) -> str:
    """Write, damage the bytes of one sample in the middle, read everything."""
    with TemporaryDirectory(dir=scratch) as name:
        container = kind(Path(name) / "container", SHAPE, SHARD)
        in_child(container.write, values)
        payload = values[len(values) // 2].tobytes()
        path, offset = _place(container.folder, payload)
        damage(path, offset, len(payload))
        try:
            outcomes = in_child(read_all, container, values)
        except ChildDiedError as died:
            return f"reader dies ({died})"
    return "wrong values, no error" if outcomes["silent"] else "error"


def _place(folder: Path, payload: bytes) -> tuple[Path, int]:
    """File and offset of a sample's bytes."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        offset = path.read_bytes().find(payload)
        if offset >= 0:
            return path, offset
    raise RuntimeError(f"{folder} does not hold the sample's bytes")


def _flip(path: Path, offset: int, length: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset + length // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def _truncate(path: Path, offset: int, length: int) -> None:
    os.truncate(path, offset + length // 2)


def _after_kills(kind: type[Container], values: Sequence[Half], scratch: Path, kills: int) -> str:
    """Kill writers at several moments; count those after which a reader gets wrong values without an error."""
    duration = _write_and_kill(kind, values, scratch, None)[1]
    silent = 0
    for number in range(kills):
        outcomes, _ = _write_and_kill(kind, values, scratch, duration * (number + 0.5) / kills)
        silent += outcomes["silent"] > 0
    return f"wrong values, no error: {silent} of {kills}" if silent else f"error or right: {kills} of {kills}"


def _write_and_kill(
    kind: type[Container], values: Sequence[Half], scratch: Path, delay: float | None
) -> tuple[Counter[str], float]:
    """What is read of a container whose writer was killed after `delay` seconds, and how long the writer lived."""
    with TemporaryDirectory(dir=scratch) as name:
        container = kind(Path(name) / "container", SHAPE, SHARD)
        receiver, sender = _fork.Pipe(duplex=False)
        child = _fork.Process(target=_announced_write, args=(container, values, sender))
        child.start()
        receiver.recv()
        started = time.perf_counter()
        child.join(delay)
        lived = time.perf_counter() - started
        child.kill()
        child.join()
        return in_child(read_all, container, values), lived


def _announced_write(container: Container, values: Sequence[Half], started: Connection) -> None:
    for name in ("lmdb", "safetensors.numpy", "zarr.codecs"):  # not part of the time in which a writer is killed
        importlib.import_module(name)
    started.send(True)
    container.write(values)
