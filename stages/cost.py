"""Stage `cost`: what the models of the study cost at inference, at the sizes of the parameters.

It needs neither data nor weights. The input is made up and a model's numbers hang on its config alone, so equal configs
are measured once. What hangs on time differs from run to run: nothing but the report reads it.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple, Self

import torch
from mmcv.ops import DeformConv2d, ModulatedDeformConv2d
from torch import Tensor, nn
from torch.autograd.profiler import profile
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from config.params import Params
from data.reading.batch import Batch, collate
from models.detectors.build import build_detector
from models.detectors.camera import CameraDetector
from models.detectors.detector import Detector
from stages.context import StageContext
from stages.synthetic import random_samples

logger = logging.getLogger(__name__)

# By type of device; all but float32 by autocast.
PRECISIONS: Final[Mapping[str, Sequence[torch.dtype]]] = {
    "cpu": (torch.float32,),
    "cuda": (torch.float32, torch.float16),
}


class Turns(NamedTuple):
    """Forward passes over samples at once."""

    warm_up: int  # passes that are not timed
    repeats: int


TURNS: Final = {1: Turns(3, 15), 8: Turns(1, 3)}  # by size of the batch


class Speed(NamedTuple):
    """What a forward pass takes in one precision.

    Decoding of boxes is left out: how long that takes depends on what was learned.
    """

    latency_ms: float  # median at batch 1
    throughput_1: float  # samples per second at batch 1, one pass after the other
    throughput_8: float  # at batch 8
    peak_memory: int  # see `peak_memory`; at batch 1


class Cost(NamedTuple):
    """Of a detector on a sample: six cameras, and what else it reads."""

    parameters: int
    multiply_adds: int  # see `MultiplyAdds`
    speeds: dict[str, Speed]  # by precision

    def numbers(self) -> dict[str, float]:
        """All of them by name; what was not measured in float32 has its precision behind its name."""
        numbers: dict[str, float] = {"parameters": self.parameters, "multiply_adds": self.multiply_adds}
        for precision, speed in self.speeds.items():
            suffix = "" if precision == "float32" else f"_{precision}"
            numbers |= {f"{key}{suffix}": value for key, value in speed._asdict().items()}
        return numbers


class MultiplyAdds(FlopCounterMode):
    """Counts the multiply-adds of convolutions and matrix products while it is entered, by module.

    torch's counter, and on top of it mmcv's deformable convolutions, which torch does not see. Neither sees what only
    gathers values or runs on sparse ones: pooling into BEV, the sampling of deformable attention, sparse convolutions.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(display=False)
        kinds = (DeformConv2d, ModulatedDeformConv2d)
        self._deformable = [module for module in model.modules() if isinstance(module, kinds)]
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        super().__enter__()
        self._handles = [module.register_forward_hook(self._add) for module in self._deformable]
        return self

    def __exit__(self, *error: Any) -> Any:
        for handle in self._handles:
            handle.remove()
        return super().__exit__(*error)

    def of(self, modules: Iterable[str] = ("Global",)) -> int:
        """Multiply-adds of the named modules (names start with the model's class); by default of the whole model."""
        counts = self.get_flop_counts()
        return sum(sum(counts.get(module, {}).values()) for module in modules) // 2

    def _add(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        assert isinstance(module.weight, Tensor)
        for name in set(self.mod_tracker.parents):
            self.flop_counts[name]["deform_conv"] += 2 * output.numel() * module.weight[0].numel()


def run(context: StageContext) -> None:
    """Measure all models of the study, publish the numbers."""
    params, device = context.params, context.device
    models = study_models(params)
    texts = {(section, name): _text(config) for section, configs in models.items() for name, config in configs.items()}
    detectors = {text: build_detector(json.loads(text)).to(device) for text in dict.fromkeys(texts.values())}
    batches = {size: collate(random_samples(params, size)).to(device) for size in TURNS}
    measured = measure(list(detectors.values()), batches, PRECISIONS[device.type])
    costs = dict(zip(detectors, measured, strict=True))
    content: dict[str, Any] = {**conditions(params, device), **{section: {} for section in models}}
    for (section, name), text in texts.items():
        content[section][name] = numbers = costs[text].numbers()
        logger.info("%s: %s", name, _words(costs[text]))
        context.tracker.log_metrics({f"{name}/{key}": float(value) for key, value in numbers.items()}, 0)
    made = context.scratch / "cost.json"
    made.write_text(json.dumps(content, indent=2) + "\n")
    context.publish(made, "reports/cost.json")


def study_models(params: Params) -> dict[str, dict[str, dict[str, Any]]]:
    """Model configs of a study's `teachers` and `variants`, by name."""
    study = params.study
    return {
        "teachers": {name: params.teachers[name].model for name in study.detectors},
        "variants": {name: params.student(name).model for name in study.variants},
    }


def conditions(params: Params, device: torch.device) -> dict[str, Any]:
    """What the numbers were measured with."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "torch": torch.__version__,
        "precisions": [_name(precision) for precision in PRECISIONS[device.type]],
        "image": list(params.input.image.size),
        "frames": params.input.frames,
        "repeats": {str(size): turns.repeats for size, turns in TURNS.items()},
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's as far as the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def measure(
    detectors: Sequence[Detector], batches: Mapping[int, Batch], precisions: Sequence[torch.dtype]
) -> list[Cost]:
    """The costs of detectors in evaluation mode.

    Args:
        detectors: on the device of the batches.
        batches: of 1 and of 8 samples, by size.
        precisions: to measure speed and memory in.
    """
    for detector in detectors:
        detector.eval()
    speeds = {_name(precision): _speeds(detectors, batches, precision) for precision in precisions}
    return [
        Cost(
            parameters_of(detector),
            multiply_adds(detector, batches[1]),
            {precision: values[index] for precision, values in speeds.items()},
        )
        for index, detector in enumerate(detectors)
    ]


def _speeds(detectors: Sequence[Detector], batches: Mapping[int, Batch], precision: torch.dtype) -> list[Speed]:
    device = batches[1].images.device.type
    # One context for all passes: it casts the weights once, as if the model were kept in that precision.
    with torch.autocast(device, precision, enabled=precision != torch.float32):
        seconds = {size: pass_seconds(detectors, batch, TURNS[size]) for size, batch in batches.items()}
        memory = [peak_memory(detector, batches[1]) for detector in detectors]
    return [
        Speed(round(1e3 * one, 3), round(1 / one, 3), round(8 / eight, 3), peak)
        for one, eight, peak in zip(seconds[1], seconds[8], memory, strict=True)
    ]


def parameters_of(module: nn.Module) -> int:
    """Number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


@torch.inference_mode()
def multiply_adds(detector: Detector, batch: Batch) -> int:
    """Of one forward pass."""
    with MultiplyAdds(detector) as counted:
        detector(batch)
    return counted.of()


@torch.inference_mode()
def pass_seconds(detectors: Sequence[Detector], batch: Batch, turns: Turns) -> list[float]:
    """Median seconds of a forward pass of each detector.

    They take turns, so that whatever else the machine does meets all of them alike.
    """
    pairs = [(detector, as_deployed(detector, batch)) for detector in detectors]
    rounds = [[_seconds(detector, seen) for detector, seen in pairs] for _ in range(sum(turns))]
    return [median(seconds) for seconds in zip(*rounds[turns.warm_up :], strict=True)]


@torch.inference_mode()
def peak_memory(detector: Detector, batch: Batch) -> int:
    """The most bytes that a forward pass holds at once, beyond what was there before it: the weights and the batch."""
    batch = as_deployed(detector, batch)
    if batch.images.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        detector(batch)
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler reports on the terminal that it starts and stops
    with profile(profile_memory=True) as recorded:
        detector(batch)
    assert recorded.kineto_results is not None
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate((event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())), initial=0))


def as_deployed(detector: Detector, batch: Any) -> Any:
    """The batch with images of the size that a detector sees: where it is deployed nobody gives it larger ones."""
    return detector.at_own_size(batch) if isinstance(detector, CameraDetector) else batch


def _seconds(detector: Detector, batch: Batch) -> float:
    start = time.perf_counter()
    detector(batch)
    if batch.images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _name(precision: torch.dtype) -> str:
    return str(precision).removeprefix("torch.")


def _text(config: dict[str, Any]) -> str:
    """A config, equal for equal models."""
    return json.dumps(config, sort_keys=True)


def _words(cost: Cost) -> str:
    speed = cost.speeds["float32"]
    return (
        f"{cost.parameters / 1e6:.2f} M parameters, {cost.multiply_adds / 1e9:.2f} G multiply-adds, "
        f"{speed.latency_ms:.1f} ms, {speed.throughput_8:.1f} samples/s at batch 8, {speed.peak_memory / 1e6:.0f} MB"
    )
