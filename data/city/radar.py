"""The five RADARs: few returns with position, cross section and radial velocity, in the devkit's .pcd layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.city.raycast import Snapshot
from data.city.rig import Sensor
from data.city.world import World

Array = NDArray[np.float64]

RANGE = 100.0
_AZIMUTHS = np.deg2rad(np.linspace(-60, 60, 241))
_ELEVATIONS = np.deg2rad([-1.5, 0.5, 3.0])
MAX_RETURNS = 125

FIELDS = np.dtype([
    ("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("dyn_prop", "i1"), ("id", "<i2"), ("rcs", "<f4"), ("vx", "<f4"),
    ("vy", "<f4"), ("vx_comp", "<f4"), ("vy_comp", "<f4"), ("is_quality_valid", "i1"), ("ambig_state", "i1"),
    ("x_rms", "i1"), ("y_rms", "i1"), ("invalid_state", "i1"), ("pdh0", "i1"), ("vx_rms", "i1"), ("vy_rms", "i1"),
])  # fmt: skip

# Mean cross section in dBsm, and the share of rays that come back.
_RCS = {"vehicle": (12.0, 0.5), "cycle": (2.0, 0.35), "human": (-4.0, 0.3), "movable": (-2.0, 0.15)}
_STATIC = (4.0, 0.05)


def _cross_section(category: str) -> tuple[float, float]:
    kind = "cycle" if category in ("vehicle.bicycle", "vehicle.motorcycle") else category.split(".")[0].split("_")[0]
    return _RCS[kind]


def scan(
    world: World,
    snapshot: Snapshot,
    sensor: Sensor,
    city_SE3_ego: NDArray[np.float64],
    ego_velocity: NDArray[np.float64],
    velocities: NDArray[np.float64],
    rng: np.random.Generator,
) -> NDArray:
    """Return what one RADAR sees at an instant, as records of FIELDS.

    Args:
        world: the scene.
        snapshot: the scene at that instant.
        sensor: which RADAR; x forward, y left, and all returns at z = 0 of its frame.
        city_SE3_ego: pose of the ego vehicle, [4, 4].
        ego_velocity: of the ego vehicle, city frame, [2] m/s.
        velocities: of all actors, city frame, [N, 2] m/s.
        rng: source of noise and of losses.
    """
    azimuth, elevation = np.tile(_AZIMUTHS, len(_ELEVATIONS)), np.repeat(_ELEVATIONS, len(_AZIMUTHS))
    rays = np.stack([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)], 1)
    city_SE3_radar = city_SE3_ego @ sensor.ego_SE3_sensor
    directions = (rays @ city_SE3_radar[:3, :3].T).astype(np.float32)
    hits = snapshot.cast(np.tile(city_SE3_radar[:3, 3].astype(np.float32), (len(rays), 1)), directions)
    actor = np.where(hits.face < 0, -1, world.actor_of_face[hits.face])
    table = np.array([*(_cross_section(a.category) for a in world.traffic.actors), _STATIC])  # the last row is -1
    visible = (hits.face >= 0) & (hits.distance < RANGE) & ((actor >= 0) | ~world.is_ground[hits.face])
    found = np.flatnonzero(visible & (rng.random(len(rays)) < table[actor, 1]))
    found = np.sort(rng.permutation(found)[:MAX_RETURNS])
    distance = hits.distance[found] * np.cos(elevation[found]) + rng.normal(0, 0.12, len(found))
    bearing = azimuth[found] + rng.normal(0, 0.004, len(found))
    unit = np.stack([np.cos(bearing), np.sin(bearing)], 1)
    motion = np.concatenate([velocities, np.zeros((1, 2))])[actor[found]] @ city_SE3_radar[:2, :2]
    radial = (motion * unit).sum(1) + rng.normal(0, 0.08, len(found))
    own = unit @ (ego_velocity @ city_SE3_radar[:2, :2])
    rcs = np.round((table[actor[found], 0] + rng.normal(0, 3, len(found))) * 2) / 2
    moving = np.linalg.norm(motion, axis=1) > 0.3
    return _records(unit * distance[:, None], unit * radial[:, None], unit * (radial - own)[:, None], rcs, moving)


def _records(xy: Array, compensated: Array, relative: Array, rcs: Array, moving: NDArray[np.bool_]) -> NDArray:
    """Fill records from positions and velocities [R, 2] and cross sections [R]; the rest says: a valid return."""
    records = np.zeros(len(xy), FIELDS)
    records["x"], records["y"] = xy.T
    records["vx_comp"], records["vy_comp"] = compensated.T
    records["vx"], records["vy"] = relative.T
    records["rcs"], records["id"] = rcs, np.arange(len(xy))
    approaching = (xy * compensated).sum(1) < 0
    records["dyn_prop"] = np.where(moving, np.where(approaching, 2, 0), 1)  # moving, oncoming, stationary
    records["is_quality_valid"], records["ambig_state"], records["pdh0"] = 1, 3, 1
    records["x_rms"] = records["y_rms"] = 19
    records["vx_rms"] = records["vy_rms"] = 3
    return records


def write(path: Path, records: NDArray) -> None:
    """Write a .pcd file. An empty scan has one point of NaN, as the devkit expects."""
    if not len(records):
        records = np.zeros(1, FIELDS)
        records["x"] = np.nan
    kinds = [FIELDS[name] for name in FIELDS.names or ()]
    lines = [
        "# .PCD v0.7 - Point Cloud Data file format",
        "VERSION 0.7",
        "FIELDS " + " ".join(FIELDS.names or ()),
        "SIZE " + " ".join(str(k.itemsize) for k in kinds),
        "TYPE " + " ".join("F" if k.kind == "f" else "I" for k in kinds),
        "COUNT " + " ".join("1" for _ in kinds),
        f"WIDTH {len(records)}",
        "HEIGHT 1",
        "VIEWPOINT 0 0 0 1 0 0 0",
        f"POINTS {len(records)}",
        "DATA binary\n",
    ]
    # The devkit wants at least one byte after the last field.
    path.write_bytes("\n".join(lines).encode() + records.tobytes() + b"\n")
