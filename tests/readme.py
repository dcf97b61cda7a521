"""The commands of README.md: those that a test runs, and those that none does."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()

ACTIVATE = "source .venv/bin/activate"
# Commands that the last part of tests/e2e/test_smoke.py leaves out, and why.
NOT_RUN = {
    "make demo": "it takes a quarter of an hour; the study of test_smoke.py is the same DAG with fewer arms",
    "dvc repro": "test_smoke.py runs it earlier in the same project",
    "python -m pipeline run --max-parallel 2": "as above",
    "python -m pipeline run --dry-run": "as above",
    "dvc metrics show": "as above",
    "python -m pipeline cache plan": "test_cache.py covers it in less time",
    "python -m pipeline cache verify": "as above",
    "python -m pipeline cache look lidar": "as above",
    "make quick": "it is run before the suite",
    "make test": "it is the suite",
    "make test-all": "it is the suite",
    "make study STUDY=x3kd": "it takes hours; test_studies.py runs the commands behind `make study` at smoke size",
    "make study STUDY=simdistill": "as above",
    "make study STUDY=structured": "as above",
    "make study STUDY=combined": "as above",
    "make study STUDY=x3kd PROFILE=smoke": "as above",
    "make study STUDY=x3kd WORKTREE=../x3kd": "as above; test_worktree.py makes worktrees",
    "make up": "it serves a cluster",
    "prefect deploy --all && prefect worker start --pool gpu-pool": "it needs a cluster; see test_deployment.py",
    "prefect deployment run pipeline/slurm -p study=x3kd --watch": "it needs a cluster",
}


def commands() -> list[str]:
    """Every command of a console block, in order, without its comment."""
    blocks = re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert all(line.startswith("$ ") for line in lines)
    return [re.sub(r"\s+#.*", "", line.removeprefix("$ ")) for line in lines]


def runnable() -> list[str]:
    """Those that a person can run as they stand where the demo's study is computed."""
    return [command for command in commands() if command not in NOT_RUN]
