"""Stages of a project in forks of the test's process, which has the imports that each would otherwise pay for anew."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from collections.abc import Collection, Mapping
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import MappingProxyType

from config import graph
from config.graph import Node
from pipeline.stage import published_since, run_stage
from tests.walks import write_calls

FORK = multiprocessing.get_context("fork")
MODULES = (
    "check",
    "cost",
    "distill",
    "evaluate",
    "evaluate_segmenter",
    "extract",
    "features",
    "film",
    "generate",
    "needs",
    "predict",
    "predict_segmenter",
    "prepare",
    "report",
    "segmenter",
    "teacher",
)


def run_all(root: Path, parallel: int = 2, traced: Mapping[str, Collection[str]] = MappingProxyType({})) -> set[str]:
    """Run every stage of dvc.yaml after the stages that it needs, as its command would; DVC records nothing.

    What has already been published from the same command, dependencies and params does not run again.

    Args:
        root: the project, whose code is this one's.
        parallel: stages at once.
        traced: stage -> functions of it that are written to `calls` when they are first called.

    Returns:
        The stages that ran.

    Raises:
        AssertionError: a stage failed; with what it printed.
    """
    for module in MODULES:
        importlib.import_module(f"stages.{module}")
    waiting = graph.graph(root)
    running: dict[str, ForkProcess] = {}
    ran: set[str] = set()
    while waiting or running:
        for name in ready(waiting, running)[: parallel - len(running)]:
            del waiting[name]
            if not published_since(root, graph.resolve(name, root), 0.0):
                running[name] = start(root, name, traced.get(name, ()))
        if running and (len(running) == parallel or not ready(waiting, running)):
            wait([process.sentinel for process in running.values()])
        for name, process in list(running.items()):
            if not process.is_alive():
                del running[name]
                assert process.exitcode == 0, f"{name} ended with {process.exitcode}:\n{output(root, name).read_text()}"
                ran.add(name)
    return ran


def ready(waiting: Mapping[str, Node], running: Mapping[str, ForkProcess]) -> list[str]:
    """Stages that wait for no other one."""
    unfinished = waiting.keys() | running.keys()
    return [name for name, node in waiting.items() if unfinished.isdisjoint(node.upstream)]


def start(root: Path, name: str, traced: Collection[str]) -> ForkProcess:
    """Start a stage, its output in a file."""
    process = FORK.Process(target=body, args=(root, name, traced))
    process.start()
    return process


def output(root: Path, name: str) -> Path:
    """What a stage printed."""
    return root / f"{name.replace('@', '-')}.out"


def calls(root: Path, name: str) -> Path:
    """Which of the traced functions a stage called, one a line, in the order of their first calls."""
    return output(root, name).with_suffix(".calls")


def body(root: Path, name: str, traced: Collection[str]) -> None:
    """What the command of a stage does, in a process that has imported everything."""
    os.chdir(root)
    sys.stdout = sys.stderr = output(root, name).open("w", buffering=1)
    os.environ["PIPELINE_TRACK_LATER"] = "1"
    base, _, key = name.partition("@")
    if traced:
        write_calls(traced, calls(root, name))
    code = run_stage(base, key or None)
    sys.stdout.flush()
    os._exit(code)  # as a thread that still sends to a tracking server must not hold the process
