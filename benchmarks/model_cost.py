"""What a student costs: parameters, multiply-adds and memory, part by part, at the size of a profile.

`python benchmarks/model_cost.py nuscenes-x3kd-r50` lays the profile over the parameters in memory and runs, on CUDA if
there is one, else on the CPU, one inference and one training step of a sample: six cameras, all keyframes of the
profile. It needs no data and no weights. One profile per run, because a process's peak memory never falls.

Multiply-adds are those of convolutions and matrix products as stages/cost.py counts them, for terms those of the
training step's forward pass. Pooling into BEV (below 0.1 G), the sampling of deformable attention and sparse
convolutions are not counted. What is kept for the backward pass counts every storage once, at the first part that keeps
it.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import psutil
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.charts import machine
from config.params import Params
from config.profiles import apply_profile
from config.sections import tap_kind
from data.reading.batch import Batch, collate
from data.reading.classes import CLASSES
from data.reading.instances import ImageInstances
from distill.recipe import Recipe
from models.detectors.bevformer import BEVFormer
from models.detectors.build import build_detector
from models.detectors.detector import Detector
from models.detectors.segmenter import build_segmenter
from models.head.targets import CODE_SIZE
from stages.cost import MultiplyAdds, parameters_of
from stages.synthetic import CAMERAS, random_samples
from training.trainer import minimised, parameter_groups

ROOT = Path(__file__).resolve().parents[1]
INSTANCES = 8  # per image, about what a segmenter finds on nuScenes
REST = "the rest, losses"


class Step(NamedTuple):
    """A training step."""

    kept: dict[str, int]  # bytes that the forward pass keeps for the backward pass, by part and term
    macs: dict[str, int]  # of the forward passes of the terms
    before: int  # bytes in use before the step
    peak: int
    seconds: float  # of CPU time, which other work on the machine hardly changes


class Row(NamedTuple):
    """Of a part."""

    part: str
    parameters: int
    macs: int
    kept: int


def params_of(profile: str) -> Params:
    """The parameters with a profile over them."""
    with TemporaryDirectory() as name:
        shutil.copy(ROOT / "params.yaml", name)
        shutil.copytree(ROOT / "params", Path(name) / "params")
        shutil.copytree(ROOT / "profiles", Path(name) / "profiles")
        return apply_profile(profile, Path(name))


def parts_of(student: Detector) -> dict[str, nn.Module]:
    """The student's submodules by name, image backbone and neck apart."""
    parts: dict[str, nn.Module] = {}
    for name, child in student.named_children():
        inner = {f"{name}.{part}": module for part, module in child.named_children() if part in ("backbone", "neck")}
        parts |= inner or {name: child}
    return parts


class Kept:
    """Adds up what autograd keeps, by the innermost of some modules that is running."""

    def __init__(self, parts: Mapping[str, nn.Module], parameters: Iterable[nn.Parameter]) -> None:
        self.bytes: dict[str, int] = dict.fromkeys([*parts, REST], 0)
        self.running = [REST]
        self.seen = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        for name, module in parts.items():
            module.register_forward_pre_hook(lambda *_, name=name: self.running.append(name))
            module.register_forward_hook(lambda *_: self.running.pop() and None)

    def watching(self) -> saved_tensors_hooks:
        """A context that counts."""
        return saved_tensors_hooks(self._add, lambda tensor: tensor)

    def _add(self, tensor: Tensor) -> Tensor:
        # While the graph holds a storage, no other can have its address.
        if tensor.layout == torch.strided and (storage := tensor.untyped_storage()).data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.bytes[self.running[-1]] += storage.nbytes()
        return tensor


class Bench:
    """A variant's student and recipe, or a teacher alone, with a sample."""

    def __init__(self, params: Params, variant: str) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        alone = variant in params.teachers
        settings = params.teachers[variant] if alone else params.student(variant)
        self.terms = {} if alone else params.variants[variant].terms
        self.train, self.size = settings.train, params.input.image.size
        self.student: Detector = build_detector(settings.model).to(self.device)
        self.frozen = {
            name: parameters_of(build_detector(params.teachers[name].model)) for name in params.study.detectors
        }
        for name in params.study.segmenters:
            given = params.segmenters[name]
            model = build_segmenter({"model": given.model, "classes": given.classes or CLASSES})
            self.frozen[name] = parameters_of(model)
        self.recipe = self._recipe(params).to(self.device)
        self.batch: Batch = collate(random_samples(params, 1)).to(self.device)
        self.teacher = self._teacher_outputs()
        self.parts = parts_of(self.student)

    def rows(self, step: Step, counted: MultiplyAdds) -> list[Row]:
        """The student's parts, the student, the terms."""
        name = type(self.student).__name__
        rows = [
            Row(part, parameters_of(module), counted.of([f"{name}.{part}"]), step.kept[part])
            for part, module in self.parts.items()
        ]
        kept = sum(step.kept[part] for part in self.parts)
        whole = Row("student", parameters_of(self.student), counted.of([name]), kept)
        rest = Row(
            REST,
            whole.parameters - sum(row.parameters for row in rows),
            whole.macs - sum(row.macs for row in rows),
            step.kept[REST],
        )
        terms = [
            Row(f"train-only: {term}", parameters_of(module), step.macs[term], step.kept[term])
            for term, module in self.recipe.terms.items()
        ]
        return [*rows, rest, whole._replace(kept=whole.kept + rest.kept), *terms]

    def _recipe(self, params: Params) -> Recipe:
        self.shapes: dict[str, tuple[int, int, int]] = {}
        for source in sorted({source for config in self.terms.values() for source in config.teacher_taps}):
            if not tap_kind(source.tap).exact:
                teacher = build_detector(params.teachers[params.stores[source.store].teacher].model)
                self.shapes[source] = shape_of(teacher, source.tap)
        student, stride = self.student, getattr(self.student, "stride", None)
        widths = {source: shape[0] for source, shape in self.shapes.items()}
        return Recipe(
            self.terms, student.targets, student.tap_channels, widths, stride=stride, losses=student.head.losses
        )

    def _teacher_outputs(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        outputs: dict[str, Any] = {}
        for tap in self.recipe.teacher_taps:
            if tap.tap == "boxes":
                boxes, labels = self.batch.boxes[0].cpu(), self.batch.labels[0].cpu()[:, None]
                score = torch.full((len(boxes), 1), 0.9)
                outputs[tap] = [torch.cat([boxes, score, labels.float()], dim=1).to(self.device)]
            elif tap.tap == "inst2d":
                outputs[tap] = [[random_instances(generator, self.size, self.device) for _ in range(CAMERAS)]]
            else:
                outputs[tap] = torch.randn(1, *self.shapes[tap], generator=generator).relu().to(self.device)
        return outputs

    def autocast(self) -> torch.autocast:
        """The precision of training."""
        half = torch.float16 if self.train.precision == "16-mixed" else torch.bfloat16
        return torch.autocast(self.device.type, half, enabled=self.train.precision != "32-true")

    @torch.inference_mode()
    def inference(self) -> MultiplyAdds:
        """The student on the sample, counted."""
        self.student.eval()
        with MultiplyAdds(self.student) as counted, self.autocast():
            self.student(self.batch)
        return counted

    def training_step(self) -> Step:
        """Forward, backward and AdamW, measured."""
        modules = nn.ModuleList([self.student, self.recipe])
        modules.train()
        optimizer = torch.optim.AdamW(parameter_groups(modules, 0.01), lr=1e-6)
        kept = Kept({**self.parts, **self.recipe.terms}, modules.parameters())
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before, start = self.memory(), time.process_time()
        with self.autocast(), kept.watching():
            prediction = self.student(self.batch, self.recipe.student_taps)
            losses = self.student.loss(prediction, self.batch)
            with MultiplyAdds(self.recipe) as counted:
                losses |= self.recipe(prediction, self.teacher, self.batch, 0.5)
            total = torch.stack([losses[name] for name in minimised(losses)]).sum()
        total.backward()
        optimizer.step()
        peak = self.peak()
        seconds = time.process_time() - start
        terms = {name: counted.of([f"Recipe.modules_of_terms.{i}"]) for i, name in enumerate(self.recipe.terms)}
        return Step(kept.bytes, terms, before, peak, seconds)

    def memory(self) -> int:
        """Bytes in use: allocated on a GPU, else of the whole process."""
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else psutil.Process().memory_info().rss

    def peak(self) -> int:
        """The most bytes in use so far, as `memory` counts them."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def shape_of(teacher: Detector, tap: str) -> tuple[int, int, int]:
    """Of a dense tap; the head's channels are the heatmap and the regression code of each of its tasks."""
    queried = isinstance(teacher, BEVFormer) and tap in ("bev_lift", "bev_prev", "bev_view")
    side = (teacher.cells if queried else teacher.targets.grid).size
    if tap == "head":
        return teacher.targets.classes + CODE_SIZE * len(teacher.targets.task_sizes), side, side
    return teacher.tap_channels[tap], side, side


def random_instances(generator: torch.Generator, size: tuple[int, int], device: torch.device) -> ImageInstances:
    """Instances of one image: boxes that are full."""
    limit = torch.tensor([size[1], size[0]])
    side = (0.05 + 0.15 * torch.rand(INSTANCES, 2, generator=generator)) * limit
    corner = torch.rand(INSTANCES, 2, generator=generator) * (limit - side)
    boxes = torch.cat([corner, corner + side], dim=1).round()
    masks = torch.zeros(INSTANCES, *size, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = 1
    labels = torch.randint(0, len(CLASSES), (INSTANCES,), generator=generator)
    tensors = boxes, labels, torch.full((INSTANCES,), 0.9), masks
    return ImageInstances(*(tensor.to(device) for tensor in tensors))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile")
    parser.add_argument("--variant", default="x3kd", help="or a teacher of 3D boxes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    params = params_of(given.profile)
    bench = Bench(params, given.variant)
    counted, step = bench.inference(), bench.training_step()
    rows = bench.rows(step, counted)
    height, width = params.input.image.size
    print(
        f"{given.profile}, {given.variant}: {CAMERAS} x {height} x {width}, {params.input.frames} keyframes, "
        f"{bench.train.precision}, {machine()['device']}, {given.threads} thread(s)\n"
    )
    print("| part | parameters, M | multiply-adds, G | kept for backward, MB |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row.part} | {row.parameters / 1e6:.2f} | {row.macs / 1e9:.1f} | {row.kept / 1e6:.0f} |")
    for name, parameters in bench.frozen.items():
        print(f"| frozen teacher: {name} | {parameters / 1e6:.2f} | | |")
    print(
        f"\ntraining step of one sample: {step.seconds:.1f} s of CPU time, memory {step.before / 1e9:.2f} GB before, "
        f"{step.peak / 1e9:.2f} GB at its peak"
    )
    if given.json:
        found = {"machine": machine(), "rows": [row._asdict() for row in rows], "step": step._asdict()}
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
