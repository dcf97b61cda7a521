"""What decides the bytes of a city."""

from __future__ import annotations

from dataclasses import dataclass

MAX_SWEEPS = 10
"""Sweeps at 20 Hz that fit between two keyframes at 2 Hz."""


@dataclass(frozen=True, kw_only=True)
class CityConfig:
    """Size and seed of a synthetic city. Equal values give equal bytes."""

    seed: int = 0
    train_scenes: int = 40
    """Scenes that take their names from the devkit's training split."""
    val_scenes: int = 24
    """Scenes that take their names from the devkit's validation split."""
    train_keyframes: int = 8
    """Keyframes of a training scene, at 2 Hz."""
    val_keyframes: int = 4
    """Keyframes of a validation scene, at 2 Hz."""
    image: tuple[int, int] = (128, 352)
    """Height and width in pixels: a 1600 x 900 picture scaled to the width, its top cut off."""
    sweeps: int = 3
    """LiDAR sweeps per keyframe at 20 Hz, the keyframe's included."""
    azimuths: int = 1080
    """LiDAR columns per turn; there are 32 beams."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "image", (int(self.image[0]), int(self.image[1])))
        for name, low, high in (
            ("seed", 0, 2**31),
            ("train_scenes", 0, 700),
            ("val_scenes", 0, 150),
            ("train_keyframes", 1, 40),
            ("val_keyframes", 1, 40),
            ("sweeps", 1, MAX_SWEEPS),
            ("azimuths", 16, 4096),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"city.{name} is {value}; allowed: {low} to {high}")
        if not (16 <= self.image[0] <= 1600 and 32 <= self.image[1] <= 1600):
            raise ValueError(f"city.image is {list(self.image)}; allowed: height 16 to 1600, width 32 to 1600")
        if self.train_scenes + self.val_scenes == 0:
            raise ValueError("city.train_scenes and city.val_scenes are both 0; at least one scene is needed")


@dataclass(frozen=True)
class ScenePlan:
    """Which scene to make."""

    name: str  # nuScenes scene name
    split: str  # "train" or "val"
    keyframes: int
    index: int  # position in the city; sets the date
