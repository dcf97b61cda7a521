"""The Prefect flow over DVC's graph.

dvc.yaml is the only DAG: the flow reads it, asks for the status once, and submits what is out of date as
`dvc --wait-for-lock repro --single-item STAGE`, each in a process group of its own. A stage that only follows such a
one is decided when that has ended: by the hashes of what it reads, without a process. Prefect orders, shows and
cancels; DVC decides whether a stage really runs, and records it.
"""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal, get_args

from base import redaction
from base.environment import cores
from base.errors import PipelineError
from base.stopping import PREEMPTED
from config import graph
from config.files import load_params
from config.graph import Node
from pipeline import launchers, slots
from pipeline.processes import Children, stop_groups

NAME = "pipeline"  # of the flow, for Prefect
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
COUNTS = re.compile(r"(?:.* )?(\d+)/([1-9]\d*)(?: .*)?")  # base/progress.py: `extract 40/128 ...`
Action = Literal["run", "perhaps", "cached"]
Outcome = Literal["done", "cached", "failed", "skipped"]


@dataclass(frozen=True)
class Step:
    """A stage in a plan."""

    node: Node
    reasons: list[str]  # of its own to run
    after: list[str]  # stages of the plan that it reads from and that are not up to date
    beside: int  # stages of the graph that may run at the same time

    @property
    def action(self) -> Action:
        """What becomes of it: one that only follows others runs if these make something else than before."""
        return "run" if self.reasons else "perhaps" if self.after else "cached"

    @property
    def why(self) -> str:
        """Its reasons in words."""
        return "; ".join([*self.reasons, *(f"after {name}" for name in self.after)]) or "up to date"


Plan = dict[str, Step]


@dataclass
class Result:
    """What became of a stage; Prefect keeps and shows it."""

    outcome: Outcome
    seconds: float = 0.0
    note: str = ""

    def __post_init__(self) -> None:
        self.note = redaction.redact(self.note)


@dataclass
class Run:
    """What the tasks of one flow share."""

    root: Path
    plan: Plan
    slots: int  # stages at once
    children: Children = field(default_factory=Children)
    results: dict[str, Result] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    link: str = ""  # the flow's run in MLflow


def make_plan(root: Path, targets: Sequence[str]) -> Plan:
    """The targets and all they need (without targets: everything), each with the reasons to run it."""
    load_params(root)  # says what is wrong in words, which DVC may not
    everything, changed = graph.graph_and_status(root)
    nodes, beside = graph.select(everything, targets), graph.beside(everything)
    plan: Plan = {}
    for name, node in nodes.items():
        after = [other for other in node.upstream if other in plan and plan[other].action != "cached"]
        plan[name] = Step(node, list(changed.get(name, ())), after, beside[name])
    return plan


def describe(plan: Plan) -> str:
    """The plan in lines: what runs, on how many GPUs, and why."""
    if not plan:
        return "dvc.yaml has no stages"
    width = max(len(name) for name in plan)
    lines = [f"{'stage':{width}}  action   gpus  why"]
    for name, step in plan.items():
        lines.append(f"{name:{width}}  {step.action:7}  {step.node.meta.get('gpus', 0):>4}  {step.why}")
    counts = Counter(step.action for step in plan.values())
    perhaps = f", {counts['perhaps']} perhaps" if counts["perhaps"] else ""
    return "\n".join([*lines, f"{counts['run']} of {len(plan)} stages to run{perhaps}"])


def run(plan: Plan, root: Path, max_parallel: int | None = None) -> int:
    """Run a plan here as a flow; returns the exit code: 0, or 1 when a stage failed."""
    if all(step.action == "cached" for step in plan.values()):
        print("everything is up to date")
        return 0
    # Where Prefect starts a server for this flow alone nobody sees its pages, which it unpacks for two seconds of CPU.
    os.environ.setdefault("PREFECT_SERVER_UI_ENABLED", "false")
    with alone(root), _ends_with_exit():
        from prefect import flow

        @flow(name=NAME, persist_result=False)
        def pipeline() -> Any:
            return conduct(plan, root, max_parallel)

        _check_server()
        state: Any = pipeline(return_state=True)
        return 0 if state.is_completed() else 1


def _check_server() -> None:
    """Raises PipelineError where the Prefect server that was asked for does not answer: flows would end in a crash."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    if api := PREFECT_API_URL.value():
        with get_client(sync_client=True) as client:
            error = client.api_healthcheck()
        if error:
            raise PipelineError(
                f"Prefect's server at PREFECT_API_URL={redaction.public(api)} does not answer ({error}): start it "
                "(`make up` serves one on this machine), or unset PREFECT_API_URL for a temporary one"
            )


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Be the only flow of this workspace. Raises PipelineError when there is one."""
    from filelock import FileLock, Timeout

    path = root / ".dvc" / "tmp" / "flow.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise PipelineError(f"a flow is already running in this workspace ({root}): wait for it, or stop it") from None
    try:
        yield
    finally:
        lock.release()


def conduct(plan: Plan, root: Path, max_parallel: int | None) -> Any:
    """The body of the flow, in the main thread: run what is out of date; returns the flow's state for Prefect."""
    from prefect.states import Completed, Failed

    this = Run(root, plan, max_parallel or slots.of_this_machine())
    with redaction.clean_errors(), _tracked(this), _stops_children(this.children):
        _schedule(this, _task(this))
    print(_summary(this), flush=True)
    _create_artifacts(this)
    failed = [name for name, result in this.results.items() if result.outcome == "failed"]
    return Failed(message=f"failed: {', '.join(failed)}") if failed else Completed()


def _task(this: Run) -> Any:
    """The Prefect task that runs a stage of the plan."""
    from prefect import task
    from prefect.cache_policies import NO_CACHE
    from prefect.states import Completed, Failed

    @task(cache_policy=NO_CACHE, persist_result=False)
    def reproduce(name: str) -> Any:
        action = this.plan[name].action
        if action == "cached" or (action == "perhaps" and _reads_the_same(this.root, name)):
            this.results[name] = Result("cached")
            return Completed(name="Cached")
        try:
            with slots.held(_gpus(this, name), lambda text: _say(name, text), lambda: this.children.stopped):
                result = _reproduce(this, name)
        except InterruptedError:
            result = Result("failed", note="stopped")
        except Exception as error:
            result = Result("failed", note=f"{type(error).__name__}: {error}")
        this.results[name] = result
        _say(name, f"{result.outcome} in {result.seconds:.1f} s{': ' if result.note else ''}{result.note}")
        return Completed() if result.outcome == "done" else Failed(message=result.note)

    return reproduce


def _reads_the_same(root: Path, name: str) -> bool:
    """Whether DVC recorded a stage with the command, dependencies and params that it has now, and its outs are there.

    That they are as recorded was seen when the plan was made.
    """
    from pipeline.lockfile import recorded

    try:
        spec, entry = graph.resolve(name, root), recorded(root / "dvc.lock", name)
    except graph.GraphError:  # DVC will say what is wrong
        return False
    if entry is None or not all((root / out).exists() for out in spec.outs):
        return False
    deps = {dep["path"]: dep.get("md5") for dep in entry.get("deps", ())}
    params = {key: value for values in entry.get("params", {}).values() for key, value in values.items()}
    return (entry["cmd"], deps, params) == (spec.cmd, spec.deps, spec.params)


def _gpus(this: Run, name: str) -> int:
    """GPUs of this machine that a stage needs: those of another one are for its scheduler to count."""
    return 0 if launchers.chosen() in launchers.FAR else int(this.plan[name].node.meta.get("gpus", 0))


def _say(name: str, text: str) -> None:
    print(f"[{name}] {text}", flush=True)


def _schedule(this: Run, reproduce: Any) -> None:
    """Submit every stage as soon as its upstream stages are done: a waiting stage must not hold a slot."""
    waiting = dict(this.plan)
    running: set[str] = set()
    futures: dict[str, Any] = {}
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
        for name in ready[: this.slots - len(running)]:
            needs = [futures[other] for other in waiting.pop(name).node.upstream if other in futures]
            running.add(name)
            futures[name] = reproduce.with_options(name=name).submit(name, wait_for=needs)  # arrows on Prefect's pages
            futures[name].add_done_callback(lambda _, name=name: ended.put(name))
        if running:
            name = ended.get()
            running.remove(name)
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
        _say(name, f"{'DVC was locked' if locked else 'preempted'}: again")
        time.sleep(2.0 * attempt)
    seconds = time.monotonic() - started
    if code == 0:
        return Result("done", seconds)
    last = (output.strip() or f"exit code {code}").splitlines()[-1]
    note = "stopped" if this.children.stopped else last.removeprefix(f"ERROR: failed to reproduce '{name}': ")
    return Result("failed", seconds, note)


def _run_child(this: Run, name: str, arguments: list[str]) -> tuple[int, str]:
    """Run `dvc ARGUMENTS` to its end or its timeout, passing its lines on; returns its exit code and its last lines.

    See pipeline.lockfile.
    """
    # Far away the scheduler keeps the time: here it would run while the stage waits in a queue.
    hours = this.plan[name].node.meta.get("timeout_h") if launchers.chosen() not in launchers.FAR else None
    command = [sys.executable, "-m", "pipeline.lockfile", "--wait-for-lock", *arguments]
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
    progress = _Progress()
    try:
        assert child.stdout is not None
        for line in map(redaction.redact, child.stdout):  # ends when the last process of the group has closed it
            if line.strip() and not line.strip().startswith(HINTS):
                _say(name, line.rstrip())
                progress.show(line.strip())
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
    """What ends the flow's body early (SIGTERM and Ctrl-C are exceptions in it) first ends all children.

    Prefect does not end what tasks started. Its handler of SIGTERM is left in place until then: without it, Prefect
    takes a run that was cancelled for one that crashed.
    """
    try:
        yield
    except BaseException:
        ends = (signal.SIGTERM, signal.SIGINT)
        previous = {number: signal.signal(number, lambda *_: None) for number in ends}  # being told once is enough
        print("stopping all stages", flush=True)
        children.stop(GRACE_SECONDS)
        for number, handler in previous.items():
            signal.signal(number, handler)
        raise


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
def _tracked(this: Run) -> Iterator[None]:
    """While inside, a run in MLflow is the parent of the stages' runs."""
    from config.files import PARAMS, read_yaml
    from results.tracking.runs import BY_FLOW, LATER, PARENT, MlflowTracker, git_tags, run_link

    params = this.root / PARAMS
    tags = {
        "kind": "flow",
        "profile": read_yaml(params).get("profile") if params.exists() else None,
        "stages": " ".join(name for name, step in this.plan.items() if step.action != "cached")[:4000],
    }
    tracker = MlflowTracker("flow", this.root, tags | git_tags(this.root), for_others=True)
    this.environment |= {PARENT: tracker.id, LATER: os.environ.get(LATER) or BY_FLOW}
    state = "FAILED"
    try:
        yield
        state = "FINISHED"
    finally:
        tracker.close("KILLED" if this.children.stopped else state, 5.0 if this.children.stopped else 60.0)
        this.link = run_link(tracker.run_id)  # after all is sent: a short flow may not have begun to


class _Progress:
    """The counts that a stage prints, as a bar of its Prefect task."""

    def __init__(self) -> None:
        self._artifact: Any = None
        self._away = False

    def show(self, line: str) -> None:
        """Take a line of the stage; a server that does not answer is not asked again."""
        counts = COUNTS.fullmatch(line)
        if counts is None or self._away:
            return
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        percent = min(100.0, 100.0 * int(counts[1]) / int(counts[2]))
        try:
            if self._artifact is None:
                self._artifact = create_progress_artifact(percent, description=line)
            else:
                update_progress_artifact(self._artifact, percent, description=line)
        except Exception:
            self._away = True


def _summary(this: Run) -> str:
    """The last lines of a flow: for every failure its log, its run and how to run it again, then counts."""
    from pipeline.stage import log_file, rerun_command

    lines: list[str] = []
    for name in [name for name, result in this.results.items() if result.outcome == "failed"]:
        base, _, key = name.partition("@")
        lines += [
            f"{name} failed: {this.results[name].note}",
            f"    log:    {log_file(base, key or None)}",
            *([f"    mlflow: {link}"] if (link := _link(this.root, base, key or None)) else []),
            f"    rerun:  {rerun_command(base, key or None)}",
        ]
    outcomes = Counter(result.outcome for result in this.results.values())
    counts = [(kind, outcomes[kind]) for kind in get_args(Outcome)]
    return "\n".join([*lines, ", ".join(f"{count} {kind}" for kind, count in counts if count)])


def _link(root: Path, name: str, key: str | None) -> str | None:
    """Where a person finds the last run of a stage that did not finish."""
    from pipeline.stage import SCRATCH, log_file
    from results.tracking.runs import JOURNALS, Journal, run_link

    memories = sorted((root / SCRATCH / log_file(name, key).stem).glob("*/run.json"), key=lambda p: p.stat().st_mtime)
    if not memories:
        return None
    journal = json.loads(memories[-1].read_text())["journal"]
    return run_link(Journal(root / JOURNALS / f"{journal}.jsonl").cursor()["run_id"])


def _create_artifacts(this: Run) -> None:
    """The run for Prefect's pages: what ran, the study's table, and where the rest is. None of it holds a secret."""
    from prefect.artifacts import create_link_artifact, create_markdown_artifact

    rows = [
        f"| {name} | {result.outcome} | {result.seconds:.1f} | {result.note} |" for name, result in this.results.items()
    ]
    stages = ["| stage | outcome | seconds | note |", "|---|---|---|---|", *rows, "", f"MLflow: {this.link}"]
    create_markdown_artifact("\n".join(stages), key="stages", description="what ran")
    if this.link.startswith("http"):
        create_link_artifact(this.link, "the stages' runs", key="mlflow", description="MLflow")
    table, page = this.root / "reports" / "table.md", this.root / "reports" / "report.html"
    if table.exists():
        text = f"{redaction.redact(table.read_text())}\n\nThe report: `{page}`"
        create_markdown_artifact(text, key="ablation", description="the study's table")
