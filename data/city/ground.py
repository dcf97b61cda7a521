"""The ground seen from above: a picture of colours, and a raster of zones that doubles as nuScenes' map mask."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from data.city.roads import LANE, PARKING, PAVEMENT, Road

RESOLUTION = 0.1  # metres per pixel, the devkit's default for map masks
PLOT, WALK, STREET = 0, 1, 2
_SHIFT = 4  # binary places of the pixel coordinates that cv2 draws with
_LEVELS = 5
_ROW = 256  # cv2.remap takes pictures, so points are arranged in rows

Pixels = NDArray[np.uint8]
Colour = tuple[int, int, int]
Number = float | NDArray[np.float64]
WHITE, YELLOW = (205, 205, 200), (190, 150, 50)
_GRASS = np.array([[88, 110, 58], [120, 116, 84], [74, 98, 54], [140, 134, 122]])
_SLABS, _JOINTS, _KERB = (148, 144, 138), (126, 122, 117), (172, 170, 165)


@dataclass
class Ground:
    """Pictures whose row 0 is the northern edge, y = extent."""

    extent: float
    zones: Pixels  # [P, P] PLOT, WALK or STREET
    levels: list[Pixels]  # colours [P / 2^k, P / 2^k, 3] RGB, each level half the one before

    def zone(self, xy: NDArray[np.floating]) -> Pixels:
        """Return the zone at points [..., 2] in metres; outside the city it is PLOT."""
        size = self.zones.shape[0]
        column = np.floor(xy[..., 0] / RESOLUTION).astype(int)
        row = np.floor((self.extent - xy[..., 1]) / RESOLUTION).astype(int)
        inside = (column >= 0) & (column < size) & (row >= 0) & (row < size)
        return np.where(inside, self.zones[row.clip(0, size - 1), column.clip(0, size - 1)], PLOT).astype(np.uint8)

    def colour(self, xy: NDArray[np.float32], footprint: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return RGB in 0-1 at points [R, 2], blurred to the size (m) of the pixels that see them, [R]."""
        level = np.log2(np.maximum(footprint / RESOLUTION, 1.0)).astype(np.int32).clip(0, _LEVELS - 1)
        out = np.empty((len(xy), 3), np.float32)
        flipped = np.stack([xy[:, 0], np.float32(self.extent) - xy[:, 1]], 1)
        for k, picture in enumerate(self.levels):
            rays = np.flatnonzero(level == k)
            cells = flipped[rays] * np.float32(1 / (RESOLUTION * 2**k)) - np.float32(0.5)
            padded = np.zeros((-(-len(rays) // _ROW) * _ROW, 2), np.float32)
            padded[: len(rays)] = cells
            columns, rows = padded.T.reshape(2, -1, _ROW)
            sampled = cv2.remap(picture, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
            out[rays] = sampled.reshape(-1, 3)[: len(rays)]
        out *= np.float32(1 / 255)
        return out

    def mask(self) -> Pixels:
        """Return nuScenes' semantic prior: 255 where one may drive or walk."""
        return np.where(self.zones == PLOT, 0, 255).astype(np.uint8)


class _Painter:
    """Draws in metres on the colour picture and on the zones."""

    def __init__(self, extent: float) -> None:
        self.extent = extent
        size = int(np.ceil(extent / RESOLUTION))
        self.colours: Pixels = np.zeros((size, size, 3), np.uint8)
        self.zones: Pixels = np.zeros((size, size), np.uint8)

    def fixed(self, xy: NDArray[np.floating]) -> NDArray[np.int32]:
        """Return cv2's fixed-point pixels of points [..., 2] in metres."""
        flipped = np.stack([xy[..., 0], self.extent - xy[..., 1]], -1)
        return np.round((flipped / RESOLUTION - 0.5) * 2**_SHIFT).astype(np.int32)

    def line(self, xy: NDArray[np.floating], width: float, colour: Colour, zone: int | None = None) -> None:
        """Draw a line through points [K, 2]."""
        pixels, thickness = [self.fixed(xy)], max(1, round(width / RESOLUTION))
        cv2.polylines(self.colours, pixels, False, colour, thickness, cv2.LINE_8, _SHIFT)
        if zone is not None:
            cv2.polylines(self.zones, pixels, False, (zone,), thickness, cv2.LINE_8, _SHIFT)

    def polygon(self, xy: NDArray[np.floating], colour: Colour) -> None:
        """Fill convex polygons [..., K, 2]."""
        for corners in self.fixed(xy).reshape(-1, *xy.shape[-2:]):
            cv2.fillConvexPoly(self.colours, corners, colour, cv2.LINE_8, _SHIFT)


def _strips(road: Road, s0: Number, s1: Number, low: Number, high: Number) -> NDArray[np.float64]:
    """Return quadrilaterals [..., 4, 2] from s0 to s1 between two offsets."""
    return np.stack([road.at(s0, low), road.at(s1, low), road.at(s1, high), road.at(s0, high)], -2)[..., :2]


def _dashes(painter: _Painter, road: Road, offset: float, dash: float, gap: float, colour: Colour) -> None:
    """Paint a broken line, or with gap 0 a solid one, that leaves the junctions free."""
    start = np.arange(0, road.length - dash, dash + gap)
    start = start[~(road.blocked(start) | road.blocked(start + dash))]
    painter.polygon(_strips(road, start, start + dash, offset - 0.08, offset + 0.08), colour)


def _markings(painter: _Painter, road: Road) -> None:
    """Paint lane lines, parking bays, stop lines and zebra crossings."""
    if road.lanes > 1:
        for side in (-0.15, 0.15):
            _dashes(painter, road, side, 1.0, 0.0, YELLOW)
    else:
        _dashes(painter, road, 0.0, 3.0, 4.0, YELLOW)
    for lane in range(1, road.lanes):
        for side in (-1, 1):
            _dashes(painter, road, side * lane * LANE, 3.0, 5.0, WHITE)
    edge = road.lanes * LANE
    for side in (-1, 1):
        _dashes(painter, road, side * edge, 1.0, 0.0, WHITE)
        if road.parking:
            bays = np.arange(0, road.length, 6.5)
            bays = bays[~road.blocked(bays, 6.0)]
            low, high = sorted((side * edge, side * (edge + PARKING)))
            painter.polygon(_strips(road, bays, bays + 0.15, low, high), WHITE)
    for crossing in road.crossings:
        for direction in (-1, 1):
            near = crossing.s + direction * crossing.clear
            bars = np.arange(-road.kerb + 0.4, road.kerb - 0.4, 1.0)
            painter.polygon(_strips(road, near, near + direction * 3.0, bars, bars + 0.5), WHITE)
            stop = near + direction * 4.2
            low, high = sorted((0.0, direction * edge))
            painter.polygon(_strips(road, stop, stop + 0.4 * direction, low, high), WHITE)


def _speckle(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """Return factors around 1, [size, size], of several grain sizes."""
    tile = 512
    noise = np.ones((tile, tile), np.float32)
    for cells, strength in ((8, 0.05), (48, 0.06), (512, 0.05)):
        grain = rng.normal(0, strength, (cells, cells)).astype(np.float32)
        noise += cv2.resize(grain, (tile, tile), interpolation=cv2.INTER_LINEAR)
    return np.tile(noise, (size // tile + 1,) * 2)[:size, :size]


def _shade(colour: NDArray[np.floating], factor: float) -> Colour:
    r, g, b = (int(v) for v in (colour * factor).clip(0, 255))
    return r, g, b


def _meadow(painter: _Painter, rng: np.random.Generator) -> None:
    """Fill the picture with ground that is nobody's, in lighter and darker patches."""
    grass = _GRASS[rng.integers(len(_GRASS))].astype(np.float64)
    painter.colours[:] = grass
    for _ in range(40):
        x, y = painter.fixed(rng.uniform(0, painter.extent, 2)).tolist()
        radius = int(rng.uniform(3, 12) / RESOLUTION * 2**_SHIFT)
        cv2.circle(painter.colours, (x, y), radius, _shade(grass, rng.uniform(0.85, 1.1)), -1, cv2.LINE_8, _SHIFT)


def _surfaces(painter: _Painter, roads: list[Road], asphalt: Colour) -> None:
    """Lay pavements, kerbs and asphalt, each for all roads, so that junctions are open."""
    for road in roads:
        painter.line(road.points, 2 * (road.kerb + PAVEMENT), _SLABS, WALK)
    for road in roads:
        start = np.arange(0, road.length, 1.6)
        painter.polygon(_strips(road, start, start + 0.1, -road.kerb - PAVEMENT, road.kerb + PAVEMENT), _JOINTS)
    for road in roads:
        painter.line(road.points, 2 * (road.kerb + 0.2), _KERB)
    for road in roads:
        painter.line(road.points, 2 * road.kerb, asphalt, STREET)


def _repairs(painter: _Painter, road: Road, rng: np.random.Generator, asphalt: NDArray[np.floating]) -> None:
    """Paint darker rectangles of newer asphalt."""
    for s in rng.uniform(0, road.length, 8):
        low = rng.uniform(-road.kerb, road.kerb - 2)
        end = s + rng.uniform(2, 9)
        strip = _strips(road, s, end, low, low + rng.uniform(0.8, 2))
        painter.polygon(strip, _shade(asphalt, rng.uniform(0.78, 0.93)))


def paint(rng: np.random.Generator, extent: float, roads: list[Road], yards: NDArray[np.floating], wet: bool) -> Ground:
    """Paint the ground of a city.

    Args:
        rng: source of all that is random.
        extent: side of the city in metres.
        roads: the streets.
        yards: paved plots, corners [N, 4, 2] in metres.
        wet: whether asphalt is dark with rain.
    """
    painter = _Painter(extent)
    _meadow(painter, rng)
    asphalt = np.array([72, 73, 76]) * rng.uniform(0.75, 1.25) * (0.72 if wet else 1.0)
    if len(yards):
        painter.polygon(yards, _shade(asphalt, 1.15))
    _surfaces(painter, roads, _shade(asphalt, 1.0))
    for road in roads:
        _repairs(painter, road, rng, asphalt)
    for road in roads:
        _markings(painter, road)
    speckle = _speckle(rng, len(painter.zones))
    textured = cv2.multiply(painter.colours, cv2.merge([speckle] * 3), dtype=cv2.CV_8U)
    levels = [np.asarray(textured, np.uint8)]
    for _ in range(_LEVELS - 1):
        height, width = levels[-1].shape[:2]
        half = cv2.resize(levels[-1], (width // 2, height // 2), interpolation=cv2.INTER_AREA)
        levels.append(np.asarray(half, np.uint8))
    return Ground(extent, painter.zones, levels)
