"""Child processes in process groups of their own, which are ended whole."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

import psutil

from base import redaction
from base.environment import die_with_parent

Child = subprocess.Popen[str]


class Children:
    """The children of one run. Each leads a session, so that a signal reaches everything it started."""

    def __init__(self) -> None:
        self.stopped = False
        self._running: set[Child] = set()
        self._lock = threading.RLock()  # a signal handler may find its own thread inside

    def start(
        self, command: Sequence[str], env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Start a child that also dies when this process is killed. After `stop` nothing starts any more."""
        with self._lock:
            if self.stopped:
                raise InterruptedError("the run is being stopped")
            child = Child(command, env=env, text=True, start_new_session=True, preexec_fn=die_with_parent, **options)
            self._running.add(child)
            return child

    def forget(self, child: Child) -> None:
        """Take note that a child has ended."""
        with self._lock:
            self._running.discard(child)

    def stop(self, grace: float) -> None:
        """End all children: SIGTERM to every group, SIGKILL to what is left after `grace` seconds."""
        with self._lock:
            self.stopped = True
            groups = [child.pid for child in self._running]
        stop_groups(groups, grace)


def stop_groups(groups: Sequence[int], grace: float) -> None:
    """SIGTERM to process groups; SIGKILL to those with a living member after `grace` seconds."""
    for group in groups:
        _signal(group, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while (left := _alive(groups)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for group in left:
        _signal(group, signal.SIGKILL)


def together(commands: Sequence[Sequence[str]], greet: Callable[[], bool], grace: float = 10.0) -> int:
    """Run commands in the foreground until one ends or SIGTERM or Ctrl-C comes, then end all; returns the exit code.

    What they print is passed on without secrets: they are servers of others, which repeat addresses in their errors.
    `greet` is called again and again until it returns True: it waits for them without blocking, and then says hello.
    """
    children = Children()
    ended = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        ended.set()

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "errors": "replace"}
        started = [children.start(command, environment, **pipe) for command in commands]
        readers = [threading.Thread(target=_pass_on, args=[child], daemon=True) for child in started]
        for reader in readers:
            reader.start()
        greeted = False
        while not ended.is_set() and all(child.poll() is None for child in started):
            greeted = greeted or greet()
            ended.wait(0.2)
        if ended.is_set():
            return 0
        for reader, child in zip(readers, started, strict=True):
            if child.poll() is not None:
                reader.join(grace)  # why it ended
        return 1
    finally:
        children.stop(grace)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _pass_on(child: Child) -> None:
    assert child.stdout is not None
    with child.stdout as lines:
        for line in lines:
            with suppress(OSError):  # nobody reads any more, and a server that cannot write either would hang
                print(redaction.redact(line), end="", flush=True)


def _signal(group: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _alive(groups: Sequence[int]) -> list[int]:
    """The groups that have a member which is not a zombie."""
    found: set[int] = set()
    for process in psutil.process_iter(["status"]):
        with suppress(ProcessLookupError):
            group = os.getpgid(process.pid)
            if group in groups and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.add(group)
    return sorted(found)
