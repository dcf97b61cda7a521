"""The journal in front of MLflow: nothing stops, nothing is lost, nothing arrives twice."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from results.tracking import runs as tracking
from results.tracking.runs import JOURNALS, Journal, MlflowTracker, open_store, replay
from tests.pipeline.project import ROOT, Project, wait_until
from tests.pipeline.writing import write_at_once

NOWHERE = "http://127.0.0.1:9"  # nobody listens there


@pytest.fixture
def store(database: str, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """A client of this test's own store, which the tracker uses, too."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    monkeypatch.delenv(tracking.LATER, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    return MlflowClient(database)


def runs(client: MlflowClient) -> dict[str, Any]:
    """All runs of the project by name."""
    experiment = client.get_experiment_by_name("bev-distillery")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])} if experiment else {}


def curve(client: MlflowClient, run: Any, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]


def values_of(client: MlflowClient, name: str) -> dict[str, float] | None:
    found = runs(client)
    return found[name].data.metrics if name in found else None


def journals(root: Path) -> list[Path]:
    return sorted((root / JOURNALS).glob("*.jsonl"))


def test_everything_arrives(store: MlflowClient, tmp_path: Path) -> None:
    tracker = MlflowTracker("distill@x-0", tmp_path, {"variant": "x", "nothing": None})
    tracker.log_params({"train": {"lr": 0.1, "many": {str(i): i for i in range(200)}}, "size": [1, 2]})
    for step in range(3000):
        tracker.log_metrics({"train/loss": 1 / (step + 1), "lr": 0.5}, step)
    tracker.set_tags({"seed": 3})
    (tmp_path / "drawn.png").write_bytes(b"\x89PNG")
    tracker.log_file(tmp_path / "drawn.png", "figures/curve.png")
    (tmp_path / "table.json").write_text("{}")
    tracker.log_artifact(tmp_path / "table.json", "tables")
    tracker.close()

    run = runs(store)["distill@x-0"]
    assert not journals(tmp_path)
    assert tracker.run_id == run.info.run_id
    assert run.info.status == "FINISHED"
    assert run.data.tags.items() >= {"variant": "x", "seed": "3"}.items()
    assert run.data.params.items() >= {"train.lr": "0.1", "train.many.199": "199", "size": "[1, 2]"}.items()
    assert curve(store, run, "train/loss") == [(step, 1 / (step + 1)) for step in range(3000)]
    assert [item.path for item in store.list_artifacts(run.info.run_id, "figures")] == ["figures/curve.png"]
    assert [item.path for item in store.list_artifacts(run.info.run_id, "tables")] == ["tables/table.json"]
    assert not list((tmp_path / JOURNALS).iterdir())  # sent whole: nothing is kept


def test_stage_runs_through_without_a_server_and_its_records_come_later(
    store: MlflowClient, make_project: Callable[..., Project]
) -> None:
    project = make_project(MLFLOW_TRACKING_URI=NOWHERE, PIPELINE_TRACK_LATER="")
    project.edit("dvc.yaml", "deps: [stages/distill.py, outputs/index]", "deps: [stages/distill.py]")
    project.write(
        "stages/distill.py",
        (project.root / "stages" / "distill.py")
        .read_text()
        .replace("step=1)", "step=1)\n    [context.tracker.log_metrics({'m': i}, i) for i in range(500)]"),
    )
    began = time.monotonic()
    assert project.repro("distill@baseline-0") == ["distill@baseline-0"]
    assert time.monotonic() - began < 60
    assert "the server does not answer" in "\n".join(project.lines("logs/distill-baseline-0.log"))
    assert len(journals(project.root)) == 1

    assert replay(project.root / JOURNALS) == (1, 0)
    assert replay(project.root / JOURNALS) == (0, 0)
    run = runs(store)["distill@baseline-0"]
    assert run.info.status == "FINISHED"
    assert run.data.tags["dvc.stage"] == "distill@baseline-0"
    assert run.data.tags["variant"] == "baseline"
    assert run.data.params["variants.baseline.student"] == "camera"
    assert curve(store, run, "m") == [(i, float(i)) for i in range(500)]


def test_what_another_left_goes_out_with_the_next_run(store: MlflowClient, tmp_path: Path) -> None:
    os.environ[tracking.LATER] = "1"
    left = MlflowTracker("left", tmp_path, {})
    left.log_metrics({"m": 1.0}, 0)
    left.close()
    del os.environ[tracking.LATER]
    assert len(journals(tmp_path)) == 1
    MlflowTracker("next", tmp_path, {}).close()
    assert runs(store)["left"].data.metrics == {"m": 1.0}
    assert not journals(tmp_path)


def test_sending_again_changes_nothing(store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sender that dies between sending and noting that it has sent."""
    monkeypatch.setenv(tracking.LATER, "1")
    tracker = MlflowTracker("twice", tmp_path, {})
    tracker.log_params({"a": 1})
    for step in range(1200):
        tracker.log_metrics({"m": step}, step)
    tracker.close("FAILED")
    journal = Journal(journals(tmp_path)[0])
    assert journal.send(dead=True)
    (journal.path.with_suffix(".cursor")).unlink()
    assert journal.send(dead=True)
    assert len(runs(store)) == 1
    assert curve(store, runs(store)["twice"], "m") == [(step, float(step)) for step in range(1200)]


def test_a_resumed_stage_goes_on_with_its_run(store: MlflowClient, tmp_path: Path) -> None:
    """kill -9, then the steps behind the last checkpoint are done, and recorded, again."""
    script = (
        "import sys, time; from pathlib import Path; from results.tracking.runs import MlflowTracker\n"
        "tracker = MlflowTracker('killed', Path(sys.argv[1]), {})\n"
        "for step in range(10): tracker.log_metrics({'m': step}, step)\n"
        "print(tracker.id, flush=True); time.sleep(100)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), tracking.LATER: "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    name = child.stdout.readline().strip()
    assert replay(tmp_path / JOURNALS) == (0, 0)  # its writer lives
    child.kill()
    child.communicate()
    with journals(tmp_path)[0].open("a") as file:
        file.write('{"op": "metr')  # torn by the kill
    assert replay(tmp_path / JOURNALS) == (1, 0)
    assert runs(store)["killed"].info.status == "KILLED"

    tracker = MlflowTracker("killed", tmp_path, {}, resume=name)
    assert tracker.id == name
    for step in range(5, 15):
        tracker.log_metrics({"m": step}, step)
    tracker.close()
    assert len(runs(store)) == 1
    assert runs(store)["killed"].info.status == "FINISHED"
    assert curve(store, runs(store)["killed"], "m") == [(step, float(step)) for step in range(15)]


def test_children_find_their_parent(store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tracking.LATER, "1")
    flow = MlflowTracker("flow", tmp_path, {})
    stage = MlflowTracker("stage", tmp_path, {}, parent=flow.id)
    orphan = MlflowTracker("orphan", tmp_path, {}, parent="20000101-000000-gone")
    stage.close()
    orphan.close()
    assert replay(tmp_path / JOURNALS) == (1, 1)  # the child waits until the server knows its parent
    flow.close()
    assert replay(tmp_path / JOURNALS) == (2, 0)
    found = runs(store)
    assert found["stage"].data.tags["mlflow.parentRunId"] == found["flow"].info.run_id
    assert "mlflow.parentRunId" not in found["orphan"].data.tags


def test_a_flow_sends_for_its_stages(store: MlflowClient, tmp_path: Path) -> None:
    """While they run and when they have ended, without their help; a damaged journal stands in no one's way."""
    (tmp_path / JOURNALS).mkdir(parents=True)
    (tmp_path / JOURNALS / "19990101-damaged.jsonl").write_text("torn")
    flow = MlflowTracker("flow", tmp_path, {}, for_others=True)
    script = (
        "import sys, time; from pathlib import Path; from results.tracking.runs import MlflowTracker\n"
        f"tracker = MlflowTracker('stage', Path({str(tmp_path)!r}), {{}}, {flow.id!r})\n"
        "tracker.log_metrics({'m': 1.0}, 0); input(); tracker.log_metrics({'m': 2.0}, 1); input(); tracker.close()\n"
        "print([name for name in sys.modules if name == 'mlflow'])\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), tracking.LATER: tracking.BY_FLOW}
    with subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as stage:
        assert stage.stdin is not None
        assert stage.stdout is not None
        for step in (0, 1):
            wait_until(lambda metrics={"m": step + 1.0}: values_of(store, "stage") == metrics)
            assert runs(store)["stage"].info.status == "RUNNING"
            print(file=stage.stdin, flush=True)
        assert stage.stdout.read() == "[]\n"
    flow.close()
    found = runs(store)
    assert {name: run.info.status for name, run in found.items()} == {"flow": "FINISHED", "stage": "FINISHED"}
    assert found["stage"].data.tags["mlflow.parentRunId"] == found["flow"].info.run_id
    assert [path.name for path in journals(tmp_path)] == ["19990101-damaged.jsonl"]


def test_two_senders_make_one_run(store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tracking.LATER, "1")
    tracker = MlflowTracker("one", tmp_path, {})
    for step in range(50):
        tracker.log_metrics({"m": step}, step)
    tracker.close()
    open_store(tmp_path)  # imports are for one thread
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: Journal(journals(tmp_path)[0]).send(), range(4)))
    assert len(store.search_runs([runs(store)["one"].info.experiment_id])) == 1


def test_a_damaged_journal_blocks_no_other(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(tracking.LATER, "1")
    bad, good = MlflowTracker("bad", tmp_path, {}), MlflowTracker("good", tmp_path, {})
    bad.close()
    good.close()
    path = journals(tmp_path)[0]
    path.write_text("torn" + path.read_text()[30:])
    replay(tmp_path / JOURNALS)
    assert runs(store)["good"].info.status == "FINISHED"


def test_replay_without_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(tracking.LATER, "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    MlflowTracker("kept", tmp_path, {}).close()
    with caplog.at_level(logging.WARNING):
        assert replay(tmp_path / JOURNALS) == (0, 1)
    assert "cannot be sent now" in caplog.text
    assert len(journals(tmp_path)) == 1


def test_locked_database(store: MlflowClient, database: str, tmp_path: Path) -> None:
    with sqlite3.connect(database.removeprefix("sqlite:///"), isolation_level=None) as lock:
        lock.execute("BEGIN EXCLUSIVE")
        tracker = MlflowTracker("locked", tmp_path, {})
        tracker.log_metrics({"m": 1.0}, 1)
        began = time.monotonic()
        tracker.close("FINISHED", seconds=1.0)
        assert time.monotonic() - began < 3
        assert len(journals(tmp_path)) == 1
        lock.execute("ROLLBACK")
    tracker._thread.join(60)
    replay(tmp_path / JOURNALS)
    assert curve(store, runs(store)["locked"], "m") == [(1, 1.0)]


def test_a_record_that_the_server_refuses_blocks_nothing(store: MlflowClient, tmp_path: Path) -> None:
    tracker = MlflowTracker("refused", tmp_path, {})
    tracker.log_params({"a": 1})
    tracker.log_metrics({"m": 0.0}, 0)
    tracker.log_params({"a": 2})  # MLflow's params cannot change
    tracker.log_metrics({"m": 1.0}, 1)
    refused = journals(tmp_path)[0].with_suffix(".refused")
    tracker.close()
    assert [json.loads(line)["values"] for line in refused.read_text().splitlines()] == [{"a": "2"}]
    assert curve(store, runs(store)["refused"], "m") == [(0, 0.0), (1, 1.0)]


def test_no_secret_and_no_machine_path_in_params(store: MlflowClient, tmp_path: Path) -> None:
    tracker = MlflowTracker("scrubbed", tmp_path, {})
    tracker.log_params(
        {
            "data": {"dataroot": "/mnt/disk/nuscenes", "token": "abc"},
            "url": "s3://me:pass@host/x",
            "api_key": "k",
            "odd key!": 1,
        }
    )
    tracker.close()
    params = runs(store)["scrubbed"].data.params
    assert params == {
        "data.dataroot": "nuscenes",
        "data.token": "***",
        "url": "s3://***@host/x",
        "api_key": "***",
        "odd key_": "1",
    }


def test_four_processes_on_a_fresh_database(tmp_path: Path) -> None:
    """Each finds no tables and wants to make them; all write at once."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    write_at_once(tmp_path, uri, ["p", "q", "r", "s"], steps=200, params=1)
    client = MlflowClient(uri)
    found = runs(client)
    assert sorted(found) == ["p", "q", "r", "s"]
    for run in found.values():
        assert curve(client, run, "train/loss") == [(step, step / 2) for step in range(200)]
        assert curve(client, run, "train/lr") == [(step, -float(step)) for step in range(200)]


def test_machine_is_sampled(store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "SAMPLE_SECONDS", 0.1)
    monkeypatch.setattr(tracking, "SEND_SECONDS", 0.2)
    tracker = MlflowTracker("sampled", tmp_path, {})
    wait_until(lambda: any("cpu_utilization" in line for line in journals(tmp_path)[0].read_text().splitlines()))
    tracker.close()
    assert "system/cpu_utilization_percentage" in runs(store)["sampled"].data.metrics
