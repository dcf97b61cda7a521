"""What every stage that trains hands to the trainer in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from stages.context import StageContext
from training.config import TrainConfig
from training.trainer import Task, train


def train_stage(
    context: StageContext,
    task: Task,
    dataset: Dataset[Any],
    collate: Callable[[list[Any]], Any],
    config: TrainConfig,
    seed: int,
    classes: Callable[[], Sequence[Iterable[int]]] | None = None,
) -> dict[str, Tensor]:
    """`training.trainer.train` in the stage's scratch folder, under its address, until the stage is asked to stop.

    Args:
        context: of the stage.
        task: the module and its losses.
        dataset: its samples; `collate` makes batches of them.
        collate: see `dataset`.
        config: the settings.
        seed: of the order of samples and of every draw in the steps.
        classes: labels of each sample's objects, for `config.balanced`.

    Returns:
        Averaged weights by name, on the CPU.

    Raises:
        What `training.trainer.train` raises, and what the dataset does.
    """
    return train(
        task,
        dataset,
        collate,
        config,
        seed=seed,
        scratch=context.scratch,
        tracker=context.tracker,
        stop=context.stop.is_set,
        label=context.spec.address,
        classes=classes,
    )
