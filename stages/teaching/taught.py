"""Teacher outputs in a batch: read from stores by the loader's workers.

Workers read, verify, decompress and scatter; what is left to the training process is a copy to the device. Boxes are
moved into the frame of the augmented sample here, instances into its augmented images; maps stay as they are stored,
for `stages.teaching.serving`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, default_collate

from data.reading.batch import Batch, Sample, collate
from data.reading.boxes import transform_boxes
from data.reading.dataset import NuScenesDataset, SampleKey
from data.reading.instances import CameraBatch, ImageInstances, in_image, unpack
from data.store import Store, StoreError


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
            taps: `<store>.<tap>` to read, all of them cached.

        Raises:
            StoreError: naming the sample or tap that a store lacks.
        """
        self.dataset, self.stores = dataset, dict(stores)
        self.taps = {
            name: [tap.partition(".")[2] for tap in sorted(taps) if tap.partition(".")[0] == name] for name in stores
        }
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
                outputs[f"{name}.{tap}"] = _MOVED[tap](array, sample) if tap in _MOVED else array
        return TaughtSample(sample, outputs)


def collate_taught(samples: Sequence[TaughtSample]) -> Batch:
    """`collate` with `Batch.teacher`: boxes and instances as lists over the samples, dense maps stacked."""
    batch = collate([taught.sample for taught in samples])
    for name in samples[0].teacher:
        if name.endswith(".inst2d"):
            batch.teacher[name] = CameraBatch.of([taught.teacher[name] for taught in samples])
            continue
        tensors = [torch.from_numpy(taught.teacher[name]) for taught in samples]
        # In a worker torch's collate stacks straight into shared memory; np.stack's result is copied there again.
        batch.teacher[name] = tensors if name.endswith(".boxes") else default_collate(tensors)
    return batch


def _augmented_boxes(boxes: NDArray[np.float32], sample: Sample) -> NDArray[np.float32]:
    moved: NDArray[np.float32] = transform_boxes(torch.from_numpy(boxes), sample.bev_aug).numpy()
    return moved


def _augmented_instances(packed: NDArray[np.uint8], sample: Sample) -> list[ImageInstances]:
    height, width = sample.images.shape[-2:]
    try:
        return in_image(unpack(packed), sample.image_aug[0].numpy().astype(np.float64), (height, width))
    except ValueError as error:
        raise StoreError(f"tap inst2d of sample {sample.token}: {error}. Run its extract stage again") from error


_MOVED: dict[str, Callable[[NDArray[Any], Sample], Any]] = {"boxes": _augmented_boxes, "inst2d": _augmented_instances}
