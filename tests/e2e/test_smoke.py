"""The DAG at smoke size, by the commands that a person types; whole studies are in test_studies.py."""

from __future__ import annotations

import json
import re
import signal
import socket
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from config.files import lay, read_texts
from tests.e2e.conftest import Project, set_study
from tests.e2e.forks import calls, run_all
from tests.params_files import edit_params
from tests.readme import ACTIVATE, runnable
from tests.walks import functions, misled

pytestmark = pytest.mark.xdist_group("e2e")

# What is killed, and what that needs: every kind of stage that trains or extracts for long.
STUDY = {
    "teachers": ["lidar", "start"],
    "fusions": {"fusion": {"lidar": "lidar", "camera": "start"}},
    "large": {},
    "segmenters": [],
    "stores": ["lidar", "fusion"],
    "variants": ["baseline", "modal", "simdistill"],
    "baselines": [],
    "featured": [],
}


def checkpoint_of(project: Project, stage: str) -> bool:
    """Whether a stage that is still training has saved a checkpoint."""
    return any(project.root.glob(f".scratch/{stage}/*/checkpoints/*.safetensors"))


def shard_of(project: Project, stage: str) -> bool:
    """Whether a stage that is still extracting has finished a shard."""
    return any(path.stat().st_size for path in project.root.glob(f".scratch/{stage}/**/shard-*"))


def state(project: Project, out: str) -> dict[str, tuple[int, int]]:
    """Inode and time of every file of an out: both change when it is made again."""
    files = [path for path in sorted((project.root / out).rglob("*")) if path.is_file()]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


@pytest.mark.whole
@pytest.mark.timeout(1800)
def test_killed_run_ends_like_an_undisturbed_one(project: Project) -> None:
    """kill -9 in teachers, extraction and distillation: nothing finished is made again, and the metrics are equal.

    DVC runs what is killed and an arm that follows, a flow of two stages at once the rest.
    """
    make_small(project)
    project.repro_until("teacher", lambda: checkpoint_of(project, "teacher-lidar"))
    finished = {out: state(project, out) for out in ("outputs/city", "outputs/index")}
    project.repro_until("fusion", lambda: checkpoint_of(project, "fusion-fusion"))
    finished["outputs/teachers/lidar"] = state(project, "outputs/teachers/lidar")
    project.repro_until("extract", lambda: shard_of(project, "extract-lidar"))
    finished["outputs/teachers/fusion"] = state(project, "outputs/teachers/fusion")
    output = project.repro_until("distill", lambda: checkpoint_of(project, "distill-modal-0"))
    finished["outputs/stores/lidar"] = state(project, "outputs/stores/lidar")
    project.run("dvc", "repro", "evaluate@simdistill-0")
    project.run(sys.executable, "-m", "pipeline", "run", "--max-parallel", "2")

    assert "Stage 'prepare' didn't change, skipping" in output
    for out, before in finished.items():
        assert before
        assert state(project, out) == before, f"{out} was made again"
    killed, evaluations = project.metrics(), project.evaluations()
    students = {f"{variant}-0" for variant in STUDY["variants"]}
    assert killed.keys() == {f"{name}.json" for name in {"lidar", "start", "fusion"} | students}
    assert all({"mAP", "NDS"} <= json.loads(text).keys() for text in killed.values())
    assert {f"{name}.json" for name in evaluations} == killed.keys()

    check_report(project)
    check_second_run_does_nothing(project)
    check_changed_weight_touches_one_variant(project)
    check_metrics_fit_a_screen(project)
    check_commands_of_readme(project)
    check_undisturbed_metrics(project, killed, evaluations)


def make_small(project: Project) -> None:
    """The smoke profile with fewer arms, a checkpoint after every step, and small shards: time to be killed in."""
    project.profile("smoke")
    longer = (r"train: (&\w+ )?\{epochs: 1,", r"train: \1{checkpoint_minutes: 0.0, epochs: 2,")
    edit_params(project.root, [longer, (r"shard_samples: 8", "shard_samples: 2")])
    set_study(project.root, STUDY)


def check_report(project: Project) -> None:
    """Every arm is in the page and in the table, and the page needs no network."""
    table = (project.root / "reports/table.md").read_text()
    page = (project.root / "reports/report.html").read_text()
    for arm in ("lidar", "fusion", *STUDY["variants"]):
        assert arm in table
        assert arm in page
    assert not re.search(r"(src|href)=\"(https?:)?//", page)


def check_second_run_does_nothing(project: Project) -> None:
    """DVC finds up to date what it has made itself and what the flow has made."""
    again = project.run("dvc", "repro")
    assert "Running stage" not in again.stdout
    assert "up to date" in again.stdout
    assert project.run("dvc", "status").stdout.strip() == "Data and pipelines are up to date."


def check_changed_weight_touches_one_variant(project: Project) -> None:
    """Another weight of one variant's term reruns that variant and what follows from it, nothing else."""
    before = read_texts(project.root)
    edit_params(
        project.root,
        [(r"(?m)^(  modal: .*terms: ).*", r"\1{xod_cls: {}, xod_reg: {}, xfd: {weight: 0.123}, xat: {}}}")],
    )
    needs = [f"needs@{variant}" for variant in STUDY["variants"]]
    # DVC knows the files of arms as a whole: what reads them looks, and what learns runs again if that is different.
    assert planned(project)["run"] == {"check", *needs, "cost", "film", "report"}
    project.run("dvc", "repro", *needs)
    plan = planned(project)
    assert not [name for name in set().union(*plan.values()) if name.startswith(("teacher", "fusion", "extract"))]
    assert {name for name in plan["run"] if name.startswith("distill")} == {"distill@modal-0"}
    assert {name for name in plan["perhaps"] if name.startswith("predict")} == {"predict@modal-0"}
    lay(before, project.root)
    project.run("dvc", "repro", *needs)


def planned(project: Project) -> dict[str, set[str]]:
    """Action -> the stages of which the flow says so."""
    lines = project.run(sys.executable, "-m", "pipeline", "run", "--dry-run").stdout.splitlines()[1:-1]
    return {action: {line.split()[0] for line in lines if line.split()[1] == action} for action in ("run", "perhaps")}


def check_metrics_fit_a_screen(project: Project) -> None:
    """`dvc metrics show` prints a line of few columns for each model, and nothing of stores, costs and the summary."""
    head, *lines = project.run("dvc", "metrics", "show").stdout.strip().splitlines()
    assert {line.split()[0] for line in lines} == {f"reports/metrics/{name}.json" for name in project.evaluations()}
    assert len(head.split()) <= 14
    assert max(map(len, (head, *lines))) <= 200


def check_commands_of_readme(project: Project) -> None:
    """Every command of README.md that can run here does, typed as it stands; git then sees the record of the study."""
    (project.root / ".venv").symlink_to(sys.prefix)
    for command in runnable():
        if command == "make ui":
            check_pages(project, command)
        else:
            project.run("bash", "-ec", f"{ACTIVATE}\n{command}")
    status = project.run("git", "status", "--short").stdout
    changed = {line.split()[-1] for line in status.splitlines()}
    assert {name for name in changed if not name.startswith("params")} == {"dvc.lock", "reports/"}
    project.run("make", "clean")
    assert project.run("git", "status", "--short").stdout == status


def check_pages(project: Project, command: str) -> None:
    """MLflow's pages are served until Ctrl-C; on a free port, as others may use the usual one."""
    # The suite's own make would let this one say which folder it enters.
    make = ("make", "--no-print-directory", "--dry-run", f"READY={project.root}")
    recipe = project.run(*make, *command.split()[1:]).stdout.strip()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = project.start("env", "MLFLOW_WORKERS=1", *recipe.split(), "--port", str(port))
    try:
        deadline = time.monotonic() + 120
        while (page := read_page(f"http://127.0.0.1:{port}")) is None:
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.5)
        assert "MLflow" in page
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=60)


def read_page(address: str) -> str | None:
    """A page, or None while nobody answers."""
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return str(answer.read().decode())
    except OSError:
        return None


def check_undisturbed_metrics(project: Project, killed: dict[str, str], evaluations: dict[str, str]) -> None:
    """A run from nothing, by neither DVC nor the flow, gives the same metrics byte for byte.

    It takes the walks of docs/walks.md.
    """
    for folder in ("outputs", ".scratch", "reports/metrics"):
        project.run("rm", "-rf", folder)
    run_all(project.root, traced=functions())
    assert project.metrics() == killed
    assert project.evaluations() == evaluations
    assert misled({stage: calls(project.root, stage).read_text().split() for stage in functions()}) == []


def test_copy_is_complete(project: Project) -> None:
    """The project that the tests run in has what a clone has."""
    assert Path(project.root / "dvc.yaml").is_file()
    assert "distill@baseline-0" in project.run("dvc", "stage", "list").stdout
