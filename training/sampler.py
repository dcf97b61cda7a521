"""Which samples a step sees, as a pure function of (seed, step, rank, world size), so that nothing has to be saved."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from base.environment import die_with_parent
from training.seeding import SAMPLE, seed_everything


class Key(NamedTuple):
    """Address of one training sample: it fixes the sample and every random draw of its augmentation."""

    epoch: int
    position: int  # place in the epoch's order
    item: int  # place in the dataset


def epoch_order(length: int, seed: int, epoch: int) -> np.ndarray:
    """Permutation [length] of the dataset in an epoch."""
    return _generator(seed, epoch).permutation(length)


class ClassBalance:
    """Class-balanced resampling (CBGS; Zhu et al., "Class-balanced Grouping and Sampling", 2019, section 3.1).

    An epoch draws equally often for every class, with replacement, from the samples that hold it; it is as long as the
    number of (sample, class) pairs. A sample without objects is never drawn. The numbers are those of mmdet3d's
    CBGSDataset, which draws once for all epochs; here every epoch draws anew.
    """

    def __init__(self, classes: Sequence[Iterable[int]]) -> None:
        """Sort the samples by class.

        Args:
            classes: labels of each sample's objects, in any order; repeated ones count once.

        Raises:
            ValueError: no sample has a class.
        """
        labels = [sorted(set(found)) for found in classes]
        sample = np.repeat(np.arange(len(labels)), [len(found) for found in labels])
        label = np.array([one for found in labels for one in found], np.int64)
        self.members = [sample[label == present] for present in np.unique(label)]
        if not self.members:
            raise ValueError(f"none of {len(labels)} samples holds an object: class-balanced resampling has no classes")
        self.draws_per_class = len(sample) // len(self.members)

    def __len__(self) -> int:
        """Samples of an epoch."""
        return self.draws_per_class * len(self.members)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Samples [len(self)] of an epoch in the order in which they are shown."""
        generator = _generator(seed, epoch)
        drawn = [generator.choice(members, self.draws_per_class) for members in self.members]
        return generator.permutation(np.concatenate(drawn))


class LabelMix:
    """Samples with and without labels in a set proportion in every step.

    Where few samples are labelled, steps that happen to have none would learn from teachers alone. Both kinds are
    shown whole permutations one after another, however often that shows a sample in an epoch, which is as long as
    there are samples.
    """

    def __init__(self, labelled: Sequence[bool] | np.ndarray, share: float, batch_size: int) -> None:
        """Count how many of a step are labelled.

        Args:
            labelled: of each sample.
            share: of a step's samples that have labels, rounded to whole samples.
            batch_size: samples of a step over all processes.

        Raises:
            ValueError: steps would hold but one kind, or there is but one.
        """
        known = np.asarray(labelled, bool)
        self.count, self.batch_size, self.length = round(share * batch_size), batch_size, len(known)
        if not 0 < self.count < batch_size:
            raise ValueError(f"a share of {share} labelled samples is {self.count} of a step of {batch_size}")
        self.kinds = np.flatnonzero(known), np.flatnonzero(~known)
        if not all(map(len, self.kinds)):
            which = "labelled" if len(self.kinds[0]) else "without labels"
            raise ValueError(f"all {self.length} samples are {which}: there is nothing to mix")

    def __len__(self) -> int:
        """Samples of an epoch."""
        return self.length

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Samples of an epoch's whole steps in the order in which they are shown."""
        generator, steps = _generator(seed, epoch), self.length // self.batch_size
        parts = (self.count, self.batch_size - self.count)
        shown = [
            _repeated(generator, kind, steps * part).reshape(steps, part)
            for kind, part in zip(self.kinds, parts, strict=True)
        ]
        return generator.permuted(np.concatenate(shown, axis=1), axis=1).ravel()


def _repeated(generator: np.random.Generator, members: np.ndarray, count: int) -> np.ndarray:
    """So many of the members, as permutations one after another."""
    rounds = max(1, -(-count // len(members)))
    return np.concatenate([generator.permutation(members) for _ in range(rounds)])[:count]


class Order(Protocol):
    """Which samples an epoch shows, in place of a permutation of all."""

    def __len__(self) -> int:
        """Samples of an epoch."""
        ...

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Samples of an epoch in the order in which they are shown."""
        ...


def _generator(seed: int, epoch: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, epoch]))


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
        order: Order | None = None,
    ) -> None:
        if batch_size % (world * accumulate):
            raise ValueError(
                f"batch_size {batch_size} does not divide into {world} processes x {accumulate} accumulated parts: "
                f"choose a multiple of {world * accumulate}"
            )
        if order is not None:
            length = len(order)
        if length < batch_size:
            raise ValueError(f"batch_size {batch_size} is larger than the dataset of {length} samples")
        self.length, self.batch_size, self.seed, self.first = length, batch_size, seed, first
        self.order = order
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
                shown = self._order(epoch)
            start = step_in_epoch * self.batch_size + self.rank * part * self.accumulate
            for micro in range(self.accumulate):
                positions = range(start + micro * part, start + (micro + 1) * part)
                yield [Key(epoch, position, int(shown[position])) for position in positions]

    def _order(self, epoch: int) -> np.ndarray:
        if self.order is not None:
            return self.order.order(self.seed, epoch)
        return epoch_order(self.length, self.seed, epoch)


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
