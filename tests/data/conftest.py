"""A small nuScenes dataroot with what the real keyframes lack: sweeps, RADARs, tracks, neighbours, tilted poses."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pyquaternion import Quaternion

from data.preparing.build import build_index
from data.reading.config import BevConfig, GridConfig, ImageConfig, InputConfig
from data.reading.index import CAMERAS, LIDAR, RADARS, Index

VERSION = "v1.0-mini"
SCENES = {"scene-0061": 3, "scene-0103": 2}  # one of mini_train, one of mini_val
IMAGE = (90, 160)
START = 1_532_402_927_000_000
CATEGORIES = [
    "vehicle.car",
    "vehicle.bus.bendy",
    "human.pedestrian.child",
    "vehicle.bicycle",
    "movable_object.trafficcone",
    "vehicle.trailer",
    "animal",
]
ATTRIBUTES = ["vehicle.moving", "vehicle.parked", "pedestrian.moving", "cycle.with_rider"]
ATTRIBUTE_OF = {0: 0, 1: 1, 2: 2, 3: 3, 5: 1}
RADAR_HEADER = """# .PCD v0.7 - Point Cloud Data file format
VERSION 0.7
FIELDS {fields}
SIZE 4 4 4 1 2 4 4 4 4 4 1 1 1 1 1 1 1 1
TYPE F F F I I F F F F F I I I I I I I I
COUNT 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1
WIDTH {count}
HEIGHT 1
VIEWPOINT 0 0 0 1 0 0 0
POINTS {count}
DATA binary
"""
RADAR_DTYPE = np.dtype(
    [(name, "<f4") for name in ("x", "y", "z")]
    + [("dyn_prop", "i1"), ("id", "<i2")]
    + [(name, "<f4") for name in ("rcs", "vx", "vy", "vx_comp", "vy_comp")]
    + [(name, "i1") for name in ("is_quality_valid", "ambig_state", "x_rms", "y_rms")]
    + [(name, "i1") for name in ("invalid_state", "pdh0", "vx_rms", "vy_rms")]
)


class DatarootMaker:
    """Writes the tables and blobs of some scenes under a root."""

    def __init__(self, root: Path, scenes: dict[str, int] = SCENES) -> None:
        self.scenes = scenes
        self.root, self.rng = root, np.random.default_rng(7)
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.count = 0

    def add(self, table: str, **fields: Any) -> dict[str, Any]:
        self.count += 1
        record = {"token": f"{table}-{self.count:05d}", **fields}
        self.tables.setdefault(table, []).append(record)
        return record

    def make(self) -> Path:
        for n, level in enumerate(("v0-40", "v40-60", "v60-80", "v80-100"), 1):
            self.tables.setdefault("visibility", []).append({"token": str(n), "level": level, "description": ""})
        self.categories = [self.add("category", name=name, description="x") for name in CATEGORIES]
        self.attributes = [self.add("attribute", name=name, description="") for name in ATTRIBUTES]
        self.sensors = {name: self.add("sensor", channel=name, modality="") for name in (LIDAR, *CAMERAS, *RADARS)}
        for name, keyframes in self.scenes.items():
            self.scene(name, keyframes)
        cv2.imwrite(str(self.folder("maps") / "blank.png"), np.zeros((4, 4), np.uint8))
        logs = [record["token"] for record in self.tables["log"]]
        self.add("map", log_tokens=logs, category="semantic_prior", filename="maps/blank.png")
        for table, records in self.tables.items():
            (self.folder(VERSION) / f"{table}.json").write_text(json.dumps(records, indent=0))
        return self.root

    def folder(self, name: str) -> Path:
        path = self.root / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def scene(self, name: str, keyframes: int) -> None:
        log = self.add("log", logfile=name, vehicle="n0", date_captured="2018-01-01", location="singapore-onenorth")
        scene = self.add("scene", log_token=log["token"], name=name, nbr_samples=keyframes, description="a {scene}, it")
        self.start = START + self.count * 1_000_000
        samples = [
            self.add("sample", timestamp=self.start + n * 500_000, scene_token=scene["token"], prev="", next="")
            for n in range(keyframes)
        ]
        link(samples)
        scene.update(first_sample_token=samples[0]["token"], last_sample_token=samples[-1]["token"])
        for channel, sensor in self.sensors.items():
            self.channel(channel, sensor["token"], samples)
        for n in range(14):
            self.instance(n % len(CATEGORIES), samples if n % 5 else samples[:1])

    def channel(self, channel: str, sensor: str, samples: list[dict[str, Any]]) -> None:
        is_camera, is_radar = channel in CAMERAS, channel in RADARS
        yaw = self.rng.uniform(-np.pi, np.pi)
        rotation = Quaternion(axis=[0, 0, 1], angle=yaw) * Quaternion(axis=[1, 0, 0], angle=self.rng.normal(0, 0.02))
        if is_camera:
            rotation = rotation * Quaternion(axis=[1, 0, 0], angle=-np.pi / 2)
        intrinsic = [[110.0 + yaw, 0.0, 79.3], [0.0, 111.0, 48.1], [0.0, 0.0, 1.0]] if is_camera else []
        calibration = self.add(
            "calibrated_sensor",
            sensor_token=sensor,
            translation=self.rng.normal(0, 1, 3).tolist(),
            rotation=rotation.elements.tolist(),
            camera_intrinsic=intrinsic,
        )
        offset = int(self.rng.integers(-40_000, 0)) if is_camera else 0
        records = []
        for n, sample in enumerate(samples):
            between = 0 if is_camera or n == 0 else 4
            for step in range(between, -1, -1):
                time = sample["timestamp"] + offset - step * (77_000 if is_radar else 50_000)
                records.append(self.sample_data(channel, calibration["token"], sample["token"], time, step == 0))
        link(records)

    def sample_data(self, channel: str, calibration: str, sample: str, time: int, key: bool) -> dict[str, Any]:
        seconds = (time - self.start) * 1e-6
        turn = Quaternion(axis=[0, 0, 1], angle=0.7 + 0.3 * seconds) * Quaternion(axis=[0.6, 0.8, 0], angle=0.03)
        pose = self.add(
            "ego_pose",
            timestamp=time,
            rotation=turn.elements.tolist(),
            translation=[1000.0 + 6.0 * seconds, 2000.0 - 3.0 * seconds, 0],
        )
        suffix = "jpg" if channel in CAMERAS else "pcd" if channel in RADARS else "pcd.bin"
        folder = f"{'samples' if key else 'sweeps'}/{channel}"
        self.folder(folder)
        record = self.add(
            "sample_data",
            sample_token=sample,
            ego_pose_token=pose["token"],
            calibrated_sensor_token=calibration,
            timestamp=time,
            fileformat=suffix.split(".")[0],
            is_key_frame=key,
            height=IMAGE[0] if channel in CAMERAS else 0,
            width=IMAGE[1] if channel in CAMERAS else 0,
            filename=f"{folder}/{channel}__{time}.{suffix}",
            prev="",
            next="",
        )
        self.blob(self.root / record["filename"])
        return record

    def blob(self, path: Path) -> None:
        if path.suffix == ".jpg":
            coarse = self.rng.integers(0, 255, (9, 16, 3), dtype=np.uint8)
            cv2.imwrite(str(path), cv2.resize(coarse, IMAGE[::-1], interpolation=cv2.INTER_CUBIC))
        elif path.suffix == ".pcd":
            returns = np.zeros(20, RADAR_DTYPE)
            for name in ("x", "y", "z", "rcs", "vx_comp", "vy_comp"):
                returns[name] = self.rng.uniform(-40 if name in "xy" else -2, 40 if name in "xy" else 2, 20)
            returns["dyn_prop"], returns["ambig_state"] = self.rng.integers(0, 8, 20), self.rng.integers(2, 4, 20)
            returns["invalid_state"] = self.rng.integers(0, 4, 20) == 3
            header = RADAR_HEADER.format(count=20, fields=" ".join(RADAR_DTYPE.names or ()))
            path.write_bytes(header.encode() + returns.tobytes() + b"\n")  # the devkit wants a byte more
        else:
            points = self.rng.uniform(-50, 50, (400, 5))
            points[:, 2] *= 0.06
            points[:20, :2] *= 0.03  # some returns off the car itself
            points[:, 3] = self.rng.integers(0, 256, 400)
            path.write_bytes(points.astype(np.float32).tobytes())

    def instance(self, category: int, samples: list[dict[str, Any]]) -> None:
        instance = self.add("instance", category_token=self.categories[category]["token"], nbr_annotations=len(samples))
        centre = np.array([1000.0, 2000.0, 1.0]) + self.rng.uniform([-40, -40, -0.5], [40, 40, 0.5])
        velocity, size = self.rng.normal(0, 4, 3) * (1, 1, 0), self.rng.uniform(0.5, 6, 3)
        yaw, rate = self.rng.uniform(-np.pi, np.pi), self.rng.normal(0, 0.5)
        attribute = [self.attributes[ATTRIBUTE_OF[category]]["token"]] if category in ATTRIBUTE_OF else []
        records = []
        for sample in samples:
            seconds = (sample["timestamp"] - samples[0]["timestamp"]) * 1e-6
            record = self.add(
                "sample_annotation",
                sample_token=sample["token"],
                instance_token=instance["token"],
                visibility_token=str(self.rng.integers(1, 5)),
                attribute_tokens=attribute,
                translation=(centre + velocity * seconds).tolist(),
                size=size.tolist(),
                rotation=Quaternion(axis=[0, 0, 1], angle=yaw + rate * seconds).elements.tolist(),
                num_lidar_pts=int(self.rng.integers(0, 4)),
                num_radar_pts=int(self.rng.integers(0, 2)),
                prev="",
                next="",
            )
            records.append(record)
        link(records)
        instance.update(first_annotation_token=records[0]["token"], last_annotation_token=records[-1]["token"])


def link(records: list[dict[str, Any]]) -> None:
    for before, after in pairwise(records):
        before["next"], after["prev"] = after["token"], before["token"]


@pytest.fixture(scope="session")
def made_dataroot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataroot; tests that break files copy it first."""
    return DatarootMaker(tmp_path_factory.mktemp("dataroot")).make()


@pytest.fixture(scope="session")
def made_index(made_dataroot: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    out = tmp_path_factory.mktemp("index")
    build_index(made_dataroot, VERSION, ["mini_train", "mini_val"], out, sweeps=4, radar=True)
    return Index.open(out)


@pytest.fixture(scope="session")
def real_index(real_dataroot: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    out = tmp_path_factory.mktemp("index")
    build_index(real_dataroot, VERSION, ["mini_train", "mini_val"], out)
    return Index.open(out)


@pytest.fixture(scope="session")
def devkit(made_dataroot: Path) -> Any:
    """The devkit's own view of the small dataroot."""
    from nuscenes import NuScenes

    return NuScenes(VERSION, str(made_dataroot), verbose=False)


@pytest.fixture(scope="session")
def real_devkit(real_dataroot: Path) -> Any:
    """The devkit's own view of the real keyframes."""
    from nuscenes import NuScenes

    return NuScenes(VERSION, str(real_dataroot), verbose=False)


@pytest.fixture(scope="session")
def city_index(city: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    out = tmp_path_factory.mktemp("index")
    build_index(city, "v1.0-trainval", ["train", "val"], out, sweeps=3, radar=True)
    return Index.open(out)


@pytest.fixture(scope="session")
def city_devkit(city: Path) -> Any:
    """The devkit's own view of the synthetic city."""
    from nuscenes import NuScenes

    return NuScenes("v1.0-trainval", str(city), verbose=False)


@pytest.fixture
def grid() -> GridConfig:
    return GridConfig(range=51.2, cell=1.6, z=(-5.0, 3.0))


@pytest.fixture
def config() -> InputConfig:
    """Every augmentation on."""
    return InputConfig(
        frames=2,
        sweeps=3,
        radar=True,
        image=ImageConfig(size=(64, 128), resize=(0.9, 1.2), rotate=10.0, flip=0.5),
        bev=BevConfig(flip_x=0.5, flip_y=0.5, rotate=30.0, scale=(0.9, 1.1)),
        depth_stride=16,
    )
