"""Which samples a step sees, as a pure function of (seed, step, rank, world size), so that nothing has to be saved."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from pipeline.environment import die_with_parent
from pipeline.seeding import SAMPLE, seed_everything


class Key(NamedTuple):
    """Address of one training sample: it fixes the sample and every random draw of its augmentation."""

    epoch: int
    position: int  # place in the epoch's order
    item: int  # place in the dataset


def epoch_order(length: int, seed: int, epoch: int) -> np.ndarray:
    """Permutation [length] of the dataset in an epoch."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(length)


class StepBatches(Sampler[list[Key]]):
    """Batch sampler over a whole training run: the keys of every micro-batch from step `first` to the last.

    `batch_size` counts the samples of a step over all ranks, so the number of GPUs does not change which samples make
    a step: rank r takes the r-th equal part. A step's part is cut into `accumulate` micro-batches. The last
    `length % batch_size` samples of an epoch's order are left out; another epoch leaves out others.
    Running through epochs in one iterator spares the loader's workers a restart per epoch.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        epochs: int,
        seed: int,
        *,
        first: int = 0,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
    ) -> None:
        if batch_size % (world * accumulate):
            raise ValueError(
                f"batch_size {batch_size} does not divide into {world} processes x {accumulate} accumulated parts: "
                f"choose a multiple of {world * accumulate}"
            )
        if length < batch_size:
            raise ValueError(f"batch_size {batch_size} is larger than the dataset of {length} samples")
        self.length, self.batch_size, self.seed, self.first = length, batch_size, seed, first
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.steps_per_epoch = length // batch_size
        self.total_steps = epochs * self.steps_per_epoch

    def __len__(self) -> int:
        """Number of micro-batches that are left."""
        return (self.total_steps - self.first) * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        """Keys of each micro-batch of this rank."""
        part = self.batch_size // (self.world * self.accumulate)
        for step in range(self.first, self.total_steps):
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            if step == self.first or step_in_epoch == 0:
                order = epoch_order(self.length, self.seed, epoch)
            start = step_in_epoch * self.batch_size + self.rank * part * self.accumulate
            for micro in range(self.accumulate):
                positions = range(start + micro * part, start + (micro + 1) * part)
                yield [Key(epoch, position, int(order[position])) for position in positions]


class KeyedDataset(Dataset[Any]):
    """Seeds the global generators from a sample's key before each read.

    A dataset should draw from its own generator; code that it calls (an image library, a voxelizer) may not. Seeded
    here, such draws too depend on the key alone, not on which worker reads or on what it read before.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: Key) -> Any:
        """Sample of a key."""
        seed_everything(SAMPLE, self.seed, key.epoch, key.position, cuda=False)
        return self.dataset[key]


def start_worker(_: int) -> None:
    """A loader's worker computes on one thread and dies with its trainer.

    In a process group of its own it does not get the stop signals that go to the trainer's group, and can still be
    terminated by the trainer, whose handlers it must not keep.
    """
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    die_with_parent(signal.SIGKILL)
    torch.set_num_threads(1)
