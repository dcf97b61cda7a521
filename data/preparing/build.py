"""Builds the index of a nuScenes dataroot from its tables, vectorised, and checks every file that it names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from data.preparing.splits import official_splits
from data.preparing.tables import MISSING, Rows, TableError, Tables
from data.reading.blobs import BlobError, check_blobs
from data.reading.boxes import lidar_boxes_from_global
from data.reading.classes import ATTRIBUTES, CATEGORY_TO_CLASS, CLASSES
from data.reading.geometry import Float64, se3
from data.reading.index import CAMERAS, FILE, FORMAT, LIDAR, RADARS, devkit_split, scenes_of_split
from data.reading.truth import SEVERAL, TRUTH_FILE, TRUTH_FORMAT

RADAR_SWEEPS: Final = 6  # 0.46 s at 13 Hz
MAX_TIME_DIFFERENCE: Final = 1.5  # s; the devkit's bound for estimating a velocity
_VERSION_OF_SPLIT: Final = {
    "train": "trainval",
    "val": "trainval",
    "train_detect": "trainval",
    "train_track": "trainval",
    "mini_train": "mini",
    "mini_val": "mini",
    "test": "test",
}
_RACK: Final = "static_object.bicycle_rack"
_VISIBILITY: Final = {"v0-40": 1, "v40-60": 2, "v60-80": 3, "v80-100": 4}


@dataclass(frozen=True)
class Summary:
    """What an index holds."""

    samples: dict[str, int]  # split -> keyframes
    scenes: dict[str, int]  # split -> scenes
    boxes: int
    skipped: dict[str, dict[str, str]]  # split -> sample token -> reason


@dataclass(frozen=True)
class _Keyframes:
    """The keyframes that are indexed; arrays are aligned, channels in the order of `channels`."""

    rows: Rows  # [S], of the table sample
    scene: NDArray[np.object_]  # [S]
    split: NDArray[np.object_]  # [S]
    channels: tuple[str, ...]
    sweeps: Rows  # [S, channels, sweeps], of the table sample_data, newest first, MISSING where there is none

    def take(self, keep: NDArray[np.bool_]) -> _Keyframes:
        return _Keyframes(self.rows[keep], self.scene[keep], self.split[keep], self.channels, self.sweeps[keep])


def build_index(
    dataroot: Path | str,
    version: str,
    splits: Sequence[str],
    out_dir: Path | str,
    *,
    skip_broken: int = 0,
    sweeps: int = 10,
    radar: bool = False,
) -> Summary:
    """Write the index of some splits of a dataroot to `out_dir`/index.arrow, and their truth to truth.arrow beside it.

    Args:
        dataroot: folder that holds `version`, `samples` and `sweeps`.
        version: v1.0-trainval, v1.0-mini or v1.0-test.
        splits: the devkit's names of the splits; of a part such as train[:64], the whole split is indexed.
        out_dir: folder of the index, made if need be.
        skip_broken: how many samples may be left out because a file of theirs is missing or broken.
        sweeps: LiDAR sweeps per keyframe, the keyframe's own included.
        radar: whether RADAR sweeps are wanted.

    Raises:
        TableError: version, split or tables are wrong.
        BlobError: more than `skip_broken` samples have a missing or broken file.
    """
    dataroot = Path(dataroot)
    tables = Tables(dataroot, version)
    split_of_scene = _split_of_scene(tables, version, splits)
    keyframes = _keyframes(tables, split_of_scene, sweeps, radar)
    faults, digest = _sample_faults(dataroot, tables, keyframes)
    _check_bound(faults, skip_broken)
    keep = np.array([row not in faults for row in range(len(keyframes.rows))], dtype=bool)
    kept = keyframes.take(keep)
    columns = _columns(tables, kept)
    metadata = {
        "format": FORMAT,
        "version": version,
        "scenes": json.dumps(_scenes(split_of_scene)),
        "skipped": json.dumps(_skipped(tables, keyframes, keyframes.scene, faults), sort_keys=True),
        "blobs": digest,
    }
    _write(Path(out_dir) / TRUTH_FILE, _truth_columns(tables, keyframes), {"format": TRUTH_FORMAT, "version": version})
    _write(Path(out_dir) / FILE, columns, metadata)
    return _summary(kept, len(columns["box"].flatten()), _skipped(tables, keyframes, keyframes.split, faults))


def _keyframes(tables: Tables, split_of_scene: dict[str, str], sweeps: int, radar: bool) -> _Keyframes:
    """The keyframes of some scenes, scene by scene in time, with the sensor records that belong to each."""
    names = np.array(tables["scene"]["name"].to_pylist(), dtype=object)
    split_of_row = np.array([split_of_scene.get(name) for name in names], dtype=object)
    scene_rows = tables.reference("sample", "scene_token", "scene")
    wanted = np.flatnonzero(split_of_row[scene_rows] != np.array(None))
    timestamps = tables.integers("sample", "timestamp", wanted)
    rows = wanted[np.lexsort((timestamps, scene_rows[wanted]))]
    channels = (LIDAR, *CAMERAS, *(RADARS if radar else ()))
    chains = _sweep_chains(tables, rows, channels, max(sweeps, RADAR_SWEEPS if radar else 1))
    limits = np.array([sweeps] + [1] * len(CAMERAS) + [RADAR_SWEEPS] * (len(channels) - 1 - len(CAMERAS)))
    chains[np.broadcast_to(np.arange(chains.shape[2]) >= limits[:, None], chains.shape)] = MISSING
    return _Keyframes(rows, names[scene_rows[rows]], split_of_row[scene_rows[rows]], channels, chains)


def _split_of_scene(tables: Tables, version: str, splits: Sequence[str]) -> dict[str, str]:
    """Scene name -> the devkit's split, for the scenes of the splits, taken whole, that the tables have."""
    try:
        parts, splits = splits, sorted({devkit_split(split)[0] for split in splits})
    except ValueError as error:
        raise TableError(str(error)) from None
    unknown = [split for split in splits if split not in _VERSION_OF_SPLIT]
    if unknown or not splits:
        raise TableError(f"split {unknown or splits}: nuScenes has {', '.join(_VERSION_OF_SPLIT)}. Set data.splits.")
    foreign = [split for split in splits if not version.endswith(_VERSION_OF_SPLIT[split])]
    if foreign:
        fitting = [split for split, suffix in _VERSION_OF_SPLIT.items() if version.endswith(suffix)]
        raise TableError(
            f"split {foreign[0]!r} does not belong to version {version!r}, whose splits are {', '.join(fitting)}. "
            "Set data.splits or data.version."
        )
    present = set(tables["scene"]["name"].to_pylist())
    official = official_splits()
    result: dict[str, str] = {}
    for split in splits:
        scenes = [name for name in official[split] if name in present]
        if not scenes:
            held = [name for name, members in official.items() if present.intersection(members)]
            raise TableError(
                f"no scene of split {split!r} is in {tables.folder}, "
                f"whose scenes belong to {', '.join(held) or 'no split'}. Set data.splits."
            )
        shared = [name for name in scenes if name in result]
        if shared:
            raise TableError(f"scene {shared[0]} is in splits {split!r} and {result[shared[0]]!r}: choose one of them.")
        result.update(dict.fromkeys(scenes, split))
    _check_parts(parts, _scenes(result))
    return result


def _check_parts(splits: Sequence[str], scenes: dict[str, list[str]]) -> None:
    for split in splits:
        try:
            scenes_of_split(split, scenes[devkit_split(split)[0]])
        except ValueError as error:
            raise TableError(str(error)) from None


def _scenes(split_of_scene: dict[str, str]) -> dict[str, list[str]]:
    """Split -> its scenes, both in order of name."""
    splits = sorted(set(split_of_scene.values()))
    return {split: sorted(scene for scene, its in split_of_scene.items() if its == split) for split in splits}


def _sweep_chains(tables: Tables, samples: Rows, channels: tuple[str, ...], length: int) -> Rows:
    """Rows [S, channels, length] of sample_data: each keyframe's record and the ones before it."""
    calibration = tables.reference("sample_data", "calibrated_sensor_token", "calibrated_sensor")
    sensor = tables.reference("calibrated_sensor", "sensor_token", "sensor")
    channel_of_sensor = pc.index_in(tables["sensor"]["channel"], value_set=pa.array(channels)).fill_null(MISSING)
    channel = channel_of_sensor.to_numpy()[sensor][calibration]
    position = np.full(len(tables["sample"]), MISSING)
    position[samples] = np.arange(len(samples))
    sample = position[tables.reference("sample_data", "sample_token", "sample")]
    is_keyframe = tables["sample_data"]["is_key_frame"].to_numpy()
    rows = np.flatnonzero(is_keyframe & (channel != MISSING) & (sample != MISSING))
    chains = np.full((len(samples), len(channels), length), MISSING)
    chains[sample[rows], channel[rows], 0] = rows
    before = tables.reference("sample_data", "prev", "sample_data", empty=True)
    before = np.append(before, MISSING)  # so that MISSING, as an index, gives MISSING
    for step in range(1, length):
        chains[..., step] = before[chains[..., step - 1]]
    return chains


def _sample_faults(dataroot: Path, tables: Tables, keyframes: _Keyframes) -> tuple[dict[int, str], str]:
    """What is wrong with the records and files of the samples.

    Returns:
        Position of each faulty sample -> what is wrong, with tokens; and a digest of the sizes of all files, which
        makes the index differ when files were made anew under the same names.
    """
    tokens = tables.column("sample", "token", keyframes.rows)
    absent: dict[int, list[str]] = {}
    for position, channel in np.argwhere(keyframes.sweeps[:, :, 0] == MISSING).tolist():
        absent.setdefault(position, []).append(f"sample {tokens[position]} has no {keyframes.channels[channel]} record")
    positions, _, _ = used = np.nonzero(keyframes.sweeps != MISSING)
    rows = keyframes.sweeps[used]
    files = tables.column("sample_data", "filename", rows)
    sizes, faults = check_blobs(dataroot, pc.unique(files).to_pylist())
    broken = np.flatnonzero(pc.is_in(files, value_set=pa.array(list(faults), pa.string())).to_numpy())
    data_tokens = tables.column("sample_data", "token", rows[broken]).to_pylist()
    for entry, data_token in zip(broken.tolist(), data_tokens, strict=True):
        position, file = int(positions[entry]), files[entry].as_py()
        absent.setdefault(position, []).append(
            f"{file} {faults[file]} (sample_data {data_token} of sample {tokens[position]})"
        )
    digest = xxhash.xxh3_128_hexdigest(sizes.tobytes())
    return {position: "; ".join(reasons) for position, reasons in sorted(absent.items())}, digest


def _check_bound(faults: dict[int, str], skip_broken: int) -> None:
    if len(faults) <= skip_broken:
        return
    shown = "\n  ".join(list(faults.values())[:5])
    more = f"\n  and {len(faults) - 5} more" if len(faults) > 5 else ""
    raise BlobError(
        f"{len(faults)} samples have missing or broken files, data.skip_broken allows {skip_broken}:\n  {shown}{more}\n"
        "Restore the files, or raise data.skip_broken to train without these samples."
    )


def _skipped(
    tables: Tables, keyframes: _Keyframes, groups: NDArray[np.object_], faults: dict[int, str]
) -> dict[str, dict[str, str]]:
    """Group -> token of a faulty sample -> what is wrong; `groups` [S] are the keyframes' scenes or splits."""
    skipped: dict[str, dict[str, str]] = {}
    for position, reason in faults.items():
        token = tables["sample"]["token"][int(keyframes.rows[position])].as_py()
        skipped.setdefault(groups[position], {})[token] = reason
    return skipped


def _columns(tables: Tables, keyframes: _Keyframes) -> dict[str, pa.Array]:
    """All columns of the index."""
    lidar, cameras = keyframes.sweeps[:, 0], keyframes.sweeps[:, 1 : 1 + len(CAMERAS), 0]
    radars = keyframes.sweeps[:, 1 + len(CAMERAS) :].reshape(len(lidar), -1)
    previous, following = _neighbours(tables, keyframes.rows)
    # All at once, as every look-up goes through all tokens of ego_pose.
    tables.reference("sample_data", "ego_pose_token", "ego_pose", keyframes.sweeps[keyframes.sweeps != MISSING])
    global_SE3_ego = _ego_poses(tables, lidar[:, 0])
    return {
        "token": _text(tables.column("sample", "token", keyframes.rows)),
        "scene": pa.array(keyframes.scene, pa.string()),
        "split": pa.array(keyframes.split, pa.string()),
        "timestamp": pa.array(tables.integers("sample", "timestamp", keyframes.rows)),
        "previous": pa.array(previous),
        "next": pa.array(following),
        "global_SE3_ego": _fixed(global_SE3_ego, 16),
        **_camera_columns(tables, cameras),
        **_sweep_columns(tables, "lidar", lidar),
        **_sweep_columns(tables, "radar", radars),
        **_annotation_columns(tables, keyframes.rows, _sensor_poses(tables, lidar[:, 0])),
    }


def _neighbours(tables: Tables, rows: Rows) -> tuple[Rows, Rows]:
    """Positions [S] of the previous and the next keyframe among `rows`, MISSING where there is none."""
    position = np.full(len(tables["sample"]) + 1, MISSING)
    position[rows] = np.arange(len(rows))
    before = tables.reference("sample", "prev", "sample", rows, empty=True)
    previous = position[before]
    following = np.full(len(rows) + 1, MISSING)
    following[previous] = np.arange(len(rows))
    return previous, following[:-1]


def _ego_poses(tables: Tables, rows: Rows) -> Float64:
    """`global_SE3_ego` [R, 4, 4] of sample_data rows."""
    poses = tables.reference("sample_data", "ego_pose_token", "ego_pose", rows)
    return se3(tables.vectors("ego_pose", "rotation", 4, poses), tables.vectors("ego_pose", "translation", 3, poses))


def _sensor_poses(tables: Tables, rows: Rows) -> Float64:
    """`global_SE3_sensor` [R, 4, 4] of sample_data rows, each at its own timestamp."""
    calibrations = _calibrations(tables, rows)
    ego_SE3_sensor = se3(
        tables.vectors("calibrated_sensor", "rotation", 4, calibrations),
        tables.vectors("calibrated_sensor", "translation", 3, calibrations),
    )
    return _ego_poses(tables, rows) @ ego_SE3_sensor


def _calibrations(tables: Tables, rows: Rows) -> Rows:
    return tables.reference("sample_data", "calibrated_sensor_token", "calibrated_sensor", rows)


def _camera_columns(tables: Tables, rows: Rows) -> dict[str, pa.Array]:
    """Columns of the cameras from sample_data rows [S, 6]."""
    flat = rows.reshape(-1)
    intrinsics = pc.list_flatten(tables.column("calibrated_sensor", "camera_intrinsic", _calibrations(tables, flat)))
    size = np.stack([tables.integers("sample_data", field, flat) for field in ("height", "width")], axis=-1)
    return {
        "camera_file": _fixed(_text(tables.column("sample_data", "filename", flat)), 6),
        "camera_token": _fixed(_text(tables.column("sample_data", "token", flat)), 6),
        "camera_timestamp": _fixed(tables.integers("sample_data", "timestamp", flat), 6),
        "camera_size": _fixed(size, 12),
        "camera_intrinsic": _fixed(pc.list_flatten(intrinsics).to_numpy(), 54),
        "global_SE3_camera": _fixed(_sensor_poses(tables, flat), 96),
    }


def _sweep_columns(tables: Tables, sensor: str, rows: Rows) -> dict[str, pa.Array]:
    """Columns of a ragged set of sweeps from sample_data rows [S, sweeps] with gaps."""
    used = rows != MISSING
    offsets = _offsets(used.sum(axis=1))
    flat = rows[used]
    return {
        f"{sensor}_file": _lists(offsets, _text(tables.column("sample_data", "filename", flat))),
        f"{sensor}_timestamp": _lists(offsets, pa.array(tables.integers("sample_data", "timestamp", flat))),
        f"global_SE3_{sensor}": _lists(offsets, _fixed(_sensor_poses(tables, flat), 16)),
    }


def _annotation_columns(tables: Tables, samples: Rows, global_SE3_lidar: Float64) -> dict[str, pa.Array]:
    """Columns of the boxes of the ten classes, in the LiDAR frame of their keyframe."""
    labels = _labels(tables)
    rows, keyframe, offsets = _annotations_of(tables, samples, labels != MISSING)
    boxes = lidar_boxes_from_global(
        tables.vectors("sample_annotation", "translation", 3, rows),
        tables.vectors("sample_annotation", "size", 3, rows),
        tables.vectors("sample_annotation", "rotation", 4, rows),
        _velocities(tables, rows),
        global_SE3_lidar[keyframe],
    )
    values: dict[str, Any] = {
        "box": _fixed(boxes, 9),
        "label": labels[rows],
        "box_token": _text(tables.column("sample_annotation", "token", rows)),
        "num_lidar_points": tables.integers("sample_annotation", "num_lidar_pts", rows),
        "num_radar_points": tables.integers("sample_annotation", "num_radar_pts", rows),
        "visibility": _visibility(tables, rows),
        "attribute": _attributes(tables, rows),
    }
    return {name: _lists(offsets, pa.array(column)) for name, column in values.items()}


def _annotations_of(tables: Tables, samples: Rows, wanted: NDArray[np.bool_]) -> tuple[Rows, Rows, pa.Array]:
    """The annotations of keyframes, among those that are wanted [A].

    Returns:
        Rows [M] of sample_annotation, keyframe by keyframe, each in the order of the table, which is the devkit's; the
        position [M] of their keyframes; where each keyframe's begin [S + 1].
    """
    position = np.full(len(tables["sample"]), MISSING)
    position[samples] = np.arange(len(samples))
    keyframe = position[tables.reference("sample_annotation", "sample_token", "sample")]
    rows = np.flatnonzero((keyframe != MISSING) & wanted)
    rows = rows[np.argsort(keyframe[rows], kind="stable")]
    return rows, keyframe[rows], _offsets(np.bincount(keyframe[rows], minlength=len(samples)))


def _truth_columns(tables: Tables, keyframes: _Keyframes) -> dict[str, pa.Array]:
    """All columns of the truth: of every keyframe of the splits, also of those with missing or broken files."""
    labels, lidar = _labels(tables), keyframes.sweeps[:, 0, 0]
    rows, _, offsets = _annotations_of(tables, keyframes.rows, labels != MISSING)
    ego = np.full((len(lidar), 3), np.nan)
    ego[lidar != MISSING] = _ego_poses(tables, lidar[lidar != MISSING])[:, :3, 3]
    values: dict[str, Any] = {
        "box_token": _text(tables.column("sample_annotation", "token", rows)),
        "label": labels[rows],
        **_placed(tables, rows),
        "velocity": _fixed(_velocities(tables, rows), 2),
        "attribute": _only_attributes(tables, rows),
        "points": sum(
            tables.integers("sample_annotation", field, rows) for field in ("num_lidar_pts", "num_radar_pts")
        ),
    }
    racks, _, rack_offsets = _annotations_of(tables, keyframes.rows, _racks(tables))
    placed = {f"rack_{name}": column for name, column in _placed(tables, racks).items()}
    return {
        "token": _text(tables.column("sample", "token", keyframes.rows)),
        "scene": pa.array(keyframes.scene, pa.string()),
        "ego": _fixed(ego, 3),
        **{name: _lists(offsets, pa.array(column)) for name, column in values.items()},
        **{name: _lists(rack_offsets, column) for name, column in placed.items()},
    }


def _placed(tables: Tables, rows: Rows) -> dict[str, pa.Array]:
    """Where annotations are in the global frame, as they were written."""
    widths = {"translation": 3, "size": 3, "rotation": 4}
    return {
        name: _fixed(tables.vectors("sample_annotation", name, width, rows), width) for name, width in widths.items()
    }


def _racks(tables: Tables) -> NDArray[np.bool_]:
    """Whether an annotation is a bicycle rack."""
    names = tables["category"]["name"].to_pylist()
    return np.array([name == _RACK for name in names], dtype=bool)[_categories(tables)]


def _labels(tables: Tables) -> Rows:
    """Class of every annotation, MISSING where its category is not part of the benchmark."""
    label_of = {category: CLASSES.index(name) for category, name in CATEGORY_TO_CLASS.items()}
    names = tables["category"]["name"].to_pylist()
    return np.array([label_of.get(name, MISSING) for name in names], dtype=np.int64)[_categories(tables)]


def _categories(tables: Tables) -> Rows:
    """Row of category of every annotation."""
    instance = tables.reference("sample_annotation", "instance_token", "instance")
    return tables.reference("instance", "category_token", "category")[instance]


def _velocities(tables: Tables, rows: Rows) -> Float64:
    """Horizontal velocity [R, 2] in the global frame, NaN where unknown, as the devkit's `box_velocity` estimates it.

    The centred difference between the neighbouring annotations of the object, or the one-sided one at the ends of its
    track, unless they are more than 1.5 s apart (3 s for the centred one).
    """
    before, after = (
        tables.reference("sample_annotation", field, "sample_annotation", rows, empty=True)
        for field in ("prev", "next")
    )
    first, last = np.where(before == MISSING, rows, before), np.where(after == MISSING, rows, after)
    ends = [tables.vectors("sample_annotation", "translation", 3, end)[:, :2] for end in (first, last)]
    seconds = [1e-6 * _annotation_times(tables, end) for end in (first, last)]
    elapsed = seconds[1] - seconds[0]
    limit = np.where((before != MISSING) & (after != MISSING), 2 * MAX_TIME_DIFFERENCE, MAX_TIME_DIFFERENCE)
    elapsed[(first == last) | (elapsed > limit)] = np.nan
    return (ends[1] - ends[0]) / elapsed[:, None]


def _annotation_times(tables: Tables, rows: Rows) -> Rows:
    samples = tables.reference("sample_annotation", "sample_token", "sample", rows)
    return tables.integers("sample", "timestamp", samples)


def _visibility(tables: Tables, rows: Rows) -> Rows:
    levels = np.array([_VISIBILITY.get(level, 0) for level in tables["visibility"]["level"].to_pylist()] + [0])
    tokens = tables.column("sample_annotation", "visibility_token", rows).fill_null("")
    return levels[tables.look_up("visibility", tokens, empty=True)]


def _attributes(tables: Tables, rows: Rows) -> Rows:
    """Positions [R] in ATTRIBUTES; the first attribute where an annotation has several, 0 where it has none."""
    names = tables["attribute"]["name"].to_pylist()
    positions = [ATTRIBUTES.index(name) if name in ATTRIBUTES else 0 for name in names]
    lists = tables.column("sample_annotation", "attribute_tokens", rows).combine_chunks()
    filled = pc.list_value_length(lists).to_numpy() > 0
    first = np.zeros(len(rows), dtype=np.int64)
    tokens = pc.list_element(lists.filter(pa.array(filled)), 0) if filled.any() else pa.array([], pa.string())
    first[filled] = np.array(positions, dtype=np.int64)[tables.look_up("attribute", tokens)]
    return first


def _only_attributes(tables: Tables, rows: Rows) -> Rows:
    """Positions [R] in ATTRIBUTES, 0 where an annotation has none; SEVERAL where the devkit refuses what it has."""
    only = _attributes(tables, rows)
    count = pc.list_value_length(tables.column("sample_annotation", "attribute_tokens", rows)).to_numpy()
    return np.where((count > 1) | ((count == 1) & (only == 0)), SEVERAL, only)


def _text(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], pa.string())


def _offsets(lengths: Rows) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())


def _lists(offsets: pa.Array, values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(offsets, values)


def _fixed(values: NDArray[Any] | pa.Array, size: int) -> pa.FixedSizeListArray:
    flat = values if isinstance(values, pa.Array) else pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, size)


def _write(path: Path, columns: dict[str, pa.Array], metadata: dict[str, str]) -> None:
    """One record batch, so that a row of any column is one look-up."""
    batch = pa.RecordBatch.from_pydict(columns, metadata=metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    partial.replace(path)


def _summary(keyframes: _Keyframes, boxes: int, skipped: dict[str, dict[str, str]]) -> Summary:
    splits = sorted(set(keyframes.split.tolist()))
    return Summary(
        samples={split: int((keyframes.split == split).sum()) for split in splits},
        scenes={split: len(set(keyframes.scene[keyframes.split == split].tolist())) for split in splits},
        boxes=boxes,
        skipped=skipped,
    )
