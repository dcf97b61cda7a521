"""One scene: drive through its world, write the sensor files, collect the records of the nuScenes tables."""

from __future__ import annotations

import json
import zlib
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from data.city import lidar, radar, rig
from data.city.camera import Renderer, visible_fractions
from data.city.config import CityConfig, ScenePlan
from data.city.raycast import Snapshot
from data.city.schema import CLASS_OF_CATEGORY, DETECTION_CLASSES, Record, token, visibility_token
from data.city.world import World

KEYFRAME_US, SWEEP_US = 500_000, 50_000
CAMERA_LEAD_US = 12_000  # the cameras fire together, this long before the LiDAR's turn is complete
ANNOTATION_RANGE = 80.0
JPEG_QUALITY = 92
MIN_MASK_PIXELS = 10
_SCENE_TABLES = (
    "instance",
    "calibrated_sensor",
    "ego_pose",
    "log",
    "scene",
    "sample",
    "sample_data",
    "sample_annotation",
    "map",
)


class SceneWriter:
    """Makes one scene. Everything random comes from the city's seed and the scene's name."""

    def __init__(self, plan: ScenePlan, config: CityConfig, root: Path) -> None:
        """Build the world of a scene whose files go below root."""
        self.plan, self.config, self.root = plan, config, root
        self.rng = np.random.default_rng([config.seed, zlib.crc32(plan.name.encode())])
        self.world = World(self.rng, (plan.keyframes - 1) * KEYFRAME_US / 1e6)
        self.cameras, self.lidar, self.radars = rig.cameras(config.image), rig.lidar(), rig.radars()
        self.renderer = Renderer(self.world, self.cameras, config.image, self.rng)
        self.tables: dict[str, list[Record]] = {name: [] for name in _SCENE_TABLES}
        self.images: list[Record] = []
        self.objects: list[Record] = []
        self.sightings: list[Record] = []
        self.start_us = 1_535_000_000_000_000 + plan.index * 1_000_000_000
        self.log_name = f"n000-2018-08-23-04-53-20+0000-city-{plan.name}"
        self._last: dict[str, Record] = {}

    def token(self, *parts: object) -> str:
        """Return a token that is this scene's own."""
        return token(self.config.seed, self.plan.name, *parts)

    def write(self) -> None:
        """Write all files of the scene and its records."""
        self._describe()
        for keyframe in range(self.plan.keyframes):
            self._keyframe(keyframe)
        self._link_samples()
        self._annotate()
        records = {"tables": self.tables, "images": self.images, "objects": self.objects}
        (self.root / "records.json").write_text(json.dumps(records))

    def _describe(self) -> None:
        """Record the log, the map, the calibration and the scene."""
        log, state = self.token("log"), "driving" if self.world.traffic.ego.speed else "waiting at red"
        self.tables["log"].append({
            "token": log, "logfile": self.log_name, "vehicle": "n000", "date_captured": "2018-08-23",
            "location": "synthetic-city",
        })  # fmt: skip
        mask = f"maps/{self.token('map')}.png"
        (self.root / "maps").mkdir()
        cv2.imwrite(str(self.root / mask), self.world.ground.mask(), [cv2.IMWRITE_PNG_COMPRESSION, 1])
        self.tables["map"].append(
            {"token": self.token("map"), "log_tokens": [log], "category": "semantic_prior", "filename": mask}
        )
        for sensor in (*self.cameras, self.lidar, *self.radars):
            self.tables["calibrated_sensor"].append({
                "token": self.token("calibrated", sensor.channel), "sensor_token": token("sensor", sensor.channel),
                "translation": sensor.translation.tolist(), "rotation": sensor.quaternion,
                "camera_intrinsic": [] if sensor.intrinsic is None else sensor.intrinsic.tolist(),
            })  # fmt: skip
            (self.root / "samples" / sensor.channel).mkdir(parents=True)
        (self.root / "sweeps" / self.lidar.channel).mkdir(parents=True)
        samples = [self.token("sample", k) for k in range(self.plan.keyframes)]
        self.tables["scene"].append({
            "token": self.token("scene"), "log_token": log, "nbr_samples": len(samples), "name": self.plan.name,
            "first_sample_token": samples[0], "last_sample_token": samples[-1],
            "description": f"Synthetic city, {self.world.weather.name}, {state}",
        })  # fmt: skip

    def _keyframe(self, keyframe: int) -> None:
        """Write the files of one keyframe and what leads up to it."""
        stamp = self.start_us + keyframe * KEYFRAME_US
        self.tables["sample"].append({
            "token": self.token("sample", keyframe), "timestamp": stamp, "scene_token": self.token("scene"),
            "prev": "", "next": "",
        })  # fmt: skip
        for back in range(self.config.sweeps - 1, 0, -1):
            self._sweep(keyframe, stamp - back * SWEEP_US)
        fractions, pixels = self._cameras(keyframe, stamp - CAMERA_LEAD_US)
        time = self._seconds(stamp)
        snapshot, ego = self.world.snapshot(time), self.world.ego_pose(time)
        record = self._data(keyframe, self.lidar.channel, stamp, "pcd", ego, True)
        points = lidar.scan(self.world, snapshot, self.lidar, ego, self.config.azimuths, self.rng).points
        points.tofile(self.root / record["filename"])
        returns = self._radars(keyframe, stamp, snapshot, ego)
        boxes = self.world.boxes(time)
        city_SE3_lidar = ego @ self.lidar.ego_SE3_sensor
        lidar_points = lidar.count_inside(_apply(city_SE3_lidar, points[:, :3]), boxes)
        radar_points = lidar.count_inside(returns, boxes)
        near = np.linalg.norm(boxes[:, :2] - ego[:2, 3], axis=1) < ANNOTATION_RANGE
        for actor in np.flatnonzero(near):
            self.sightings.append({
                "actor": int(actor), "keyframe": keyframe, "box": boxes[actor],
                "visibility": visibility_token(fractions[actor]), "pixels": int(pixels[actor]),
                "lidar": int(lidar_points[actor]), "radar": int(radar_points[actor]),
            })  # fmt: skip

    def _seconds(self, stamp: int) -> float:
        return (stamp - self.start_us) / 1e6

    def _sweep(self, keyframe: int, stamp: int) -> None:
        time = self._seconds(stamp)
        ego = self.world.ego_pose(time)
        record = self._data(keyframe, self.lidar.channel, stamp, "pcd", ego, False)
        sweep = lidar.scan(self.world, self.world.snapshot(time), self.lidar, ego, self.config.azimuths, self.rng)
        sweep.points.tofile(self.root / record["filename"])

    def _cameras(self, keyframe: int, stamp: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Write six pictures and their instances; return the actors' visible fractions [N] and pixels [N]."""
        time = self._seconds(stamp)
        ego = self.world.ego_pose(time)
        pictures = self.renderer.render(self.world.snapshot(time), ego)
        for k, camera in enumerate(self.cameras):
            record = self._data(keyframe, camera.channel, stamp, "jpg", ego, True)
            bgr = cv2.cvtColor(pictures.images[k], cv2.COLOR_RGB2BGR)
            cv2.imwrite(str(self.root / record["filename"]), bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
            self._instances(record, pictures.actors[k])
        return visible_fractions(self.world, self.world.boxes(time), pictures, self.cameras, ego)

    def _radars(self, keyframe: int, stamp: int, snapshot: Snapshot, ego: NDArray[np.float64]) -> NDArray[np.float64]:
        """Write the scans of all RADARs; return their points in the city frame, [R, 3]."""
        time, step = self._seconds(stamp), 0.01
        own = (self.world.ego_pose(time + step) - self.world.ego_pose(time - step))[:2, 3] / (2 * step)
        velocities, points = self.world.velocities(time), []
        for sensor in self.radars:
            records = radar.scan(self.world, snapshot, sensor, ego, own, velocities, self.rng)
            data = self._data(keyframe, sensor.channel, stamp, "pcd", ego, True)
            radar.write(self.root / data["filename"], records)
            xyz = np.stack([records["x"], records["y"], records["z"]], 1)
            points.append(_apply(ego @ sensor.ego_SE3_sensor, xyz))
        return np.concatenate(points)

    def _data(self, keyframe: int, channel: str, stamp: int, kind: str, ego: NDArray[np.float64], key: bool) -> Record:
        """Record a sensor file with its ego pose, chained to the channel's previous one."""
        suffix = "pcd.bin" if channel == self.lidar.channel else kind
        camera = kind == "jpg"
        own = self.token("data", channel, stamp)
        self.tables["ego_pose"].append({
            "token": own, "timestamp": stamp, "rotation": rig.upright_quaternion(np.arctan2(ego[1, 0], ego[0, 0])),
            "translation": ego[:3, 3].tolist(),
        })  # fmt: skip
        record = {
            "token": own, "sample_token": self.token("sample", keyframe), "ego_pose_token": own,
            "calibrated_sensor_token": self.token("calibrated", channel), "timestamp": stamp, "fileformat": kind,
            "is_key_frame": key, "height": self.config.image[0] if camera else 0,
            "width": self.config.image[1] if camera else 0,
            "filename": f"{'samples' if key else 'sweeps'}/{channel}/{self.log_name}__{channel}__{stamp}.{suffix}",
            "prev": "", "next": "",
        }  # fmt: skip
        if channel in self._last:
            record["prev"] = self._last[channel]["token"]
            self._last[channel]["next"] = own
        self._last[channel] = record
        self.tables["sample_data"].append(record)
        return record

    def _instances(self, data: Record, actors: NDArray[np.int32]) -> None:
        """Record the masks and 2D boxes of one picture."""
        self.images.append({
            "file_name": data["filename"], "width": data["width"], "height": data["height"],
            "sample_data_token": data["token"], "sample_token": data["sample_token"],
        })  # fmt: skip
        count = np.bincount(actors[actors >= 0], minlength=1)
        for actor in np.flatnonzero(count >= MIN_MASK_PIXELS):
            mask = actors == actor
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            x, y = int(columns[0]), int(rows[0])
            rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
            name = CLASS_OF_CATEGORY[self.world.traffic.actors[actor].category]
            self.objects.append({
                "image": len(self.images) - 1, "category_id": DETECTION_CLASSES.index(name) + 1,
                "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
                "area": int(count[actor]), "iscrowd": 0,
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                "instance_token": self.token("instance", int(actor)),
            })  # fmt: skip

    def _link_samples(self) -> None:
        samples = self.tables["sample"]
        for before, after in pairwise(samples):
            before["next"], after["prev"] = after["token"], before["token"]

    def _annotate(self) -> None:
        """Record instances and annotations: from the first to the last keyframe where any sensor sees the actor."""
        by_actor: dict[int, list[Record]] = {}
        for sighting in self.sightings:
            by_actor.setdefault(sighting["actor"], []).append(sighting)
        for actor, track in by_actor.items():
            seen = [k for k, s in enumerate(track) if s["lidar"] + s["radar"] + s["pixels"]]
            if seen:
                self._annotate_actor(actor, track[seen[0] : seen[-1] + 1])
        order = {s["token"]: k for k, s in enumerate(self.tables["sample"])}
        self.tables["sample_annotation"].sort(key=lambda a: order[a["sample_token"]])

    def _annotate_actor(self, actor: int, track: list[Record]) -> None:
        tokens = [self.token("annotation", actor, s["keyframe"]) for s in track]
        instance, body = self.token("instance", actor), self.world.traffic.actors[actor]
        self.tables["instance"].append({
            "token": instance, "category_token": token("category", body.category), "nbr_annotations": len(track),
            "first_annotation_token": tokens[0], "last_annotation_token": tokens[-1],
        })  # fmt: skip
        for k, sighting in enumerate(track):
            x, y, z, length, width, height, yaw = sighting["box"].tolist()
            self.tables["sample_annotation"].append({
                "token": tokens[k], "sample_token": self.token("sample", sighting["keyframe"]),
                "instance_token": instance, "visibility_token": sighting["visibility"],
                "attribute_tokens": [token("attribute", body.attribute)] if body.attribute else [],
                "translation": [x, y, z], "size": [width, length, height],
                "rotation": rig.upright_quaternion(yaw),
                "prev": tokens[k - 1] if k else "", "next": tokens[k + 1] if k + 1 < len(tokens) else "",
                "num_lidar_pts": sighting["lidar"], "num_radar_pts": sighting["radar"],
            })  # fmt: skip


def _apply(transform: NDArray[np.float64], points: NDArray) -> NDArray[np.float64]:
    """Transform points [P, 3] by a [4, 4]."""
    return points.astype(np.float64) @ transform[:3, :3].T + transform[:3, 3]
