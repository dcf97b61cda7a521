"""Projects in temporary folders, and one migrated MLflow database that tests copy."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from base.environment import die_with_parent
from config.profiles import apply_profile
from pipeline.processes import stop_groups
from tests.params_files import copy_params
from tests.pipeline.project import ROOT, Project, free_port, wait_until


@pytest.fixture(scope="session")
def prefect_database(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """An empty database of a Prefect server, made once per test session: a server takes eleven seconds for it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "prefect"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            environment = os.environ | {"PREFECT_HOME": str(folder)}
            command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return folder / "prefect.db"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, prefect_database: Path) -> Iterator[str]:
    """A Prefect server for the tests of the group `prefect-server`."""
    port, home = free_port(), tmp_path_factory.mktemp("prefect")
    shutil.copy(prefect_database, home)
    environment = os.environ | {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_ENABLED": "false",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    url = f"http://127.0.0.1:{port}/api"

    def ready() -> bool:
        try:
            return urllib.request.urlopen(f"{url}/health", timeout=5).status == 200
        except OSError:
            return False

    try:
        wait_until(ready, 90)
        yield url
    finally:
        stop_groups([process.pid], 10)
        process.wait()


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    """A tiny project."""
    made = Project(tmp_path / "project")
    yield made
    made.stop_all()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The repository's parameters at profile `demo`, beside its profiles."""
    copy_params(tmp_path)
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    apply_profile("demo", tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A migrated, empty database, made once per test session (it takes several seconds)."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "mlflow"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            environment = os.environ | {
                "PYTHONPATH": str(ROOT),
                "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
            }
            (folder / "dvc.yaml").write_text("stages: {}\n")
            subprocess.run([sys.executable, "-m", "pipeline", "track", "init"], cwd=folder, env=environment, check=True)
    return folder / "mlflow.db"


@pytest.fixture
def database(migrated: Path, tmp_path: Path) -> str:
    """URI of a migrated, empty tracking database of this test's own."""
    return f"sqlite:///{shutil.copy(migrated, tmp_path / 'mlflow.db')}"


@pytest.fixture
def make_project(tmp_path: Path) -> Iterator[Callable[..., Project]]:
    """Make tiny projects with environment variables."""
    made: list[Project] = []

    def make(**environment: str) -> Project:
        made.append(Project(tmp_path / f"project{len(made)}", **environment))
        return made[-1]

    yield make
    for project in made:
        project.stop_all()
