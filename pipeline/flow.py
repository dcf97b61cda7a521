"""The Prefect flow over DVC's graph.

dvc.yaml is the only DAG: the flow reads it, asks for the status once, and submits what is out of date (and what follows
from that) as `dvc --wait-for-lock repro --single-item STAGE`, each in a process group of its own. Prefect orders, shows
and cancels; DVC decides whether a stage really runs, and records it.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from filelock import FileLock, Timeout

from pipeline import gpus, graph
from pipeline.environment import cores
from pipeline.errors import PipelineError
from pipeline.graph import Node
from pipeline.launch import PREEMPTED
from pipeline.processes import Children, stop_groups

GRACE_SECONDS = 60.0  # from SIGTERM to SIGKILL of a stage that saves
ATTEMPTS = 3  # of a stage that was preempted or found DVC locked; nothing else is tried again
# DVC's advice on git, after every stage; not passed on.
HINTS = (
    "To track the changes",
    "git add",
    "To enable auto",
    "dvc config",
    "Use `dvc push`",
    "Updating lock",
    "Generating",
)
LOCKED = ("Unable to acquire lock", "is busy, it is being blocked by")
PREEMPTION = f"exited with {PREEMPTED}"
Outcome = Literal["done", "cached", "failed", "skipped"]


@dataclass(frozen=True)
class Step:
    """A stage in a plan; without reasons it is up to date."""

    node: Node
    reasons: list[str]
    beside: int  # stages of the graph that may run at the same time


Plan = dict[str, Step]


@dataclass
class Result:
    """What became of a stage."""

    outcome: Outcome
    seconds: float = 0.0
    note: str = ""


@dataclass
class Run:
    """What the tasks of one flow share."""

    root: Path
    plan: Plan
    slots: int
    children: Children = field(default_factory=Children)
    results: dict[str, Result] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


def make_plan(root: Path, targets: Sequence[str]) -> Plan:
    """The targets and all they need (without targets: everything), each with the reasons to run it."""
    everything = graph.graph(root)
    nodes = graph.select(everything, targets)
    changed = graph.status(root)
    plan: Plan = {}
    for name, node in nodes.items():
        reasons = list(changed.get(name, ()))
        reasons += [f"after {other}" for other in node.upstream if other in plan and plan[other].reasons]
        plan[name] = Step(node, reasons, graph.beside(everything, name))
    return plan


def describe(plan: Plan) -> str:
    """The plan in lines: what runs, on how many GPUs, and why."""
    if not plan:
        return "dvc.yaml has no stages"
    width = max(len(name) for name in plan)
    lines = [f"{'stage':{width}}  action  gpus  why"]
    for name, step in plan.items():
        action = "run" if step.reasons else "cached"
        lines.append(
            f"{name:{width}}  {action:6}  {step.node.meta.get('gpus', 0):>4}  {'; '.join(step.reasons) or 'up to date'}"
        )
    lines.append(f"{sum(bool(step.reasons) for step in plan.values())} of {len(plan)} stages to run")
    return "\n".join(lines)


def run(plan: Plan, root: Path, max_parallel: int | None = None) -> int:
    """Run the flow; returns the exit code: 0, or 1 when a stage failed."""
    if not any(step.reasons for step in plan.values()):
        print("everything is up to date")
        return 0
    lock = FileLock(root / ".dvc" / "tmp" / "flow.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise PipelineError("a flow is already running in this workspace: wait for it, or stop it") from None
    slots = max_parallel or len(gpus.visible_gpus()) or min(2, cores())
    with lock, _ends_with_exit(), _tracked(root, plan) as environment:
        this = Run(root, plan, slots, environment=environment)
        _build_flow(this)()
        print(_summary(this.results), flush=True)
        return 1 if any(result.outcome in ("failed", "skipped") for result in this.results.values()) else 0


def _build_flow(this: Run) -> Any:
    """The Prefect flow of a plan; its body runs in the main thread, its tasks in `slots` threads."""
    from prefect import flow, task
    from prefect.artifacts import create_markdown_artifact
    from prefect.cache_policies import NO_CACHE
    from prefect.states import Completed, Failed
    from prefect.task_runners import ThreadPoolTaskRunner

    @task(cache_policy=NO_CACHE, persist_result=False)
    def reproduce(name: str) -> Any:
        if not this.plan[name].reasons:
            this.results[name] = Result("cached")
            return Completed(name="Cached")
        try:
            result = _reproduce(this, name)
        except Exception as error:
            result = Result("failed", note=f"{type(error).__name__}: {error}")
        this.results[name] = result
        print(
            f"[{name}] {result.outcome} in {result.seconds:.1f} s{': ' if result.note else ''}{result.note}", flush=True
        )
        return Completed() if result.outcome == "done" else Failed(message=result.note)

    runner: Any = ThreadPoolTaskRunner(max_workers=this.slots)

    @flow(name="pipeline", persist_result=False, task_runner=runner)
    def pipeline() -> Any:
        with _stops_children(this.children):
            _schedule(this, reproduce)
        create_markdown_artifact(key="summary", markdown=_artifact(this), description="what ran, and the study's table")
        failed = [name for name, result in this.results.items() if result.outcome == "failed"]
        return Failed(message=f"failed: {', '.join(failed)}") if failed else Completed()

    return lambda: pipeline(return_state=True)


def _schedule(this: Run, reproduce: Any) -> None:
    """Submit every stage as soon as its upstream stages are done: a waiting stage must not hold a slot."""
    waiting = dict(this.plan)
    running: dict[str, Any] = {}
    ended: queue.Queue[str] = queue.Queue()
    while waiting or running:
        for name in [name for name in waiting if name not in running]:
            states = [this.results.get(other) for other in waiting[name].node.upstream if other in this.plan]
            if any(state is not None and state.outcome in ("failed", "skipped") for state in states):
                this.results[name] = Result("skipped", note="what it needs failed")
                del waiting[name]
        ready = [
            name
            for name, step in waiting.items()
            if all(other in this.results for other in step.node.upstream if other in this.plan)
        ]
        for name in ready:
            del waiting[name]
            running[name] = reproduce.with_options(name=name).submit(name)
            running[name].add_done_callback(lambda _, name=name: ended.put(name))
        if running:
            name = ended.get()
            running.pop(name)
            this.results.setdefault(name, Result("failed", note="Prefect did not run it"))


def _reproduce(this: Run, name: str) -> Result:
    """Run one stage through DVC, again when it was preempted or DVC was locked."""
    started = time.monotonic()
    for attempt in range(1, ATTEMPTS + 1):
        moment = time.time()
        try:
            code, output = _run_child(this, name, ["repro", "--single-item", name])
        except InterruptedError:
            code, output = 1, "stopped"
        locked = code != 0 and any(sign in output for sign in LOCKED)
        if locked and _finished(this.root, name, moment):
            code, output = _run_child(this, name, ["commit", "--force", name])  # the work is done, not recorded
            locked = code != 0 and any(sign in output for sign in LOCKED)
        again = code != 0 and (locked or PREEMPTION in output) and not this.children.stopped
        if not again or attempt == ATTEMPTS:
            break
        print(f"[{name}] {'DVC was locked' if locked else 'preempted'}: again", flush=True)
        time.sleep(2.0 * attempt)
    seconds = time.monotonic() - started
    if code == 0:
        return Result("done", seconds)
    last = (output.strip() or f"exit code {code}").splitlines()[-1]
    note = "stopped" if this.children.stopped else last.removeprefix(f"ERROR: failed to reproduce '{name}': ")
    return Result("failed", seconds, note)


def _run_child(this: Run, name: str, arguments: list[str]) -> tuple[int, str]:
    """Run `dvc ARGUMENTS` to its end or its timeout, passing its lines on; returns its exit code and its last lines."""
    hours = this.plan[name].node.meta.get("timeout_h")
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", *arguments]
    child = this.children.start(
        command,
        _environment(this, name),
        cwd=this.root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        errors="replace",
    )
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        stop_groups([child.pid], GRACE_SECONDS)

    timer = threading.Timer(float(hours) * 3600, expire) if hours else None
    if timer:
        timer.daemon = True
        timer.start()
    tail: list[str] = []
    try:
        assert child.stdout is not None
        for line in child.stdout:  # ends when the last process of the group has closed it
            if line.strip() and not line.strip().startswith(HINTS):
                print(f"[{name}] {line.rstrip()}", flush=True)
            tail = [*tail[-99:], line]
        code = child.wait()
    finally:
        if timer:
            timer.cancel()
        this.children.forget(child)
    if expired.is_set():
        return code or 1, f"stopped after meta.timeout_h = {hours}"
    return code, "".join(tail)


def _environment(this: Run, name: str) -> dict[str, str]:
    """The environment of a child: this Python first on the path, and its share of the cores where none is set.

    The share follows from the graph and not from what happens to run: another number of threads adds in another order,
    and a stage must give the same bits whether its neighbours are up to date or not.
    """
    environment = {**os.environ, **this.environment}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    threads = cores() // min(this.slots, 1 + this.plan[name].beside)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
    return environment


def _finished(root: Path, name: str, moment: float) -> bool:
    """Whether the stage published all its outs after `moment`, so that only DVC's record of it is missing."""
    from pipeline.stage import published_since

    return published_since(root, graph.resolve(name, root), moment)


@contextmanager
def _stops_children(children: Children) -> Iterator[None]:
    """While inside, SIGTERM and Ctrl-C first end all children, then do what they did before.

    To be entered in the flow's body: Prefect installs a handler of its own, and does not end what tasks started.
    """
    previous: dict[int, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        print("stopping all stages", flush=True)
        children.stop(GRACE_SECONDS)
        if callable(previous[number]):
            previous[number](number, frame)

    previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, handle)
    previous[signal.SIGINT] = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _ends_with_exit() -> Iterator[None]:
    """While inside, SIGTERM is an orderly exit, so that Prefect's temporary server is stopped, too."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def _tracked(root: Path, plan: Plan) -> Iterator[dict[str, str]]:
    """A run that is the parent of the stages' runs; yields what the stages need in their environment."""
    from pipeline.params import read_yaml
    from pipeline.tracking import PARENT, MlflowTracker, git_tags

    profile = read_yaml(root / "params.yaml").get("profile") if (root / "params.yaml").exists() else None
    stages = " ".join(name for name, step in plan.items() if step.reasons)
    tracker = MlflowTracker(
        "flow", root, {"kind": "flow", "profile": profile, "stages": stages[:4000]} | git_tags(root)
    )
    state = "FAILED"
    try:
        yield {PARENT: tracker.id}
        state = "FINISHED"
    except SystemExit:
        state = "KILLED"
        raise
    finally:
        tracker.close(state, 5.0)


def _summary(results: Mapping[str, Result]) -> str:
    """The last lines of a flow: for every failure its log and how to run it again, then counts."""
    from pipeline.stage import log_file, rerun_command

    lines: list[str] = []
    for name in [name for name, result in results.items() if result.outcome == "failed"]:
        base, _, key = name.partition("@")
        lines += [
            f"{name} failed: {results[name].note}",
            f"    log:   {log_file(base, key or None)}",
            f"    rerun: {rerun_command(base, key or None)}",
        ]
    counts = [
        (kind, sum(r.outcome == kind for r in results.values())) for kind in ("done", "cached", "failed", "skipped")
    ]
    return "\n".join([*lines, ", ".join(f"{count} {kind}" for kind, count in counts if count)])


def _artifact(this: Run) -> str:
    """The run for Prefect's pages: a table of what ran, and the study's table where there is one."""
    rows = [
        f"| {name} | {result.outcome} | {result.seconds:.1f} | {result.note} |" for name, result in this.results.items()
    ]
    table = this.root / "reports" / "table.md"
    study = [table.read_text()] if table.exists() else []
    return "\n".join(["| stage | outcome | seconds | note |", "|---|---|---|---|", *rows, "", *study])
