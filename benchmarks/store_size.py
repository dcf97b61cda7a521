"""What each encoding of a teacher's map costs in bytes and error: `python benchmarks/store_size.py`.

Encodes the LiDAR teacher's `bev_lift` of the parameters, with calibrations fitted to one half of the samples and
everything measured on the other. The trained teacher and the data come from `--outputs`, the folder that a run of the
study has made. Without it the teacher is freshly initialised and sees random points, and the table says so.
Decoding is what a loader's worker does with a chunk, up to the map in the batch; expanding to float is the device's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.charts import Bar, Panel, draw, machine
from config.files import load_params
from config.params import Params
from config.sections import StoreParams
from data.reading.batch import collate
from data.store import Calibration, Encoding
from data.store.encoding import decode_map, encode_map
from models.detectors.build import build_detector
from stages.synthetic import random_samples
from stages.teaching.frozen import KEEP, FrozenTeacher, View, evenly
from training.seeding import MODEL, seed_everything

TAP = "bev_lift"
TRAINVAL = 28_130  # training samples of nuScenes
STORE = StoreParams(
    teacher="lidar",
    score_threshold=0.1,
    taps={TAP: {"serve": "cached-warp", "cells": "foreground"}},  # type: ignore[dict-item]
)
ENCODINGS = [
    Encoding("float32"),
    Encoding("float16"),
    Encoding("float16", compression="lz4"),
    Encoding("float16", compression="zstd"),
    Encoding("float16", cells="occupied"),
    Encoding("float16", cells="occupied", compression="zstd"),
    Encoding("float8_e4m3"),
    Encoding("float8_e4m3", cells="occupied", compression="zstd"),
    Encoding("int8"),
    Encoding("int8", compression="zstd"),
    Encoding("int8", cells="occupied"),
    Encoding("int8", cells="occupied", compression="lz4"),
    Encoding("int8", cells="occupied", compression="zstd"),
    *(Encoding("int8", channels, "occupied", "zstd") for channels in (32, 16, 8)),
    Encoding("float16", cells="foreground"),
    Encoding("int8", cells="foreground"),
    Encoding("int8", cells="foreground", compression="zstd"),
]


class Map(NamedTuple):
    """A teacher's map."""

    value: NDArray[np.float32]  # [C, H, W]
    keep: NDArray[np.bool_]  # [H, W], the cells near an object


def label(encoding: Encoding) -> str:
    """Short, for tables."""
    channels = f" {encoding.channels} ch" if encoding.channels else ""
    cells = "" if encoding.cells == "all" else f" {encoding.cells}"
    return f"{encoding.dtype}{channels}{cells}" + (f" {encoding.compression}" if encoding.compression != "none" else "")


def trained_maps(params: Params, outputs: Path, count: int) -> list[Map]:
    """Of evenly spaced training samples, by the teacher of a run."""
    teacher = FrozenTeacher(outputs.parent, params, STORE, outputs / "teachers/lidar", torch.device("cpu"))
    rows = evenly(count, len(teacher.tokens))
    return [Map(arrays[TAP], arrays[TAP + KEEP]) for _, arrays in teacher.stream([rows])]


def fresh_maps(params: Params, count: int) -> list[Map]:
    """Of random points, by a teacher that has learnt nothing."""
    seed_everything(MODEL, 0)
    detector = build_detector(params.teachers["lidar"].model)
    samples = random_samples(params, count)
    view = View(detector, samples, [TAP], foreground=[TAP])  # type: ignore[arg-type]
    outputs = (view(collate([sample]))[0] for sample in samples)
    return [Map(arrays[TAP], arrays[TAP + KEEP]) for arrays in outputs]


def measure(encoding: Encoding, fitted: Sequence[Map], maps: Sequence[Map], std: NDArray[np.float32]) -> dict[str, Any]:
    """A row of the table; errors count the cells that are present."""
    calibration = Calibration.fit(encoding, [m.value for m in fitted], [m.keep for m in fitted])
    channels, height, width = maps[0].value.shape
    shape = (height, width, encoding.channels or channels)
    batch = np.empty(shape, encoding.array_dtype)
    stored, times, wrong, whole, worst = [], [], 0.0, 0.0, 0.0
    for value, keep in maps:
        chunk = encode_map(value, encoding, calibration, keep)
        stored.append(len(memoryview(chunk.data)))
        for _ in range(2):  # the second time counts
            started = time.perf_counter()
            decoded, present = decode_map(chunk, shape, encoding, calibration)
            batch[:] = decoded
            taken = time.perf_counter() - started
        times.append(taken)
        given = calibration.expand(torch.from_numpy(batch)).permute(2, 0, 1).numpy()
        error = np.abs(given - value) * (1.0 if present is None else present)
        wrong, whole = wrong + error.sum(), whole + np.abs(value * (1.0 if present is None else present)).sum()
        worst = max(worst, float((error.max((1, 2)) / std).max()))
    return {
        "encoding": label(encoding), "settings": asdict(encoding), "bytes": float(np.mean(stored)),
        "mean_error": float(wrong / whole), "max_error_of_std": worst, "decode_ms": 1e3 * median(times),
        "trainval_gb": float(np.mean(stored)) * TRAINVAL / 1e9,
    }  # fmt: skip


def table(maps: Sequence[Map]) -> Iterator[dict[str, Any]]:
    """Rows, with bytes also as a share of plain float16."""
    std = np.std([m.value for m in maps], axis=(0, 2, 3))
    std = np.maximum(std, std.max() * 1e-3)  # a channel that never fires has no error either
    plain = 2 * maps[0].value.size
    for encoding in ENCODINGS:
        row = measure(encoding, maps[::2], maps[1::2], std)
        yield row | {"of_float16": row["bytes"] / plain}


def print_row(row: dict[str, Any]) -> None:
    """A line of the table."""
    print(
        f"{row['encoding']:30s}{row['bytes']:11,.0f}{100 * row['of_float16']:10.1f} %{100 * row['mean_error']:11.4f} %"
        f"{row['max_error_of_std']:12.4f}{row['decode_ms']:11.2f}{row['trainval_gb']:13.2f}"
    )


def panel(rows: Sequence[dict[str, Any]], title: str) -> Panel:
    """Bytes as shares of float16, with errors beside them."""
    groups = {}
    for row in rows:
        series = 2 if row["settings"]["cells"] == "foreground" else int(row["settings"]["cells"] == "occupied")
        note = f"{100 * row['of_float16']:.1f} %, error {100 * row['mean_error']:.2g} %"
        groups[row["encoding"]] = [Bar(100 * row["of_float16"], note, series)]
    return Panel(title, groups, 100.0)


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=Path, default=Path(__file__).resolve().parents[1] / "outputs")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--chart", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    params = load_params(Path(__file__).resolve().parents[1])
    outputs = given.outputs.resolve()
    trained = (outputs / "teachers/lidar").is_dir() and (outputs / "index").is_dir()
    if trained and outputs.name != "outputs":
        parser.error(
            f"--outputs {given.outputs}: its name must be outputs, as the paths of the parameters begin with it"
        )
    maps = trained_maps(params, outputs, given.samples) if trained else fresh_maps(params, given.samples)
    what = "trained teacher" if trained else "UNTRAINED teacher on random points (no outputs/): shares mean little"
    occupied = np.mean([m.value.any(0).mean() for m in maps])
    foreground = np.mean([m.keep.mean() for m in maps])
    title = f"{what}; {TAP} {list(maps[0].value.shape)}, {100 * occupied:.0f} % of cells occupied, " \
            f"{100 * foreground:.1f} % foreground"  # fmt: skip
    print(title)
    heads = {"bytes": 11, "of float16": 12, "mean error": 13, "max / std": 12, "decode ms": 11, "trainval GB": 13}
    print(" " * 30 + "".join(f"{name:>{width}s}" for name, width in heads.items()))
    rows = []
    for row in table(maps):
        print_row(row)
        rows.append(row)
    if given.json:
        given.json.write_text(json.dumps({"machine": machine(), "source": title, "encodings": rows}, indent=1) + "\n")
    if given.chart:
        cells = ("all cells", "occupied", "foreground")
        draw(given.chart, "Bytes of a teacher's map by encoding", [panel(rows, title)], cells)


if __name__ == "__main__":
    main()
