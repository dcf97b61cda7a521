"""The city against the nuScenes devkit, pycocotools and its own geometry."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from nuscenes.eval.common.loaders import load_gt
from nuscenes.eval.common.utils import Quaternion
from nuscenes.eval.detection.data_classes import DetectionBox
from nuscenes.eval.detection.utils import category_to_detection_name
from nuscenes.nuscenes import NuScenes
from nuscenes.utils.data_classes import LidarPointCloud, RadarPointCloud
from nuscenes.utils.geometry_utils import points_in_box, view_points
from nuscenes.utils.splits import create_splits_scenes
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from scipy.spatial import ConvexHull

from data.city.config import CityConfig
from data.city.footprints import corners, overlap
from data.city.generate import generate, plan_scenes

ROOT = Path(__file__).resolve().parents[3]
VERSION = "v1.0-trainval"
CONFIG = CityConfig(
    seed=5, train_scenes=4, val_scenes=2, train_keyframes=3, val_keyframes=2, image=(64, 176), azimuths=360, sweeps=3
)
CLASSES = 10


@pytest.fixture(scope="module")
def dataroot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cities") / "city"
    generate(CONFIG, root, VERSION, workers=2)
    return root


@pytest.fixture(scope="module")
def devkit(dataroot: Path) -> NuScenes:
    return NuScenes(VERSION, str(dataroot), verbose=False)


def digests(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()
    }


def ego_pose(devkit: NuScenes, sample: dict[str, Any]) -> dict[str, Any]:
    data = devkit.get("sample_data", sample["data"]["LIDAR_TOP"])
    return devkit.get("ego_pose", data["ego_pose_token"])


def test_scenes_are_named_by_the_devkit(devkit: NuScenes) -> None:
    names = [scene["name"] for scene in devkit.scene]
    splits = create_splits_scenes()
    assert names == sorted(splits["train"])[:4] + sorted(splits["val"])[:2]
    mini = [plan.name for plan in plan_scenes(CONFIG, "v1.0-mini")]
    assert sorted(mini) == sorted(splits["mini_train"] + splits["mini_val"])


def test_tables_and_instances_name_the_city_that_they_are_of(dataroot: Path) -> None:
    """Other paint changes the pictures alone, and who depends on the JSON must notice."""
    identity = json.loads((dataroot / VERSION / "city.json").read_text())
    assert len(identity["identity"]) == 16
    for split in ("train", "val"):
        assert json.loads((dataroot / "instances" / f"{split}.json").read_text())["info"] == identity


def test_every_key_resolves_and_every_file_exists(devkit: NuScenes, dataroot: Path) -> None:
    foreign = re.compile(r"^(?:first_|last_)?(annotation|\w+?)_tokens?$")
    tables = {"annotation": "sample_annotation"}
    for table in devkit.table_names:
        records = json.loads((dataroot / VERSION / f"{table}.json").read_text())
        assert len({r["token"] for r in records}) == len(records)
        for record in records:
            for name, value in record.items():
                match = foreign.match(name)
                if match:
                    for token in value if isinstance(value, list) else [value]:
                        devkit.get(tables.get(match[1], match[1]), token)
                elif name in ("prev", "next") and value:
                    back = devkit.get(table, value)["next" if name == "prev" else "prev"]
                    assert back == record["token"]
            if "filename" in record:
                assert (dataroot / record["filename"]).is_file()


def test_sample_data_is_what_nuscenes_has(devkit: NuScenes) -> None:
    for sample in devkit.sample:
        assert len(sample["data"]) == 12
        lidar = devkit.get("sample_data", sample["data"]["LIDAR_TOP"])
        assert lidar["timestamp"] == sample["timestamp"]
        for _ in range(CONFIG.sweeps - 1):
            before = devkit.get("sample_data", lidar["prev"])
            assert lidar["timestamp"] - before["timestamp"] == 50_000
            assert not before["is_key_frame"]
            lidar = before
    picture = cv2.imread(devkit.get_sample_data_path(devkit.sample[0]["data"]["CAM_FRONT"]))
    assert picture.shape == (*CONFIG.image, 3)
    points, times = LidarPointCloud.from_file_multisweep(
        devkit, devkit.sample[1], "LIDAR_TOP", "LIDAR_TOP", nsweeps=CONFIG.sweeps
    )
    assert points.nbr_points() > 5000
    assert sorted(set(np.round(times[0], 3).tolist())) == [0.0, 0.05, 0.1]


def test_all_classes_and_their_attributes(devkit: NuScenes) -> None:
    found: dict[str, set[str]] = {}
    for annotation in devkit.sample_annotation:
        name = category_to_detection_name(annotation["category_name"])
        assert name is not None
        attributes = [devkit.get("attribute", t)["name"] for t in annotation["attribute_tokens"]]
        found.setdefault(name, set()).update(attributes)
        assert len(attributes) == (0 if name in ("barrier", "traffic_cone") else 1)
    assert len(found) == CLASSES
    assert "vehicle.moving" in found["car"]
    assert found["pedestrian"] <= {"pedestrian.moving", "pedestrian.standing"}
    assert found["bicycle"] <= {"cycle.with_rider", "cycle.without_rider"}


def test_the_devkit_reads_the_ground_truth(devkit: NuScenes) -> None:
    boxes = load_gt(devkit, "val", DetectionBox, verbose=False)
    assert len(boxes.sample_tokens) == CONFIG.val_scenes * CONFIG.val_keyframes
    assert len(boxes.all) > 10


def test_lidar_point_counts(devkit: NuScenes) -> None:
    """num_lidar_pts is what the devkit counts in the box, but for points that rounding puts on its surface."""
    differences = []
    for sample in devkit.sample:
        path, boxes, _ = devkit.get_sample_data(sample["data"]["LIDAR_TOP"])
        points = LidarPointCloud.from_file(path).points[:3]
        for box in boxes:
            stored = devkit.get("sample_annotation", box.token)["num_lidar_pts"]
            differences.append(abs(int(points_in_box(box, points).sum()) - stored))
    assert np.mean(np.array(differences) == 0) > 0.98
    assert max(differences) <= 1


def test_radar_files_and_counts(devkit: NuScenes, dataroot: Path) -> None:
    total, inside = 0, 0
    for data in devkit.sample_data:
        if data["sensor_modality"] == "radar":
            cloud = RadarPointCloud.from_file(str(dataroot / data["filename"]))
            assert np.isfinite(cloud.points).all()
            total += cloud.nbr_points()
    inside = sum(a["num_radar_pts"] for a in devkit.sample_annotation)
    assert total > 100
    assert inside > 0


def test_radar_velocity_is_the_objects(devkit: NuScenes, dataroot: Path) -> None:
    """The compensated radial velocity of a return from a moving vehicle is the vehicle's along the ray."""
    errors = []
    for sample in devkit.sample:
        for channel in (c for c in sample["data"] if c.startswith("RADAR")):
            path, boxes, _ = devkit.get_sample_data(sample["data"][channel])
            points = RadarPointCloud.from_file(path).points
            for box in boxes:
                velocity = devkit.box_velocity(box.token)
                if np.linalg.norm(velocity) < 2 or np.isnan(velocity).any():
                    continue
                pose = devkit.get(
                    "calibrated_sensor", devkit.get("sample_data", sample["data"][channel])["calibrated_sensor_token"]
                )
                local = Quaternion(ego_pose(devkit, sample)["rotation"]) * Quaternion(pose["rotation"])
                v = local.inverse.rotate(velocity)[:2]
                unit = points[:2] / np.linalg.norm(points[:2], axis=0)
                hit = points_in_box(box, points[:3]) & (np.linalg.norm(points[8:10], axis=0) > 0.3)
                errors += ((points[8:10] * unit).sum(0) - v @ unit)[hit].tolist()
    assert len(errors) > 5
    assert np.median(np.abs(errors)) < 0.5


def test_masks_lie_in_the_projected_boxes(devkit: NuScenes, dataroot: Path) -> None:
    """Every pixel of a mask is inside the hull of its 3D box, moved to the camera's time; all ten classes."""
    classes = set()
    coco = COCO(str(dataroot / "instances" / "train.json"))
    by_key = {(a["instance_token"], a["sample_token"]): a for a in devkit.sample_annotation}
    for item in coco.loadAnns(coco.getAnnIds()):
        image = coco.loadImgs(item["image_id"])[0]
        data = devkit.get("sample_data", image["sample_data_token"])
        key = (item["instance_token"], image["sample_token"])
        if key not in by_key:
            continue  # farther than annotations go
        box = devkit.get_box(by_key[key]["token"])
        velocity = devkit.box_velocity(by_key[key]["token"])
        if np.isnan(velocity).any():
            continue
        lead = (devkit.get("sample", image["sample_token"])["timestamp"] - data["timestamp"]) / 1e6
        assert 0 <= lead < 0.05
        box.translate(-velocity * lead)
        pose = devkit.get("ego_pose", data["ego_pose_token"])
        sensor = devkit.get("calibrated_sensor", data["calibrated_sensor_token"])
        for place in (pose, sensor):
            box.translate(-np.array(place["translation"]))
            box.rotate(Quaternion(place["rotation"]).inverse)
        if box.corners()[2].min() < 0.3:
            continue
        pixels = view_points(box.corners(), np.array(sensor["camera_intrinsic"]), normalize=True)[:2].T
        hull = ConvexHull(pixels)
        rows, columns = np.nonzero(coco.annToMask(item))
        outside = (hull.equations[:, :2] @ np.stack([columns, rows]) + hull.equations[:, 2:]).max(0)
        assert outside.max() < 0.6, (box.name, outside.max())
        classes.add(item["category_id"])
        x, y, w, h = item["bbox"]
        assert (x, y, x + w, y + h) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert item["area"] == len(rows) == coco_mask.area(item["segmentation"])
    assert len(classes) >= CLASSES - 1


def test_velocities_match_the_motion(devkit: NuScenes) -> None:
    """Parked and standing things do not move; moving ones move the way they face."""
    for annotation in devkit.sample_annotation:
        velocity = devkit.box_velocity(annotation["token"])
        if np.isnan(velocity).any():
            continue
        attribute = [devkit.get("attribute", t)["name"] for t in annotation["attribute_tokens"]]
        speed = np.linalg.norm(velocity)
        if attribute in (["vehicle.moving"], ["pedestrian.moving"], ["cycle.with_rider"]) and speed > 0.5:
            heading = Quaternion(annotation["rotation"]).rotate([1, 0, 0])
            assert velocity @ heading / speed > 0.95
        elif attribute not in (["vehicle.moving"], ["pedestrian.moving"], ["cycle.with_rider"]):
            assert speed < 1e-6


def test_no_two_boxes_overlap_nor_touch_the_ego_vehicle(devkit: NuScenes) -> None:
    for sample in devkit.sample:
        boxes = [devkit.get_box(token) for token in sample["anns"]]
        poses = np.array([[*b.center[:2], b.orientation.yaw_pitch_roll[0]] for b in boxes])
        sizes = np.array([b.wlh for b in boxes])
        shapes = corners(poses, sizes[:, 1], sizes[:, 0])
        hit = overlap(shapes[:, None], shapes[None])
        assert (hit == np.eye(len(boxes), dtype=bool)).all()
        ego = ego_pose(devkit, sample)
        yaw = Quaternion(ego["rotation"]).yaw_pitch_roll[0]
        middle = np.array(ego["translation"][:2]) + 1.3 * np.array([np.cos(yaw), np.sin(yaw)])
        assert not overlap(shapes, corners(np.array([[*middle, yaw]]), 4.5, 1.9)).any()


def test_visibility_follows_the_masks(devkit: NuScenes, dataroot: Path) -> None:
    """What no camera shows has the lowest level, and what is plainly visible in front has the highest."""
    levels = {a["visibility_token"] for a in devkit.sample_annotation}
    assert levels <= {"1", "2", "3", "4"}
    assert {"1", "4"} <= levels
    areas: dict[tuple[str, str], int] = {}
    for split in ("train", "val"):
        content = json.loads((dataroot / "instances" / f"{split}.json").read_text())
        sample_of = {image["id"]: image["sample_token"] for image in content["images"]}
        for item in content["annotations"]:
            key = (item["instance_token"], sample_of[item["image_id"]])
            areas[key] = areas.get(key, 0) + item["area"]
    mean = {level: [] for level in levels}
    for a in devkit.sample_annotation:
        mean[a["visibility_token"]].append(areas.get((a["instance_token"], a["sample_token"]), 0))
    assert np.mean(mean["4"]) > 3 * np.mean(mean["1"])


def test_boxes_stand_on_the_ground(devkit: NuScenes) -> None:
    for a in devkit.sample_annotation:
        bottom = a["translation"][2] - a["size"][2] / 2
        assert bottom == pytest.approx(0, abs=1e-6) or bottom == pytest.approx(0.12, abs=1e-6)


def test_the_ego_vehicle_drives_on_the_map(devkit: NuScenes) -> None:
    for scene in devkit.scene:
        sample = devkit.get("sample", scene["first_sample_token"])
        x, y, _ = ego_pose(devkit, sample)["translation"]
        mask = next(m["mask"] for m in devkit.map if scene["log_token"] in m["log_tokens"])
        assert mask.is_on_mask(np.array([x]), np.array([y])).all()


def test_same_bytes_whatever_the_number_of_workers(dataroot: Path, tmp_path: Path) -> None:
    generate(CONFIG, tmp_path / "again", VERSION, workers=1)
    assert digests(tmp_path / "again") == digests(dataroot)


def test_another_seed_gives_another_city(tmp_path: Path) -> None:
    for seed in (1, 2):
        config = CityConfig(seed=seed, train_scenes=1, val_scenes=0, train_keyframes=1, image=(32, 88), sweeps=1)
        generate(config, tmp_path / str(seed), VERSION)
    a, b = (json.loads((tmp_path / s / VERSION / "sample_annotation.json").read_text()) for s in "12")
    assert [x["translation"] for x in a] != [x["translation"] for x in b]


_GENERATE = """
import sys
from pathlib import Path
from data.city.config import CityConfig
from data.city.generate import generate
if __name__ == "__main__":
    config = CityConfig(seed=5, train_scenes=4, val_scenes=2, train_keyframes=3, val_keyframes=2, image=(64, 176),
                        azimuths=360, sweeps=3)
    generate(config, Path(sys.argv[1]), "v1.0-trainval", 2, progress=lambda done, name: print(done, name, flush=True))
"""


def test_killed_and_resumed(dataroot: Path, tmp_path: Path) -> None:
    """After kill -9 no worker lives on, finished scenes are kept, and the bytes are those of an undisturbed run."""
    script, out = tmp_path / "make.py", tmp_path / "city"
    script.write_text(_GENERATE)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(script), str(out)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert [process.stdout.readline().split()[0] for _ in range(2)] == ["1", "2"]
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)
    assert not out.exists()
    kept = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob(".city.partial/*/scene-*/records.json")}
    assert kept
    reports: list[str] = []
    generate(CONFIG, out, VERSION, progress=lambda done, name: reports.append(f"{done} {name}"))
    assert reports[0].endswith("kept from an earlier run")
    assert int(reports[0].split()[0]) >= 2
    assert digests(out) == digests(dataroot)
    assert not list(tmp_path.glob(".city.partial"))


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sweeps": 11}, "less than or equal to 10"),
        ({"image": (8, 352)}, "greater than or equal to 16"),
        ({"train_scenes": 0, "val_scenes": 0}, "at least one scene"),
    ],
)
def test_settings_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        CityConfig(**change)


def test_refuses_what_it_cannot_make(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="remove it"):
        generate(CONFIG, tmp_path, VERSION)
    with pytest.raises(ValueError, match=r"v1\.0-test.*allowed: v1\.0-mini, v1\.0-trainval"):
        generate(CONFIG, tmp_path / "x", "v1.0-test")
