"""What the trainings of a plan will take of a GPU's memory: an estimate, from what one sample took on a CPU."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from config.graph import Node
from config.params import Params, split_key


@dataclass(frozen=True)
class Training:
    """What a stage trains, and on what."""

    model: str  # entry of `teachers`, `segmenters` or `students`
    stage: str  # entry of `resources`
    batch: int
    samples: int  # at once on each GPU
    gpus: int  # of all nodes


@dataclass(frozen=True)
class Estimate:
    """What a training will take."""

    of: Training
    gigabytes: float  # on each GPU

    def words(self, device: float | None) -> str:
        """In a line; `device` are the GB of this machine's GPU."""
        of = self.of
        line = (
            f"  {of.model}: about {self.gigabytes:.0f} GB, {of.samples} samples at once of a batch of {of.batch} "
            f"on {of.gpus} GPU{'s' * (of.gpus > 1)}"
        )
        if device is not None and self.gigabytes > device:
            line += f"; more than there is: raise resources.{of.stage}.gpus, or train.accumulate of {of.model}"
        return line


def describe(params: Params, nodes: Iterable[Node]) -> str:
    """The estimates of stages that are to run in lines; nothing where no model of them has been measured."""
    nodes = list(nodes)
    found = list(dict.fromkeys(estimates(params, nodes)))
    if not found:
        return ""
    trained = dict.fromkeys(training.model for training in trainings(params, nodes))
    others = [model for model in trained if model not in params.memory]
    device = gpu_gigabytes()
    here = "no GPU here" if device is None else f"a GPU here has {device:.0f} GB"
    head = f"memory of each GPU, estimated from one sample on a CPU (docs/paper-scale.md); {here}:"
    lines = [head, *(estimate.words(device) for estimate in found)]
    if others:
        lines.append(f"  not measured: {', '.join(others)}")
    return "\n".join(lines)


def trainings(params: Params, nodes: Iterable[Node]) -> Iterator[Training]:
    """Those of the stages that train a model."""
    for node in nodes:
        name, _, key = node.name.partition("@")
        if name in ("teacher", "fusion", "large"):
            stage, model, train = "teacher", key, params.teachers[key].train
        elif name == "segmenter" and (own := params.segmenters[key].train) is not None:
            stage, model, train = name, key, own
        elif name == "distill":
            variant, _ = split_key(key)
            stage, model, train = name, params.variants[variant].student, params.student(variant).train
        else:
            continue
        gpus = max(int(node.meta.get("gpus") or 0), 1) * int(node.meta.get("nodes") or 1)
        yield Training(model, stage, train.batch_size, math.ceil(train.batch_size / gpus / train.accumulate), gpus)


def estimates(params: Params, nodes: Iterable[Node]) -> Iterator[Estimate]:
    """Of each training whose model has been measured."""
    for training in trainings(params, nodes):
        if measured := params.memory.get(training.model):
            yield Estimate(training, measured.model + training.samples * measured.sample)


def gpu_gigabytes() -> float | None:
    """The memory of this machine's smallest GPU; None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):  # a driver that does not answer is no reason to say no plan
        return None
    sizes = [float(line) for line in done.stdout.splitlines() if line.strip().isdecimal()]
    return min(sizes) * 2**20 / 1e9 if sizes else None
