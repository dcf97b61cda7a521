"""Triangle meshes: primitives and what they are made of.

Coordinates are metres, x forward, y left, z up. Every triangle has a material; the materials PAINT and TRIM take
the colours of the instance, all others have their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


class Material(IntEnum):
    """What a triangle is made of."""

    PAINT = 0
    TRIM = 1
    GLASS = 2
    TYRE = 3
    METAL = 4
    HEADLIGHT = 5
    TAILLIGHT = 6
    DARK = 7
    SKIN = 8
    WHITE = 9
    ORANGE = 10
    YELLOW = 11
    FACADE = 12
    ROOF = 13
    LEAVES = 14
    BARK = 15
    CONCRETE = 16
    GROUND = 17
    LAMP = 18
    RED = 19


# RGB in 0-1, LiDAR reflectivity in 0-1, and the share of the own colour that shines without light.
_APPEARANCE: dict[Material, tuple[tuple[float, float, float], float, float]] = {
    Material.PAINT: ((0.5, 0.5, 0.5), 0.45, 0.0),
    Material.TRIM: ((0.4, 0.4, 0.4), 0.35, 0.0),
    Material.GLASS: ((0.10, 0.13, 0.17), 0.05, 0.0),
    Material.TYRE: ((0.06, 0.06, 0.06), 0.06, 0.0),
    Material.METAL: ((0.45, 0.46, 0.48), 0.5, 0.0),
    Material.HEADLIGHT: ((0.95, 0.95, 0.86), 0.7, 0.35),
    Material.TAILLIGHT: ((0.78, 0.05, 0.05), 0.8, 0.35),
    Material.DARK: ((0.10, 0.10, 0.11), 0.12, 0.0),
    Material.SKIN: ((0.75, 0.55, 0.42), 0.4, 0.0),
    Material.WHITE: ((0.88, 0.88, 0.88), 0.9, 0.0),
    Material.ORANGE: ((0.93, 0.33, 0.06), 0.7, 0.08),
    Material.YELLOW: ((0.90, 0.66, 0.08), 0.55, 0.0),
    Material.FACADE: ((0.6, 0.55, 0.5), 0.35, 0.0),
    Material.ROOF: ((0.35, 0.25, 0.22), 0.25, 0.0),
    Material.LEAVES: ((0.18, 0.34, 0.12), 0.3, 0.0),
    Material.BARK: ((0.28, 0.21, 0.15), 0.25, 0.0),
    Material.CONCRETE: ((0.62, 0.61, 0.58), 0.4, 0.0),
    Material.GROUND: ((0.3, 0.3, 0.3), 0.2, 0.0),
    Material.LAMP: ((0.98, 0.93, 0.75), 0.6, 0.5),
    Material.RED: ((0.75, 0.10, 0.08), 0.6, 0.0),
}
COLOURS: Array = np.array([_APPEARANCE[m][0] for m in Material], np.float32)
REFLECTIVITY: Array = np.array([_APPEARANCE[m][1] for m in Material], np.float32)
GLOW: Array = np.array([_APPEARANCE[m][2] for m in Material], np.float32)


def vec(values: Sequence[float] | Sequence[Sequence[float]]) -> Array:
    """Return values as float32."""
    return np.array(values, np.float32)


class Mesh(NamedTuple):
    """Triangles with a material each."""

    vertices: Array  # [V, 3] metres
    faces: NDArray[np.int32]  # [F, 3] vertex indices
    materials: NDArray[np.uint8]  # [F] Material

    def moved(self, x: float = 0.0, y: float = 0.0, z: float = 0.0, yaw: float = 0.0) -> Mesh:
        """Return the mesh turned by yaw about z, then translated."""
        c, s = np.cos(yaw), np.sin(yaw)
        turned = self.vertices @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]], np.float32)
        return self._replace(vertices=turned + np.array([x, y, z], np.float32))

    def extents(self) -> tuple[Array, Array]:
        """Return the lowest and the highest corner, [3] each."""
        return self.vertices.min(0), self.vertices.max(0)


def merge(meshes: Sequence[Mesh]) -> Mesh:
    """Put meshes into one, in order."""
    starts = np.cumsum([0, *(len(m.vertices) for m in meshes[:-1])])
    return Mesh(
        np.concatenate([m.vertices for m in meshes]).astype(np.float32),
        np.concatenate([m.faces + start for m, start in zip(meshes, starts, strict=True)]).astype(np.int32),
        np.concatenate([m.materials for m in meshes]),
    )


def _loft(bottom: Array, top: Array, side: Material, cap: Material) -> Mesh:
    """Close the space between two convex rings of n points, [n, 3] each."""
    n = len(bottom)
    k = np.arange(n)
    after = (k + 1) % n
    sides = np.concatenate([np.stack([k, after, after + n], 1), np.stack([k, after + n, k + n], 1)])
    fan = np.arange(1, n - 1)
    zero = np.zeros_like(fan)
    caps = np.concatenate([np.stack([zero, fan + 1, fan], 1), np.stack([zero, fan, fan + 1], 1) + n])
    materials = np.repeat(np.array([side, cap], np.uint8), [len(sides), len(caps)])
    vertices = np.concatenate([bottom, top]).astype(np.float32)
    return Mesh(vertices, np.concatenate([sides, caps]).astype(np.int32), materials)


def _rectangle(x0: float, x1: float, y0: float, y1: float, z: float) -> Array:
    return np.array([[x0, y0, z], [x1, y0, z], [x1, y1, z], [x0, y1, z]], np.float32)


def frustum(
    bottom: tuple[float, float, float, float],
    top: tuple[float, float, float, float],
    z0: float,
    z1: float,
    side: Material,
    cap: Material | None = None,
) -> Mesh:
    """Return the body between two rectangles (x0, x1, y0, y1) at heights z0 and z1."""
    return _loft(_rectangle(*bottom, z0), _rectangle(*top, z1), side, side if cap is None else cap)


def block(x0: float, x1: float, y0: float, y1: float, z0: float, z1: float, material: Material) -> Mesh:
    """Return an axis-aligned box."""
    return frustum((x0, x1, y0, y1), (x0, x1, y0, y1), z0, z1, material)


def prism(profile: Sequence[tuple[float, float]], y0: float, y1: float, material: Material) -> Mesh:
    """Extrude a convex side view, points (x, z), from y0 to y1."""
    x, z = np.array(profile, np.float32).T
    ring = np.stack([x, np.zeros_like(x), z], 1)
    return _loft(ring + vec([0, y0, 0]), ring + vec([0, y1, 0]), material, material)


def tube(
    start: Sequence[float],
    end: Sequence[float],
    radius: float,
    material: Material,
    *,
    sides: int = 6,
    end_radius: float | None = None,
) -> Mesh:
    """Return a cylinder or cone from start to end."""
    a, b = np.array(start, np.float32), np.array(end, np.float32)
    axis = (b - a) / np.linalg.norm(b - a)
    x, y, z = axis.tolist()
    u = vec([-y, x, 0] if abs(z) < 0.9 else [0, -z, y])
    u /= np.linalg.norm(u)
    v = vec([y * u[2] - z * u[1], z * u[0] - x * u[2], x * u[1] - y * u[0]])  # axis x u
    angle = (np.arange(sides, dtype=np.float32) + 0.5) * 2 * np.pi / sides
    circle = np.cos(angle)[:, None] * u + np.sin(angle)[:, None] * v
    return _loft(a + radius * circle, b + (radius if end_radius is None else end_radius) * circle, material, material)


def ring(x: float, y: float, z: float, outer: float, inner: float, material: Material, sides: int = 12) -> Mesh:
    """Return a flat, upright annulus in the x-z plane: a wheel that can be seen through."""
    angle = np.arange(sides) * 2 * np.pi / sides
    circle = np.stack([np.cos(angle), np.zeros(sides), np.sin(angle)], 1)
    vertices = np.concatenate([outer * circle, inner * circle]) + vec([x, y, z])
    k = np.arange(sides)
    after = (k + 1) % sides
    faces = np.concatenate([np.stack([k, after, after + sides], 1), np.stack([k, after + sides, k + sides], 1)])
    return Mesh(vertices.astype(np.float32), faces.astype(np.int32), np.full(len(faces), material, np.uint8))


_OCTAHEDRON = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]], np.float32)
_OCTAHEDRON_FACES = np.array(
    [[0, 2, 4], [2, 1, 4], [1, 3, 4], [3, 0, 4], [2, 0, 5], [1, 2, 5], [3, 1, 5], [0, 3, 5]], np.int32
)


def ellipsoid(centre: Sequence[float], radii: Sequence[float], material: Material) -> Mesh:
    """Return an ellipsoid of 32 triangles."""
    a, b, c = (_OCTAHEDRON[_OCTAHEDRON_FACES[:, i]] for i in range(3))
    ab, bc, ca = a + b, b + c, c + a
    corners = np.concatenate([np.stack(t, 1) for t in ((a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca))])
    corners = corners / np.linalg.norm(corners, axis=-1, keepdims=True)
    vertices = (corners * vec(radii) + vec(centre)).reshape(-1, 3)
    faces = np.arange(len(vertices), dtype=np.int32).reshape(-1, 3)
    return Mesh(vertices.astype(np.float32), faces, np.full(len(faces), material, np.uint8))
