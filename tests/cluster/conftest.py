"""Clusters of one machine: a Slurm and a Ray, each started once for the tests that use it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm_cluster import DAEMONS, Slurm
from tests.pipeline.project import Project


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A Slurm of two nodes with 4 CPUs and 2 GPUs each."""
    absent = [name for name in (*DAEMONS, "sbatch") if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
    if absent:
        pytest.skip(f"Slurm is absent: {', '.join(absent)} (Debian: slurm-wlm, munge)")
    if os.getuid():
        pytest.skip("slurmd needs root to start jobs")
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


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
