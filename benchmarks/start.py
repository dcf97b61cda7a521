"""What the start of a stage costs: CPU seconds of a process that imports the stage and reads it from DVC.

python benchmarks/start.py                    (in a workspace with dvc.yaml and params.yaml)
python benchmarks/start.py --against COMMIT   (beside the same of another commit)

Processes take turns in every round; a figure is the least of its rounds, as load of the machine only adds. A stage
starts as `python -m pipeline stage` does, up to `module.run`; a stage that trains pays for Fabric and torch's
optimisers after that. What a model's config names is imported when it is built, which is a line of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
START = """
import importlib
from pathlib import Path
import pipeline.cli
from pipeline.stage import graph, load_params
params = load_params("." if Path("params").is_dir() else "params.yaml")  # other commits have one file
graph.resolve({address!r})
importlib.import_module("stages.{stage}")
"""
BUILD = (
    START
    + """
for home in ("models.detectors.build", "models.build", "models.detector"):  # other commits have it elsewhere
    try:
        build_detector = importlib.import_module(home).build_detector
        break
    except (ImportError, AttributeError):
        pass
build_detector(params.teachers["start"].model)
"""
)
STAGES = {
    "generate": "generate@city", "prepare": "prepare", "check": "check", "needs": "needs@baseline",
    "evaluate": "evaluate@baseline-0", "film": "film", "report": "report",
    "teacher": "teacher@lidar", "extract": "extract@lidar", "distill": "distill@baseline-0",
    "predict": "predict@baseline-0", "features": "features@simdistill-0", "cost": "cost",
    "segmenter": "segmenter@instance",
}  # fmt: skip


def codes(stages: list[str]) -> dict[str, str]:
    """Line of the table -> the program that is timed."""
    starts = {name: START.format(address=STAGES[name], stage=name) for name in stages}
    built = BUILD.format(address=STAGES["distill"], stage="distill")
    return {"import torch": "import torch", **starts, "distill, with its student built": built}


def cpu_seconds(code: str, root: Path) -> float:
    """CPU time of a process that runs `code` in `root`, user and system.

    Raises:
        RuntimeError: it fails; with the end of what it wrote.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            errors.seek(0)
            raise RuntimeError(f"a process in {root} failed:\n{errors.read().decode()[-2000:]}")
    return usage.ru_utime + usage.ru_stime


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A temporary worktree of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", path, commit], cwd=ROOT, check=True)
        try:
            yield path
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", path], cwd=ROOT, check=True)


def measure(trees: dict[str, Path], stages: list[str], rounds: int) -> None:
    """Print a row per program, with a column per tree; a dash where a tree has no such stage."""
    programs = codes(stages)
    absent = {(name, tree) for name in STAGES for tree in trees if not (trees[tree] / f"stages/{name}.py").exists()}
    least = {(name, tree): float("inf") for name in programs for tree in trees if (name, tree) not in absent}
    for _ in range(rounds):
        for name, tree in least:
            least[name, tree] = min(least[name, tree], cpu_seconds(programs[name], trees[tree]))
    print(f"| CPU seconds, least of {rounds} | {' | '.join(trees)} |")
    print(f"|---|{'---|' * len(trees)}")
    for name in programs:
        print(f"| {name} | {' | '.join(_figure(least.get((name, tree))) for tree in trees)} |")


def _figure(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f}"


def main() -> None:
    """Measure this tree, and beside it another commit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--against", metavar="COMMIT", help="measured beside this tree")
    options = parser.parse_args()
    if options.against is None:
        measure({"here": ROOT}, options.stages, options.rounds)
        return
    with checked_out(options.against) as other:
        measure({options.against: other, "here": ROOT}, options.stages, options.rounds)


if __name__ == "__main__":
    main()
