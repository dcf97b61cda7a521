"""docs/reruns.md says truly what an edit makes run again.

Nothing is computed: DVC runs a stage again when the hash of a dependency has changed, so what an edit reaches follows
from dvc.yaml alone. That DVC's hashes do change so is seen with an edit of a file of every row.
"""

from __future__ import annotations

import json
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from dvc.repo import Repo

from base.environment import ROOMS

ROOT = Path(__file__).resolve().parents[1]


def body(entry: dict[str, Any]) -> dict[str, Any]:
    """A stage for one item: the key of a second step says of which kind it is, and its parts are teachers."""
    for kind in ("fusion", "large"):
        if str(entry.get("foreach", "")).startswith(f"${{study.{kind}"):
            text = json.dumps(entry["do"]).replace("${key}", f"${{item.{kind}}}")
            found: dict[str, Any] = json.loads(re.sub(r"\$\{item\.(lidar|camera)\}", "${item.teacher}", text))
            return found
    return entry.get("do", entry)


STAGES = {name: body(entry) for name, entry in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].items()}
GROUPS = {
    "every teacher": {"teacher", "fusion", "large", "segmenter"},
    "every prediction": {"predict", "predict_teacher", "predict_fusion", "predict_large", "predict_segmenter"},
    "every evaluation": {"evaluate", "evaluate_teacher", "evaluate_fusion", "evaluate_large", "evaluate_segmenter"},
    "nothing": set[str](),
}


def outs(stage: str) -> list[str]:
    """Patterns of a stage's outs."""
    entries = [*STAGES[stage].get("outs", []), *STAGES[stage].get("metrics", [])]
    return [pattern(entry if isinstance(entry, str) else next(iter(entry))) for entry in entries]


def pattern(path: str) -> str:
    """A path in which `*teacher` stands for the name of any teacher, `*key` for any student, `*` for anything."""
    # A dataroot may be anywhere; as far as stages are concerned it is what `generate` makes.
    path = re.sub(r"^\$\{data\.(dataroot|instances)[^}]*\}.*", "outputs/*", path)
    return re.sub(r"\$\{[^}]*\}", "*", re.sub(r"\$\{(?:item\.)?(\w+)\}", r"*\1", path).replace("*item", "*"))


def overlap(one: str, other: str) -> bool:
    """Whether two paths may be the same, or one a folder that holds the other."""
    pairs = zip(one.split("/"), other.split("/"), strict=False)
    return all("*" in (a, b) or a == b for a, b in pairs)


def reads(stage: str, other: str) -> bool:
    """Whether a stage reads what another one makes. The city is `outputs/*`, which is no folder of the others."""
    deps = [pattern(dep) for dep in STAGES[stage]["deps"]]
    if other == "check":  # what it makes is the same in every run
        return False
    if other == "generate":
        return "outputs/*" in deps
    return any(overlap(dep, out) for dep in deps if dep != "outputs/*" for out in outs(other))


def runs(file: str) -> frozenset[str]:
    """The stages that run again after an edit of a file."""
    return frozenset(
        name for name, stage in STAGES.items() if any(f"{file}/".startswith(f"{dep}/") for dep in stage["deps"])
    )


@cache
def follow(stages: frozenset[str]) -> set[str]:
    """The stages behind them: they run again if what those made has changed."""
    found: set[str] = set()
    frontier: set[str] = {*stages}
    while frontier:
        frontier = {stage for stage in STAGES if any(reads(stage, other) for other in frontier)} - found
        found |= frontier
    return found - stages


@cache
def table() -> dict[str, tuple[set[str], set[str]]]:
    """Path of docs/reruns.md -> the stages of its two columns."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    for line in (ROOT / "docs/reruns.md").read_text().splitlines():
        if line.startswith("| `"):
            paths, first, then = (cell.strip() for cell in line.strip("|").split("|"))
            for path in paths.split(", "):
                found[path.strip("`")] = (names(first), names(then))
    return found


def names(cell: str) -> set[str]:
    """The stages of a cell: names, and groups of them."""
    entries = [entry.strip().strip("`") for entry in cell.split(",")]
    return set[str]().union(*(GROUPS.get(entry, {entry}) for entry in entries))


def row_of(file: str) -> str | None:
    """The most exact row for a file."""
    return max((path for path in table() if f"{file}/".startswith(f"{path}/")), key=len, default=None)


PARAMETERS = [f"params/{name}.yaml" for name in ("detectors", "segmenters", "stores")]
FILES = [
    file
    for file in subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *ROOMS, "params/arms"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    if file.endswith((".py", ".html", ".yaml")) and (ROOT / file).is_file()
]


def test_every_row_is_of_a_file() -> None:
    assert set(table()) == {row_of(file) for file in FILES}


def test_every_edit_makes_run_again_what_the_table_says() -> None:
    said, found = {}, {}
    for file in FILES:
        said[file] = table()[str(row_of(file))]
        found[file] = (runs(file), follow(runs(file)))
    assert found == said


def test_dvc_hashes_say_the_same(tmp_path: Path) -> None:
    """A file of every row is edited, and put back; DVC takes the hashes of all code that stages depend on."""
    for file in [*FILES, "dvc.yaml", "params.yaml", *PARAMETERS]:
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((ROOT / file).read_bytes())
    repo = Repo.init(str(tmp_path), no_scm=True)
    stages: dict[str, set[str]] = {}
    dependencies = {}
    for stage in repo.index.stages:
        for dependency in stage.deps:
            path = Path(dependency.fs_path)
            if path.exists():  # not what other stages make
                stages.setdefault(stage.name.split("@")[0], set()).add(str(path))
                dependencies[str(path)] = dependency

    def hashes() -> dict[str, str]:
        return {path: dependency.get_hash().value for path, dependency in dependencies.items()}

    before = hashes()
    rows = {row_of(file): file for file in FILES}
    found = {}
    for file in rows.values():
        path, content = tmp_path / file, (tmp_path / file).read_bytes()
        path.write_bytes(content + b"\n# an edit\n")
        after = hashes()
        changed = {dependency for dependency in before if before[dependency] != after[dependency]}
        found[file] = {name for name, paths in stages.items() if paths & changed}
        path.write_bytes(content)
    assert found == {file: runs(file) & stages.keys() for file in rows.values()}
    assert hashes() == before


def test_a_loss_and_a_metric() -> None:
    """No teacher, store or evaluation of a teacher runs again for a loss; no model runs again for a metric."""
    assert runs("distill/relations.py") == {"check", "distill"}
    trained = {*GROUPS["every teacher"], *GROUPS["every prediction"], "distill", "extract"}
    for file in ("data/scoring/confusion.py", "data/drawing/pictures.py", "stages/evaluate.py", "stages/report.py"):
        assert not (runs(file) | follow(runs(file))) & trained, file
