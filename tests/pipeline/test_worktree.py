"""Worktrees with real git and real DVC: what one workspace has computed, another one restores."""

from __future__ import annotations

import copy
import itertools
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from base.errors import PipelineError
from config.files import load_params
from pipeline.worktree import describe, make
from results.tracking.runs import MlflowTracker
from tests.pipeline.project import ROOT, Project

# Like the stages of tests/pipeline/project.py; each notes outside of all workspaces that it ran, when and on which GPU.
PREPARE = """
import os

def run(context):
    with open(os.environ["TOY_TRACE"], "a") as trace:
        trace.write("prepare\\n")
    made = context.scratch / "index"
    made.write_text("index")
    context.publish(made, "outputs/index")
"""
DISTILL = """
import os, time

def run(context):
    began = time.time()
    time.sleep(float(os.environ.get("TOY_SECONDS", "0")))
    made = context.scratch / "student"
    made.mkdir(exist_ok=True)
    (made / "weights").write_text(context.key)
    context.publish(made, f"outputs/students/{context.key}")
    with open(os.environ["TOY_TRACE"], "a") as trace:
        gpu = os.environ["CUDA_VISIBLE_DEVICES"]
        trace.write(f"{context.key} {began} {time.time()} {gpu} {context.root.name}\\n")
"""
PROFILE = "study: {name: demo, variants: [baseline, xod], seeds: [0]}\n"
STUDY = "about: one line\nprofile: demo\nstudy: {variants: [%s], seeds: [0]}\n"


# Nothing but DVC: one out for every variant, made by the shell.
PLAIN = """
stages:
  distill:
    matrix: {variant: "${study.variants}"}
    cmd: mkdir -p outputs && echo ${item.variant} > outputs/${item.variant}
    params: ["variants.${item.variant}"]
    outs: ["outputs/${item.variant}"]
"""


@pytest.fixture
def toy(project: Project, tmp_path: Path) -> Project:
    """A tiny project that is committed, with two studies that share the row `xod`."""
    project.env |= {"TOY_TRACE": str(tmp_path / "trace.txt"), "DVC_SITE_CACHE_DIR": str(tmp_path / "site-cache")}
    project.set(study__name="demo", data__dataroot="data/scenes", data__worlds=[], data__instances=None)
    for folder in ("profiles", "studies"):
        (project.root / folder).mkdir()
    project.write("profiles/demo.yaml", PROFILE)
    project.write("studies/one.yaml", STUDY % "baseline, xod")
    project.write("studies/two.yaml", STUDY % "xod, xfd")
    project.write("studies/wrong.yaml", STUDY % "xodd")
    project.write("stages/prepare.py", PREPARE)
    project.write("stages/distill.py", DISTILL)
    ignored = ("/outputs/", "/.scratch/", "/logs/", "/.prefect/", "/mlflow.db*", "/data/", "/.venv/", "__pycache__/")
    project.write(".gitignore", "\n".join(ignored))
    project.write(".dvc/.gitignore", (ROOT / ".dvc" / ".gitignore").read_text())
    project.write("mlflow.db", "")  # ready, as setup leaves it
    commit(project.root)
    return project


def git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def commit(root: Path) -> None:
    git(root, "add", "--all")
    git(root, "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "--quiet", "-m", "change")


def at(project: Project, root: Path) -> Project:
    """A worktree of the project, in the same environment."""
    other = copy.copy(project)
    other.root = root
    return other


def trace(project: Project) -> list[list[str]]:
    file = Path(project.env["TOY_TRACE"])
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def ran(project: Project) -> list[str]:
    return sorted(line[0] for line in trace(project))


def links(root: Path) -> set[str]:
    """Links at the top of a workspace."""
    return {path.name for path in root.iterdir() if path.is_symlink()}


def test_a_worktree_restores_what_another_study_computed(toy: Project, tmp_path: Path) -> None:
    toy.run("pipeline", "study", "one")
    toy.repro()
    assert ran(toy) == ["baseline-0", "prepare", "xod-0"]
    there = at(toy, tmp_path / "there")
    made = make(there.root, toy.root, study="two")
    assert (made.study, made.profile, made.branch) == ("two", "demo", None)
    assert load_params(there.root).study.variants == ["xod", "xfd"]
    there.repro()
    assert ran(there) == ["baseline-0", "prepare", "xfd-0", "xod-0"]  # one of them is new
    restored = there.root / "outputs/students/xod-0/weights"
    assert restored.read_text() == "xod-0"
    assert os.path.samefile(restored, toy.root / "outputs/students/xod-0/weights")  # a link, which takes no space
    assert restored.stat().st_mode & 0o222 == 0  # and is protected
    assert load_params(toy.root).study.variants == ["baseline", "xod"]


@pytest.mark.timeout(600)
@pytest.mark.xdist_group("prefect-server")
def test_flows_in_two_worktrees_share_the_gpu(toy: Project, server: str, tmp_path: Path) -> None:
    toy.run("pipeline", "study", "one")
    there = at(toy, tmp_path / "there")
    make(there.root, toy.root, study="two")
    environment = {
        "CUDA_VISIBLE_DEVICES": "0",
        "PIPELINE_GPU_LEASES": str(tmp_path / "leases"),
        "TOY_SECONDS": "1",
        "PREFECT_API_URL": server,
    }
    flows = [workspace.start("pipeline", "run", **environment) for workspace in (toy, there)]
    for flow in flows:
        output, _ = flow.communicate(timeout=400)
        assert flow.returncode == 0, output
    distilled = sorted((float(row[1]), float(row[2]), row[3], row[4]) for row in trace(toy) if len(row) > 1)
    assert {row[3] for row in distilled} == {"project", "there"}
    assert {row[2] for row in distilled} == {"0"}
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(distilled))
    for workspace in (toy, there):
        assert workspace.repro() == []


def test_what_is_shared_and_what_is_not(toy: Project, tmp_path: Path) -> None:
    toy.run("dvc", "remote", "add", "--local", "store", "../store")
    toy.run("dvc", "remote", "modify", "--local", "store", "verify", "true")
    (toy.root / "data/scenes").mkdir(parents=True)
    (toy.root / ".venv").symlink_to(sys.prefix)
    before = (toy.root / "params.yaml").read_bytes()
    make(tmp_path / "elsewhere" / "there", toy.root, branch="try")  # made with its parents
    there = at(toy, tmp_path / "elsewhere" / "there")
    third = make(tmp_path / "third", there.root, study="two")
    for workspace in (there, at(toy, third.path)):  # a worktree of a worktree hangs on the first one, too
        assert links(workspace.root) == {".venv", "mlflow.db"}
        assert (workspace.root / "mlflow.db").readlink() == toy.root / "mlflow.db"
        assert (workspace.root / ".venv").resolve() == Path(sys.prefix).resolve()
        assert (workspace.root / "data/scenes").readlink() == toy.root / "data/scenes"
        assert workspace.run("dvc", "cache", "dir").strip() == str(toy.root / ".dvc/cache")
        settings = workspace.run("dvc", "config", "--local", "--list").splitlines()
        assert f"remote.store.url={tmp_path / 'store'}" in settings
        assert "remote.store.verify=true" in settings
    assert (there.root / "params.yaml").read_bytes() == before
    assert git(there.root, "branch", "--show-current") == "try"
    assert git(third.path, "branch", "--show-current") == ""
    assert git(there.root, "rev-parse", "HEAD") == git(third.path, "rev-parse", "HEAD") == third.revision
    git(toy.root, "worktree", "remove", "--force", str(there.root))
    assert (toy.root / "data/scenes").is_dir()
    assert (toy.root / "mlflow.db").is_file()
    assert (third.path / "mlflow.db").is_file()


def test_workspaces_write_one_tracking_store(toy: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made before it is shared, where it is not there yet."""
    there = tmp_path / "there"
    (toy.root / "mlflow.db").unlink()
    make(there, toy.root)
    for root in (toy.root, there):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
        MlflowTracker(root.name, root, {}).close("FINISHED", 60.0)
    assert not list((there / "logs").rglob("*.jsonl"))  # all of it was sent
    git(toy.root, "worktree", "remove", "--force", str(there))
    client = MlflowClient(f"sqlite:///{toy.root / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'bev-distillery'")
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name or "" for run in runs) == ["project", "there"]
    assert experiment.artifact_location == (toy.root / "mlartifacts").as_uri()


def test_gc_with_all_workspaces_keeps_their_rows(toy: Project, tmp_path: Path) -> None:
    toy.write("dvc.yaml", PLAIN)
    commit(toy.root)
    there = at(toy, tmp_path / "there there")
    make(there.root, toy.root, study="two")
    for workspace in (toy, there):
        workspace.repro()
    lines = describe(toy.root).splitlines()
    assert lines[0].startswith(f"{toy.root}: study demo, profile demo, ")
    assert lines[1].startswith(f"{there.root}: study two, profile demo, ")
    assert describe(there.root).splitlines()[:2] == lines[:2]
    for workspace in (toy, there):
        command = shlex.split(describe(workspace.root).splitlines()[2].partition(": ")[2])
        workspace.run(*command, "--force")

    def restored() -> list[str]:
        for name in ("xod", "xfd"):
            (there.root / "outputs" / name).unlink(missing_ok=True)
        there.run("dvc", "checkout", code=None)
        return sorted(path.name for path in (there.root / "outputs").iterdir() if path.name in ("xod", "xfd"))

    assert restored() == ["xfd", "xod"]
    toy.run("dvc", "gc", "--workspace", "--force")  # what the documentation warns of
    assert restored() == ["xod"]


def refusal(root: Path, path: Path, **options: str) -> str:
    """What `make` says; it must leave the repository as it was."""
    with pytest.raises(PipelineError) as error:
        make(path, root, **options)
    assert git(root, "worktree", "list").count("\n") == 0
    assert git(root, "branch", "--list", "new") == ""
    return str(error.value)


def test_what_cannot_become_a_worktree_is_refused(toy: Project, tmp_path: Path) -> None:
    root, new = toy.root, tmp_path / "new"
    assert "study 'three' is unknown; allowed: one, two" in refusal(root, new, study="three")
    assert "profile 'huge' is unknown; allowed: demo" in refusal(root, new, profile="huge", branch="new")
    assert "study.variants: 'xodd' is unknown" in refusal(root, new, study="wrong", branch="new")
    assert not new.exists()
    assert f"{tmp_path} is already there" in refusal(root, tmp_path)
    assert "is inside this workspace" in refusal(root, root / "outputs/new")
    git(root, "branch", "taken")
    assert "'taken' already exists" in refusal(root, new, branch="taken")
    inner = root / "stages"
    assert f"{inner} is a folder of the git repository {root}" in refusal(inner, new)
    toy.set(study__name="demo", data__dataroot="../scenes", data__worlds=[], data__instances=None)
    commit(root)
    (tmp_path / "scenes").mkdir()
    assert "../scenes is" in refusal(root, tmp_path / "elsewhere" / "new")
    make(new, root)  # beside this workspace the same path leads there


def test_changes_that_would_be_missing_are_refused(toy: Project, tmp_path: Path) -> None:
    root, new = toy.root, tmp_path / "new"
    toy.run("pipeline", "study", "two")
    toy.write("dvc.lock", "schema: '2.0'\n")
    (root / "reports").mkdir()
    toy.write("reports/table.txt", "a run wrote it\n")
    toy.write("stages/prepare.py", PREPARE + "# a change")
    toy.write("stages/more.py", "")
    assert "these changes are not: stages/prepare.py, stages/more.py; commit them" in refusal(root, new)
    toy.write("stages/prepare.py", PREPARE)
    (root / "stages/more.py").unlink()
    toy.edit("params.yaml", "azimuths: 1080", "azimuths: 1081")
    assert "these changes are not: params.yaml; commit them" in refusal(root, new, study="one")
    toy.edit("params.yaml", "azimuths: 1081", "azimuths: 1080")
    (root / "params/arms").mkdir(parents=True)
    toy.write("params/arms/own.yaml", "variants:\n  own: {student: camera, terms: []}\n")
    assert "these changes are not: params/arms/own.yaml; commit them" in refusal(root, new, study="one")
    shutil.rmtree(root / "params")
    made = make(new, root, study="one")  # what studies and runs write is no change
    assert made.study == "one"


def test_without_git_or_a_commit_it_says_so(toy: Project, tmp_path: Path) -> None:
    shutil.rmtree(toy.root / ".git")
    with pytest.raises(PipelineError, match=r"project has no commit.*not a git repository"):
        make(tmp_path / "new", toy.root)
    subprocess.run(["git", "init", "-q", str(toy.root)], check=True)
    with pytest.raises(PipelineError, match=r"project has no commit"):
        make(tmp_path / "new", toy.root)


def test_the_command_makes_one_and_lists_all(toy: Project, tmp_path: Path) -> None:
    output = toy.run("pipeline", "worktree", "../there", "--study", "two", "--branch", "try")
    there = tmp_path / "there"
    assert output.startswith(f"{there}: study two, profile demo, ")
    assert f"cd {there} && .venv/bin/python -m pipeline run" in output
    assert f"{there}: study two, profile demo, " in toy.run("pipeline", "worktree")
    assert "error: study 'three' is unknown" in toy.run("pipeline", "worktree", "../x", "--study", "three", code=1)
