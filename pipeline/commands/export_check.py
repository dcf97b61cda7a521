"""What runs the files of an export, compared with the student that they were made of."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Final

import torch
from torch import Tensor

from models.detectors.detector import Detector
from models.head.center_head import GridCenterHead
from models.ports import Detections

TOLERANCE: Final = 1e-3  # of head maps, and of boxes in their own units
REPEATS: Final = 5  # of a timed forward pass
EAGER: Final = "eager"  # the published student itself

Maps = dict[str, Tensor]
Runner = Callable[[Maps], Maps]
Difference = dict[str, dict[str, float]]


@torch.no_grad()
def compare(runners: Mapping[str, Runner], samples: Sequence[Maps], detector: Detector, threshold: float) -> Difference:
    """Largest absolute differences from the runner EAGER, by runner and output.

    Args:
        runners: by name.
        samples: inputs.
        detector: that decodes; output `boxes` is about what it finds.
        threshold: score from which on a box of either must be found by both.
    """
    difference: dict[str, dict[str, float]] = {name: {} for name in runners if name != EAGER}
    for inputs in samples:
        maps = {name: runner(inputs) for name, runner in runners.items()}
        for name, largest in difference.items():
            found = {output: _largest(value, maps[EAGER][output]) for output, value in maps[name].items()}
            ours, theirs = decoded(detector, maps[name]), decoded(detector, maps[EAGER])
            if (apart := box_difference(ours, theirs, threshold)) is not None:
                found["boxes"] = apart
            largest |= {output: max(value, largest.get(output, 0.0)) for output, value in found.items()}
    return difference


def _largest(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference; infinite where a number is none."""
    return float((ours - theirs).abs().nan_to_num(nan=torch.inf).max())


def decoded(detector: Detector, maps: Maps) -> Detections:
    """Boxes of the first sample of head maps by their names as outputs."""
    tasks: dict[str, Maps] = {}
    for output, value in maps.items():
        task, _, name = output.partition("_")
        tasks.setdefault(task, {})[name] = value
    head = detector.head
    assert isinstance(head, GridCenterHead)
    return head.decode(list(tasks.values()))[0]


def box_difference(ours: Detections, theirs: Detections, threshold: float) -> float | None:
    """Largest difference between boxes and scores, from a score on, of either to the nearest of the other's class.

    Infinite where the other has none of that class, None where neither has a box of such a score. Angles differ by
    less than a turn; sides of more than a metre, of which the maps hold logarithms, by parts of themselves.
    """
    largest = None
    for one, other in ((ours, theirs), (theirs, ours)):
        for box, score, label in zip(*one, strict=True):
            same = other.labels == label
            if score < threshold:
                break  # best first
            if not same.any():
                return torch.inf
            apart = torch.cat([other.boxes[same] - box, (other.scores[same] - score)[:, None]], dim=1)
            apart[:, 6] = torch.remainder(apart[:, 6] + torch.pi, 2 * torch.pi) - torch.pi
            apart[:, 3:6] /= box[3:6].clamp(min=1.0)
            largest = max(largest or 0.0, float(apart.abs().amax(1).min()))
    return largest


@torch.no_grad()
def latencies_ms(runners: Mapping[str, Runner], inputs: Maps) -> dict[str, float]:
    """Median milliseconds of a forward pass of each, in turns, after one that does not count."""
    rounds = [{name: _seconds(runner, inputs) for name, runner in runners.items()} for _ in range(REPEATS + 1)]
    return {name: 1e3 * median(one[name] for one in rounds[1:]) for name in runners}


def _seconds(runner: Runner, inputs: Maps) -> float:
    start = time.perf_counter()
    runner(inputs)
    return time.perf_counter() - start
