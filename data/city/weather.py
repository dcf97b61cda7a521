"""Light and air of a scene."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


class Weather(NamedTuple):
    """Everything about light that a scene keeps. Colours are RGB around 0-1."""

    name: str
    sun: Array  # [3] unit vector towards the light that casts shadows
    sunlight: Array  # [3] added where that light falls on a surface
    ambient: Array  # [3] light from the sky
    zenith: Array  # [3] colour of the sky overhead
    horizon: Array  # [3] colour of the sky at the horizon, and of haze
    visibility: float  # metres after which haze has taken 63 % of the contrast
    clouds: float  # strength of clouds, 0-1
    noise: float  # standard deviation of the camera's noise, in 1/255
    lights: float  # how strongly lamps and lit windows shine, 0-1
    wet: bool



def _vector(azimuth: float, elevation: float) -> Array:
    return np.float32(
        [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)]
    )


def draw(rng: np.random.Generator) -> Weather:
    """Draw the weather of a scene: clear, overcast, dusk or rain."""
    name = str(rng.choice(["clear", "overcast", "dusk", "rain"], p=[0.45, 0.25, 0.15, 0.15]))
    azimuth = rng.uniform(-np.pi, np.pi)
    f = np.float32
    exposure = f(rng.uniform(0.9, 1.1))
    if name == "clear":
        sun = _vector(azimuth, np.deg2rad(rng.uniform(25, 65)))
        light = (f([0.95, 0.88, 0.76]), f([0.62, 0.66, 0.74]), f([0.28, 0.48, 0.82]), f([0.72, 0.82, 0.92]))
        air = (rng.uniform(400, 900), rng.uniform(0.2, 0.8), 2.5, 0.0, False)
    elif name == "overcast":
        sun = _vector(azimuth, np.deg2rad(82))
        light = (f([0.42, 0.42, 0.42]), f([0.78, 0.80, 0.83]), f([0.62, 0.66, 0.71]), f([0.78, 0.80, 0.82]))
        air = (rng.uniform(250, 500), 0.9, 3.0, 0.1, False)
    elif name == "dusk":
        sun = _vector(azimuth, np.deg2rad(rng.uniform(9, 16)))
        light = (f([0.80, 0.52, 0.30]), f([0.44, 0.44, 0.54]), f([0.22, 0.26, 0.46]), f([0.92, 0.62, 0.42]))
        air = (rng.uniform(250, 500), 0.7, 5.0, 0.85, False)
    else:
        sun = _vector(azimuth, np.deg2rad(82))
        light = (f([0.32, 0.32, 0.33]), f([0.68, 0.70, 0.73]), f([0.50, 0.53, 0.57]), f([0.66, 0.68, 0.70]))
        air = (rng.uniform(90, 180), 0.5, 4.5, 0.4, True)
    return Weather(name, sun, *(v * exposure for v in light[:2]), *light[2:], *air)
