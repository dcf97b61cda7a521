"""Eight processes write to one tracking store at once, in sqlite and in PostgreSQL: nothing is lost or there twice."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from results.tracking import runs as tracking
from results.tracking.runs import JOURNALS, artifact_root, open_store, replay
from tests.pipeline.project import free_port, wait_until
from tests.pipeline.writing import write_at_once

WRITERS, STEPS, PARAMS = 8, 200, 120
NAMES = [f"writer-{number}" for number in range(WRITERS)]
POSTGRES = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1:]), None)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """URI of an empty database of a PostgreSQL of its own, on a free port."""
    if POSTGRES is None or shutil.which("setpriv") is None:
        pytest.skip("PostgreSQL is absent: no /usr/lib/postgresql/*/bin, or no setpriv")
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))  # the folders of pytest's tmp_path are closed to other users
    data, port, own = folder / "data", free_port(), ["setpriv", "--pdeathsig=INT"]  # ends with this process
    if os.getuid() == 0:  # it does not run as root
        shutil.chown(folder, "postgres", "postgres")
        own += ["--reuid=postgres", "--regid=postgres", "--clear-groups"]
    made = [*own, str(POSTGRES / "initdb"), "-D", str(data), "-A", "trust", "-U", "tracker"]
    subprocess.run(made, check=True, cwd=folder, stdout=subprocess.DEVNULL)
    quick = ["-p", str(port), "-k", str(folder), "-h", "127.0.0.1", "-F"]  # -F: a test needs no fsync
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([*own, str(POSTGRES / "postgres"), "-D", str(data), *quick], cwd=folder, stderr=log)
    ready = [str(POSTGRES / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
    wait_until(lambda: subprocess.run(ready).returncode == 0)
    yield f"postgresql+psycopg2://tracker:secret@127.0.0.1:{port}/postgres"
    server.send_signal(signal.SIGINT)
    assert server.wait(60) == 0
    shutil.rmtree(folder)


def check_all_arrived(root: Path, monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    """What found the store busy at its end waits in journals, and goes out with the next replay."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.delenv(tracking.LATER, raising=False)
    replay(root / JOURNALS)
    assert not [path.name for path in (root / JOURNALS).iterdir() if not path.name.endswith(".lock")]
    client = open_store(root)
    experiment = client.get_experiment_by_name("bev-distillery")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name for run in found) == NAMES
    for run in found:
        check_whole(client, run.info.run_id, run.info.run_name)


def check_whole(client: MlflowClient, run_id: str, name: str) -> None:
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {str(number): str(number) for number in range(PARAMS)}
    for metric, factor in (("train/loss", 0.5), ("train/lr", -1.0)):
        history = [(point.step, point.value) for point in client.get_metric_history(run_id, metric)]
        assert sorted(history) == [(step, factor * step) for step in range(STEPS)]
    text = Path(client.download_artifacts(run_id, "texts/name.txt")).read_text()
    assert text == name * 1000


def test_eight_writers_on_sqlite(tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_at_once(tmp_path, database, NAMES, STEPS, PARAMS)
    check_all_arrived(tmp_path, monkeypatch, database)


def test_eight_writers_on_an_empty_postgresql(tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each finds no tables and wants to make them."""
    write_at_once(tmp_path, cluster, NAMES, STEPS, PARAMS)
    check_all_arrived(tmp_path, monkeypatch, cluster)


def test_files_of_a_store_without_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_DEFAULT_ARTIFACT_ROOT", raising=False)
    assert artifact_root("sqlite:////one/mlflow.db", Path("/two")) == "file:///one/mlartifacts"
    assert artifact_root("postgresql+psycopg2://a:b@host/db", Path("/two")) == "file:///two/mlartifacts"
    monkeypatch.setenv("MLFLOW_DEFAULT_ARTIFACT_ROOT", "s3://bucket/runs")
    assert artifact_root("postgresql+psycopg2://a:b@host/db", Path("/two")) == "s3://bucket/runs"
