from __future__ import annotations

import importlib.util
import multiprocessing
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import mmdet3d
import numpy as np
import pytest
from nuscenes.utils.splits import create_splits_scenes
from pyquaternion import Quaternion

from data.preparing.build import build_index
from data.preparing.splits import official_splits
from data.preparing.tables import TableError
from data.reading.blobs import BlobError
from data.reading.classes import ATTRIBUTES, CLASSES
from data.reading.index import CAMERAS, FILE, LIDAR, Index, IndexFormatError

ROOT = Path(__file__).resolve().parents[2]
MINI = ("v1.0-mini", ["mini_train", "mini_val"])


@pytest.fixture(scope="session")
def converter() -> ModuleType:
    """mmdet3d's own nuScenes converter, which its wheel ships as a tool."""
    path = Path(mmdet3d.__file__).parent / ".mim/tools/dataset_converters/nuscenes_converter.py"
    spec = importlib.util.spec_from_file_location("nuscenes_converter", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copy(made_dataroot: Path, tmp_path: Path) -> Path:
    """A dataroot that may be broken."""
    return Path(shutil.copytree(made_dataroot, tmp_path / "dataroot"))


def check_against_devkit(index: Index, nusc: Any, sweeps: int) -> None:
    for row in range(len(index)):
        record = index.sample(row)
        sample = nusc.get("sample", record.token)
        assert record.scene == nusc.get("scene", sample["scene_token"])["name"]
        assert record.timestamp == sample["timestamp"]
        for neighbour, position in (("prev", record.previous), ("next", record.next)):
            assert sample[neighbour] == (index.sample(position).token if position >= 0 else "")
        check_cameras(record.cameras, nusc, sample)
        data = nusc.get("sample_data", sample["data"][LIDAR])
        np.testing.assert_allclose(record.global_SE3_ego, pose_of(nusc, data)[0], atol=1e-9)
        for n, file in enumerate(record.lidar.files):
            assert (file, record.lidar.timestamps[n]) == (data["filename"], data["timestamp"])
            ego, sensor = pose_of(nusc, data)
            np.testing.assert_allclose(record.lidar.global_SE3_sensor[n], ego @ sensor, atol=1e-9)
            last, data = data, nusc.get("sample_data", data["prev"]) if data["prev"] else {}
        assert len(record.lidar.files) == sweeps or not last["prev"]


def check_cameras(cameras: Any, nusc: Any, sample: dict[str, Any]) -> None:
    for n, channel in enumerate(CAMERAS):
        data = nusc.get("sample_data", sample["data"][channel])
        assert (cameras.files[n], cameras.tokens[n]) == (data["filename"], data["token"])
        assert cameras.timestamps[n] == data["timestamp"]
        assert cameras.sizes[n].tolist() == [data["height"], data["width"]]
        calibration = nusc.get("calibrated_sensor", data["calibrated_sensor_token"])
        np.testing.assert_array_equal(cameras.intrinsics[n], calibration["camera_intrinsic"])
        ego, sensor = pose_of(nusc, data)
        np.testing.assert_allclose(cameras.global_SE3_camera[n], ego @ sensor, atol=1e-9)


def pose_of(nusc: Any, data: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    poses = []
    for table, token in (("ego_pose", "ego_pose_token"), ("calibrated_sensor", "calibrated_sensor_token")):
        record = nusc.get(table, data[token])
        pose = Quaternion(record["rotation"]).transformation_matrix
        pose[:3, 3] = record["translation"]
        poses.append(pose)
    return poses[0], poses[1]


def check_against_mmdet3d(index: Index, nusc: Any, converter: ModuleType) -> None:
    infos, _ = converter._fill_trainval_infos(nusc, {scene["token"] for scene in nusc.scene}, set())
    checked = 0
    for info in infos:
        annotations = index.sample(index.row(info["token"])).annotations
        known = np.isin(info["gt_names"], CLASSES)
        boxes = annotations.boxes.copy()
        boxes[:, 2] += boxes[:, 5] / 2  # their infos keep the centre
        np.testing.assert_allclose(boxes[:, :7], info["gt_boxes"][known], atol=1e-8)
        np.testing.assert_allclose(boxes[:, 7:], info["gt_velocity"][known], atol=1e-8)
        assert [CLASSES[label] for label in annotations.labels] == info["gt_names"][known].tolist()
        np.testing.assert_array_equal(annotations.num_lidar_points, info["num_lidar_pts"][known])
        np.testing.assert_array_equal(annotations.num_radar_points, info["num_radar_pts"][known])
        np.testing.assert_array_equal(annotations.valid, info["valid_flag"][known])
        checked += int(known.sum())
    assert checked == sum(len(index.sample(row).annotations.labels) for row in range(len(index)))


def check_labels(index: Index, nusc: Any) -> None:
    level = {"v0-40": 1, "v40-60": 2, "v60-80": 3, "v80-100": 4}
    for row in range(len(index)):
        annotations = index.sample(row).annotations
        for n, token in enumerate(annotations.tokens):
            theirs = nusc.get("sample_annotation", token)
            names = [nusc.get("attribute", attribute)["name"] for attribute in theirs["attribute_tokens"]]
            assert [ATTRIBUTES[annotations.attributes[n]]] == (names or [""])
            visibility = nusc.get("visibility", theirs["visibility_token"])["level"]
            assert annotations.visibility[n] == level[visibility]


def test_the_index_says_what_the_devkit_says(made_index: Index, devkit: Any) -> None:
    check_against_devkit(made_index, devkit, sweeps=4)
    check_labels(made_index, devkit)
    assert [len(made_index.tokens(split)) for split in MINI[1]] == [3, 2]


def test_the_index_says_what_the_devkit_says_of_real_keyframes(real_index: Index, real_devkit: Any) -> None:
    check_against_devkit(real_index, real_devkit, sweeps=10)
    check_labels(real_index, real_devkit)
    assert real_index.tokens("mini_train") == ["ca9a282c9e77460f8360f564131a8af5"]


def test_boxes_equal_mmdet3ds_conversion(made_index: Index, devkit: Any, converter: ModuleType) -> None:
    check_against_mmdet3d(made_index, devkit, converter)
    velocities = np.concatenate([made_index.sample(row).annotations.boxes[:, 7:] for row in range(5)])
    assert 0 < np.isnan(velocities[:, 0]).sum() < len(velocities) / 2


def test_real_boxes_equal_mmdet3ds_conversion(real_index: Index, real_devkit: Any, converter: ModuleType) -> None:
    check_against_mmdet3d(real_index, real_devkit, converter)


def test_the_index_says_what_the_devkit_and_mmdet3d_say_of_the_city(
    city_index: Index, city_devkit: Any, converter: ModuleType
) -> None:
    check_against_devkit(city_index, city_devkit, sweeps=3)
    check_labels(city_index, city_devkit)
    check_against_mmdet3d(city_index, city_devkit, converter)


def test_radars_are_indexed_newest_first_and_only_on_demand(made_index: Index, real_index: Index) -> None:
    radars = made_index.sample(2).radars
    assert len(radars.files) == 5 * 6
    for n in range(5):
        times = radars.timestamps[6 * n : 6 * n + 6]
        assert (np.diff(times) < 0).all()
    assert real_index.sample(0).radars.global_SE3_sensor.shape == (0, 4, 4)


def test_equal_data_gives_equal_bytes_wherever_it_lies(copy: Path, made_index: Index, tmp_path: Path) -> None:
    build_index(copy, *MINI, tmp_path / "again", sweeps=4, radar=True)
    content = (tmp_path / "again" / FILE).read_bytes()
    assert content == made_index.path.read_bytes()
    assert str(copy).encode() not in content
    image = copy / made_index.sample(0).cameras.files[0]
    image.write_bytes(image.read_bytes() + b"\0")  # made anew under the same name
    build_index(copy, *MINI, tmp_path / "again", sweeps=4, radar=True)
    assert (tmp_path / "again" / FILE).read_bytes() != content


def test_opening_is_fast_reads_no_pickle_and_imports_no_devkit(made_index: Index) -> None:
    code = f"""
import pickle, sys, time
def refuse(*args, **kwargs): raise AssertionError("unpickled")
pickle.load = pickle.loads = pickle.Unpickler = refuse
import data.reading.index, data.reading.dataset
start = time.process_time()
index = data.reading.index.Index.open({str(made_index.path)!r})
assert [index.sample(row).token for row in range(len(index))]
assert time.process_time() - start < 0.5
assert "nuscenes" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_worker_maps_the_file_instead_of_receiving_it(made_index: Index) -> None:
    assert len(pickle.dumps(made_index)) < 500
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(len, (made_index,)) == len(made_index)


def test_a_foreign_or_broken_index_is_refused(made_index: Index, tmp_path: Path) -> None:
    with pytest.raises(IndexFormatError, match=r"no index at .*prepare"):
        Index.open(tmp_path / "absent")
    broken = tmp_path / FILE
    broken.write_bytes(made_index.path.read_bytes()[:5000])
    with pytest.raises(IndexFormatError, match="not a whole index"):
        Index.open(broken)
    with pytest.raises(ValueError, match=r"split 'val' is not in .* mini_train, mini_val"):
        made_index.rows("val")
    with pytest.raises(KeyError, match="no sample 'nothing'"):
        made_index.row("nothing")


def test_a_part_is_a_slice_over_the_scenes_in_order_of_name(city_index: Index, city_devkit: Any) -> None:
    names = sorted(scene["name"] for scene in city_devkit.scene if scene["name"] in create_splits_scenes()["val"])
    assert len(names) == 2
    for part in (slice(None, 1), slice(1, None), slice(-1, None), slice(None, -1), slice(0, 2)):
        split = f"val[{'' if part.start is None else part.start}:{'' if part.stop is None else part.stop}]"
        assert city_index.scenes(split) == names[part]
        tokens = city_index.tokens(split)
        assert [city_devkit.get("sample", token)["scene_token"] for token in tokens] == [
            scene["token"] for scene in city_devkit.scene if scene["name"] in names[part] for _ in range(2)
        ]
        assert tokens == [city_index.sample(int(row)).token for row in city_index.rows(split)]
    assert city_index.tokens("val[:]") == city_index.tokens("val")
    assert city_index.scenes("val[::2]") == names[::2]
    assert city_index.scenes("val[1::3]") == names[1::3]
    assert city_index.scenes("train") == sorted({city_index.sample(row).scene for row in city_index.rows("train")})


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("val[2:]", r"'val\[2:\]' has no scene: 'val' has 2 of them"),
        ("val[1]", r"'val\[1\]': a part is written like .* train\[:64\]"),
        ("val[::0]", "a part is written like"),
        ("val[::-1]", "a part is written like"),
        ("[:1]", "a part is written like"),
        ("val[:1", "a part is written like"),
        ("test[:1]", "'test' is not in the index .* train, val"),
    ],
)
def test_a_wrong_part_is_named(city_index: Index, split: str, message: str) -> None:
    for method in (city_index.rows, city_index.tokens, city_index.skipped):
        with pytest.raises(ValueError, match=message):
            method(split)


def test_of_a_part_the_whole_split_is_indexed(copy: Path, made_index: Index, tmp_path: Path) -> None:
    build_index(copy, "v1.0-mini", ["mini_val[:1]", "mini_train[-1:]", "mini_train"], tmp_path, sweeps=4, radar=True)
    assert (tmp_path / FILE).read_bytes() == made_index.path.read_bytes()
    for split, message in (("mini_val[1:]", "has no scene: 'mini_val' has 1"), ("mini_val[0]", "a part is written")):
        with pytest.raises(TableError, match=message):
            build_index(copy, "v1.0-mini", [split], tmp_path / "out")


def test_a_scene_whose_samples_are_all_left_out_still_counts(copy: Path, made_index: Index, tmp_path: Path) -> None:
    record = made_index.sample(0)
    names = copy / "v1.0-mini" / "scene.json"
    names.write_text(names.read_text().replace("scene-0103", "scene-1100"))  # then both are of mini_train
    for row in range(3):
        (copy / made_index.sample(row).cameras.files[0]).unlink()
    build_index(copy, "v1.0-mini", ["mini_train"], tmp_path / "out", skip_broken=3)
    index = Index.open(tmp_path / "out")
    assert index.scenes("mini_train") == ["scene-0061", "scene-1100"]
    assert index.tokens("mini_train[:1]") == []
    assert record.token in index.skipped("mini_train[:1]")
    assert index.skipped("mini_train[1:]") == {}
    assert len(index.tokens("mini_train[1:]")) == 2


def test_a_wrong_version_or_split_is_named(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"'v1.0-trainval' is not in .*has v1.0-mini"):
        build_index(copy, "v1.0-trainval", ["train"], tmp_path / "out")
    with pytest.raises(TableError, match=r"\['mini'\].*mini_train, mini_val"):
        build_index(copy, "v1.0-mini", ["mini"], tmp_path / "out")
    with pytest.raises(TableError, match=r"'val' does not belong to version 'v1.0-mini'"):
        build_index(copy, "v1.0-mini", ["val"], tmp_path / "out")
    scenes = copy / "v1.0-mini" / "scene.json"
    scenes.write_text(scenes.read_text().replace("scene-0103", "scene-0061"))
    with pytest.raises(TableError, match=r"no scene of split 'mini_val'.*mini_train"):
        build_index(copy, "v1.0-mini", ["mini_val"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("table", "damage", "message"),
    [
        ("sample_data", lambda path: path.unlink(), r"lacks the tables sample_data.json"),
        ("ego_pose", lambda path: path.write_text(""), r"ego_pose.json is empty"),
        ("ego_pose", lambda path: path.write_bytes(path.read_bytes()[:-500]), r"ego_pose.json is not a whole JSON"),
        ("ego_pose", lambda path: path.write_text("[{]"), r"ego_pose.json is not a nuScenes table"),
        ("ego_pose", lambda path: path.write_text("[]"), r"ego_pose.json has no record 'ego_pose-.*\d+ such"),
        ("instance", lambda path: path.write_text('[{"token": "a"}]'), r"instance.json: 1 of 1 .* 'category_token'"),
    ],
)
def test_a_broken_table_is_named(
    copy: Path, tmp_path: Path, table: str, damage: Callable[[Path], object], message: str
) -> None:
    damage(copy / "v1.0-mini" / f"{table}.json")
    with pytest.raises(TableError, match=message):
        build_index(copy, *MINI, tmp_path / "out", radar=True)


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("camera", lambda path: path.unlink(), "is missing"),
        ("camera", lambda path: path.write_bytes(b""), "is empty"),
        ("camera", lambda path: path.write_bytes(b"\x89PNG" + bytes(100)), "is not a JPEG"),
        ("camera", lambda path: path.write_bytes(path.read_bytes()[:-200]), "is a truncated JPEG"),
        ("lidar", lambda path: path.write_bytes(path.read_bytes()[:-7]), "7993 bytes is not a multiple of 20"),
        ("sweep", lambda path: path.unlink(), "is missing"),
    ],
)
def test_a_broken_blob_is_named_and_skipped_within_the_bound(
    copy: Path, made_index: Index, tmp_path: Path, kind: str, damage: Callable[[Path], object], message: str
) -> None:
    record = made_index.sample(1)
    files = {"camera": record.cameras.files[3], "lidar": record.lidar.files[0], "sweep": record.lidar.files[2]}
    damage(copy / files[kind])
    with pytest.raises(BlobError, match=rf"(?s)1 samples .*allows 0.*{files[kind]} .*{message}.*{record.token}"):
        build_index(copy, *MINI, tmp_path / "out", sweeps=4)
    assert not (tmp_path / "out" / FILE).exists()
    summary = build_index(copy, *MINI, tmp_path / "out", sweeps=4, skip_broken=1)
    assert list(summary.skipped) == ["mini_train"]
    index = Index.open(tmp_path / "out")
    assert message in index.skipped("mini_train")[record.token]
    assert index.skipped("mini_val") == {}
    assert record.token not in index.tokens("mini_train")
    assert [index.sample(row).previous for row in range(len(index))] == [-1, -1, -1, 2]


def test_a_keyframe_without_a_camera_is_broken(copy: Path, made_index: Index, tmp_path: Path) -> None:
    table = copy / "v1.0-mini" / "sample_data.json"
    token = made_index.sample(0).cameras.tokens[5]
    table.write_text(table.read_text().replace(f'"{token}"', '"other"'))
    text = table.read_text()
    start = text.index('"other"')
    table.write_text(text[:start] + text[start:].replace('"is_key_frame": true', '"is_key_frame": false', 1))
    with pytest.raises(BlobError, match=rf"{made_index.sample(0).token} has no CAM_BACK_RIGHT"):
        build_index(copy, *MINI, tmp_path / "out")


def test_real_keyframes_have_no_radar(real_dataroot: Path, tmp_path: Path) -> None:
    with pytest.raises(BlobError, match=r"(?s)2 samples .*no RADAR_FRONT record"):
        build_index(real_dataroot, *MINI, tmp_path, radar=True)


def test_official_splits_are_the_devkits() -> None:
    assert official_splits() == create_splits_scenes()
