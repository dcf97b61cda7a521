"""The index: one memory-mapped Arrow table with a row per keyframe, which is all that training knows of a dataroot.

File names in it are relative to the dataroot, so its bytes depend on the data alone. Poses and boxes are float64.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from base.errors import PipelineError
from data.reading.geometry import Float64

FORMAT: Final = "bev-distillery index 3"
FILE: Final = "index.arrow"
CAMERAS: Final = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")
LIDAR: Final = "LIDAR_TOP"
RADARS: Final = ("RADAR_FRONT", "RADAR_FRONT_LEFT", "RADAR_FRONT_RIGHT", "RADAR_BACK_LEFT", "RADAR_BACK_RIGHT")

_PART: Final = re.compile(r"([^][]+)\[(-?\d+)?:(-?\d+)?(?::([1-9]\d*))?\]")


class IndexFormatError(PipelineError, ValueError):
    """The file is not an index of this format."""


def devkit_split(split: str) -> tuple[str, slice]:
    """The devkit's name in the name of a split, and which of its scenes are meant, in order of name.

    `train` means all of them, `train[:64]` the first 64, `train[-16:]` the last 16.

    Raises:
        ValueError: there are brackets, but no slice of whole numbers, with a step above 0 if any, between them.
    """
    if "[" not in split and "]" not in split:
        return split, slice(None)
    part = _PART.fullmatch(split)
    if part is None:
        raise ValueError(
            f"split {split!r}: a part is written like a Python slice over scenes, as train[:64], train[-16:] or "
            "train[::4]. "
            "Set data.splits."
        )
    return part[1], slice(*(None if bound is None else int(bound) for bound in part.groups()[1:]))


def scenes_of_split(split: str, names: Iterable[str]) -> list[str]:
    """Those scenes of a devkit split, given by `names`, that it or a part of it means, in order of name.

    Raises:
        ValueError: none is left, or the part is badly written.
    """
    whole, part = devkit_split(split)
    ordered = sorted(names)
    if not ordered[part]:
        raise ValueError(
            f"split {split!r} has no scene: {whole!r} has {len(ordered)} of them in this dataroot. Set data.splits."
        )
    return ordered[part]


def open_batch(path: Path, expected: str, what: str) -> tuple[pa.RecordBatch, dict[str, str]]:
    """The mapped rows of a file that `prepare` wrote, and its metadata, whose `format` must be the expected one.

    Raises:
        IndexFormatError: there is none, or it is of another format; `what` names it.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
    except FileNotFoundError:
        raise IndexFormatError(f"there is no {what} at {path}: run the stage `prepare`.") from None
    except pa.ArrowInvalid as error:
        raise IndexFormatError(f"{path} is not a whole {what} ({error}): run the stage `prepare` again.") from error
    metadata = {key.decode(): value.decode() for key, value in (reader.schema.metadata or {}).items()}
    if (found := metadata.get("format")) != expected:
        raise IndexFormatError(
            f"{path} has format {found!r}, this code reads {expected!r}: run the stage `prepare` again."
        )
    return reader.get_batch(0), metadata


@dataclass(frozen=True)
class Cameras:
    """The six images of a keyframe, in the order of CAMERAS."""

    files: list[str]
    tokens: list[str]  # of sample_data
    timestamps: NDArray[np.int64]  # [6], microseconds
    sizes: NDArray[np.int64]  # [6, 2], height and width in raw pixels
    intrinsics: Float64  # [6, 3, 3], camera -> raw pixels
    global_SE3_camera: Float64  # [6, 4, 4], at the camera's own timestamp


@dataclass(frozen=True)
class Sweeps:
    """Sweeps of one modality, newest first."""

    files: list[str]
    timestamps: NDArray[np.int64]  # [S], microseconds
    global_SE3_sensor: Float64  # [S, 4, 4], at the sweep's own timestamp


@dataclass(frozen=True)
class Annotations:
    """Boxes of the ten detection classes, in the order of the sample_annotation table."""

    boxes: Float64  # [M, 9], see data.reading.boxes
    labels: NDArray[np.int64]  # [M], positions in CLASSES
    tokens: list[str]
    num_lidar_points: NDArray[np.int64]  # [M]
    num_radar_points: NDArray[np.int64]  # [M]
    visibility: NDArray[np.int64]  # [M], 1 (0-40 %) to 4 (80-100 %), 0 where unknown
    attributes: NDArray[np.int64]  # [M], positions in ATTRIBUTES

    @property
    def valid(self) -> NDArray[np.bool_]:
        """[M]: seen by at least one LiDAR or RADAR point; the devkit scores no others and training drops them."""
        return self.num_lidar_points + self.num_radar_points > 0


@dataclass(frozen=True)
class Record:
    """One keyframe."""

    token: str
    scene: str
    split: str
    timestamp: int  # microseconds
    previous: int  # row of the previous keyframe of the scene, -1 at its start or where that one was left out
    next: int  # likewise
    global_SE3_ego: Float64  # [4, 4], at the LiDAR's timestamp
    cameras: Cameras
    lidar: Sweeps  # the first is the keyframe's
    radars: Sweeps  # of all five RADARs, each newest first; empty when the index was built without
    annotations: Annotations

    @property
    def global_SE3_lidar(self) -> Float64:
        """Pose [4, 4] of the LiDAR, whose frame the boxes live in."""
        return self.lidar.global_SE3_sensor[0]


class Index:
    """A built index. Opening maps the file; a record is read when asked for, so workers share one copy in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        batch, metadata = open_batch(path, FORMAT, "index")
        self.version: str = metadata["version"]
        self._scenes: dict[str, list[str]] = json.loads(metadata["scenes"])  # of each of the devkit's splits
        self._skipped: dict[str, dict[str, str]] = json.loads(metadata["skipped"])  # scene -> sample token -> reason
        self._columns: dict[str, Any] = dict(zip(batch.schema.names, batch.columns, strict=True))

    @classmethod
    def open(cls, path: Path | str) -> Index:
        """Open an index file, or the one in a folder.

        Raises:
            IndexFormatError: there is none, or it is of another format.
        """
        path = Path(path)
        return cls(path / FILE if path.is_dir() else path)

    def __reduce__(self) -> tuple[Callable[[Path], Index], tuple[Path]]:
        """A spawned worker maps the file again instead of receiving the table."""
        return Index, (self.path,)

    def __len__(self) -> int:
        return len(self._columns["token"])

    def rows(self, split: str) -> NDArray[np.int64]:
        """Row numbers of one of the devkit's splits or of a part of it, scene by scene in time.

        Raises:
            ValueError: see `scenes`.
        """
        return np.flatnonzero(pc.is_in(self._columns["scene"], value_set=pa.array(self.scenes(split))))

    def scenes(self, split: str) -> list[str]:
        """Names of the scenes of a split or of a part of it, in order; also of those whose samples were all left out.

        Raises:
            ValueError: the index was built without that split, or the part is badly written or empty.
        """
        whole, _ = devkit_split(split)
        if whole not in self._scenes:
            raise ValueError(
                f"split {whole!r} is not in the index {self.path}, which holds {', '.join(self._scenes)}: "
                "set data.splits and run the stage `prepare` again."
            )
        return scenes_of_split(split, self._scenes[whole])

    def tokens(self, split: str) -> list[str]:
        """Sample tokens of a split, in the order of `rows`."""
        return self._columns["token"].take(pa.array(self.rows(split))).to_pylist()

    def skipped(self, split: str) -> dict[str, str]:
        """Sample tokens of a split that were left out because a file was missing or broken, with the reason.

        The devkit demands a prediction for each of them: evaluation submits an empty list.
        """
        return {token: reason for scene in self.scenes(split) for token, reason in self._skipped.get(scene, {}).items()}

    def token(self, row: int) -> str:
        """Sample token of a row."""
        return self._scalar("token", row)

    def row(self, token: str) -> int:
        """Row number of a sample token.

        Raises:
            KeyError: the token is not in the index.
        """
        row = self._columns["token"].index(token).as_py()
        if row < 0:
            raise KeyError(f"the index {self.path} has no sample {token!r}.")
        return row

    def sample(self, row: int) -> Record:
        """The keyframe at a row; its arrays are read-only views of the mapped file."""
        return Record(
            token=self._scalar("token", row),
            scene=self._scalar("scene", row),
            split=self._scalar("split", row),
            timestamp=self._scalar("timestamp", row),
            previous=self._scalar("previous", row),
            next=self._scalar("next", row),
            global_SE3_ego=self._array("global_SE3_ego", row, 4, 4),
            cameras=self._cameras(row),
            lidar=self._sweeps("lidar", row),
            radars=self._sweeps("radar", row),
            annotations=self.annotations(row),
        )

    def global_SE3_lidar(self, row: int) -> Float64:
        """Pose [4, 4] of the LiDAR of the keyframe at a row, without reading the rest of its record."""
        return self._array("global_SE3_lidar", row, -1, 4, 4)[0]

    def _cameras(self, row: int) -> Cameras:
        return Cameras(
            files=self._strings("camera_file", row),
            tokens=self._strings("camera_token", row),
            timestamps=self._array("camera_timestamp", row),
            sizes=self._array("camera_size", row, 6, 2),
            intrinsics=self._array("camera_intrinsic", row, 6, 3, 3),
            global_SE3_camera=self._array("global_SE3_camera", row, 6, 4, 4),
        )

    def _sweeps(self, sensor: str, row: int) -> Sweeps:
        return Sweeps(
            files=self._strings(f"{sensor}_file", row),
            timestamps=self._array(f"{sensor}_timestamp", row),
            global_SE3_sensor=self._array(f"global_SE3_{sensor}", row, -1, 4, 4),
        )

    def annotations(self, row: int) -> Annotations:
        """The boxes of the keyframe at a row, without reading the rest of its record."""
        return Annotations(
            boxes=self._array("box", row, -1, 9),
            labels=self._array("label", row),
            tokens=self._strings("box_token", row),
            num_lidar_points=self._array("num_lidar_points", row),
            num_radar_points=self._array("num_radar_points", row),
            visibility=self._array("visibility", row),
            attributes=self._array("attribute", row),
        )

    def _scalar(self, column: str, row: int) -> Any:
        return self._columns[column][row].as_py()

    def _strings(self, column: str, row: int) -> list[str]:
        return self._columns[column][row].as_py()

    def _array(self, column: str, row: int, *shape: int) -> NDArray[Any]:
        values = self._columns[column][row].values
        while isinstance(values, pa.FixedSizeListArray):
            values = values.flatten()
        array = values.to_numpy(zero_copy_only=True)
        return array.reshape(shape) if shape else array
