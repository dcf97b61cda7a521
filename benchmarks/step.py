"""What a training step costs: CPU milliseconds per sample of the demo's models, by part, and what convolutions cost.

python benchmarks/step.py                     (every kind of model that the demo trains)
python benchmarks/step.py --against COMMIT    (beside the same of another commit, in turn)

One thread, a batch of two samples of a small city, the least of a few steps. `convolutions` is what torch's profiler
counts for them, and its rate is set beside that of a product of large matrices, which is about all that a core can do:
where they are near each other, only a model with fewer operations is faster.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.start import checked_out

ROOT: Final = Path(__file__).resolve().parents[1]
MODELS: Final = ["students.camera", "students.simulated", "students.camera-small", "teachers.lidar", "teachers.fusion"]
PARTS: Final = ["data", "forward", "loss", "backward", "optimiser", "all"]
MAKE: Final = """
import sys
from pathlib import Path
from data.city.config import CityConfig
from data.city.generate import generate
generate(CityConfig(train_scenes=4, val_scenes=0, train_keyframes=4), Path(sys.argv[1]), "v1.0-trainval")
"""
STEP: Final = """
import json, sys, time
from pathlib import Path
import torch
from torch.profiler import ProfilerActivity, profile
from config.files import load_params
from data.preparing.build import build_index
from data.reading.batch import collate
from models.detectors.build import build_detector
from stages.inputs.datasets import training_dataset
from training.ema import EMA
from training.seeding import MODEL, make_deterministic, seed_everything
from training.trainer import parameter_groups

city, root, name, count = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
torch.set_num_threads(1)
make_deterministic()
params = load_params(".")
group, key = name.split(".")
(root / "outputs").mkdir()
(root / params.data.dataroot).symlink_to(city)
build_index(city, "v1.0-trainval", ["train"], root / "outputs/index", sweeps=params.input.sweeps, radar=True)
seed_everything(MODEL, 0)
model = build_detector(getattr(params, group)[key].model).train()
dataset = training_dataset(root, params, model, 0, "train")
spent = {}
def timed(part, work):
    began = time.process_time()
    result = work()
    spent.setdefault(part, []).append(time.process_time() - began)
    return result
optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=1e-3, weight_decay=0.0)
average = EMA(model, 0.99)
def update(step):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 35.0)
    optimizer.step()
    optimizer.zero_grad()
    average.update(model, step + 1)
losses = []
def one(step):
    batch = timed("data", lambda: collate([dataset[(2 * step + n) % len(dataset)] for n in (0, 1)]))
    prediction = timed("forward", lambda: model(batch))
    loss = timed("loss", lambda: torch.stack(list(model.loss(prediction, batch).values())).sum())
    timed("backward", loss.backward)
    timed("optimiser", lambda: update(step))
    losses.append(loss.item())
for step in range(count + 2):
    one(step)
least = {part: 500 * min(values[2:]) for part, values in spent.items()}  # of a sample
with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiler:
    for step in range(2):
        one(step)
events = profiler.key_averages()
convolutions = sum(e.self_cpu_time_total for e in events if "conv" in e.key and "evaluate" not in e.key) / 4000
operations = 3 * sum(e.flops for e in events if e.key == "aten::conv2d") / 4  # backward has two products more
matrix = torch.randn(768, 768)
rates = []
for _ in range(8):
    began = time.process_time()
    matrix @ matrix
    rates.append(2 * 768**3 / (time.process_time() - began))
print(json.dumps({"parts": least, "losses": losses[: count + 2], "convolutions": convolutions,
                  "rate": operations / convolutions / 1e6, "product": max(rates) / 1e9}))
"""


def measure(tree: Path, city: Path, model: str, steps: int) -> dict[str, Any]:
    """What a process of a tree found."""
    with tempfile.TemporaryDirectory() as root:
        command = [sys.executable, "-c", STEP, str(city), root, model, str(steps)]
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found["parts"]["all"] = sum(found["parts"].values())
    return found


def line(model: str, tree: str, found: list[dict[str, Any]], bits: str) -> str:
    """A row of the table: the least of all rounds."""
    figures = [min(one["parts"][part] for one in found) for part in PARTS]
    convolutions = min(one["convolutions"] for one in found)
    rates = f"{max(one['rate'] for one in found):.0f} / {max(one['product'] for one in found):.0f}"
    spent = " | ".join(f"{figure:.1f}" for figure in [*figures, convolutions])
    return f"| {model} | {tree} | {spent} | {rates} | {bits} |"


def main() -> None:
    """Measure in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--against", metavar="COMMIT", help="measured beside this tree")
    options = parser.parse_args()
    with ExitStack() as stack:
        city = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "city"
        subprocess.run([sys.executable, "-c", MAKE, city], cwd=ROOT, check=True)
        trees = {"here": ROOT}
        if options.against:
            trees = {options.against: stack.enter_context(checked_out(options.against)), **trees}
        print(f"| CPU ms per sample | | {' | '.join(PARTS)} | convolutions | Gflop/s: theirs / a product's | losses |")
        print("|---|---|" + "---|" * (len(PARTS) + 3))
        for model in options.models:
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
            for _ in range(options.rounds):
                for name, tree in trees.items():
                    found[name].append(measure(tree, city, model, options.steps))
            bits = "equal" if len({str(one["losses"]) for some in found.values() for one in some}) == 1 else "other"
            for name, some in found.items():
                print(line(model, name, some, bits), flush=True)


if __name__ == "__main__":
    main()
