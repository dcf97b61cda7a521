"""What `study.featured` compares: the maps of a student with simulated LiDAR features, and its fusion teacher's."""

from __future__ import annotations

from typing import Final

from config.params import Params
from stages.context import StageError

LIDAR: Final = "bev_lift_lidar"  # of the teacher
BEFORE: Final = "bev_lift_uncompensated"  # of the student
AFTER: Final = "bev_lift_simulated"  # of the student, after the compensation in BEV


def fusion_teacher(params: Params, variant: str) -> str:
    """The fusion teacher whose taps a variant's terms read.

    Raises:
        StageError: there is none, or there are several.
    """
    stores = {term.teacher.store for term in params.variants[variant].terms.values()}
    teachers = sorted({params.stores[store].teacher for store in stores} & set(params.study.fusions))
    if len(teachers) != 1:
        raise StageError(
            f"study.featured: the terms of variant {variant!r} read {', '.join(teachers) or 'none'} of the fusion "
            f"teachers in study.fusions {[*params.study.fusions]}: features are compared with exactly one"
        )
    return teachers[0]
