from __future__ import annotations

import numpy as np
from nuscenes.eval.detection.constants import ATTRIBUTE_NAMES, DETECTION_NAMES
from nuscenes.eval.detection.utils import category_to_detection_name, detection_name_to_rel_attributes

from data.reading.classes import ATTRIBUTES, CATEGORY_TO_CLASS, CLASSES, TASKS, attributes_from_speed


def test_classes_and_attributes_are_those_of_the_devkit() -> None:
    assert set(CLASSES) == set(DETECTION_NAMES)
    assert [name for task in TASKS for name in task] == list(CLASSES)
    assert set(ATTRIBUTES) == {"", *ATTRIBUTE_NAMES}
    for category, name in CATEGORY_TO_CLASS.items():
        assert category_to_detection_name(category) == name
    for category in ("animal", "human.pedestrian.wheelchair", "static_object.bicycle_rack", "vehicle.emergency.police"):
        assert category_to_detection_name(category) is None
        assert category not in CATEGORY_TO_CLASS


def test_attributes_are_allowed_for_their_class_and_follow_the_speed() -> None:
    labels = np.arange(10)
    for speed in (0.0, 5.0, np.nan):
        for name, attribute in zip(CLASSES, attributes_from_speed(labels, np.full(10, speed)), strict=True):
            assert attribute in (detection_name_to_rel_attributes(name) or [""])
            assert ("moving" in attribute or "with_rider" in attribute) == (speed == 5.0 and attribute != "")
