"""The parts of the nuScenes schema that are the same for every city: categories, attributes, visibility, sensors."""

from __future__ import annotations

import hashlib
from typing import Any

from data.city.rig import CHANNELS

Record = dict[str, Any]

TABLES = (
    "category", "attribute", "visibility", "instance", "sensor", "calibrated_sensor", "ego_pose", "log", "scene",
    "sample", "sample_data", "sample_annotation", "map",
)  # fmt: skip
SHARED = ("category", "attribute", "visibility", "sensor")  # tables that do not depend on the scenes

_CATEGORIES = (
    "human.pedestrian.adult", "human.pedestrian.child", "human.pedestrian.wheelchair", "human.pedestrian.stroller",
    "human.pedestrian.personal_mobility", "human.pedestrian.police_officer", "human.pedestrian.construction_worker",
    "animal", "vehicle.car", "vehicle.motorcycle", "vehicle.bicycle", "vehicle.bus.bendy", "vehicle.bus.rigid",
    "vehicle.truck", "vehicle.construction", "vehicle.emergency.ambulance", "vehicle.emergency.police",
    "vehicle.trailer", "movable_object.barrier", "movable_object.trafficcone", "movable_object.pushable_pullable",
    "movable_object.debris", "static_object.bicycle_rack",
)  # fmt: skip
_ATTRIBUTES = (
    "vehicle.moving", "vehicle.stopped", "vehicle.parked", "cycle.with_rider", "cycle.without_rider",
    "pedestrian.sitting_lying_down", "pedestrian.standing", "pedestrian.moving",
)  # fmt: skip
_VISIBILITY = {"1": "v0-40", "2": "v40-60", "3": "v60-80", "4": "v80-100"}

# The classes of the instance annotations; COCO ids count from 1 in this order.
DETECTION_CLASSES = (
    "car", "truck", "construction_vehicle", "bus", "trailer", "barrier", "motorcycle", "bicycle", "pedestrian",
    "traffic_cone",
)  # fmt: skip

CLASS_OF_CATEGORY = {
    "vehicle.car": "car", "vehicle.truck": "truck", "vehicle.construction": "construction_vehicle",
    "vehicle.bus.rigid": "bus", "vehicle.trailer": "trailer", "movable_object.barrier": "barrier",
    "vehicle.motorcycle": "motorcycle", "vehicle.bicycle": "bicycle", "human.pedestrian.adult": "pedestrian",
    "human.pedestrian.child": "pedestrian", "human.pedestrian.construction_worker": "pedestrian",
    "movable_object.trafficcone": "traffic_cone",
}  # fmt: skip


def token(*parts: object) -> str:
    """Return a token of 32 hexadecimal digits, the same for the same parts."""
    return hashlib.md5("/".join(map(str, parts)).encode(), usedforsecurity=False).hexdigest()


def shared_tables() -> dict[str, list[Record]]:
    """Return the records of the tables in SHARED."""
    return {
        "category": [
            {"token": token("category", name), "name": name, "description": "", "index": index}
            for index, name in enumerate(_CATEGORIES, 1)
        ],
        "attribute": [{"token": token("attribute", name), "name": name, "description": ""} for name in _ATTRIBUTES],
        "visibility": [
            {"token": key, "level": level, "description": f"visibility of the whole object is {level[1:]} %"}
            for key, level in _VISIBILITY.items()
        ],
        "sensor": [
            {"token": token("sensor", channel), "channel": channel, "modality": modality}
            for channel, modality in CHANNELS.items()
        ],
    }


def visibility_token(fraction: float) -> str:
    """Return the token of the level that a visible fraction 0-1 falls into."""
    return str(1 + sum(fraction >= bound for bound in (0.4, 0.6, 0.8)))


def coco_categories() -> list[Record]:
    """Return COCO's categories."""
    return [{"id": k, "name": name, "supercategory": "object"} for k, name in enumerate(DETECTION_CLASSES, 1)]
