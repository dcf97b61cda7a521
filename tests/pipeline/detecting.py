"""A small camera detector on random scenes, trained for a few steps: the same in one process and in several."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.detector import Detector, build_detector
from pipeline.trainer import train
from tests.models.factory import camera_config, random_batch
from tests.pipeline.toy import config


class Scenes(torch.utils.data.Dataset):
    """Scenes that differ in all that a detector reads and learns; no task has equally many objects in two of them."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, key: Any) -> SimpleNamespace:
        return random_batch(1, boxes=4 + 3 * key.item, seed=1 + key.item)


class DetectorTask:
    """The detector's own losses."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module: Detector = build_detector(camera_config())
        replace_batch_norms(self.module)

    def loss(self, batch: Any, progress: float) -> dict[str, Tensor]:
        return self.module.loss(self.module(batch), batch)


def replace_batch_norms(module: nn.Module) -> None:
    """Put a group norm in the place of every batch norm."""
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, nn.GroupNorm(1, child.num_features))
        else:
            replace_batch_norms(child)


def collate(scenes: list[SimpleNamespace]) -> SimpleNamespace:
    """A batch of scenes: tensors one behind the other, lists too."""
    fields = {name: [getattr(scene, name) for scene in scenes] for name in vars(scenes[0])}
    joined = {
        name: torch.cat(values) if isinstance(values[0], Tensor) else [item for value in values for item in value]
        for name, values in fields.items()
    }
    return SimpleNamespace(**joined | {"teacher": {}})


def fit(scratch: Path, tracker: Any, stop: Callable[[], bool]) -> dict[str, Tensor]:
    """Train for four steps of four scenes; writes state.safetensors."""
    torch.set_num_threads(1)
    settings = config(epochs=2, batch_size=4, lr=1e-4, ema_decay=0.0)
    state = train(DetectorTask(), Scenes(), collate, settings, seed=3, scratch=scratch, tracker=tracker, stop=stop)
    save_file(state, scratch / "state.safetensors")
    return state
