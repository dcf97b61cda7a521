"""What every detector offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType

from mmengine.model import BaseModule
from torch import Tensor, nn

from models.head.center_head import GridCenterHead
from models.head.targets import TargetEncoder
from models.layers.initialising import initialise
from models.ports import Batch, Detections, Prediction


class Detector(nn.Module, ABC):
    """A 3D detector: forward to head maps and taps, loss against boxes, decoding to boxes."""

    # The batch's sensor data that `forward` reads, of `images`, `points`, `radar`; no other need be loaded.
    sensors: tuple[str, ...]
    tap_channels: dict[str, int]  # channels of the taps of this detector that are dense maps
    head: GridCenterHead
    targets: TargetEncoder  # how boxes become head targets on this detector's grid
    frames: int = 1  # keyframes of the batch that `forward` reads; no other need be loaded
    truth_losses: tuple[str, ...] = ("heatmap", "box")  # those of the losses that compare with the true boxes
    # Where weights of other detectors fit: the name of a module there -> names here. Unlisted: the same name.
    places: Mapping[str, tuple[str, ...]] = MappingProxyType({})

    @abstractmethod
    def forward(self, batch: Batch, taps: Collection[str] = ()) -> Prediction:
        """Head maps of a batch, and the named taps.

        `boxes` may be named and is not returned: boxes come from `decode`.
        """

    @abstractmethod
    def loss(self, prediction: Prediction, batch: Batch) -> dict[str, Tensor]:
        """Weighted supervised losses by name; their sum is what is minimised."""

    @abstractmethod
    def decode(self, prediction: Prediction) -> list[Detections]:
        """Boxes of each sample."""

    def init_weights(self) -> None:
        """Initialise every part by its own `init_cfg` (which may name a checkpoint)."""
        initialise(*(child for child in self.children() if isinstance(child, BaseModule)))

    def select_taps(self, available: Mapping[str, Callable[[], Tensor]], taps: Collection[str]) -> dict[str, Tensor]:
        """The asked taps, made only now, out of those that this detector has.

        Raises:
            ValueError: naming a tap that it does not have.
        """
        for name in taps:
            if name not in available and name != "boxes":
                known = ", ".join([*available, "boxes"])
                raise ValueError(f"{type(self).__name__} has no tap '{name}': it has {known}")
        return {name: available[name]() for name in taps if name != "boxes"}
