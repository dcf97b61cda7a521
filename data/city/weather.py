"""Light and air of a scene."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.city.mesh import vec

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
    return vec([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)])


def _kind(
    name: str, elevation: tuple[float, float], visibility: tuple[float, float], colours: list[list[float]], **rest: Any
) -> tuple[float, float, tuple[float, float], Weather]:
    """Describe a kind of weather; colours are sunlight, ambient, zenith, horizon."""
    sunlight, ambient, zenith, horizon = (vec(c) for c in colours)
    return *elevation, visibility, Weather(name, vec([0, 0, 1]), sunlight, ambient, zenith, horizon, 0.0, **rest)


# Under clouds the light that casts shadows comes from nearly overhead: it darkens what lies under a vehicle.
_KINDS = {
    kind[-1].name: kind
    for kind in (
        _kind("clear", (25, 65), (400, 900),
              [[0.95, 0.88, 0.76], [0.62, 0.66, 0.74], [0.28, 0.48, 0.82], [0.72, 0.82, 0.92]],
              clouds=0.5, noise=2.5, lights=0.0, wet=False),
        _kind("overcast", (80, 84), (250, 500),
              [[0.42, 0.42, 0.42], [0.78, 0.80, 0.83], [0.62, 0.66, 0.71], [0.78, 0.80, 0.82]],
              clouds=0.9, noise=3.0, lights=0.1, wet=False),
        _kind("dusk", (9, 16), (250, 500),
              [[0.80, 0.52, 0.30], [0.44, 0.44, 0.54], [0.22, 0.26, 0.46], [0.92, 0.62, 0.42]],
              clouds=0.7, noise=5.0, lights=0.7, wet=False),
        _kind("rain", (80, 84), (90, 180),
              [[0.32, 0.32, 0.33], [0.68, 0.70, 0.73], [0.50, 0.53, 0.57], [0.66, 0.68, 0.70]],
              clouds=0.5, noise=4.5, lights=0.4, wet=True),
    )
}  # fmt: skip


def draw(rng: np.random.Generator) -> Weather:
    """Draw the weather of a scene: clear, overcast, dusk or rain."""
    name = str(rng.choice(["clear", "overcast", "dusk", "rain"], p=[0.45, 0.25, 0.15, 0.15]))
    low, high, ranges, weather = _KINDS[name]
    exposure = np.float32(rng.uniform(0.9, 1.1))
    return weather._replace(
        sun=_vector(rng.uniform(-np.pi, np.pi), np.deg2rad(rng.uniform(low, high))),
        sunlight=weather.sunlight * exposure,
        ambient=weather.ambient * exposure,
        visibility=rng.uniform(*ranges),
    )
