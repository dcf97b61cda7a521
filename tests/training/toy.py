"""A small task for tests of the trainer: a convolutional net with dropout on random images; also a script.

python tests/training/toy.py FOLDER [key=value ...]     keys: the fields of TrainConfig, and those of `run`
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from training.config import TrainConfig  # noqa: E402
from training.run import Run  # noqa: E402
from training.trainer import train  # noqa: E402


@dataclasses.dataclass
class ToyBatch:
    """Images [B,3,8,8], targets [B,1] and names."""

    tokens: list[str]
    images: Tensor
    targets: Tensor

    def to(self, device: torch.device, **_: Any) -> ToyBatch:
        return ToyBatch(self.tokens, self.images.to(device), self.targets.to(device))


class ToyDataset(torch.utils.data.Dataset):
    """Images that depend on the item, with noise from the global generators: the trainer must have seeded those."""

    def __init__(self, length: int = 22, poison: int | None = None) -> None:
        self.length, self.poison = length, poison

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: Any) -> tuple[str, Tensor, Tensor]:
        _, _, item = key
        image = torch.from_numpy(np.random.default_rng(item).normal(size=(3, 8, 8)).astype(np.float32))
        noisy = image + 0.1 * torch.randn(3, 8, 8) + float(np.random.normal()) * 0.01  # noqa: NPY002
        if item == self.poison:
            noisy[0, 0, 0] = torch.nan
        return f"token-{item}", noisy, image.mean().reshape(1)


def collate(samples: list[tuple[str, Tensor, Tensor]]) -> ToyBatch:
    tokens, images, targets = zip(*samples, strict=True)
    return ToyBatch(list(tokens), torch.stack(images), torch.stack(targets))


class ToyTask:
    """Regression of the mean of an image; `norm` is a batch norm, `dropout` draws in the step, `width` adds weight."""

    def __init__(self, norm: bool = True, dropout: float = 0.1, width: int = 4, pause: float = 0.0) -> None:
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3), nn.BatchNorm2d(width) if norm else nn.Identity()]
        head = [nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(width * 36, 1)]
        self.module: nn.Module = nn.Sequential(*layers, *head)
        self.pause = pause

    @property
    def student(self) -> nn.Module:
        return self.module

    def loss(self, batch: ToyBatch, progress: float) -> dict[str, Tensor]:
        time.sleep(self.pause)
        out = self.module(batch.images)
        error = nn.functional.mse_loss(out, batch.targets)
        return {"mse": error, "size": 0.01 * (1 + progress) * out.square().mean()}


class Recorder:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.metrics: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.metrics.append((step, metrics))


def config(**changes: Any) -> TrainConfig:
    settings = {"epochs": 3, "batch_size": 4, "lr": 0.01, "ema_decay": 0.9, "grad_clip": 1.0, "checkpoint_minutes": 0}
    return TrainConfig.model_validate(settings | {"workers": 0, "log_every": 1} | changes)


def run(folder: Path, *, task: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **changes: Any) -> str:
    """Train the toy in `folder`; writes weights.safetensors; returns their digest."""
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    state = train(
        ToyTask(**(task or {})),
        ToyDataset(**(data or {})),
        collate,
        config(**changes),
        Run(7, folder, Recorder(), lambda: bool(stopped)),
    )
    if int(os.environ.get("RANK", 0)) == 0:
        save_file(state, folder / "weights.safetensors")
    return weights_digest(state)


def weights_digest(state: dict[str, Tensor]) -> str:
    """Digest of the bytes of a state."""
    return hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()


def trace(folder: Path) -> list[dict[str, float]]:
    """The loss trace of a run."""
    return [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), **{k: json.loads(v) for k, v in (argument.split("=", 1) for argument in sys.argv[2:])})
