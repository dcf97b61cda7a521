"""dvc.yaml lists all the code that can change a stage's result.

A module that is missing from a stage's `deps` would let an edit leave stale outs behind, so the list is compared with
the imports: from stages/<name>.py through all rooms but those where nothing may change a result.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest
import yaml

from base.environment import ROOMS
from stages.teaching.identity import CODE

ROOT = Path(__file__).resolve().parents[1]
# What only runs, watches or records: an edit of it changes no result.
CONTROL = ("base/", "config/", "pipeline/", "results/tracking/", "stages/context.py")
SAME_CODE = {f"{stage}_{kind}": stage for stage in ("predict", "evaluate") for kind in ("teacher", "fusion", "large")}
SAME_CODE |= {"fusion": "teacher", "large": "teacher"}
# Beside what a stage imports: how the parameters of a student are put together.
COMPOSING = {"needs": {f"config/{name}.py" for name in ("composing", "nested", "params", "sections")}}
STAGES: dict[str, dict[str, object]] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def file_of(module: str) -> Path | None:
    """File of a module of ours, if it is one."""
    if module.partition(".")[0] not in ROOMS:
        return None
    path = ROOT / module.replace(".", "/")
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


@cache
def imports(path: Path) -> frozenset[Path]:
    """Our modules that a file imports at run time, wherever in the file."""
    found: set[Path] = set()
    tree = ast.parse(path.read_text())
    typing_only = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {file for name in names if (file := file_of(name))}
    return frozenset(found)


def closure(stage: str) -> set[str]:
    """Files that can change a stage's result, relative to the root."""
    frontier, seen = [ROOT / "stages" / f"{SAME_CODE.get(stage, stage)}.py"], set()
    while frontier:
        path = frontier.pop()
        name = str(path.relative_to(ROOT))
        if name in seen or name.startswith(CONTROL):
            continue
        seen.add(name)
        frontier += imports(path)
    return {name for name in seen if Path(name).name != "__init__.py" or len(Path(name).parts) > 2}


def code_deps(stage: str) -> list[str]:
    """The entries of a stage's deps that are code."""
    entry = STAGES[stage]
    body = entry.get("do", entry)
    assert isinstance(body, dict)
    return [dep for dep in body["deps"] if dep.partition("/")[0] in ROOMS]


@pytest.mark.parametrize("stage", list(STAGES))
def test_every_module_is_a_dependency(stage: str) -> None:
    """What the stage imports is listed, as a file or by its folder."""
    listed = code_deps(stage)
    missing = {name for name in closure(stage) if not any(name == dep or name.startswith(f"{dep}/") for dep in listed)}
    assert not missing, f"add to the deps of {stage} in dvc.yaml: {sorted(missing)}"


@pytest.mark.parametrize("stage", list(STAGES))
def test_no_dependency_is_superfluous(stage: str) -> None:
    """What is listed is imported: an edit elsewhere must not retrain a teacher."""
    needed = closure(stage) | COMPOSING.get(stage, set())
    idle = [dep for dep in code_deps(stage) if not any(name == dep or name.startswith(f"{dep}/") for name in needed)]
    assert not idle, f"remove from the deps of {stage} in dvc.yaml: {idle}"


def test_a_loss_is_a_dependency_of_students_only() -> None:
    """And of the stage from whose outs, which are always the same, nothing follows."""
    assert [stage for stage in STAGES if "distill" in code_deps(stage)] == ["check", "distill"]


def test_a_store_is_of_the_code_that_its_stage_depends_on() -> None:
    """But for what says what the store cost, and what hashes the code."""
    assert {*CODE, "stages/card.py", "data/hashing.py"} == set(code_deps("extract"))
    assert all((ROOT / path).exists() for path in CODE)


@pytest.mark.parametrize("stage", [name for name in STAGES if name != "report"])
def test_the_run_cache_takes_the_stage(stage: str) -> None:
    """DVC restores nothing of a stage that has an out with `cache: false`, unless it is among the metrics."""
    body = STAGES[stage].get("do", STAGES[stage])
    assert isinstance(body, dict)
    assert [out for out in body.get("outs", []) if isinstance(out, dict)] == []
