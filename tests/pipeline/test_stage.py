"""The stage contract under real DVC: fingerprinted scratch, atomic outs, preemption, death, errors."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from base.stopping import PREEMPTED
from config.files import load_params
from pipeline import stage
from stages import context
from stages.context import StageError, Stop, publish
from tests.pipeline.project import Project, wait_until

# Counts to 6 in a file in scratch, as a trainer would with a checkpoint; notes where it began, and its process.
COUNTING = """
import os, time

def run(context):
    state = context.scratch / "count"
    begin = int(state.read_text()) if state.exists() else 0
    with open("trace.txt", "a") as trace:
        trace.write(f"{context.key} {begin}\\n")
    with open("pids.txt", "a") as pids:
        pids.write(f"{os.getpid()}\\n")
    for step in range(begin + 1, 7):
        state.write_text(str(step))
        if step == 3 and os.path.exists("hang"):
            while not POLLS or not context.stop.is_set():
                time.sleep(0.02)
            (context.scratch / "saved").write_text("yes")
            raise SystemExit(75)
    made = context.scratch / "student"
    made.mkdir(exist_ok=True)
    (made / "weights").write_text(f"{context.params.seed} {state.read_text()}")
    context.publish(made, f"outputs/students/{context.key}")
"""
NAME = "distill@baseline-0"


@pytest.fixture
def counting(project: Project) -> Project:
    """A project with a stage that counts, and hangs at 3 as long as the file `hang` is there."""
    project.edit("dvc.yaml", "deps: [stages/distill.py, outputs/index]", "deps: [stages/distill.py]")
    project.write("stages/distill.py", COUNTING.replace("POLLS", "False"))
    project.write("hang", "")
    return project


def hanging(project: Project) -> int:
    """Wait until the stage hangs; returns its process id."""
    wait_until(lambda: [file for file in project.root.glob(".scratch/distill*/*/count") if file.read_text() == "3"])
    return int(project.lines("pids.txt")[-1])


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_second_repro_does_nothing_and_a_weight_reruns_one_variant(project: Project) -> None:
    assert project.repro() == ["prepare", NAME, "distill@xod-0"]
    assert project.repro() == []
    project.set(variants__baseline__train={"lr": 1e-3})
    assert project.repro() == [NAME]
    assert project.repro() == []
    project.set(variants__baseline__train={"lr": 2e-3})
    assert project.repro() == [NAME]


def test_a_variant_whose_name_begins_with_another_ones_is_no_student_of_that(project: Project) -> None:
    """`skd-alone` is a variant beside `skd`, and not its student of seed `alone`."""
    project.edit("params.yaml", "variants:\n", "variants:\n  baseline-alone: {student: camera, terms: []}\n")
    params = load_params(project.root)
    assert stage._student(params, "baseline-alone") is None
    assert stage._student(params, "baseline-3") == ("baseline", 3)
    assert stage._student(params, "baseline-alone-3") == ("baseline-alone", 3)
    assert stage._student(params, "lidar") is None


def test_two_stages_at_once(project: Project) -> None:
    project.edit("dvc.yaml", "deps: [stages/distill.py, outputs/index]", "deps: [stages/distill.py]")
    slow = "import time\n" + (project.root / "stages" / "distill.py").read_text().replace(
        "    made =", "    time.sleep(2)\n    made ="
    )
    project.write("stages/distill.py", slow)
    names = ["distill@baseline-0", "distill@xod-0"]
    runs = [project.start("dvc", "--wait-for-lock", "repro", "--single-item", name) for name in names]
    for run in runs:
        output, _ = run.communicate(timeout=60)
        assert run.returncode == 0, output
    assert project.repro(*names) == []


def test_kill_resumes_from_scratch(counting: Project) -> None:
    run = counting.start("dvc", "repro", NAME)
    pid = hanging(counting)
    os.kill(pid, signal.SIGKILL)
    output, _ = run.communicate(timeout=30)
    assert run.returncode != 0, output
    (counting.root / "hang").unlink()
    counting.repro(NAME)
    assert counting.lines("trace.txt") == ["baseline-0 0", "baseline-0 3"]
    assert counting.lines("outputs/students/baseline-0/weights") == ["0 6"]


def test_changed_dependency_does_not_resume(counting: Project) -> None:
    run = counting.start("dvc", "repro", NAME)
    os.kill(hanging(counting), signal.SIGKILL)
    run.communicate(timeout=30)
    (counting.root / "hang").unlink()
    before = set(counting.root.glob(".scratch/distill-baseline-0/*/"))
    assert len(before) == 1
    counting.set(variants__baseline__train={"lr": 1e-3})
    counting.repro(NAME)
    assert counting.lines("trace.txt") == ["baseline-0 0", "baseline-0 0"]
    after = {path for path in counting.root.glob(".scratch/distill-baseline-0/*") if path.is_dir()}
    assert len(after) == 1  # what the old fingerprint left went when the new run had published
    assert not after & before


def test_outs_deleted_by_dvc_are_not_recomputed_from_nothing(counting: Project) -> None:
    (counting.root / "hang").unlink()
    counting.repro(NAME)
    counting.repro("--force", "--single-item", NAME)
    assert counting.lines("trace.txt") == ["baseline-0 0", "baseline-0 6"]


def test_death_of_dvc_ends_the_stage(counting: Project) -> None:
    """kill -9 of DVC cannot be handled by DVC: the kernel tells the stage."""
    run = counting.start("dvc", "repro", NAME)
    pid = hanging(counting)
    run.kill()
    wait_until(lambda: gone(pid), 15)
    run.communicate()


@pytest.mark.parametrize("polls", [False, True])
def test_sigterm(counting: Project, polls: bool) -> None:
    """A stage that polls the flag saves first; one that does not ends at once. Both say that they can be resumed."""
    counting.write("stages/distill.py", COUNTING.replace("POLLS", str(polls)))
    run = counting.start("pipeline", "stage", "distill", "--key", "baseline-0")
    os.kill(hanging(counting), signal.SIGTERM)
    output, _ = run.communicate(timeout=30)
    assert run.returncode == PREEMPTED, output
    assert "was stopped; it resumes with: dvc repro --single-item distill@baseline-0" in output
    assert bool(list(counting.root.glob(".scratch/*/*/saved"))) == polls
    (counting.root / "hang").unlink()
    counting.repro(NAME)
    assert counting.lines("trace.txt") == ["baseline-0 0", "baseline-0 3"]


def test_signals_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "GRACE_SECONDS", 1e6)  # after which the process, here the tests', would end
    stop = Stop()
    assert not stop.is_set()
    stop.handle(signal.SIGTERM, None)
    stop.handle(signal.SIGTERM, None)  # the parent's death repeats it: the stage goes on saving
    assert stop.is_set()
    with pytest.raises(SystemExit):
        stop.handle(signal.SIGINT, None)  # Ctrl-C again: enough


def test_the_same_stage_twice_is_refused(counting: Project) -> None:
    first = counting.start("pipeline", "stage", "distill", "--key", "baseline-0")
    pid = hanging(counting)
    output = counting.run("pipeline", "stage", "distill", "--key", "baseline-0", code=1)
    assert "distill@baseline-0 is already running here" in output
    os.kill(pid, signal.SIGTERM)
    first.communicate(timeout=30)


def test_failure_says_what_failed_where_and_how_to_go_on(project: Project) -> None:
    project.write("stages/distill.py", "def run(context):\n    raise ValueError('no such luck')\n")
    output = project.run("pipeline", "stage", "distill", "--key", "xod-0", code=1)
    assert output.count("failed: distill@xod-0\n") == 1
    assert "mlflow: not sent yet (python -m pipeline track replay)" in output
    assert "log: logs/distill-xod-0.log" in output
    assert "rerun: dvc repro --single-item distill@xod-0" in output
    assert any("ValueError: no such luck" in line for line in project.lines("logs/distill-xod-0.log"))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def run(context):\n    pass\n", "ended without publishing outputs/students/xod-0"),
        (
            "def run(context):\n    context.publish(context.scratch, 'outputs/other')\n",
            "publishes 'outputs/other'; dvc.yaml allows",
        ),
        ("def run(context):\n    context.publish(context.scratch / 'x', 'outputs/students/xod-0')\n", "does not exist"),
        ("import nothing_of_that_name\n", "No module named 'nothing_of_that_name'"),
    ],
)
def test_broken_stages_are_named(project: Project, code: str, message: str) -> None:
    project.write("stages/distill.py", code)
    assert message in project.run("pipeline", "stage", "distill", "--key", "xod-0", code=1)


def test_stages_that_are_not_there(project: Project) -> None:
    assert "stage 'distil' is not in dvc.yaml; there are: distill@" in project.run(
        "pipeline", "stage", "distil", code=1
    )
    (project.root / "stages" / "prepare.py").unlink()
    assert "stages/prepare.py does not exist" in project.run("pipeline", "stage", "prepare", code=1)
    project.set(data__skip_broken=-1)
    assert "data.skip_broken: -1" in project.run("pipeline", "stage", "prepare", code=1)


def test_publishing_replaces_what_is_there(tmp_path: Path) -> None:
    made, target = tmp_path / "made", tmp_path / "deep" / "out"
    (made / "sub").mkdir(parents=True)
    (made / "sub" / "new").write_text("new")
    target.mkdir(parents=True)
    (target / "partial").write_text("old")
    publish(made, target)
    assert [str(path.relative_to(target)) for path in target.rglob("*")] == ["sub", "sub/new"]
    assert not made.exists()
    (tmp_path / "file").write_text("1")
    publish(tmp_path / "file", target)  # a file over a folder
    assert target.read_text() == "1"
    with pytest.raises(StageError, match="does not exist"):
        publish(tmp_path / "nothing", target)
    assert target.read_text() == "1"


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs a second file system: /dev/shm")
def test_publishing_to_another_file_system(tmp_path: Path) -> None:
    other = Path("/dev/shm") / f"publish-{os.getpid()}"
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "a").write_text("a")
    try:
        publish(tmp_path / "made", other / "out")
        assert [path.name for path in other.rglob("*")] == ["out", "a"]
    finally:
        os.system(f"rm -rf {other}")


def test_killed_while_publishing_leaves_no_half_out(project: Project) -> None:
    """The out appears by a rename: at no moment is it there in part."""
    project.write(
        "stages/distill.py",
        "def run(context):\n"
        "    made = context.scratch / 'student'\n"
        "    made.mkdir(exist_ok=True)\n"
        "    for i in range(2000):\n"
        "        (made / str(i)).write_text('x')\n"
        "    context.publish(made, f'outputs/students/{context.key}')\n",
    )
    out = project.root / "outputs" / "students" / "baseline-0"
    for delay in (0.0, 0.02, 0.1):
        run = project.start("pipeline", "stage", "distill", "--key", "baseline-0")
        wait_until(lambda: out.exists() or list(project.root.glob(".scratch/distill*/*/student")))
        time.sleep(delay)
        run.kill()
        run.communicate()
        assert not out.exists() or len(list(out.iterdir())) == 2000


def test_several_processes(make_project: Callable[..., Project]) -> None:
    """torchrun on this host: every rank runs the stage, one of them publishes, and SIGTERM reaches all."""
    project = make_project(PIPELINE_LAUNCHER="torchrun", PIPELINE_PROCESSES="2", OMP_NUM_THREADS="1")
    project.edit("dvc.yaml", "deps: [stages/distill.py, outputs/index]", "deps: [stages/distill.py]")
    project.write(
        "stages/distill.py",
        "import os, time\n"
        "def run(context):\n"
        "    open(f'rank{context.rank}of{context.world_size}', 'w').write(str(os.getpid()))\n"
        "    while os.path.exists('hang') and not context.stop.is_set():\n"
        "        time.sleep(0.05)\n"
        "    if context.stop.is_set():\n"
        "        raise SystemExit(75)\n"
        "    if context.rank == 0:\n"
        "        (context.scratch / 'student').write_text('x')\n"
        "    context.publish(context.scratch / 'student', f'outputs/students/{context.key}')\n",
    )
    project.write("hang", "")
    run = project.start("pipeline", "stage", "distill", "--key", "baseline-0")
    ranks = ["rank0of2", "rank1of2"]
    wait_until(lambda: all(project.lines(name) for name in ranks))
    run.terminate()
    output, _ = run.communicate(timeout=60)
    assert run.returncode == PREEMPTED, output
    assert all(gone(int(project.lines(name)[0])) for name in ranks)
    (project.root / "hang").unlink()
    assert project.repro(NAME) == [NAME]
    marks = list(project.root.glob(".scratch/distill-baseline-0/*/published.json"))
    assert [json.loads(mark.read_text()) for mark in marks] == [["outputs/students/baseline-0"]]


def test_a_rank_that_fails_leaves_the_last_word_to_the_command(make_project: Callable[..., Project]) -> None:
    project = make_project(PIPELINE_LAUNCHER="torchrun", PIPELINE_PROCESSES="2", OMP_NUM_THREADS="1")
    project.edit("dvc.yaml", "deps: [stages/distill.py, outputs/index]", "deps: [stages/distill.py]")
    # The other rank waits: where it is the first to fail, the first rank may be ended before it has a run in MLflow.
    body = "time.sleep(60 * context.rank)\n    raise ValueError('no such luck')"
    project.write("stages/distill.py", f"import time\n\ndef run(context):\n    {body}\n")
    output = project.run("pipeline", "stage", "distill", "--key", "baseline-0", code=1)
    assert output.count("failed: distill@baseline-0\n") == 1
    assert output.count("mlflow: not sent yet") == 1
    assert output.count("rerun: dvc repro --single-item distill@baseline-0") == 1


def test_what_an_earlier_command_left_is_waited_for(counting: Project) -> None:
    """A rank, or a job on another machine, may still be saving when its command was killed and is given again."""
    (counting.root / "hang").unlink()
    folder = counting.root / ".scratch" / "distill-baseline-0"
    folder.mkdir(parents=True)
    with (folder / "work").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        run = counting.start("pipeline", "stage", "distill", "--key", "baseline-0")
        time.sleep(5)
        assert run.poll() is None
        assert counting.lines("trace.txt") == []
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 0, output
