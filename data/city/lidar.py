"""The 32-beam LiDAR."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.city.raycast import Snapshot
from data.city.rig import BEAMS, ELEVATIONS, Sensor
from data.city.world import World

Array = NDArray[np.float32]

RANGE = 90.0
RANGE_NOISE = 0.012  # standard deviation of a measured range in metres


class Sweep(NamedTuple):
    """One turn of the LiDAR."""

    points: Array  # [P, 5] x, y, z in the LiDAR frame (m), intensity 0-255, ring


def scan(world: World, snapshot: Snapshot, sensor: Sensor, city_SE3_ego: NDArray[np.float64],
         azimuths: int, rng: np.random.Generator) -> Sweep:  # fmt: skip
    """Turn once, all beams at the same instant, from an ego pose [4, 4]."""
    turn = (np.arange(azimuths) + rng.random()) * (2 * np.pi / azimuths)
    elevation, azimuth = np.tile(ELEVATIONS, azimuths), np.repeat(turn, BEAMS)
    rays = np.stack([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)], 1)
    city_SE3_lidar = city_SE3_ego @ sensor.ego_SE3_sensor
    directions = (rays @ city_SE3_lidar[:3, :3].T).astype(np.float32)
    origins = np.tile(city_SE3_lidar[:3, 3].astype(np.float32), (len(rays), 1))
    hits = snapshot.cast(origins, directions)
    incidence = -np.einsum("ij,ij->i", hits.normal, directions)
    strength = np.where(hits.face < 0, 0, world.reflectivity[hits.face]) * (0.3 + 0.7 * incidence)
    fade = np.exp(-hits.distance / (2.0 * world.weather.visibility))
    # What returns too little light is lost at random; dark and slanted surfaces far away go first.
    keep = rng.random(len(rays)) < 1 - np.exp(-80 * strength * fade / (1 + (hits.distance / 25) ** 2))
    keep &= (hits.face >= 0) & (hits.distance < RANGE) & (hits.distance > 1.0)
    measured = hits.distance[keep] + rng.normal(0, RANGE_NOISE, int(keep.sum()))
    xyz = rays[keep] * measured[:, None]
    intensity = (255 * strength[keep] * fade[keep] * rng.uniform(0.8, 1.0, len(xyz))).clip(0, 255).round()
    ring = np.tile(np.arange(BEAMS), azimuths)[keep]
    return Sweep(np.column_stack([xyz, intensity, ring]).astype(np.float32))


def count_inside(xyz: NDArray[np.floating], boxes: NDArray[np.float64]) -> NDArray[np.int64]:
    """Count the points [P, 3] inside boxes [M, 7] (centre, length, width, height, yaw), surface included: [M]."""
    count = np.zeros(len(boxes), np.int64)
    if not len(xyz) or not len(boxes):
        return count
    radius = np.linalg.norm(boxes[:, 3:5], axis=1) / 2 + 0.01
    order = np.argsort(xyz[:, 0], kind="stable")
    points = np.asarray(xyz, np.float64)[order]
    first = np.searchsorted(points[:, 0], boxes[:, 0] - radius)
    last = np.searchsorted(points[:, 0], boxes[:, 0] + radius)
    box = np.repeat(np.arange(len(boxes)), last - first)  # candidate pairs: points in a box's band of x
    starts = np.cumsum(last - first) - (last - first)
    point = np.arange(len(box)) - starts[box] + first[box]
    close = np.abs(points[point, 1] - boxes[box, 1]) <= radius[box]
    box, point = box[close], point[close]
    delta = points[point] - boxes[box, :3]
    c, s = np.cos(boxes[box, 6]), np.sin(boxes[box, 6])
    local = np.abs(np.stack([c * delta[:, 0] + s * delta[:, 1], c * delta[:, 1] - s * delta[:, 0], delta[:, 2]], 1))
    return np.bincount(box[(local <= boxes[box, 3:6] / 2).all(1)], minlength=len(boxes))
