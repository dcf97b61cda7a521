"""The ten nuScenes detection classes, their task groups, categories and attributes."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

CLASSES: Final = (
    "car",
    "truck",
    "construction_vehicle",
    "bus",
    "trailer",
    "barrier",
    "motorcycle",
    "bicycle",
    "pedestrian",
    "traffic_cone",
)

# CenterPoint (Yin et al., CVPR 2021): classes of similar size share a head.
TASKS: Final = (
    ("car",),
    ("truck", "construction_vehicle"),
    ("bus", "trailer"),
    ("barrier",),
    ("motorcycle", "bicycle"),
    ("pedestrian", "traffic_cone"),
)

# nuScenes category -> detection class; the other categories are not part of the detection benchmark.
CATEGORY_TO_CLASS: Final[dict[str, str]] = {
    "vehicle.car": "car",
    "vehicle.truck": "truck",
    "vehicle.construction": "construction_vehicle",
    "vehicle.bus.bendy": "bus",
    "vehicle.bus.rigid": "bus",
    "vehicle.trailer": "trailer",
    "movable_object.barrier": "barrier",
    "vehicle.motorcycle": "motorcycle",
    "vehicle.bicycle": "bicycle",
    "human.pedestrian.adult": "pedestrian",
    "human.pedestrian.child": "pedestrian",
    "human.pedestrian.construction_worker": "pedestrian",
    "human.pedestrian.police_officer": "pedestrian",
    "movable_object.trafficcone": "traffic_cone",
}

# "" is "no attribute"; the index stores positions in this tuple.
ATTRIBUTES: Final = (
    "",
    "vehicle.moving",
    "vehicle.parked",
    "vehicle.stopped",
    "cycle.with_rider",
    "cycle.without_rider",
    "pedestrian.moving",
    "pedestrian.standing",
    "pedestrian.sitting_lying_down",
)

MOVING_SPEED: Final = 0.2  # m/s; above it an object counts as moving

_VEHICLE: Final = ("vehicle.parked", "vehicle.moving")
_CYCLE: Final = ("cycle.without_rider", "cycle.with_rider")
_AT_REST_OR_MOVING: Final[dict[str, tuple[str, str]]] = {
    "car": _VEHICLE,
    "truck": _VEHICLE,
    "construction_vehicle": _VEHICLE,
    "bus": ("vehicle.stopped", "vehicle.moving"),
    "trailer": _VEHICLE,
    "barrier": ("", ""),
    "motorcycle": _CYCLE,
    "bicycle": _CYCLE,
    "pedestrian": ("pedestrian.standing", "pedestrian.moving"),
    "traffic_cone": ("", ""),
}
_ATTRIBUTE_TABLE: Final = np.array([_AT_REST_OR_MOVING[name] for name in CLASSES], dtype=object)


def attributes_from_speed(labels: NDArray[np.integer], speed: NDArray[np.floating]) -> list[str]:
    """Attribute of each box by the field's usual rule (a class at rest or moving, the border at 0.2 m/s).

    Args:
        labels: [K] positions in CLASSES.
        speed: [K] m/s; NaN counts as at rest.
    """
    moving = (speed > MOVING_SPEED).astype(np.int64)
    return _ATTRIBUTE_TABLE[labels, moving].tolist()
