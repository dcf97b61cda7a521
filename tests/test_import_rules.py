"""Who may import whom, and what the control plane does without."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.environment import ROOMS

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {
    "data": {"data"},
    "distill": {"distill", "models"},
    "models": {"models"},
    "pipeline": {"pipeline"},
    "stages": {"data", "distill", "models", "pipeline", "stages"},
}
CONTROL_PLANE = [
    "__main__",
    "cli",
    "environment",
    "errors",
    "flow",
    "gpus",
    "graph",
    "launchers",
    "launchers.job",
    "launchers.local",
    "launchers.ray",
    "launchers.slurm",
    "launchers.torchrun",
    "params",
    "processes",
    "profiles",
    "redaction",
    "slots",
    "studies",
    "worktree",
]
SLOW = ["torch", "prefect", "mlflow", "ray", "lightning", "mmcv", "mmdet", "mmdet3d"]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module


def test_every_room_has_its_rule() -> None:
    assert ALLOWED.keys() == set(ROOMS)


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_only_what_they_may(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in (ROOT / room).rglob("*.py")
        for line, module in imports(path)
        if module.partition(".")[0] in ALLOWED.keys() - ALLOWED[room]
    ]
    assert not wrong, "\n".join(wrong)


def test_only_two_modules_touch_dvc() -> None:
    files = [path for room in ALLOWED for path in (ROOT / room).rglob("*.py")]
    users = {
        str(path.relative_to(ROOT))
        for path in files
        for _, module in imports(path)
        if module.partition(".")[0] == "dvc"
    }
    assert users == {"pipeline/graph.py", "pipeline/lockfile.py"}


@pytest.mark.parametrize("engine", ["dvc", "mlflow", "prefect"])
def test_data_models_and_losses_know_no_engine(engine: str) -> None:
    for room in ("data", "distill", "models"):
        for path in (ROOT / room).rglob("*.py"):
            assert engine not in {module.partition(".")[0] for _, module in imports(path)}, path


def test_the_control_plane_imports_nothing_slow() -> None:
    modules = [f"pipeline.{name}" for name in CONTROL_PLANE if name != "__main__"]
    code = f"import sys, {', '.join(modules)}; print([name for name in {SLOW} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_the_graph_is_read_without_torch() -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline import flow, graph; assert graph.graph(Path.cwd());"
        "print([name for name in ('torch', 'prefect', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


HEAVY = ["torch", "mmengine", "mlflow", "prefect", "nuscenes", "pandas", "sklearn", "lightning_fabric"]
NOT_AT_START = {
    # These run no model. `film` and `report` draw and compute, so that they have matplotlib or scipy.
    ("needs", "prepare", "generate"): [*HEAVY, "matplotlib", "scipy", "cv2", "PIL", "jinja2"],
    ("film", "report"): HEAVY,
    # torch.distributed.fsdp cannot be in this list: mmengine.model, the base of all modules, imports it.
    ("teacher", "fusion", "large", "extract", "distill"): [
        *(name for name in HEAVY if name not in ("torch", "mmengine")),
        "mmdet.models", "mmdet3d.models", "matplotlib", "torch._dynamo",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("stages", "idle"), NOT_AT_START.items(), ids=lambda value: value[0])
def test_a_stage_starts_without_what_it_does_not_use(stages: tuple[str, ...], idle: list[str]) -> None:
    """The parts that the demo's models are made of are built, too, as they come by name."""
    code = f"""
import sys
import {", ".join(f"stages.{name}" for name in stages)}
if "models.detector" in sys.modules:
    from pipeline.params import read_yaml
    from models.detector import build_detector
    for teacher in read_yaml(__import__("pathlib").Path("params.yaml"))["teachers"].values():
        build_detector(teacher["model"])
print([name for name in {idle} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
