"""What a teacher costs a student's training step: nothing, from the store, or run online.

`python benchmarks/store_step.py` trains the camera student of the parameters with its X-OD and X-FD terms, on CUDA if
there is one, else on the CPU, by `training.trainer` and with one loader per arm. All arms read the same prepared
samples from memory (no files, no decoding), so that they differ in the teacher's part only. The arms take turns, a step
each on the CPU, and ratios are taken within a round; beside them those of the trainer's CPU time, which other work on
the machine disturbs less. Models are freshly initialised: speed does not depend on weights.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median, quantiles
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that wait must not spin, as in a stage
import psutil
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from benchmarks.charts import Bar, Panel, draw, machine
from config.files import load_params
from config.params import Params
from data.reading.batch import Sample, collate
from data.reading.dataset import SampleKey
from data.store import Calibration, Encoding, Store, StoreIdentity, StoreWriter, TapSpec
from distill.terms import TermConfig
from models.detectors.build import build_detector
from models.detectors.detector import Detector
from stages.distill import Distillation, make_recipe
from stages.synthetic import random_boxes, random_samples
from stages.teaching.sources import OnlineTeacher, Sources
from stages.teaching.taught import TaughtDataset, collate_taught
from training.run import Run
from training.seeding import MODEL, seed_everything
from training.trainer import Trainer

PLAIN, RESIDENT, ONLINE = "no distillation", "targets on the device", "online teacher"
STORED = {"store, float16": Encoding(), "store, int8 occ. zstd": Encoding("int8", None, "occupied", "zstd")}
VARIANT, MAP = "xod-xfd", "lidar.bev_lift"
TAPS = ("lidar.boxes", MAP)
BOXES = 30  # of a teacher per sample
WARM = 2  # rounds that are not counted


class InMemory(Dataset[Sample]):
    """Prepared samples, as a data set gives them."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples, self.tokens = list(samples), [sample.token for sample in samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: SampleKey | int) -> Sample:
        """The sample of a key."""
        return self.samples[key if isinstance(key, int) else key[2]]


class Silent:
    """A tracker of nothing."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Forget them."""


class Turn(NamedTuple):
    """Seconds per step."""

    step: float  # median
    wait: float  # median, of it without data
    cpu: float  # of the trainer
    worker: float  # of CPU, of its loader's workers


class Arm:
    """A trainer with its batches."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        others = set(psutil.Process().children())
        self.batches = trainer._feed()
        self.workers = set(psutil.Process().children()) - others

    def turn(self, steps: int) -> Turn:
        """Some steps."""
        trainer, workers = time.process_time(), self._workers()
        metrics = [self.trainer._one_step(self.batches) for _ in range(steps)]
        trainer, workers = time.process_time() - trainer, self._workers() - workers
        waits = median(m["data_wait_s"] for m in metrics)
        return Turn(median(m["step_s"] for m in metrics), waits, trainer / steps, workers / steps)

    def _workers(self) -> float:
        return sum(sum(worker.cpu_times()[:2]) for worker in self.workers)


def teacher_outputs(teacher: Detector, samples: Sequence[Sample], extent: float) -> dict[str, dict[str, NDArray[Any]]]:
    """By token the teacher's map, and made-up boxes: those of a fresh teacher are as many as its head may give."""
    generator = torch.Generator().manual_seed(0)
    outputs = {}
    for sample in samples:
        boxes, scores = random_boxes(generator, extent, BOXES), torch.rand(BOXES, 1, generator=generator)
        rows = torch.cat([boxes, scores, torch.arange(BOXES)[:, None] % 10], 1)
        with torch.inference_mode():
            value = teacher(collate([sample]), ["bev_lift"]).taps["bev_lift"][0]
        outputs[sample.token] = {"boxes": rows.numpy(), "bev_lift": value.numpy()}
    return outputs


def write_store(
    folder: Path, outputs: Mapping[str, Mapping[str, NDArray[Any]]], encoding: Encoding, extent: float
) -> Store:
    """A store of outputs by token."""
    maps = [arrays["bev_lift"] for arrays in outputs.values()]
    taps = {"boxes": TapSpec.boxes(), "bev_lift": TapSpec.dense(maps[0].shape, encoding, extent)}
    identity = StoreIdentity("weights", "preprocessing", "index", "code", str(encoding))
    calibration = {"bev_lift": Calibration.fit(encoding, maps)}
    with StoreWriter(folder, identity, taps, list(outputs), 64, calibration) as writer:
        for shard in writer.missing():
            writer.write(shard, ((token, outputs[token]) for token in writer.shards[shard]))
        writer.finish()
    return Store.open(folder)


class Bench:
    """What the arms share, and the arms."""

    def __init__(self, params: Params, scratch: Path, samples: int) -> None:
        """Make the samples, a fresh teacher and its store.

        Args:
            params: all parameters.
            scratch: folder of the store and of the trainers.
            samples: how many there are.
        """
        self.params, self.scratch = params, scratch
        self.settings = params.student(VARIANT)
        self.terms = params.variants[VARIANT].terms
        seed_everything(MODEL, 0)
        self.teacher = build_detector(params.teachers["lidar"].model).eval()
        self.samples = random_samples(params, samples)
        outputs, self.reach = teacher_outputs(self.teacher, self.samples, params.grid.range), params.grid.range
        self.stores = {name: write_store(scratch / name, outputs, how, self.reach) for name, how in STORED.items()}

    def arms(self) -> dict[str, Arm]:
        """All of them, by name."""
        bare = InMemory([replace(sample, points=torch.empty(0, 5)) for sample in self.samples])
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        stored = {}
        for name, store in self.stores.items():
            taught = TaughtDataset(bare, {"lidar": store}, TAPS)  # type: ignore[arg-type]
            sources = Sources({"lidar": store}, {}, self.reach)
            batch = collate_taught([taught[0, i, i] for i in range(self.settings.train.batch_size)]).to(device)
            targets = sources(batch)
            stored[name] = self._arm(name, self.terms, sources, taught, collate_taught)
        online = Sources({}, {"lidar": self._online(device)}, self.reach)
        return {
            PLAIN: self._arm(PLAIN, {}, lambda _: {}, bare, collate),
            RESIDENT: self._arm(RESIDENT, self.terms, lambda _: targets, bare, collate),
            **stored,
            ONLINE: self._arm(ONLINE, self.terms, online, InMemory(self.samples), collate),
        }

    def _online(self, device: torch.device) -> OnlineTeacher:
        """The teacher in the step, with a threshold that about as many boxes pass as a store's samples have."""
        with torch.inference_mode():
            found = self.teacher.decode(self.teacher(collate(self.samples[:1])))[0]
        threshold = float(found.scores.sort(descending=True).values[:BOXES][-1])
        return OnlineTeacher(self.teacher, [tap.partition(".")[2] for tap in TAPS], threshold, device)

    def _arm(self, name: str, terms: dict[str, TermConfig], sources: Any, dataset: Any, collate_batch: Any) -> Arm:
        seed_everything(MODEL, 0)
        student = build_detector(self.settings.model)
        recipe = make_recipe(student, terms, {MAP: torch.from_numpy(self.stores[next(iter(STORED))].std("bev_lift"))})
        config = self.settings.train.model_copy(update={"epochs": 1000})
        task, folder = Distillation(student, recipe, sources), self.scratch / name.replace(" ", "-")
        return Arm(Trainer(task, dataset, collate_batch, config, Run(0, folder, Silent(), label=name)))


def compare(arms: Mapping[str, Arm], rounds: int, steps: int) -> list[dict[str, Any]]:
    """A row per arm: seconds of a step, and ratios to the other arms in the same round."""
    turns: dict[str, list[Turn]] = {name: [] for name in arms}
    names = list(arms)
    for number in range(-WARM, rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            taken = arms[name].turn(steps)
            if number >= 0:
                turns[name].append(taken)
    return [_row(name, turns) for name in names]


def _row(name: str, turns: Mapping[str, Sequence[Turn]]) -> dict[str, Any]:
    own = turns[name]
    row: dict[str, Any] = {"arm": name, "worker": mean(turn.worker for turn in own)}  # it is counted in 10 ms
    row |= {field: median(getattr(turn, field) for turn in own) for field in ("step", "wait", "cpu")}
    for other in (PLAIN, RESIDENT):
        pairs = list(zip(own, turns[other], strict=True))
        row[f"of {other}"] = quantiles([a.step / b.step for a, b in pairs], n=4)
        row[f"CPU of {other}"] = quantiles([a.cpu / b.cpu for a, b in pairs], n=4)
    return row


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Milliseconds; ratios as median and quartiles over the rounds."""
    heads = [f"{what} {other}" for other in (PLAIN, RESIDENT) for what in ("of", "CPU of")]
    columns = "".join(f"{head:>31s}" for head in heads)
    print(f"{'ms per step':23s}{'time':>7s}{'waits':>7s}{'CPU':>7s}{'worker':>8s}{columns}")
    for row in rows:
        line = f"{row['arm']:23s}{1e3 * row['step']:7.0f}{1e3 * row['wait']:7.1f}{1e3 * row['cpu']:7.0f}"
        line += f"{1e3 * row['worker']:8.1f}"
        for low, middle, high in (row[head] for head in heads):
            line += f"{f'{middle:.3f} ({low:.3f}-{high:.3f})':>31s}"
        print(line)


def panel(rows: Sequence[dict[str, Any]], title: str) -> Panel:
    """Time and CPU time as shares of the step whose targets are there."""
    groups = {}
    for row in rows:
        time_, cpu = 100 * row[f"of {RESIDENT}"][1], 100 * row[f"CPU of {RESIDENT}"][1]
        notes = f"{time_:.0f} %, {1e3 * row['step']:.0f} ms", f"{cpu:.0f} %, {1e3 * row['cpu']:.0f} ms"
        groups[row["arm"]] = [Bar(time_, notes[0], 0), Bar(cpu, notes[1], 1)]
    return Panel(f"{title}: share of {RESIDENT!r}", groups, 100.0)


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=10 if torch.cuda.is_available() else 1, help="in an arm's turn")
    parser.add_argument("--threads", type=int, default=1, help="of the trainer; the loader's worker has its own")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--chart", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    params = load_params(Path(__file__).resolve().parents[1])
    with TemporaryDirectory() as name:
        bench = Bench(params, Path(name), given.samples)
        rows = compare(bench.arms(), given.rounds, given.steps)
    train = bench.settings.train
    threads = "" if torch.cuda.is_available() else f", {given.threads} thread(s)"
    title = f"student {VARIANT}, batch {train.batch_size}, {train.precision}, {machine()['device']}{threads}"
    print(title)
    print_table(rows)
    if given.json:
        given.json.write_text(json.dumps({"machine": machine(), "steps": rows}, indent=1) + "\n")
    if given.chart:
        draw(given.chart, "A student's training step", [panel(rows, title)], ("time", "CPU time of the trainer"))


if __name__ == "__main__":
    main()
