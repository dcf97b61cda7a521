"""What the official metrics compare with: a table beside the index, a row per keyframe, all in the global frame.

The index gives training what it learns from: boxes of the ten classes in the LiDAR frame of the keyframes whose files
are whole. The official metrics ask for more, so it stands here: boxes as they were annotated, bit for bit; keyframes
that the index left out, since a model that cannot see them is scored on them all the same; bicycle racks, inside which
bicycles do not count; the place of the vehicle, from which the range of a class is measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data.reading.geometry import Float64
from data.reading.index import open_batch

TRUTH_FORMAT: Final = "bev-distillery truth 1"
TRUTH_FILE: Final = "truth.arrow"
SEVERAL: Final = -1  # attribute of a box that has more than one, or one that nuScenes does not have

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class GlobalBoxes:
    """Boxes of many keyframes, keyframe by keyframe, as nuScenes writes them."""

    sample: Int64  # [M], position of the keyframe in a list of tokens
    label: Int64  # [M], positions in CLASSES
    translation: Float64  # [M, 3], centres in the global frame, metres
    size: Float64  # [M, 3], width, length, height
    rotation: Float64  # [M, 4], quaternions w, x, y, z
    velocity: Float64  # [M, 2], m/s, NaN where unknown
    attribute: Int64  # [M], positions in ATTRIBUTES
    points: Int64  # [M], LiDAR and RADAR points inside; -1 where nobody counted them

    def __len__(self) -> int:
        return len(self.sample)

    def take(self, which: NDArray[Any]) -> Self:
        """The boxes that a mask or positions choose."""
        return type(self)(**{field.name: getattr(self, field.name)[which] for field in fields(self)})


@dataclass(frozen=True)
class Racks:
    """Bicycle racks of many keyframes."""

    sample: Int64  # [R]
    translation: Float64  # [R, 3]
    size: Float64  # [R, 3]
    rotation: Float64  # [R, 4]


@dataclass(frozen=True)
class Truth:
    """What a submission is compared with."""

    tokens: list[str]  # [S], of the keyframes
    scenes: list[str]  # [S], their names
    ego: Float64  # [S, 3], the vehicle in the global frame at the LiDAR's timestamp; NaN without a LiDAR record
    boxes: GlobalBoxes
    box_tokens: list[str]  # [M]
    racks: Racks


def read_truth(folder: Path, scenes: Iterable[str]) -> Truth:
    """The truth of some scenes from the folder of an index.

    Raises:
        IndexFormatError: there is none, or it is of another format.
    """
    batch, _ = open_batch(folder / TRUTH_FILE, TRUTH_FORMAT, "truth")
    rows = np.flatnonzero(pc.is_in(batch["scene"], value_set=pa.array([*scenes], pa.string())))
    taken = batch.take(pa.array(rows))
    boxes = GlobalBoxes(
        sample=_samples(taken["label"]),
        label=_flat(taken["label"]),
        translation=_flat(taken["translation"], 3),
        size=_flat(taken["size"], 3),
        rotation=_flat(taken["rotation"], 4),
        velocity=_flat(taken["velocity"], 2),
        attribute=_flat(taken["attribute"]),
        points=_flat(taken["points"]),
    )
    racks = Racks(
        _samples(taken["rack_translation"]),
        *(_flat(taken[f"rack_{name}"], width) for name, width in (("translation", 3), ("size", 3), ("rotation", 4))),
    )
    ego = taken["ego"].flatten().to_numpy(zero_copy_only=False).reshape(-1, 3)
    names = taken["token"].to_pylist(), taken["scene"].to_pylist()
    return Truth(*names, ego, boxes, taken["box_token"].flatten().to_pylist(), racks)


def _samples(lists: pa.ListArray) -> Int64:
    """For each of the values of all lists, the list that it is in."""
    lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
    return np.repeat(np.arange(len(lengths)), lengths)


def _flat(lists: pa.ListArray, width: int = 1) -> NDArray[Any]:
    """The values of all lists, [M] or [M, width]."""
    values = lists.flatten()
    if width == 1:
        return values.to_numpy(zero_copy_only=False)
    return values.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
