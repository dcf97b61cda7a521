"""Roads: curved centre lines with lanes, kerbs, parking strips and pavements.

The city plane is [0, extent]^2 in metres. A place on a road is (s, offset): metres along the centre line and metres
to its left. Traffic keeps to the right, so lanes with the road's direction have negative offsets.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LANE = 3.5
PAVEMENT = 3.2
PARKING = 2.5
VERGE = 1.5
KERB_HEIGHT = 0.12
SIDE_MIDDLE = 120.0  # where on a side street the junction with the street is


@dataclass
class Crossing:
    """Where another road crosses."""

    s: float
    clear: float  # half the length of this road that the junction takes
    other: int


@dataclass
class Road:
    """A street with the same number of lanes both ways."""

    points: Array  # [K, 2] centre line, 1 m apart
    headings: Array  # [K] radians, unwrapped
    lanes: int
    parking: bool
    green: bool = True  # whether traffic may enter the junctions
    crossings: list[Crossing] = field(default_factory=list)

    @property
    def length(self) -> float:
        """Metres of centre line."""
        return float(len(self.points) - 1)

    @property
    def kerb(self) -> float:
        """Offset of the kerb from the centre line."""
        return self.lanes * LANE + (PARKING if self.parking else VERGE)

    def at(self, s: Array | float, offset: Array | float = 0.0) -> Array:
        """Return x, y, heading at (s, offset): [..., 3]. Beyond its ends the road goes straight on."""
        s = np.asarray(s, np.float64)
        inside = np.clip(s, 0, self.length)
        grid = np.arange(len(self.points))
        x, y, yaw = (np.interp(inside, grid, v) for v in (*self.points.T, self.headings))
        beyond = s - inside
        x = x + beyond * np.cos(yaw) - np.asarray(offset) * np.sin(yaw)
        y = y + beyond * np.sin(yaw) + np.asarray(offset) * np.cos(yaw)
        return np.stack(np.broadcast_arrays(x, y, yaw), -1)

    def blocked(self, s: Array | float, margin: float = 0.0) -> NDArray[np.bool_]:
        """Whether s lies in a junction, widened by margin."""
        s = np.asarray(s, np.float64)
        hit = np.zeros(s.shape, bool)
        for crossing in self.crossings:
            hit |= np.abs(s - crossing.s) < crossing.clear + margin
        return hit


def _centre_line(rng: np.random.Generator, middle: Array, heading: float, length: float, bend: float) -> Road:
    """Draw a smooth road of that length through middle; bend is the largest curvature in 1/m."""
    s = np.arange(int(length) + 1, dtype=np.float64)
    waves = rng.uniform(90, 170, 2)
    curvature = sum(bend / 2 * np.sin(2 * np.pi * (s / wave + rng.random())) for wave in waves)
    headings = np.cumsum(curvature)
    headings += heading - headings[len(s) // 2]
    points = np.cumsum(np.stack([np.cos(headings), np.sin(headings)], 1), axis=0)
    points += middle - points[len(s) // 2]
    lanes = int(rng.choice([1, 2], p=[0.6, 0.4]))
    return Road(points, headings, lanes, bool(rng.random() < 0.65))


def lay_roads(rng: np.random.Generator, extent: float, ego_from: float, ego_to: float, red: bool) -> list[Road]:
    """Lay the street of the ego vehicle, roads[0], and one or two that cross it.

    The street is `extent` + 40 m long; the ego vehicle drives from ego_from to ego_to (s on the street). When red, it
    waits ahead of the first junction and the other road has green.
    """
    middle, heading = np.full(2, extent / 2), rng.uniform(-np.pi, np.pi)
    street = _centre_line(rng, middle, heading, extent + 40, rng.uniform(0.002, 0.014))
    street.green = not red
    roads = [street]
    first = ego_to + 14 + rng.uniform(2, 12) if red else rng.uniform(ego_from - 25, ego_to + 45)
    places = [first]
    if rng.random() < 0.4:
        places.append(first + rng.choice([-1, 1]) * rng.uniform(70, 90) if not red else first + rng.uniform(70, 90))
    for s in places:
        x, y, yaw = street.at(s)
        angle = yaw + np.pi / 2 + np.deg2rad(rng.uniform(-14, 14))
        side = _centre_line(rng, np.array([x, y]), angle, 2 * SIDE_MIDDLE, rng.uniform(0.0, 0.008))
        side.green = red and s == first
        slant = abs(np.sin(angle - yaw))
        street.crossings.append(Crossing(float(s), (side.kerb + 1.5) / slant + 1.0, len(roads)))
        side.crossings.append(Crossing(SIDE_MIDDLE, (street.kerb + 1.5) / slant + 1.0, 0))
        roads.append(side)
    return roads
