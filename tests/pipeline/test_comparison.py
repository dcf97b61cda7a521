"""A study in MLflow, from published results to runs of a real store."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import DatasetInput, Run
from PIL import Image

from config import graph
from config.nested import merge
from config.params import Params
from results.report.results import load_study
from results.tracking import runs as tracking
from results.tracking import sending
from results.tracking import study_runs as comparison
from results.tracking.runs import JOURNALS, MlflowTracker, replay
from tests.params_files import read_params
from tests.pipeline.project import ROOT, Project

NDS = {"baseline-0": 0.30, "baseline-1": 0.34, "xod-0": 0.36, "xod-1": 0.35, "lidar": 0.6}
STUDENTS = sorted(set(NDS) - {"lidar"})
ERRORS = {"mATE": 0.5, "mASE": 0.3, "mAOE": 0.8, "mAVE": 1.1, "mAAE": 0.2}


def publish(root: Path, key: str, score: float) -> None:
    """The metrics, the evaluation and the pictures of one model."""
    values = {"AP": score / 2, "ATE": 0.5, "truth": 7, "predicted": 9}
    run = {"mAP": score / 2, "NDS": score, **ERRORS, "mAP_present": None, "samples": 4, "boxes": {"truth": 14}}
    run |= {"parameters": 1000}
    about = {"kind": "x", "key": key, "split": "val", "official": "vectorised"}
    evaluation = {**about, "classes": {"car": values, "bus": values}, "scenes": []}
    (root / "reports/metrics").mkdir(parents=True, exist_ok=True)
    (root / f"reports/metrics/{key}.json").write_text(json.dumps(run))
    folder = root / "outputs/evaluations" / key
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    for name in ("curves.png", "00-bev.png", "00-cameras.jpg"):
        Image.new("RGB", (1200, 600), (len(key), 0, 0)).save(folder / name)
    scene = {"files": {"bev": "00-bev.png", "cameras": "00-cameras.jpg"}}
    (folder / "pictures.json").write_text(json.dumps({"scenes": [scene]}))
    found = {"truth": ["car", "nothing"], "predicted": ["car", "missed"], "counts": [[3, 4], [6, 0]]}
    (folder / "confusion.json").write_text(json.dumps(found))


def write_lock(root: Path, keys: list[str]) -> None:
    """What DVC records of students, their teacher, its store and the index."""
    outs = {"prepare": "outputs/index", "teacher@lidar": "outputs/teachers/lidar"}
    outs |= {"extract@lidar": "outputs/stores/lidar"}
    outs |= {f"distill@{key}": f"outputs/students/{key}" for key in keys}
    stages = {
        name: {"cmd": name, "outs": [{"path": path, "hash": "md5", "md5": f"{number:032x}.dir"}]}
        for number, (name, path) in enumerate(outs.items())
    }
    (root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))


def params_of(train: dict[str, Any] | None = None, **study: Any) -> Params:
    """The repository's parameters, with a study of a baseline and one row; `train` is what the row trains with."""
    overlay: dict[str, Any] = {"name": "small", "teachers": ["lidar", "start"], "fusions": {}, "large": {}}
    overlay |= {"segmenters": [], "stores": ["lidar"], "variants": ["baseline", "xod"], "baselines": []}
    overlay |= {"featured": [], "seeds": [0, 1]}
    overlay |= study
    row = {"xod": {"train": train or {}}}
    changes = {"profile": "demo", "variants": row, "study": overlay}
    return Params.model_validate(merge(read_params(ROOT), changes))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project with published results."""
    folder = tmp_path / "project"
    for key, score in NDS.items():
        publish(folder, key, score)
    write_lock(folder, STUDENTS)
    return folder


@pytest.fixture
def store(database: str, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """A client of this test's own store, which the project uses too."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    monkeypatch.delenv(tracking.LATER, raising=False)
    return MlflowClient(database)


def track(root: Path, **study: Any) -> str:
    params = params_of(**study)
    rows = {name: params.variants[name].row or "" for name in params.study.variants}
    found = load_study(root / "reports/metrics", root / "outputs/evaluations", ["lidar"], rows, params.study.seeds)
    return comparison.track(root, params, found, {name: {"lidar"} if name == "xod" else set() for name in rows})


def runs(client: MlflowClient, **tags: str) -> dict[str, Run]:
    """Runs with tags, by name; a name that is there twice is an error."""
    experiment = client.get_experiment_by_name("bev-distillery")
    words = " AND ".join(f"tags.{name} = '{value}'" for name, value in tags.items())
    found = client.search_runs([experiment.experiment_id], words) if experiment else []
    by_name = {run.info.run_name: run for run in found}
    assert len(by_name) == len(found)
    return by_name


def inputs_of(run: Run) -> list[DatasetInput]:
    assert run.inputs is not None
    return run.inputs.dataset_inputs


def artifacts(client: MlflowClient, run: Run, folder: str) -> list[str]:
    return [Path(item.path).name for item in client.list_artifacts(run.info.run_id, folder)]


def history(client: MlflowClient, run: Run, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]


def journals(root: Path) -> list[Path]:
    return sorted((root / JOURNALS).glob("*.jsonl"))


def test_a_study_is_a_run_with_a_run_for_each_model(root: Path, store: MlflowClient) -> None:
    assert track(root) == "study small (demo): 5 models, 5 of them new or changed, on the server"
    found = runs(store, state="current")
    parent = found.pop("study small (demo)")
    assert sorted(found) == sorted(NDS)
    assert {run.data.tags["mlflow.parentRunId"] for run in found.values()} == {parent.info.run_id}
    assert {run.info.status for run in (parent, *found.values())} == {"FINISHED"}
    assert not journals(root)

    row, lidar = found["xod-1"], found["lidar"]
    assert lidar.data.tags["kind"] == "teacher"
    assert row.data.tags.items() >= {"kind": "student", "dvc.path": "outputs/students/xod-1"}.items()
    assert row.data.tags["dvc.md5"].endswith(".dir")
    shown = {"Variant": "xod", "Seed": "1", "Student": "camera", "Terms": ", ".join(params_of().variants["xod"].terms)}
    assert row.data.params.items() >= shown.items()
    assert found["baseline-1"].data.params["Terms"] == "-"
    assert row.data.metrics["val/NDS"] == lidar.data.metrics["val/NDS"] - 0.25 == 0.35
    assert row.data.metrics["val/AP/car"] == 0.175
    assert row.data.metrics["val/NDS_gain"] == pytest.approx(0.01)  # to the baseline of the same seed
    assert "val/NDS_gain" not in found["baseline-1"].data.metrics
    assert parent.data.metrics["variant/NDS/xod"] == pytest.approx(0.355)
    assert parent.data.metrics["variant/NDS_gain/xod"] == pytest.approx(0.035)
    assert "| xod | " in parent.data.tags["mlflow.note.content"]


def test_what_a_model_was_made_from_and_looks_like(root: Path, store: MlflowClient) -> None:
    track(root)
    row = runs(store)["xod-0"]
    inputs = {item.dataset.name: (item.dataset.digest, item.tags[0].value) for item in inputs_of(row)}
    hashes = comparison.read_recorded(root).hashes
    assert inputs == {
        "index": (hashes["outputs/index"], "training"),
        "teachers/lidar": (hashes["outputs/teachers/lidar"], "teacher"),
        "stores/lidar": (hashes["outputs/stores/lidar"], "store"),
    }
    assert artifacts(store, row, "tables") == ["classes.json", "confusion.json", "errors.json"]
    assert artifacts(store, row, "figures") == ["curves.png"]
    sizes = {}
    for name in artifacts(store, row, "images"):
        with Image.open(store.download_artifacts(row.info.run_id, f"images/{name}")) as picture:
            sizes[name.split("+")[0], name.endswith("+compressed.webp")] = picture.size
    assert sizes == {
        (f"00 {panel}", small): (960, 480) if small else (1200, 600)
        for panel in ("bev", "cameras")
        for small in (True, False)
    }
    table = json.loads(Path(store.download_artifacts(row.info.run_id, "tables/confusion.json")).read_text())
    assert table == {"columns": ["truth", "car", "missed"], "data": [["car", 3, 4], ["nothing", 6, 0]]}
    recipe = yaml.safe_load(Path(store.download_artifacts(row.info.run_id, "recipe.yaml")).read_text())
    assert recipe["variant"]["terms"] == params_of().variants["xod"].model_dump(mode="json")["terms"]


def test_the_best_student_has_an_alias(root: Path, store: MlflowClient) -> None:
    track(root)
    versions = store.search_model_versions("name = 'small-demo'")
    assert sorted(version.tags["key"] for version in versions) == STUDENTS
    best = store.get_model_version_by_alias("small-demo", "best")
    assert best.tags["key"] == "xod-1"  # of two seeds, the one with the lower score
    assert best.tags["dvc.md5"] == comparison.read_recorded(root).hashes["outputs/students/xod-1"]
    stored = store.get_logged_model(str(best.source).removeprefix("models:/"))
    assert stored.source_run_id == runs(store)["xod-1"].info.run_id
    assert sum(path.stat().st_size for path in Path(stored.artifact_location.removeprefix("file://")).iterdir()) < 2000


def test_the_same_results_are_the_same_runs(root: Path, store: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    track(root)
    before = {name: run.info.run_id for name, run in runs(store).items()}
    assert track(root) == "study small (demo): 5 models, 0 of them new or changed, on the server"
    monkeypatch.setattr(comparison, "_known", lambda *_: set())  # a server that could not be asked
    track(root)
    assert {name: run.info.run_id for name, run in runs(store).items()} == before
    assert history(store, runs(store)["xod-0"], "val/NDS") == [(0, 0.36)]
    assert len(store.search_model_versions("name = 'small-demo'")) == len(STUDENTS)
    assert len(inputs_of(runs(store)["xod-0"])) == 3


def test_changed_results_take_the_places_of_others(root: Path, store: MlflowClient) -> None:
    track(root)
    first = runs(store)
    publish(root, "xod-0", 0.2)
    assert "1 of them new or changed" in track(root)
    second = runs(store, state="current")
    replaced = runs(store, state="replaced")
    assert sorted(second) == sorted(first)
    assert sorted(replaced) == ["study small (demo)", "xod-0"]
    assert replaced["xod-0"].info.run_id == first["xod-0"].info.run_id
    assert replaced["xod-0"].data.metrics["val/NDS"] == 0.36
    assert second["xod-0"].data.metrics["val/NDS"] == 0.2
    assert second["xod-1"].info.run_id == first["xod-1"].info.run_id
    parents = {run.data.tags["mlflow.parentRunId"] for name, run in second.items() if "study" not in name}
    assert parents == {second["study small (demo)"].info.run_id}
    assert store.get_model_version_by_alias("small-demo", "best").tags["key"] == "baseline-0"
    versions = [v.run_id for v in store.search_model_versions("name = 'small-demo'") if v.tags["key"] == "xod-0"]
    assert {*versions} == {replaced["xod-0"].info.run_id, second["xod-0"].info.run_id}

    publish(root, "xod-0", 0.36)  # as before
    assert "0 of them new or changed" in track(root)
    third = runs(store, state="current")
    assert {name: run.info.run_id for name, run in third.items()} == {n: run.info.run_id for n, run in first.items()}


def test_seeds_that_are_no_longer_in_the_study_leave_it(root: Path, store: MlflowClient) -> None:
    track(root)
    track(root, seeds=[0])
    parent = runs(store, state="current")["study small (demo)"].info.run_id
    below = {name for name, run in runs(store, state="current").items() if "mlflow.parentRunId" in run.data.tags}
    assert below == {"lidar", "baseline-0", "xod-0"}
    assert all(
        run.data.tags["mlflow.parentRunId"] != parent
        for run in runs(store, state="replaced").values()
        if run.info.run_name != "study small (demo)"
    )


def test_a_server_that_is_away(root: Path, store: MlflowClient, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    assert track(root).endswith("kept for `python -m pipeline track replay`")
    track(root)
    assert len(journals(root)) == 6  # once
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    assert replay(root / JOURNALS) == (6, 0)
    assert sorted(runs(store, state="current")) == sorted([*NDS, "study small (demo)"])


def test_the_study_waits_for_its_runs(root: Path, store: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server went away in between: the study's run is marked and gathers others only when all are there."""
    monkeypatch.setenv(tracking.LATER, "1")
    track(root)
    monkeypatch.delenv(tracking.LATER)
    late = next(path for path in journals(root) if '"xod-0"' in path.read_text())
    aside = shutil.copytree(root / JOURNALS, root / "aside")
    late.unlink()
    assert replay(root / JOURNALS) == (4, 1)
    assert not runs(store, state="current")
    shutil.copy(aside / late.name, late)
    assert replay(root / JOURNALS) == (2, 0)
    assert len(runs(store, state="current")) == 6


def test_curves_come_from_the_run_that_trained(root: Path, store: MlflowClient) -> None:
    fingerprint = comparison.read_recorded(root).fingerprints["distill@xod-0"]
    for other, state in ((fingerprint, "FAILED"), ("another", "FINISHED"), (fingerprint, "FINISHED")):
        tags = {"dvc.fingerprint": other, "git.rev": state}
        tracker = MlflowTracker(f"distill@xod-0 {state} {other[:3]}", root, tags)
        for step in range(1500):
            tracker.log_metrics({"train/loss": step * (2.0 if other == fingerprint else 3.0)}, step)
        tracker.log_metrics({"system/cpu": 1.0}, 0)
        tracker.close(state)
    track(root)
    row, stage = runs(store)["xod-0"], runs(store)[f"distill@xod-0 FINISHED {fingerprint[:3]}"]
    assert row.data.tags["curves.run"] == stage.info.run_id
    assert row.data.tags["git.rev"] == "FINISHED"
    assert history(store, row, "train/loss") == [(step, 2.0 * step) for step in range(1500)]
    assert "system/cpu" not in row.data.metrics
    assert "curves.run" not in runs(store)["xod-1"].data.tags


def test_fingerprints_are_those_of_the_stages(make_project: Callable[..., Project]) -> None:
    """What is read out of dvc.lock is what the stage's run was tagged with."""
    project = make_project(PIPELINE_TRACK_LATER="1")
    project.repro("distill@xod-0")
    recorded = comparison.read_recorded(project.root)
    for name in ("prepare", "distill@xod-0"):
        assert recorded.fingerprints[name] == graph.resolve(name, project.root).fingerprint
    assert recorded.hashes["outputs/students/xod-0"].endswith(".dir")


def test_students_without_a_hash_are_not_registered(root: Path, store: MlflowClient) -> None:
    (root / "dvc.lock").unlink()
    track(root)
    assert not store.search_registered_models()
    assert "dvc.md5" not in runs(store)["xod-0"].data.tags


def test_two_workspaces_with_the_same_results_make_each_run_once(
    root: Path, store: MlflowClient, tmp_path: Path
) -> None:
    script = (
        "import sys; from pathlib import Path; from tests.pipeline.test_comparison import track\n"
        "print(track(Path(sys.argv[1])))\n"
    )
    shutil.copytree(root, tmp_path / "other")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    children = [
        subprocess.Popen([sys.executable, "-c", script, str(folder)], env=environment)
        for folder in (root, tmp_path / "other")
    ]
    assert [child.wait(200) for child in children] == [0, 0]
    found = runs(store, state="current")  # fails where a name is there twice
    assert len(found) == 6
    assert len(store.search_model_versions("name = 'small-demo'")) == len(STUDENTS)


def test_settings_that_differ_are_the_rows_own() -> None:
    params = params_of(variants=["baseline", "xod", "xfd"])
    own, common = comparison.own_settings(params), comparison.common_settings(params)
    assert own["baseline"] == {}
    assert not any(name in own[variant] for variant in own for name in common)
    assert common["model.type"] == params.student("baseline").model["type"]
    own = comparison.own_settings(params_of({"lr": 0.5}, variants=["baseline", "xod", "xfd"]))
    assert {variant: values.get("train.lr") for variant, values in own.items()} == {
        "baseline": params.student("baseline").train.lr,
        "xod": 0.5,
        "xfd": params.student("xfd").train.lr,
    }


def test_a_half_written_lock_is_read_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "dvc.lock").write_text("")
    monkeypatch.setattr(comparison.time, "sleep", lambda _: write_lock(root, STUDENTS))
    assert "outputs/students/xod-0" in comparison.read_recorded(root).hashes


def test_settle_keeps_the_older_of_two_runs(store: MlflowClient, tmp_path: Path) -> None:
    experiment = tracking.experiment_id(store, tmp_path)
    older, newer = (store.create_run(experiment, moment, {sending.JOURNAL: "j"}).info.run_id for moment in (1000, 2000))
    assert sending.settle(store, experiment, "j", newer) == older
    assert sending.settle(store, experiment, "j", older) == older
    assert store.get_run(newer).info.lifecycle_stage == "deleted"
