"""What the trainings of a plan will take of a GPU's memory: an estimate, from what one sample took on a CPU."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from config.graph import Node
from config.params import Params, split_key
from training.config import TrainConfig


@dataclass(frozen=True)
class Estimate:
    """Of one model on the GPUs that its stage asks for."""

    model: str  # entry of `teachers` or `students`
    gigabytes: float  # on each GPU
    samples: int  # at once on each GPU
    batch: int
    gpus: int
    stage: str  # entry of `resources`

    def words(self, device: float | None) -> str:
        """In a line; `device` are the GB of this machine's GPU."""
        line = (
            f"  {self.model}: about {self.gigabytes:.0f} GB, {self.samples} samples at once of a batch of {self.batch} "
            f"on {self.gpus} GPU{'s' * (self.gpus > 1)}"
        )
        if device is not None and self.gigabytes > device:
            line += f"; more than there is: raise resources.{self.stage}.gpus, or train.accumulate of {self.model}"
        return line


def describe(params: Params, nodes: Iterable[Node]) -> str:
    """The estimates of stages that are to run in lines; nothing where no model of them has been measured."""
    nodes = list(nodes)
    found = list(dict.fromkeys(estimates(params, nodes)))
    if not found:
        return ""
    others = dict.fromkeys(model for model, *_ in trainings(params, nodes) if model not in params.memory)
    device = gpu_gigabytes()
    here = "no GPU here" if device is None else f"a GPU here has {device:.0f} GB"
    head = f"memory of each GPU, estimated from one sample on a CPU (docs/paper-scale.md); {here}:"
    lines = [head, *(estimate.words(device) for estimate in found)]
    if others:
        lines.append(f"  not measured: {', '.join(others)}")
    return "\n".join(lines)


def trainings(params: Params, nodes: Iterable[Node]) -> Iterator[tuple[str, TrainConfig, str, Node]]:
    """Model, how it is trained, and entry of `resources` of each stage that trains a detector, with the stage."""
    for node in nodes:
        name, _, key = node.name.partition("@")
        if name in ("teacher", "fusion", "large"):
            yield key, params.teachers[key].train, "teacher", node
        elif name == "distill":
            variant, _ = split_key(key)
            yield params.variants[variant].student, params.student(variant).train, "distill", node


def estimates(params: Params, nodes: Iterable[Node]) -> Iterator[Estimate]:
    """Of each stage that trains a detector that has been measured."""
    for model, train, stage, node in trainings(params, nodes):
        if model not in params.memory:
            continue
        gpus = max(int(node.meta.get("gpus") or 0), 1) * int(node.meta.get("nodes") or 1)
        samples = math.ceil(train.batch_size / gpus / train.accumulate)
        measured = params.memory[model]
        total = measured.model + samples * measured.sample
        yield Estimate(model, total, samples, train.batch_size, gpus, stage)


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
