"""The card of a store: what it costs, what its encodings lose, and what warping loses against running again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from config.params import Params
from data.reading.augment import bev_matrix
from data.reading.batch import Batch, collate
from data.reading.boxes import transform_boxes
from data.reading.config import GridConfig
from data.store import Store, TapSpec
from models.head.targets import TargetEncoder
from stages.calibration import rounded
from stages.inputs.datasets import grown_grid, plain_dataset
from stages.teaching.frozen import BATCH, Frozen, FrozenTeacher, View, evenly
from stages.teaching.kinds import Exact, Stored, kind_of, map_kind

# Augmentations whose gap is measured.
PROBES: Final[Mapping[str, Mapping[str, Any]]] = {
    "identity": {},
    "flip x": {"flip_x": True},
    "flip y": {"flip_y": True},
    "rotate 10": {"degrees": 10.0},
    "rotate 22.5": {"degrees": 22.5},
    "scale 0.95": {"scale": 0.95},
    "scale 1.05": {"scale": 1.05},
}
MARGIN: Final = 0.1  # beyond what the strongest of them needs


def make_card(
    name: str, params: Params, store: Store, errors: Mapping[str, Any], gaps: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """The card; the same for equal stores.

    Args:
        name: of the store.
        params: all parameters.
        store: as it was built.
        errors: by dense tap, see `stages.calibration.errors`.
        gaps: by dense tap, see `measure_gaps`; empty when they are not measured.
    """
    settings, samples = params.stores[name], len(store)
    taps: dict[str, Any] = {}
    for tap, spec in store.taps.items():
        stored = store.bytes(tap)
        taps[tap] = {"serve": settings.taps[tap].serve, "encoding": _kept(tap, spec)}
        taps[tap] |= {"bytes": stored, "bytes_per_sample": rounded(stored / samples)}
        if not spec.ragged:
            height, width, _ = spec.map_shape
            taps[tap]["float16_bytes_per_sample"] = height * width * (spec.channels_of_teacher or 0) * 2
            taps[tap] |= {"error": errors[tap]} | ({"gap": dict(gaps[tap])} if tap in gaps else {})
    split = params.data.splits.train
    return {"store": name, "teacher": settings.teacher, "samples": samples, "split": split, "taps": taps}


def measure_gaps(root: Path, params: Params, teacher: Frozen, store: Store) -> dict[str, dict[str, float]]:
    """Mean |served - rerun| / mean |rerun| of each dense tap and augmentation, over the cells that are served.

    Served: read from the store, warped and expanded as a student gets it. Rerun: the teacher on augmented input.
    Both on the student's grid. Of head maps a cell counts, task by task, by the score that the rerun teacher gives it:
    what they say of the background is arbitrary.

    Args:
        root: of the project.
        params: all parameters; `store.gap_samples` says how many samples.
        teacher: that the store was made with.
        store: as it was built.
    """
    dense = [tap for tap, spec in store.taps.items() if not spec.ragged]
    rows = evenly(params.store.gap_samples, len(store))
    if not isinstance(teacher, FrozenTeacher) or not dense or not rows:
        return {}
    view = _wide_view(root, params, teacher, dense)
    sums = {tap: {name: np.zeros(2) for name in PROBES} for tap in dense}
    for i in range(0, len(rows), BATCH):
        batch = collate([view.dataset[row] for row in rows[i : i + BATCH]])
        for name, probe in PROBES.items():
            matrix = torch.from_numpy(bev_matrix(**probe))
            rerun = view(augmented(batch, matrix, grown_grid(params, 0.0)).to(teacher.device))
            for tap in dense:
                expected = torch.from_numpy(np.stack([outputs[tap] for outputs in rerun]))
                sums[tap][name] += _difference(store, tap, batch.tokens, matrix, expected, teacher.plain.targets)
    return {tap: {n: rounded(float(e / max(s, 1e-30))) for n, (e, s) in by.items()} for tap, by in sums.items()}


def augmented(batch: Batch, matrix: Tensor, grid: GridConfig) -> Batch:
    """A batch in the LiDAR frame as the dataset would give it with one augmentation matrix [4, 4] for all samples.

    The batch must reach further than the grid, so that what the augmentation brings in is there.
    """
    turn = matrix[:3, :3].float()
    points = [torch.cat([p[:, :3] @ turn.T, p[:, 3:]], dim=1) for p in batch.points]
    parts = [(r[:, :3] @ turn.T, r[:, 3:4], r[:, 4:6] @ turn[:2, :2].T, r[:, 6:]) for r in batch.radar]
    return replace(
        batch,
        bev_aug=matrix.float().expand(len(batch), 4, 4).clone(),
        points=[_inside(p, grid) for p in points],
        radar=[_inside(torch.cat(part, dim=1), grid) for part in parts],
        boxes=[transform_boxes(boxes, matrix) for boxes in batch.boxes],
    )


def table(name: str, card: Mapping[str, Any]) -> str:
    """The card in a few lines."""
    lines = []
    for tap, entry in card["taps"].items():
        line = f"{name}.{tap}: {entry['encoding']}, {entry['bytes_per_sample'] / 1000:.4g} kB per sample"
        if "error" in entry:
            error = entry["error"]
            line += f", error {_percent(error['mean'])} (float16 {_percent(error['float16']['mean'])})"
        gaps = ", ".join(f"{probe} {_percent(value)}" for probe, value in entry.get("gap", {}).items())
        lines += [line, *([f"  differs from a rerun teacher: {gaps}"] if gaps else [])]
    return "\n".join(lines)


def metrics(card: Mapping[str, Any]) -> dict[str, float]:
    """The card's numbers under flat names, for the tracker."""
    return dict(_numbers("store", card["taps"]))


def _kept(tap: str, spec: TapSpec) -> str:
    """How a store keeps a tap."""
    kind = kind_of(tap)
    return kind.kept if isinstance(kind, Exact) else str(spec.encoding)


def _percent(value: float) -> str:
    return f"{100 * value:.2g} %"


def _numbers(prefix: str, tree: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in tree.items():
        name = f"{prefix}/{key.replace(' ', '_')}"
        if isinstance(value, Mapping):
            yield from _numbers(name, value)
        elif isinstance(value, (int, float)):
            yield name, float(value)


def _wide_view(root: Path, params: Params, teacher: FrozenTeacher, taps: Sequence[str]) -> View:
    """The teacher on the grid, with samples that reach as far as the strongest augmentation looks."""
    matrices = [np.abs(np.linalg.inv(bev_matrix(**probe))) for probe in PROBES.values()]
    reach = max(matrix[:2, :2].sum(1).max() for matrix in matrices) + MARGIN
    height = max(matrix[2, 2] for matrix in matrices) + MARGIN
    cells = math.ceil(params.grid.range * (reach - 1.0) / params.grid.cell)
    low, high = (max(z * height, z / height) if i else min(z * height, z / height) for i, z in enumerate(params.grid.z))
    wide = grown_grid(params, cells * params.grid.cell).model_copy(update={"z": (low, high)})
    dataset = plain_dataset(root, params, params.data.splits.train, teacher.plain, grid=wide)
    return View(teacher.plain, dataset, taps)


def _difference(
    store: Store, tap: str, tokens: Sequence[str], matrix: Tensor, expected: Tensor, targets: TargetEncoder
) -> np.ndarray:
    """Weighted sums of |served - expected| and |expected| [B, C, H, W] over the cells that are served."""
    spec, samples = store.taps[tap], [store.read(token, [tap]) for token in tokens]
    maps = torch.from_numpy(np.stack([sample[tap] for sample in samples]))
    masks = [sample[f"{tap}.present"] for sample in samples if f"{tap}.present" in sample]
    present = torch.from_numpy(np.stack(masks)) if masks else None
    kind, stored = map_kind(tap), Stored(tap, maps, present, store.calibration(tap), spec.extent or targets.grid.range)
    assert kind is not None
    served, valid = kind.served(stored, matrix.expand(len(tokens), 4, 4), targets.grid.range, targets)
    weight = valid * kind.weight(expected, targets)
    error = ((served - expected).abs() * weight).double().sum()
    return np.array([float(error), float((expected.abs() * weight).double().sum())])


def _inside(points: Tensor, grid: GridConfig) -> Tensor:
    low, high = grid.z
    inside = (points[:, :2].abs() < grid.range).all(1) & (points[:, 2] > low) & (points[:, 2] < high)
    return points[inside]
