"""The flow with a real Prefect: order, parallelism, failures, cancellation, locks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate

from pipeline.processes import Children
from pipeline.slots import LIMIT
from tests.pipeline.project import Project, wait_until

# A diamond, and a chain beside it. Each stage notes when it began and ended.
DIAMOND = """
stages:
  top: {cmd: python work.py top, deps: [work.py], outs: [top.txt], meta: {gpus: 0, timeout_h: 1}}
  left: {cmd: python work.py left top, deps: [work.py, top.txt], outs: [left.txt], meta: {gpus: 1, timeout_h: 1}}
  right: {cmd: python work.py right top, deps: [work.py, top.txt], outs: [right.txt], meta: {gpus: 2, timeout_h: 1}}
  bottom: {cmd: python work.py bottom left right, deps: [work.py, left.txt, right.txt], outs: [bottom.txt]}
  beside: {cmd: python work.py beside, deps: [work.py, extra.txt], outs: [beside.txt]}
"""
WORK = """
import os, sys, time
name, *needs = sys.argv[1:]
def note(text):
    with open("trace.txt", "a") as trace:
        trace.write(f"{name} {text} {time.time()} {os.environ.get('OMP_NUM_THREADS')} {os.getpid()}\\n")
assert all(os.path.exists(f"{other}.txt") for other in needs)
note("begin")
while os.path.exists(f"hold-{name}"):
    time.sleep(0.02)
if os.path.exists(f"fail-{name}"):
    sys.exit(f"{name} has no luck")
if os.path.exists(f"preempt-{name}"):
    os.remove(f"preempt-{name}")
    sys.exit(75)
time.sleep(0.3)
words = f"words-{name}"
open(f"{name}.txt", "w").write(open(words).read() if os.path.exists(words) else name)
note("end")
"""

with_server = pytest.mark.xdist_group("prefect-server")  # in one test process, so that one server does


class Trace:
    """What trace.txt says."""

    def __init__(self, project: Project) -> None:
        self.rows = [line.split() for line in project.lines("trace.txt")]

    def time(self, name: str, what: str) -> float:
        return next(float(row[2]) for row in self.rows if row[:2] == [name, what])

    def names(self, what: str) -> list[str]:
        return [row[0] for row in self.rows if row[1] == what]

    def pids(self) -> list[int]:
        return [int(row[4]) for row in self.rows]


def diamond(project: Project) -> Project:
    project.write("dvc.yaml", DIAMOND)
    project.write("work.py", WORK)
    project.write("extra.txt", "1")
    return project


@pytest.fixture
def served(make_project: Callable[..., Project], server: str) -> Project:
    """The diamond, to be run with the server."""
    return diamond(make_project(PREFECT_API_URL=server))


def test_dry_run_says_what_and_why(project: Project) -> None:
    diamond(project)
    project.repro()
    project.write("extra.txt", "2")
    project.edit("dvc.yaml", "left top,", "left  top,")
    lines = project.run("pipeline", "run", "--dry-run").splitlines()
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    assert rows["top"] == "cached 0 up to date"
    assert rows["left"] == "run 1 changed command"
    assert rows["right"] == "cached 2 up to date"
    assert rows["bottom"] == "perhaps 0 after left"
    assert rows["beside"] == "run 0 dependency modified: extra.txt"
    assert lines[-1] == "2 of 5 stages to run, 1 perhaps"
    targets = project.run("pipeline", "run", "--dry-run", "--targets", "right").splitlines()
    assert [line.split()[0] for line in targets] == ["stage", "top", "right", "0"]
    assert "target 'nothing' is not a stage" in project.run("pipeline", "run", "--targets", "nothing", code=1)


@pytest.mark.parametrize(
    ("arguments", "slow"),
    [
        (["run", "--help"], ["dvc", "networkx", "prefect", "mlflow", "sqlalchemy", "torch", "numpy", "psutil"]),
        (["run", "--dry-run"], ["prefect", "mlflow", "sqlalchemy", "torch", "numpy", "pandas", "matplotlib"]),
    ],
)
def test_what_answers_at_once_imports_nothing_that_is_slow(
    project: Project, arguments: list[str], slow: list[str]
) -> None:
    diamond(project)
    code = (
        f"import atexit, sys; sys.argv = ['pipeline', *{arguments}]; from pipeline.cli import main\n"
        f"atexit.register(lambda: print('slow:', [name for name in {slow} if name in sys.modules]))\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project.root, env=project.env, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "slow: []", done.stdout


def test_diamond_with_a_temporary_server(make_project: Callable[..., Project], database: str) -> None:
    """The first run on a machine: no server anywhere. Stages run in parallel, in order, and have one parent run."""
    project = diamond(make_project(MLFLOW_TRACKING_URI=database, PIPELINE_TRACK_LATER=""))
    for name in ("left", "right"):
        project.write(f"hold-{name}", "")
    flow = project.start("pipeline", "run", "--max-parallel", "2")
    # Both run, and neither has ended; a server that is new here makes its database first.
    wait_until(lambda: {"left", "right"} <= set(Trace(project).names("begin")), 120)
    for name in ("left", "right"):
        (project.root / f"hold-{name}").unlink()
    output, _ = flow.communicate(timeout=90)
    assert "5 done" in output
    trace = Trace(project)
    assert sorted(trace.names("end")) == ["beside", "bottom", "left", "right", "top"]
    assert trace.time("top", "end") < min(trace.time("left", "begin"), trace.time("right", "begin"))
    assert trace.time("bottom", "begin") > max(trace.time("left", "end"), trace.time("right", "end"))
    share = max(1, len(os.sched_getaffinity(0)) // 2)  # every stage here has one that may run beside it
    assert {row[3] for row in trace.rows} == {str(share)}
    assert project.processes() == []
    assert (project.root / ".prefect").is_dir()
    run = MlflowClient(database).search_runs(["1"])[0]
    assert (run.info.run_name, run.info.status) == ("flow", "FINISHED")
    assert run.data.tags["profile"] == "demo"

    assert project.repro() == []  # what the flow did, DVC knows
    assert "everything is up to date" in project.run("pipeline", "run")


@with_server
def test_only_what_changed_and_what_follows_is_run(served: Project) -> None:
    served.repro()
    (served.root / "trace.txt").unlink()
    served.edit("dvc.yaml", "left top,", "left  top,")
    output = served.run("pipeline", "run", "--max-parallel", "2")
    # left makes the same bytes as before, so bottom has nothing to do: not even a process is started for it
    assert Trace(served).names("end") == ["left"]
    assert "1 done, 4 cached" in output
    served.write("words-left", "other")
    served.edit("dvc.yaml", "left  top,", "left   top,")
    assert "2 done, 3 cached" in served.run("pipeline", "run", "--max-parallel", "2")
    assert Trace(served).names("end") == ["left", "left", "bottom"]


@with_server
def test_failures_are_named_and_stop_nothing_else(served: Project) -> None:
    served.write("fail-left", "")
    served.write("preempt-right", "")
    served.edit("dvc.yaml", "outs: [beside.txt]", "outs: [beside.txt], meta: {timeout_h: 0.0005}")
    served.write("hold-beside", "")
    output = served.run("pipeline", "run", "--max-parallel", "3", code=1)
    tail = output[output.rindex("\n[") :]
    assert "left failed: failed to run: python work.py left top, exited with 1" in tail
    assert "log:    logs/left.log" in tail
    assert "rerun:  dvc repro --single-item left" in tail
    assert "left has no luck" in output
    assert "beside failed: stopped after meta.timeout_h = 0.0005" in tail
    assert "[right] preempted: again" in output
    trace = Trace(served)
    assert sorted(trace.names("end")) == ["right", "top"]
    assert trace.names("begin").count("right") == 2
    assert "bottom" not in trace.names("begin")
    assert "2 done, 2 failed, 1 skipped" in output
    assert served.processes() == []


@with_server
def test_a_failed_stage_is_named_with_its_run(served: Project, database: str) -> None:
    served.edit("dvc.yaml", "python work.py beside", "exec python -m pipeline stage beside")
    served.write("stages/beside.py", "def run(context):\n    raise ValueError('no luck')\n")
    output = served.run(
        "pipeline", "run", "--targets", "beside", code=1, MLFLOW_TRACKING_URI=database, PIPELINE_TRACK_LATER=""
    )
    (run,) = MlflowClient(database).search_runs(["1"], "tags.`dvc.stage` = 'beside'")
    assert run.info.status == "FAILED"
    tail = output[output.rindex("beside failed: failed to run") :]
    assert tail.splitlines()[1:4] == [
        "    log:    logs/beside.log",
        f"    mlflow: run {run.info.run_id} (make ui)",
        "    rerun:  dvc repro --single-item beside",
    ]


@with_server
def test_flows_of_one_server_share_its_slots(make_project: Callable[..., Project], server: str) -> None:
    """Two workspaces, one slot: the second stage begins when the first has ended, though it asks for two slots."""
    one, two = (diamond(make_project(PREFECT_API_URL=server)) for _ in range(2))
    for project in (one, two):
        project.repro("top")
    with SyncPrefectClient(server) as client:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=LIMIT, limit=1))
        try:
            one.write("hold-left", "")
            first = one.start("pipeline", "run", "--targets", "left")
            wait_until(lambda: "left" in Trace(one).names("begin"))
            assert client.read_global_concurrency_limit_by_name(LIMIT).active_slots == 1
            second = two.start("pipeline", "run", "--targets", "right")
            assert second.stdout is not None
            lines = iter(second.stdout.readline, "")
            assert any("[right] waiting for slots of the limit 'gpu'" in line for line in lines)
            assert "right" not in Trace(two).names("begin")
            third = two.start("pipeline", "run", "--targets", "beside")  # refused: its workspace has a flow
            assert "a flow is already running in this workspace" in third.communicate(timeout=60)[0]
            (one.root / "hold-left").unlink()
            assert first.wait(60) == 0, first.communicate()
            assert second.wait(60) == 0, second.communicate()
            assert Trace(two).time("right", "begin") > Trace(one).time("left", "end")
            assert client.read_global_concurrency_limit_by_name(LIMIT).active_slots == 0
        finally:
            client.delete_global_concurrency_limit_by_name(LIMIT)


@with_server
def test_a_stage_that_waits_for_slots_can_be_stopped(served: Project, server: str) -> None:
    with SyncPrefectClient(server) as client:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=LIMIT, limit=0))
        try:
            flow = served.start("pipeline", "run", "--targets", "left")
            assert flow.stdout is not None
            assert any("[left] waiting" in line for line in iter(flow.stdout.readline, ""))
            flow.terminate()
            assert "left" not in flow.communicate(timeout=60)[0].replace("[left] failed in 0.0 s: stopped", "")
            assert flow.returncode != 0
            assert Trace(served).names("begin") == ["top"]
        finally:
            client.delete_global_concurrency_limit_by_name(LIMIT)


@with_server
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_cancelling_leaves_no_process(served: Project, number: int) -> None:
    for name in ("left", "right"):
        served.write(f"hold-{name}", "")
    flow = served.start("pipeline", "run", "--max-parallel", "2")
    wait_until(lambda: {"left", "right"} <= set(Trace(served).names("begin")))
    assert len(served.processes()) >= 5  # the flow, two of DVC, two stages
    flow.send_signal(number)
    output, _ = flow.communicate(timeout=60)
    assert flow.returncode != 0, output
    assert "stopping all stages" in output
    assert served.processes() == []
    for name in ("left", "right"):
        (served.root / f"hold-{name}").unlink()
    assert served.repro("left", "right") == ["left", "right"]  # nothing is locked


@with_server
def test_killing_the_flow_ends_the_stages(served: Project) -> None:
    """kill -9 of the flow: DVC is told by the kernel, and then the stage."""
    served.edit("dvc.yaml", "python work.py beside", "exec python -m pipeline stage beside")
    served.write(
        "stages/beside.py",
        "import os, time\ndef run(context):\n    open('pid.txt', 'w').write(str(os.getpid()))\n    time.sleep(100)\n",
    )
    flow = served.start("pipeline", "run", "--targets", "beside")
    wait_until(lambda: served.lines("pid.txt"))
    flow.kill()
    flow.communicate()
    wait_until(lambda: not served.processes(), 30)


@with_server
def test_work_that_dvc_could_not_record_is_recorded_not_repeated(served: Project) -> None:
    """DVC gives up on its lock when the stage has just ended (a long commit beside it): the flow commits the outs."""
    served.edit("dvc.yaml", "python work.py beside", "exec python -m pipeline stage beside")
    served.write(
        "stages/beside.py",
        "import os, time\n"
        "def run(context):\n"
        "    open('ran.txt', 'a').write('once\\n')\n"
        "    while os.path.exists('hold'):\n"
        "        time.sleep(0.02)\n"
        "    (context.scratch / 'x').write_text('x')\n"
        "    context.publish(context.scratch / 'x', 'beside.txt')\n",
    )
    served.write("hold", "")
    flow = served.start("pipeline", "run", "--targets", "beside")
    wait_until(lambda: served.lines("ran.txt"))
    holder = hold_lock(served)
    wait_until((served.root / "locked").exists)
    (served.root / "hold").unlink()
    output, _ = flow.communicate(timeout=90)
    holder.wait()
    assert flow.returncode == 0, output
    assert "Unable to acquire lock" in output
    assert served.lines("ran.txt") == ["once"]
    assert served.repro("beside") == []


def hold_lock(project: Project) -> subprocess.Popen[bytes]:
    """Hold the lock in front of DVC's lock table for longer than DVC's patience (3 s), as a busy DVC does."""
    code = (
        "import time, zc.lockfile\n"
        "while True:\n"
        "    try: lock = zc.lockfile.LockFile('.dvc/tmp/rwlock.lock'); break\n"
        "    except zc.lockfile.LockError: time.sleep(0.01)\n"
        "open('locked', 'w'); time.sleep(6); lock.close()\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], cwd=project.root)


@with_server
def test_one_flow_per_workspace(served: Project) -> None:
    served.write("hold-top", "")
    flow = served.start("pipeline", "run")
    wait_until(lambda: Trace(served).names("begin"))
    (served.root / "dvc.yaml").touch()
    output = served.run("pipeline", "run", code=1)
    assert "another DVC process is at work" in output or "a flow is already running" in output
    flow.send_signal(signal.SIGTERM)
    flow.communicate(timeout=60)


def test_groups_that_ignore_sigterm_are_killed() -> None:
    children = Children()
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(100)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {deaf!r}]); exec({deaf!r})"
    child = children.start([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert [child.stdout.readline(), child.stdout.readline()] == ["1\n", "1\n"]
    began = time.monotonic()
    children.stop(grace=0.5)
    assert child.wait(10) == -signal.SIGKILL
    assert child.stdout.read() == ""  # the grandchild has closed it, too
    assert time.monotonic() - began < 10
    with pytest.raises(InterruptedError):
        children.start(["true"])
