"""A copy of the project in which the real commands run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.params_files import lay_text

ROOT = Path(__file__).resolve().parents[2]
# Bytecode is written (tests/conftest.py), as on a user's machine: its folders appear inside the stages' dependencies.
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "DVC_NO_ANALYTICS": "1",
}


@dataclass
class Project:
    """A project folder of its own, with git, DVC and MLflow."""

    root: Path

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        done = subprocess.run(command, cwd=self.root, env=ENVIRONMENT, text=True, capture_output=True, check=False)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a command that serves until it is stopped."""
        return subprocess.Popen(command, cwd=self.root, env=ENVIRONMENT, stdout=subprocess.DEVNULL)

    def profile(self, name: str) -> None:
        """Lay a profile over the parameters."""
        self.run(sys.executable, "-m", "pipeline", "profile", name)

    def repro_until(self, stage: str, reached: Callable[[], bool]) -> str:
        """`dvc repro`, and kill -9 the process of a stage as soon as a condition holds; returns what DVC printed."""
        log = self.root.with_name("repro.log")  # not in the project, where git would see it
        # Records are sent by the next run that is not killed: MLflow's import is a good part of a short stage.
        environment = ENVIRONMENT | {"PIPELINE_TRACK_LATER": "1"}
        with log.open("w") as file:
            dvc = subprocess.Popen(["dvc", "repro"], cwd=self.root, env=environment, stdout=file, stderr=file)
            while not reached():
                assert dvc.poll() is None, f"dvc repro ended before {stage} could be killed:\n{log.read_text()}"
                time.sleep(0.01)
            killed = [child for child in psutil.Process(dvc.pid).children(recursive=True) if is_stage(child, stage)]
            for child in killed:
                child.send_signal(signal.SIGKILL)
            dvc.wait(timeout=120)
        assert killed, f"{stage} had ended before it could be killed:\n{log.read_text()}"
        assert dvc.returncode != 0, f"{stage} survived kill -9"
        return log.read_text()

    def metrics(self) -> dict[str, str]:
        """The metrics files of the study, by name."""
        return {path.name: path.read_text() for path in sorted((self.root / "reports/metrics").glob("*.json"))}

    def evaluations(self) -> dict[str, str]:
        """What the evaluations say beside the metrics, by run."""
        found = sorted((self.root / "outputs/evaluations").glob("*/evaluation.json"))
        return {path.parent.name: path.read_text() for path in found}


def set_study(root: Path, changes: Mapping[str, Any]) -> None:
    """Set entries of `study`."""
    lay_text(root, f"study: {json.dumps(changes)}\n")


def is_stage(process: psutil.Process, stage: str) -> bool:
    """Whether a process runs a stage, or is a loader's worker of one."""
    try:
        return f"stage {stage}" in " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


@pytest.fixture(scope="session")
def tracking_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty MLflow store to copy: migrating takes ten seconds."""
    folder = tmp_path_factory.mktemp("tables")
    environment = ENVIRONMENT | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}"}
    subprocess.run([sys.executable, "-m", "pipeline", "track", "init"], cwd=ROOT, env=environment, check=True)
    return folder / "mlflow.db"


@pytest.fixture
def project(tmp_path: Path, tracking_tables: Path) -> Iterator[Project]:
    """The files that git knows or would add, in a new repository."""
    root = tmp_path / "project"
    root.mkdir()
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True, capture_output=True, check=True
    ).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
    for stale in [*(root / "reports").rglob("*.json"), root / "dvc.lock"]:
        stale.unlink(missing_ok=True)
    shutil.copy(tracking_tables, root / "mlflow.db")
    made = Project(root)
    made.run("git", "init", "--quiet")
    made.run("git", "add", "--all")
    made.run("git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "--quiet", "-m", "start")
    yield made
    shutil.rmtree(root, ignore_errors=True)
