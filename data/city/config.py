"""What decides the bytes of a city."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final, Self

from pydantic import Field, model_validator

from base.section import Section

MAX_SWEEPS: Final = 10  # at 20 Hz they fit between two keyframes at 2 Hz

Keyframes = Annotated[int, Field(ge=1, le=40)]
Height = Annotated[int, Field(ge=16, le=1600)]
Width = Annotated[int, Field(ge=32, le=1600)]


class CityConfig(Section):
    """Size and seed of a synthetic city. Equal values give equal bytes."""

    seed: int = Field(0, ge=0, le=2**31)
    train_scenes: int = Field(40, ge=0, le=700)  # they take their names from the devkit's training split
    val_scenes: int = Field(24, ge=0, le=150)  # they take their names from the devkit's validation split
    train_keyframes: Keyframes = 8  # of a training scene, at 2 Hz
    val_keyframes: Keyframes = 4  # of a validation scene, at 2 Hz
    image: tuple[Height, Width] = (128, 352)  # pixels: a 1600 x 900 picture scaled to the width, its top cut off
    sweeps: int = Field(3, ge=1, le=MAX_SWEEPS)  # of the LiDAR per keyframe at 20 Hz, the keyframe's included
    azimuths: int = Field(1080, ge=16, le=4096)  # LiDAR columns per turn; there are 32 beams

    @model_validator(mode="after")
    def _has_scenes(self) -> Self:
        if self.train_scenes + self.val_scenes == 0:
            raise ValueError("train_scenes and val_scenes are both 0; at least one scene is needed")
        return self


@dataclass(frozen=True)
class ScenePlan:
    """Which scene to make."""

    name: str  # nuScenes scene name
    split: str  # "train" or "val"
    keyframes: int
    index: int  # position in the city; sets the date
