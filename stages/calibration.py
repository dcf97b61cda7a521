"""The calibration of a store's dense taps, and what their encodings cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from config.sections import StoreParams
from data.store import Calibration, TapSpec
from stages.teaching.frozen import KEEP, Frozen, Outputs
from stages.teaching.kinds import kind_of, map_kind


def tap_specs(teacher: Frozen, store: StoreParams, sample: Outputs) -> dict[str, TapSpec]:
    """Types and shapes of the cached taps, from one sample."""
    return {
        name: kind_of(name).spec(sample[name], tap, teacher.extent(name) if map_kind(name) else None)
        for name, tap in store.cached.items()
    }


def calibrate(specs: Mapping[str, TapSpec], samples: Mapping[str, Outputs]) -> dict[str, Calibration]:
    """Fit each dense tap to the samples, by token."""
    every = samples.values()
    return {
        name: Calibration.fit(spec.encoding, [s[name] for s in every], [s.get(name + KEEP) for s in every])
        for name, spec in specs.items()
        if spec.encoding is not None
    }


def errors(spec: TapSpec, calibration: Calibration, tap: str, samples: Mapping[str, Outputs]) -> dict[str, Any]:
    """What the encoding of a dense tap does to the teacher's values, over the cells that the store holds.

    Returns:
        `mean`: mean |decoded - original| / mean |original|; `max_of_std`: the largest |decoded - original| of a
        channel by that channel's standard deviation over all cells, of the worst channel; `float16`: both for the
        same values in plain float16.
    """
    encoded, plain = _Error(), _Error()
    for token, sample in samples.items():
        original = np.moveaxis(sample[tap], 0, -1).astype(np.float32)
        decoded, present = _decoded(spec, calibration, tap, token, sample)
        encoded.add(original, decoded, present)
        plain.add(original, original.astype(np.float16).astype(np.float32), present)
    return {**encoded.ratios(), "float16": plain.ratios()}


def rounded(value: float) -> float:
    """Six digits: further ones may depend on the number of threads."""
    return float(f"{value:.6g}")


def _decoded(
    spec: TapSpec, calibration: Calibration, tap: str, token: str, sample: Outputs
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Values [H, W, C] after a way through the encoding, and the cells [H, W] that it holds."""
    stored = spec.decode(spec.encode(sample, tap, token, calibration), tap, calibration)
    decoded = calibration.expand(spec.tensor(np.array(stored[tap]))).numpy()
    return decoded, stored.get(f"{tap}.present", np.ones(decoded.shape[:2], np.bool_))


class _Error:
    """Sums of absolute errors, and the spread of the original values."""

    def __init__(self) -> None:
        self.error = self.size = 0.0
        self.count = 0
        self.worst: Any = 0.0  # [C]
        self.sum: Any = 0.0  # [C]
        self.square: Any = 0.0  # [C]

    def add(self, original: NDArray[np.float32], decoded: NDArray[np.float32], present: NDArray[np.bool_]) -> None:
        """Take in one sample: [H, W, C] twice, [H, W]."""
        error, kept = np.abs(decoded - original)[present], np.abs(original)[present]
        self.error += float(error.sum(dtype=np.float64))
        self.size += float(kept.sum(dtype=np.float64))
        self.worst = np.maximum(self.worst, error.max(0, initial=0.0))
        values = original.reshape(-1, original.shape[-1]).astype(np.float64)
        self.count += len(values)
        self.sum, self.square = self.sum + values.sum(0), self.square + np.square(values).sum(0)

    def ratios(self) -> dict[str, float]:
        """Mean error by mean size, and the worst error by the standard deviation of its channel."""
        std = np.sqrt((self.square / self.count - (self.sum / self.count) ** 2).clip(0.0))
        spread = std > 0  # a channel that is constant, as a dead one is, has no scale to compare with
        return {
            "mean": rounded(self.error / self.size if self.size else 0.0),
            "max_of_std": rounded(float((self.worst[spread] / std[spread]).max(initial=0.0))),
        }
