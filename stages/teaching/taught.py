"""Teacher outputs in a batch: read from stores by the loader's workers.

Workers read, verify, decompress and scatter; what is left to the training process is a copy to the device. Boxes are
moved into the frame of the augmented sample here, instances into its augmented images; maps stay as they are stored,
for `stages.teaching.serving`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from base.taps import TapRef
from data.reading.batch import Batch, Sample, collate
from data.reading.dataset import NuScenesDataset, SampleKey
from data.store import Store
from stages.teaching.kinds import kind_of


class TaughtSample(NamedTuple):
    """A sample, and by `<store>.<tap>` what a teacher said about it."""

    sample: Sample
    teacher: dict[str, Any]  # arrays; of instances a list over the cameras


class TaughtDataset(Dataset[TaughtSample]):
    """A dataset whose samples carry teacher outputs.

    Boxes [K, 11] are moved exactly by the sample's BEV augmentation, instances by the image augmentation of its cameras
    (frame 0), which takes the sample's images. Dense maps [H, W, K] are left in the canonical
    LiDAR frame and in the stored dtype, with `<store>.<tap>.present` where only the foreground is stored: warping them
    is cheaper on the device, a batch at a time.
    """

    def __init__(self, dataset: NuScenesDataset, stores: Mapping[str, Store], taps: Collection[str]) -> None:
        """Check that everything is there.

        Args:
            dataset: of the samples.
            stores: by name.
            taps: to read, all of them cached.

        Raises:
            StoreError: naming the sample or tap that a store lacks.
        """
        self.dataset, self.stores = dataset, dict(stores)
        refs = sorted(map(TapRef, taps))
        self.taps = {name: [ref.tap for ref in refs if ref.store == name] for name in stores}
        for name, store in self.stores.items():
            store.require(dataset.tokens, self.taps[name])

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> TaughtSample:
        """The sample of a key with its teacher outputs."""
        sample = self.dataset[key]
        outputs: dict[str, Any] = {}
        for name, store in self.stores.items():
            for tap, array in store.read(sample.token, self.taps[name]).items():
                outputs[TapRef.of(name, tap)] = kind_of(tap).moved(array, sample)
        return TaughtSample(sample, outputs)


def collate_taught(samples: Sequence[TaughtSample]) -> Batch:
    """`collate` with `Batch.teacher`: boxes and instances as lists over the samples, dense maps stacked."""
    batch = collate([taught.sample for taught in samples])
    for name in samples[0].teacher:
        batch.teacher[name] = kind_of(TapRef(name).tap).collated([taught.teacher[name] for taught in samples])
    return batch
