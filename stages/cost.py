"""Stage `cost`: what the models of the study cost at inference, at the sizes of params.yaml.

It needs neither data nor weights. The input is made up and a model's numbers hang on its config alone, so equal configs
are measured once. Latency differs from run to run: nothing but the report reads it.
"""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple, Self

import torch
from mmcv.ops import DeformConv2d, ModulatedDeformConv2d
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from data.batch import Batch, collate
from models.detector import Detector, build_detector
from pipeline.params import Params
from pipeline.stage import StageContext
from stages.synthetic import random_samples

logger = logging.getLogger(__name__)

WARM_UP: Final = 3  # forward passes that are not timed
REPEATS: Final = 15


class Cost(NamedTuple):
    """Of a detector on one sample: six cameras, and what else it reads."""

    parameters: int
    multiply_adds: int
    """See `MultiplyAdds`."""
    latency_ms: float
    """Median of the forward pass, decoding of boxes left out: how long that takes depends on what was learned."""


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
        """Multiply-adds of modules by their names, which begin with the model's class; of everything by default."""
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
    batch = collate(random_samples(params, 1)).to(device)
    costs = dict(zip(detectors, measure(list(detectors.values()), batch), strict=True))
    content: dict[str, Any] = {**conditions(params, device), **{section: {} for section in models}}
    for (section, name), text in texts.items():
        content[section][name] = numbers = costs[text]._asdict()
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
        "precision": "float32",
        "image": list(params.input.image.size),
        "frames": params.input.frames,
        "repeats": REPEATS,
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


def measure(detectors: Sequence[Detector], batch: Batch) -> list[Cost]:
    """The costs of detectors on a batch of one sample, in evaluation mode and in the precision of `evaluate`."""
    for detector in detectors:
        detector.eval()
    latencies = latencies_ms(detectors, batch)
    return [
        Cost(parameters_of(detector), multiply_adds(detector, batch), latency)
        for detector, latency in zip(detectors, latencies, strict=True)
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
def latencies_ms(detectors: Sequence[Detector], batch: Batch) -> list[float]:
    """Median milliseconds of a forward pass of each detector.

    They take turns, so that whatever else the machine does meets all of them alike.
    """
    rounds = [[_seconds(detector, batch) for detector in detectors] for _ in range(WARM_UP + REPEATS)]
    return [round(1e3 * median(seconds), 3) for seconds in zip(*rounds[WARM_UP:], strict=True)]


def _seconds(detector: Detector, batch: Batch) -> float:
    start = time.perf_counter()
    detector(batch)
    if batch.images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _text(config: dict[str, Any]) -> str:
    """A config, equal for equal models."""
    return json.dumps(config, sort_keys=True)


def _words(cost: Cost) -> str:
    return (
        f"{cost.parameters / 1e6:.2f} M parameters, {cost.multiply_adds / 1e9:.2f} G multiply-adds, "
        f"{cost.latency_ms:.1f} ms"
    )
