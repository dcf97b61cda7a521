"""Commands in forks of a process that has imported DVC and the command line: each starts a second sooner.

What they do is what `python -m dvc` and `python -m pipeline` do, in a process of their own, with an environment and a
working directory of their own.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from base.environment import die_with_parent

SERVER = multiprocessing.get_context("forkserver")
# Not `stages`: a tiny project has stages of its own.
SERVER.set_forkserver_preload(["dvc.cli", "dvc.repo", "dvc.stage", "dvc.commands.repro", "networkx", "pipeline.cli",
                               "config.graph", "tests.pipeline.warm"])  # fmt: skip
MODULES = ("dvc", "pipeline")  # that can be run so


def run(command: Sequence[str], folder: Path, environment: Mapping[str, str], seconds: float) -> tuple[int, str]:
    """Run `python -m COMMAND` to its end; returns its exit code and what it printed to stdout and stderr.

    Raises:
        AssertionError: it takes longer.
    """
    with tempfile.NamedTemporaryFile("w+") as output:
        process = SERVER.Process(target=body, args=(list(command), folder, dict(environment), output.name))
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            raise AssertionError(f"{' '.join(command)} took longer than {seconds} s:\n{output.read()}")
        return process.exitcode or 0, output.read()


def body(command: list[str], folder: Path, environment: dict[str, str], output: str) -> None:
    """What the process does."""
    die_with_parent()
    handle = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(handle, stream)
    sys.stdin = open(os.devnull)  # noqa: SIM115 (for as long as the process lives)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [str(folder)]
    sys.argv = list(command)
    try:
        sys.exit(importlib.import_module(f"{command[0]}.cli").main(*([command[1:]] if command[0] == "dvc" else [])))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
