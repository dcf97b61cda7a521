"""The kinds of taps: how each is stored, moved with the student's sample, batched, and served to the terms.

What can be asked for each kind is in `config.sections.TAP_KINDS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate

from config.sections import TapParams
from data.reading.batch import Sample
from data.reading.boxes import transform_boxes
from data.reading.instances import CameraBatch, in_image, unpack
from data.store import Calibration, Encoding, StoreError, TapSpec
from models.head.head_maps import task_scores
from models.head.targets import TargetEncoder
from stages.teaching.serving import serve_head, serve_maps


def encoding(tap: TapParams) -> Encoding:
    """The encoding that the parameters ask for."""
    return Encoding(tap.dtype, tap.channels, tap.cells, tap.compression)


@dataclass(frozen=True)
class Stored:
    """A dense tap of a batch out of a store."""

    name: str  # for messages
    values: Tensor  # [B, H, W, K] of the stored dtype
    present: Tensor | None  # [B, H, W] bool, cells that the store holds; None: all
    calibration: Calibration
    extent: float  # half the side of the stored maps in metres, halo included


class Kind(ABC):
    """One kind."""

    def moved(self, array: NDArray[Any], sample: Sample) -> Any:
        """What a store holds of a sample, in the sample's augmented frame; dense maps stay, warping them is cheaper
        on the device, a batch at a time.
        """
        return array

    @abstractmethod
    def spec(self, value: NDArray[Any], tap: TapParams, extent: float | None) -> TapSpec:
        """Type and shape in a store, from one sample's array; `extent` of a dense tap in metres."""

    @abstractmethod
    def words(self, tap: str, settings: TapParams) -> str:
        """How a store keeps it, beside its name."""

    @abstractmethod
    def collated(self, values: Sequence[Any]) -> Any:
        """The samples' values as a batch holds them."""


class Exact(Kind):
    """What is kept as it is: no cells, no encoding."""

    kept: str  # as what, for cards

    def words(self, tap: str, settings: TapParams) -> str:
        """Its name."""
        return tap


class Boxes(Exact):
    """Boxes [K, 11] (box, score, label), a list over the samples."""

    kept = "float32"

    def spec(self, value: NDArray[Any], tap: TapParams, extent: float | None) -> TapSpec:
        """See `Kind`."""
        return TapSpec.boxes()

    def moved(self, array: NDArray[Any], sample: Sample) -> NDArray[np.float32]:
        """By the sample's BEV augmentation, exactly."""
        found: NDArray[np.float32] = transform_boxes(torch.from_numpy(array), sample.bev_aug).numpy()
        return found

    def collated(self, values: Sequence[Any]) -> list[Tensor]:
        """See `Kind`."""
        return [torch.from_numpy(value) for value in values]


class Instances(Exact):
    """Instances of the camera images, a list over the samples of lists over the cameras."""

    kept = "run lengths of masks"

    def spec(self, value: NDArray[Any], tap: TapParams, extent: float | None) -> TapSpec:
        """See `Kind`."""
        return TapSpec.instances()

    def moved(self, array: NDArray[Any], sample: Sample) -> Any:
        """By the image augmentation of the sample's cameras (frame 0), which takes the sample's images."""
        height, width = sample.images.shape[-2:]
        try:
            return in_image(unpack(array), sample.image_aug[0].numpy().astype(np.float64), (height, width))
        except ValueError as error:
            raise StoreError(f"tap inst2d of sample {sample.token}: {error}. Run its extract stage again") from error

    def collated(self, values: Sequence[Any]) -> CameraBatch:
        """See `Kind`."""
        return CameraBatch.of(list(values))


class Map(Kind):
    """Dense maps in bird's-eye view [B, C, H, W]."""

    def spec(self, value: NDArray[Any], tap: TapParams, extent: float | None) -> TapSpec:
        """See `Kind`."""
        assert extent is not None
        return TapSpec.dense(value.shape, encoding(tap), extent)

    def words(self, tap: str, settings: TapParams) -> str:
        """Name and encoding."""
        return f"{tap}: {encoding(settings)}"

    def collated(self, values: Sequence[Any]) -> Any:
        """Stacked; in a worker torch's collate stacks straight into shared memory, where np.stack needs a copy."""
        return default_collate([torch.from_numpy(value) for value in values])

    def served(
        self, stored: Stored, bev_aug: Tensor, extent: float, targets: TargetEncoder | None
    ) -> tuple[Tensor, Tensor]:
        """In the augmented frame of a batch, on the student's grid.

        Args:
            stored: of the batch.
            bev_aug: [B, 4, 4] LiDAR frame -> augmented frame.
            extent: half the side of the student's grid in metres.
            targets: the student's.

        Returns:
            Maps [B, C, H, W] float32, and the cells that have a source, bool [B, 1, H, W].
        """
        return serve_maps(stored.values, stored.present, stored.calibration, stored.extent, bev_aug, extent)

    def weight(self, maps: Tensor, targets: TargetEncoder) -> Tensor | float:
        """How much each cell counts where two maps are compared; of plain maps all alike."""
        return 1.0


class HeadMap(Map):
    """The maps of a detector's head: their boxes are moved, not only their cells."""

    def served(
        self, stored: Stored, bev_aug: Tensor, extent: float, targets: TargetEncoder | None
    ) -> tuple[Tensor, Tensor]:
        """See `Map`."""
        if targets is None:
            raise ValueError(
                f"{stored.name} is a cached head map: its boxes are moved by the student's targets, give them"
            )
        return serve_head(stored.values, stored.calibration, stored.extent, bev_aug, targets)

    def weight(self, maps: Tensor, targets: TargetEncoder) -> Tensor:
        """Task by task the score that the maps give a cell: what they say of the background is arbitrary."""
        return task_scores(maps, targets)


KINDS: Final[Mapping[str, Kind]] = {"boxes": Boxes(), "inst2d": Instances(), "head": HeadMap()}
MAP: Final = Map()


def kind_of(tap: str) -> Kind:
    """The kind of a tap by its name in a store: a map in bird's-eye view unless it is known as something else."""
    return KINDS.get(tap, MAP)


def map_kind(tap: str) -> Map | None:
    """The kind of a dense tap; None of any other."""
    kind = kind_of(tap)
    return kind if isinstance(kind, Map) else None
