"""A small camera student of random teachers, trained for a few steps: the same in one process and in several."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.recipe import Recipe
from distill.terms import TermConfig
from models.detectors.build import build_detector
from models.detectors.detector import Detector
from models.ports import Batch
from tests.models.factory import CAMERAS, camera_config, random_batch, random_boxes
from tests.training.toy import config
from training.run import Run
from training.trainer import train

CHANNELS = {"large.bev_lift": 12, "large.bev_prev": 12, "large.bev_view": 12 * CAMERAS, "large.head": 70}
DENSE = {"student": "bev_neck", "teacher": "large.bev_lift", "adapter": {"kind": "conv1x1"}, "distance": "l1"}
BOXES = {"student": "head", "teacher": "large.boxes", "mask": {"kind": "teacher_conf"}}
MAPS = BOXES | {"teacher": "large.head"}
TERMS: dict[str, dict[str, Any]] = {
    **{mask: DENSE | {"mask": {"kind": mask}} for mask in ("none", "occupied", "balanced", "gt_gauss", "phi_softmax")},
    **{f"boxes_{distance}": BOXES | {"distance": distance} for distance in ("qfl", "gfl", "sl1")},
    **{f"maps_{distance}": MAPS | {"distance": distance} for distance in ("qfl", "gfl", "sl1")},
    "kl": MAPS | {"distance": "kl", "mask": {"kind": "none"}},
    "centers": MAPS | {"distance": "sl1", "mask": {"kind": "gt_centers"}},
    "everywhere": MAPS | {"distance": "qfl", "mask": {"kind": "none"}},
    "spatial": DENSE
    | {
        "student": "bev_view",
        "teacher": "large.bev_view",
        "distance": "cos_rel",
        "adapter": {},
        "mask": {"kind": "visible_views"},
    },
    "temporal": DENSE | {"student": "bev_lift", "distance": "kl_rel", "adapter": {}},
    "attention": DENSE | {"distance": "attention", "adapter": {}},
    "adversarial": DENSE | {"distance": "bce_adv", "adapter": {"kind": "grl_disc", "width": 8}},
}
"""Every way to add up over cells, boxes and samples, but for what looks at a process's own samples by its nature."""


def random_teacher(boxes: int, seed: int) -> dict[str, Any]:
    """Outputs for one scene: maps of which some part is known and some of that active, and boxes."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Any] = {}
    for tap, channels in CHANNELS.items():
        found[tap] = torch.randn(1, channels, 32, 32, generator=generator)
        found[tap] *= torch.rand(1, 1, 32, 32, generator=generator) < 0.1 * (1 + seed)
        found[f"{tap}.valid"] = torch.rand(1, 1, 32, 32, generator=generator) < 1 - 0.1 * seed
    drawn, labels = random_boxes(boxes, 12.0, seed)
    scores = torch.linspace(0.95, 0.05, boxes)
    return found | {"large.boxes": [torch.cat([drawn.nan_to_num(0.5), scores[:, None], labels[:, None]], dim=1)]}


class Scenes(torch.utils.data.Dataset):
    """Scenes that differ in all that a detector reads and learns; no task has equally many objects in two of them."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, key: Any) -> SimpleNamespace:
        boxes, seed = 4 + 3 * key.item, 1 + key.item
        scene = random_batch(1, frames=2, boxes=boxes, seed=seed)
        scene.has_previous[:] = key.item % 3 > 0
        scene.teacher = random_teacher(boxes, seed)
        return scene


class Student(nn.Module):
    """The detector and all that trains beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.detector: Detector = build_detector(camera_config(frames=2))
        terms = {name: TermConfig(**term, weight=0.1) for name, term in TERMS.items()}
        self.recipe = Recipe(terms, self.detector.targets, self.detector.tap_channels, CHANNELS)

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        prediction = self.detector(batch, self.recipe.student_taps)
        return self.detector.loss(prediction, batch) | self.recipe(prediction, batch.teacher, batch, progress)


class StudentTask:
    """The detector's own losses and the terms'."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = Student()
        replace_batch_norms(self.module)
        self.student = self.module.detector

    def loss(self, batch: Any, progress: float) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = self.module(batch, progress)
        return losses


def replace_batch_norms(module: nn.Module) -> None:
    """Put a group norm in the place of every batch norm."""
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, nn.GroupNorm(1, child.num_features))
        else:
            replace_batch_norms(child)


def collate(scenes: list[SimpleNamespace]) -> SimpleNamespace:
    """A batch of scenes."""
    return SimpleNamespace(**joined([vars(scene) for scene in scenes]))


def joined(scenes: list[dict[str, Any]]) -> dict[str, Any]:
    """Tensors one behind the other, lists too, mappings name by name."""
    found: dict[str, Any] = {}
    for name, first in scenes[0].items():
        values = [scene[name] for scene in scenes]
        if isinstance(first, dict):
            found[name] = joined(values)
        elif isinstance(first, Tensor):
            found[name] = torch.cat(values)
        else:
            found[name] = [item for value in values for item in value]
    return found


def fit(scratch: Path, tracker: Any, stop: Callable[[], bool]) -> dict[str, Tensor]:
    """Train for four steps of four scenes; writes state.safetensors."""
    torch.set_num_threads(1)
    settings = config(epochs=2, batch_size=4, lr=1e-4, ema_decay=0.0)
    state = train(StudentTask(), Scenes(), collate, settings, Run(3, scratch, tracker, stop))
    save_file(state, scratch / "state.safetensors")
    return state
