"""Who may import whom, and what the control plane does without."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from base.environment import ROOMS

ROOT = Path(__file__).resolve().parents[1]
# Room -> the rooms that it may import beside itself. A room inside another one has a line of its own.
ALLOWED = {
    "base": set[str](),
    "config": {"base", "data.city.config", "data.reading.config", "distill.terms", "training.config"},
    "data.city": {"base", "data.preparing.splits"},
    "data.drawing": {"data.reading"},
    "data.hashing": {"base"},
    "data.preparing": {"base", "data.reading"},
    "data.reading": {"base"},
    "data.scoring": {"base", "data.reading"},
    "data.store": {"base"},
    "distill": {"base", "models"},
    "distill.terms": {"base"},
    "models.detectors": {"models.head", "models.layers", "models.ports"},
    "models.head": {"models.layers", "models.ports"},
    "models.inherit": {"models.detectors"},
    "models.layers": {"models.ports"},
    "models.ports": set[str](),
    "pipeline": {"base", "config", "results", "stages"},
    "pipeline.commands": {"base", "config", "data", "models", "pipeline", "results", "stages"},
    "results": {"base", "config"},
    "stages": {"base", "config", "data", "distill", "models", "results", "training"},
    "stages.context": {"base", "config", "results", "training.run"},
    "stages.inputs": {"base", "config", "data", "models", "stages.context", "training"},
    "stages.teaching": {"base", "config", "data", "models", "stages.context", "stages.inputs", "training"},
    "training": {"base"},
}
CONTROL_PLANE = ("base", "config", "pipeline")
# These are imported when they are needed.
NOT_AT_ONCE = ("pipeline.__main__", "pipeline.commands", "pipeline.deployment")
SLOW = ["torch", "prefect", "mlflow", "ray", "lightning", "mmcv", "mmdet", "mmdet3d"]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module


def edges() -> Iterator[tuple[str, str]]:
    """(module, a module of the project that it imports), for types only or late as well."""
    known = modules()
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((name, alias.name) for alias in node.names if alias.name in known)
            elif isinstance(node, ast.ImportFrom) and node.module in known:
                submodules = [f"{node.module}.{alias.name}" for alias in node.names]
                yield from ((name, one if one in known else node.module) for one in submodules)


def modules() -> dict[str, Path]:
    """Every module of the project."""
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    return {
        str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"): path for path in files
    }


def within(module: str, room: str) -> bool:
    """Whether a module is in a room, or is it."""
    return f"{module}.".startswith(f"{room}.")


def room_of(module: str) -> str | None:
    """The innermost room with a rule."""
    return max((room for room in ALLOWED if within(module, room)), key=len, default=None)


def test_every_module_has_its_rule() -> None:
    assert [name for name in modules() if room_of(name) is None] == ["data", "models"]


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_only_what_they_may(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {imported}"
        for name, path in modules().items()
        if room_of(name) == room
        for line, imported in imports(path)
        if imported.partition(".")[0] in ROOMS and not any(within(imported, one) for one in {room} | ALLOWED[room])
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_needs_itself() -> None:
    """Whatever imports what, there is an order in which the modules can be read."""
    list(TopologicalSorter(graph_of(edges())).static_order())


def graph_of(edges: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for one, other in edges:
        found.setdefault(one, set()).add(other)
    return found


def test_only_two_modules_touch_dvc() -> None:
    files = modules().values()
    users = {
        str(path.relative_to(ROOT))
        for path in files
        for _, module in imports(path)
        if module.partition(".")[0] == "dvc"
    }
    assert users == {"config/graph.py", "pipeline/lockfile.py"}


@pytest.mark.parametrize("engine", ["dvc", "mlflow", "prefect"])
def test_the_rooms_below_know_no_engine(engine: str) -> None:
    for room in ("base", "data", "distill", "models", "training"):
        for path in (ROOT / room).rglob("*.py"):
            assert engine not in {module.partition(".")[0] for _, module in imports(path)}, path


def test_the_control_plane_imports_nothing_slow() -> None:
    names = [
        name
        for name in modules()
        if any(within(name, room) for room in CONTROL_PLANE) and not any(within(name, late) for late in NOT_AT_ONCE)
    ]
    code = f"import sys, {', '.join(names)}; print([name for name in {SLOW} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_the_graph_is_read_without_torch() -> None:
    code = (
        "import sys; from pathlib import Path; from config import graph; from pipeline import flow;"
        "assert graph.graph(Path.cwd());"
        "print([name for name in ('torch', 'prefect', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


HEAVY = ["torch", "mmengine", "mlflow", "prefect", "nuscenes", "pandas", "sklearn", "lightning_fabric"]
NOT_AT_START = {
    # These run no model. `film` and `report` draw and compute, so that they have matplotlib or scipy.
    ("stages.needs", "stages.prepare", "stages.generate"): [*HEAVY, "matplotlib", "scipy", "cv2", "PIL", "jinja2"],
    ("stages.film", "stages.report"): HEAVY,
    # These read stores, for which torch is needed, and build no model.
    tuple(f"pipeline.commands.cache.{name}" for name in ("ls", "verify", "gc", "look")): [
        *(name for name in HEAVY if name != "torch"), "mmcv",
    ],
    # torch.distributed.fsdp cannot be in this list: mmengine.model, the base of all modules, imports it.
    ("stages.teacher", "stages.extract", "stages.distill"): [
        *(name for name in HEAVY if name not in ("torch", "mmengine")),
        "mmdet.models", "mmdet3d.models", "matplotlib", "torch._dynamo",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("names", "idle"), NOT_AT_START.items(), ids=lambda value: value[0])
def test_a_stage_or_command_starts_without_what_it_does_not_use(names: tuple[str, ...], idle: list[str]) -> None:
    """The parts that the demo's models are made of are built, too, as they come by name."""
    code = f"""
import sys
import {", ".join(names)}
if "models.detectors.detector" in sys.modules:
    from config.files import load_params
    from models.detectors.build import build_detector
    for teacher in load_params().teachers.values():
        build_detector(teacher.model)
print([name for name in {idle} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
