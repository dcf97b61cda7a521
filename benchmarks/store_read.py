"""Random reads of the teacher-output store beside plain files, Zarr, LMDB and safetensors.

`python benchmarks/store_read.py` reads equal bytes in random order: in one process, each map copied into the same
buffer ("0 workers"), and through the workers of a torch DataLoader, which adds its own cost to all. *First* reads: the
container is open and nothing read yet, the page cache is warm; ours verifies every chunk. *Later* reads: the process
has read everything once. *Cold*: as first, the files dropped from this kernel's page cache (a disk or host below may
still know them). The contenders take turns in every round; ratios to plain files are taken within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from itertools import product
from multiprocessing.synchronize import Event
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.charts import Bar, Panel, draw, machine
from benchmarks.containers import CONTAINERS, Container, PlainFiles, sample_value
from benchmarks.faults import damage_table, in_child

MODES = ("first", "later", "cold")
BATCH = 2  # samples, as the demo's students take


class Size(NamedTuple):
    """A chunk and how many of them."""

    name: str
    shape: tuple[int, int, int]
    samples: int
    shard: int

    @property
    def megabytes(self) -> float:
        """Of one sample."""
        return 2e-6 * float(np.prod(self.shape))


SIZES = (Size("demo", (64, 64, 48), 256, 64), Size("paper", (128, 128, 256), 16, 4))
FIRST_VALUES: dict[str, list[float]] = {}  # of each sample's map, by size: what a batch is recognised by


class GatedReads(Dataset[tuple[int, Tensor]]):
    """A container whose workers prepare when they are asked for item -1, and then wait for the start."""

    def __init__(self, container: Container, samples: int, mode: str, start: Event) -> None:
        self.container, self.samples, self.mode, self.start = container, samples, mode, start
        self.prepared = False

    def __getitem__(self, sample: int) -> tuple[int, Tensor]:
        """Number and map of a sample."""
        if sample < 0:
            torch.set_num_threads(1)
            self.container.open()
            for other in range(self.samples if self.mode == "later" else 0):
                self.container.read(other).sum()
            return sample, torch.empty(0)
        self.start.wait()
        return sample, torch.from_numpy(self.container.read(sample))


class Order(Sampler[list[int]]):
    """A preparing batch for each worker, then random batches."""

    def __init__(self, order: Sequence[int], workers: int) -> None:
        self.order, self.workers = order, workers

    def __iter__(self) -> Iterator[list[int]]:
        yield from [[-1]] * self.workers
        yield from (list(self.order[i : i + BATCH]) for i in range(0, len(self.order), BATCH))


def seconds(container: Container, size: Size, mode: str, workers: int, order: Sequence[int]) -> float:
    """Time of a pass, which must give the samples that were asked for."""
    if workers:
        taken, seen = _through_loader(container, size, mode, workers, order)
    else:
        taken, seen = in_child(_alone, container, size, mode, order)
    expected = [(sample, FIRST_VALUES[size.name][sample]) for sample in order]
    assert seen == expected, f"{container.name} gave other samples than were asked for"
    return taken


def _alone(container: Container, size: Size, mode: str, order: Sequence[int]) -> tuple[float, list[tuple[int, float]]]:
    """A pass in this process."""
    buffer = np.empty(size.shape, np.float16)
    container.open()
    for sample in order if mode == "later" else ():
        buffer[:] = container.read(sample)
    if mode == "cold":
        drop_from_cache(container.folder)
    seen = []
    began = time.perf_counter()
    for sample in order:
        buffer[:] = container.read(sample)
        seen.append((sample, float(buffer[0, 0, 0])))
    return time.perf_counter() - began, seen


def _through_loader(
    container: Container, size: Size, mode: str, workers: int, order: Sequence[int]
) -> tuple[float, list[tuple[int, float]]]:
    """A pass from the start signal until the last batch has arrived."""
    start = torch.multiprocessing.get_context("fork").Event()
    dataset = GatedReads(container, size.samples, mode, start)
    batches = iter(DataLoader(dataset, batch_sampler=Order(order, workers), num_workers=workers))
    for _ in range(workers):
        next(batches)
    if mode == "cold":
        drop_from_cache(container.folder)
    seen: list[tuple[int, float]] = []
    start.set()
    began = time.perf_counter()
    for numbers, maps in batches:
        seen += zip(numbers.tolist(), maps[:, 0, 0, 0].tolist(), strict=True)
    return time.perf_counter() - began, seen


def drop_from_cache(folder: Path) -> None:
    """Ask the kernel to forget the files' pages; pages that a process has mapped and touched stay."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def build(size: Size, scratch: Path) -> list[Container]:
    """All containers of a size, every value of each compared with what was written."""
    values = [sample_value(sample, size.shape) for sample in range(size.samples)]
    FIRST_VALUES[size.name] = [float(value[0, 0, 0]) for value in values]
    containers = []
    for number, kind in enumerate(CONTAINERS):
        container = kind(scratch / size.name / str(number), size.shape, size.shard)
        in_child(container.write, values)
        assert in_child(_holds, container, values), f"{container.name} does not give back what was written"
        containers.append(container)
    return containers


def _holds(container: Container, values: Sequence[Any]) -> bool:
    container.open()
    return all(np.array_equal(container.read(sample), value) for sample, value in enumerate(values))


def compare(
    size: Size, containers: Sequence[Container], rounds: int, worker_counts: Sequence[int]
) -> list[dict[str, Any]]:
    """A row per container, mode and number of workers."""
    times: dict[tuple[int, str, str], list[float]] = {}
    for number, workers, mode in product(range(rounds), worker_counts, MODES):
        order = np.random.default_rng(number).permutation(size.samples).tolist()
        first = number % len(containers)
        for container in [*containers[first:], *containers[:first]]:
            taken = seconds(container, size, mode, workers, order)
            times.setdefault((workers, mode, container.name), []).append(taken)
    rows = []
    for (workers, mode, name), passes in times.items():
        rates = [size.samples * size.megabytes / taken for taken in passes]
        plain = times[workers, mode, PlainFiles.name]
        ratios = [reference / taken for reference, taken in zip(plain, passes, strict=True)]
        row = {"chunk": size.name, "workers": workers, "mode": mode, "container": name, "ratio": median(ratios)}
        rows.append(row | {"MB/s": median(rates), "low": min(rates), "high": max(rates)})
    return rows


def print_rates(size: Size, rows: Sequence[dict[str, Any]]) -> None:
    """The table of a size: MB/s, their range and the share of plain files."""
    head = f"{size.name}: {size.samples} samples of {size.megabytes:.2f} MB"
    print(f"\n{head}; MB/s: median (lowest-highest), share of plain files")
    for workers in sorted({row["workers"] for row in rows}):
        print(f"{f'{workers} workers':26s}" + "".join(f"{f'{mode} reads':>27s}" for mode in MODES))
        for kind in CONTAINERS:
            line = f"{kind.name:26s}"
            for row in sorted(rows, key=lambda row: MODES.index(row["mode"])):
                if (row["workers"], row["container"]) == (workers, kind.name):
                    text = f"{row['MB/s']:5.0f} ({row['low']:.0f}-{row['high']:.0f}) {100 * row['ratio']:4.0f} %"
                    line += f"{text:>27s}"
            print(line)


def print_damage(rows: Sequence[dict[str, str]]) -> None:
    """What a reader gets after damage."""
    widths = {"container": 26, "flipped bit": 26, "truncated": 26, "kill -9": 40}
    print("\nwhat a reader gets after damage\n" + "".join(f"{name:{width}s}" for name, width in widths.items()))
    for row in rows:
        print("".join(f"{row[name]:{width}s}" for name, width in widths.items()))


def panels(rows: Sequence[dict[str, Any]]) -> list[Panel]:
    """Rates as shares of plain files: reading alone, and through one worker."""
    result = []
    for size, workers in ((SIZES[0], 0), (SIZES[0], 1), (SIZES[1], 1)):
        groups: dict[str, list[Bar]] = {kind.name: [] for kind in CONTAINERS}
        for row in sorted(rows, key=lambda row: MODES.index(row["mode"])):
            if (row["chunk"], row["workers"]) == (size.name, workers):
                note = f"{100 * row['ratio']:.0f} %, {row['MB/s']:,.0f} MB/s"
                groups[row["container"]].append(Bar(100 * row["ratio"], note, MODES.index(row["mode"])))
        how = "one worker of a loader" if workers else "no loader"
        result.append(Panel(f"{size.name} chunk, {size.megabytes:.2f} MB, {how}: share of plain files", groups, 100.0))
    return [panel for panel in result if any(panel.groups.values())]


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kills", type=int, default=10, help="writers that are killed per container")
    parser.add_argument("--folder", type=Path, help="where to write about 1.5 GB (default: the temporary folder)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--chart", type=Path)
    given = parser.parse_args()
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory(dir=given.folder) as name:
        damage = damage_table(Path(name), given.kills)
        for size in SIZES:
            measured = compare(size, build(size, Path(name)), given.rounds, given.workers)
            print_rates(size, measured)
            rows += measured
    print_damage(damage)
    if given.json:
        given.json.write_text(json.dumps({"machine": machine(), "reads": rows, "damage": damage}, indent=1) + "\n")
    if given.chart:
        draw(given.chart, "Random reads of a teacher's map", panels(rows), MODES)


if __name__ == "__main__":
    main()
