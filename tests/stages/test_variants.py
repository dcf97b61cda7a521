"""Every variant of params.yaml: its student and recipe are built and learn one step from their own losses alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.classes import CLASSES
from data.instances import ImageInstances
from models.detector import build_detector
from models.distill import TermConfig
from pipeline.params import load_params
from stages.distill import Distillation, make_recipe
from tests.models.factory import random_batch

PARAMS = load_params(Path(__file__).resolve().parents[2] / "params.yaml")
LIFT, HEAD = 48, 70  # channels of the LiDAR teacher's maps


def instances(height: int, width: int) -> ImageInstances:
    """Two rectangles."""
    boxes = torch.tensor([[4.0, 6.0, 30.0, 28.0], [40.0, 10.0, 60.0, 50.0]])
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = 1
    return ImageInstances(boxes, torch.tensor([0, len(CLASSES) - 2]), torch.tensor([0.9, 0.8]), masks)


def outputs(batch: Any, size: int) -> dict[str, Any]:
    """What teachers say, by the tap's name."""
    generator = torch.Generator().manual_seed(0)
    count, (height, width) = len(batch.boxes), batch.images.shape[-2:]

    def maps(channels: int) -> Tensor:
        return torch.randn(count, channels, size, size, generator=generator)

    rows = [torch.cat([b, torch.full((len(b), 1), 0.7), n[:, None].float()], 1)
            for b, n in zip(batch.boxes, batch.labels, strict=True)]
    cameras = [[instances(height, width)] * batch.images.shape[2]] * count
    return {"boxes": rows, "bev_lift": maps(LIFT).relu(), "head": maps(HEAD), "inst2d": cameras}


@pytest.mark.parametrize("name", list(PARAMS.variants))
def test_variant_learns_from_its_own_losses(name: str) -> None:
    variant, settings = PARAMS.variants[name], PARAMS.student(name)
    torch.manual_seed(0)
    student = build_detector(settings.model)
    terms = {key: TermConfig(**term) for key, term in variant.terms.items()}
    widths = {"bev_lift": LIFT, "head": HEAD}
    taps = {term.teacher: term.teacher.partition(".")[2] for term in terms.values()}
    recipe = make_recipe(student, terms, {t: torch.ones(widths[tap]) for t, tap in taps.items() if tap in widths})
    batch = random_batch(batch_size=1)
    said = outputs(batch, student.targets.grid.size)
    task = Distillation(student, recipe, lambda _: {t: said[tap] for t, tap in taps.items()}, variant.truth)
    task.module.train()

    losses = task.loss(batch, 0.5)
    summed = {key: value for key, value in losses.items() if not key.startswith("watch/")}
    torch.stack(list(summed.values())).sum().backward()

    own = {"heatmap", "box"} if variant.truth else set()
    depth = {"depth"} if settings.model.get("depth_loss_weight") else set()
    assert summed.keys() == own | depth | {f"distill/{key}" for key in terms}
    assert all(value.isfinite() for value in losses.values())
    gradients = [p.grad for p in task.module.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
