"""Teacher outputs in a batch: read from stores by the loader's workers, in the frame of the augmented sample."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from data.batch import Batch, Sample, collate
from data.boxes import transform_boxes
from data.dataset import NuScenesDataset, SampleKey
from data.store import Store


class TaughtSample(NamedTuple):
    """A sample, and by `<teacher>.<tap>` what a teacher said about it."""

    sample: Sample
    teacher: dict[str, NDArray[Any]]


class TaughtDataset(Dataset[TaughtSample]):
    """A dataset whose samples carry teacher outputs.

    Boxes [K, 11] are moved exactly by the sample's BEV augmentation. Dense maps are left in the canonical LiDAR frame:
    warping them is cheaper on the device, a batch at a time.
    """

    def __init__(self, dataset: NuScenesDataset, stores: Mapping[str, Store], taps: Collection[str]) -> None:
        """Check that everything is there.

        Args:
            dataset: of the samples.
            stores: by teacher.
            taps: `<teacher>.<tap>` to read.

        Raises:
            StoreError: naming the sample or tap that a store lacks.
        """
        self.dataset, self.stores = dataset, dict(stores)
        self.taps = {
            teacher: [name.partition(".")[2] for name in sorted(taps) if name.partition(".")[0] == teacher]
            for teacher in stores
        }
        for teacher, store in self.stores.items():
            store.require(dataset.tokens, self.taps[teacher])

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> TaughtSample:
        """The sample of a key with its teacher outputs."""
        sample = self.dataset[key]
        outputs: dict[str, NDArray[Any]] = {}
        for teacher, store in self.stores.items():
            for tap, array in store.read(sample.token, self.taps[teacher]).items():
                outputs[f"{teacher}.{tap}"] = _augmented_boxes(array, sample) if tap == "boxes" else array
        return TaughtSample(sample, outputs)


def collate_taught(samples: Sequence[TaughtSample]) -> Batch:
    """`data.batch.collate`, with boxes as a list and dense maps stacked in `Batch.teacher`."""
    batch = collate([taught.sample for taught in samples])
    for name in samples[0].teacher:
        arrays = [taught.teacher[name] for taught in samples]
        ragged = name.endswith(".boxes")
        batch.teacher[name] = [torch.from_numpy(a) for a in arrays] if ragged else torch.from_numpy(np.stack(arrays))
    return batch


def _augmented_boxes(boxes: NDArray[np.float32], sample: Sample) -> NDArray[np.float32]:
    moved: NDArray[np.float32] = transform_boxes(torch.from_numpy(boxes.copy()), sample.bev_aug).numpy()
    return moved
