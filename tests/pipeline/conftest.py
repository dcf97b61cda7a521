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
def made_once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[..., Path]:
    """Make a folder of a name by a command, once per test session: by whichever of the test processes comes first."""
    base = tmp_path_factory.getbasetemp()

    def make(name: str, *command: str, **environment: str) -> Path:
        folder = (base if worker_id == "master" else base.parent) / name
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                folder.mkdir()
                (folder / "dvc.yaml").write_text("stages: {}\n")
                own = {key: value.format(folder=folder) for key, value in environment.items()}
                call = [sys.executable, "-m", *command]
                subprocess.run(call, cwd=folder, env=os.environ | own, check=True, stdout=subprocess.DEVNULL)
        return folder

    return make


@pytest.fixture(scope="session")
def prefect_database(made_once: Callable[..., Path]) -> Path:
    """An empty database of a Prefect server, which takes eleven seconds for it."""
    command = ("prefect", "server", "database", "upgrade", "--yes")
    return made_once("prefect", *command, PREFECT_HOME="{folder}") / "prefect.db"


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
def migrated(made_once: Callable[..., Path]) -> Path:
    """A migrated, empty database of MLflow, which takes several seconds."""
    uri = "sqlite:///{folder}/mlflow.db"
    return made_once("mlflow", "pipeline", "track", "init", PYTHONPATH=str(ROOT), MLFLOW_TRACKING_URI=uri) / "mlflow.db"


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
