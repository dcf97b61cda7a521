"""What does not move and is not annotated: pavements, buildings, trees, lamps, signs, clutter."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.city import shapes
from data.city.footprints import Occupancy, corners
from data.city.ground import PLOT, STREET, Ground
from data.city.mesh import COLOURS, Material, Mesh, frustum, merge, prism
from data.city.roads import KERB_HEIGHT, PAVEMENT, Road

Array = NDArray[np.float64]
Colours = NDArray[np.float32]

_FACADES = np.array([
    [0.62, 0.42, 0.35], [0.70, 0.63, 0.52], [0.55, 0.55, 0.57], [0.76, 0.72, 0.66], [0.48, 0.38, 0.34],
    [0.60, 0.62, 0.66], [0.66, 0.52, 0.40], [0.42, 0.45, 0.50], [0.72, 0.60, 0.58], [0.58, 0.60, 0.50],
])  # fmt: skip


class Part(NamedTuple):
    """A mesh in place with a colour per triangle."""

    mesh: Mesh
    colours: Colours  # [F, 3]


def plain(mesh: Mesh) -> Part:
    """Colour a mesh by its materials."""
    return Part(mesh, COLOURS[mesh.materials])


def _building(rng: np.random.Generator, length: float, depth: float) -> Part:
    """Return a building centred over the origin, its front along x."""
    height = float(rng.choice([rng.uniform(4.5, 9), rng.uniform(8, 16), rng.uniform(15, 32)], p=[0.35, 0.45, 0.2]))
    rect = (-length / 2, length / 2, -depth / 2, depth / 2)
    parts = [frustum(rect, rect, 0, height, Material.FACADE, Material.ROOF)]
    if height < 9 and rng.random() < 0.7:
        ridge = height + rng.uniform(1.5, 3)
        half = length / 2
        gable = [(-half - 0.3, height), (half + 0.3, height), (half - 1, ridge), (-half + 1, ridge)]
        parts.append(prism(gable, -depth / 2 - 0.3, depth / 2 + 0.3, Material.ROOF))
    elif height > 12 and rng.random() < 0.5:
        inner = (rect[0] + 2, rect[1] - 2, rect[2] + 1.5, rect[3] - 1.5)
        parts.append(frustum(inner, inner, height, height + rng.uniform(3, 8), Material.FACADE, Material.ROOF))
    mesh = merge(parts)
    colours = COLOURS[mesh.materials]
    colours[mesh.materials == Material.FACADE] = _FACADES[rng.integers(len(_FACADES))] * rng.uniform(0.8, 1.1)
    colours[mesh.materials == Material.ROOF] *= rng.uniform(0.6, 1.4)
    return Part(mesh, colours.clip(0, 1).astype(np.float32))


def yards(rng: np.random.Generator, roads: list[Road], centre: Array) -> Array:
    """Choose paved plots behind the pavement, as poses [N, 3] of 18 x 16 m rectangles that face the road."""
    found = []
    for road in roads[:2]:
        nearest = float(np.argmin(np.linalg.norm(road.points - centre, axis=1)))
        for side in (-1, 1):
            if rng.random() < 0.4:
                s = nearest + rng.uniform(-38, 38)
                if not road.blocked(s, 12.0):
                    x, y, yaw = road.at(s, side * (road.kerb + PAVEMENT + 8.6))
                    found.append((x, y, yaw if side < 0 else yaw + np.pi))
    return np.array(found).reshape(-1, 3)


YARD = (18.0, 16.0)  # length along the road and depth of a yard


def pavements(roads: list[Road], ground: Ground) -> Mesh:
    """Return the raised pavements with their kerbs; they stop where another road crosses."""
    parts = []
    for road in roads:
        s = np.arange(0, road.length, 2.0)
        for side in (-1, 1):
            # Kerb foot, kerb edge, outer edge, outer foot.
            offsets = side * (road.kerb + np.array([0, 0.02, PAVEMENT, PAVEMENT + 0.5]))
            lines = road.at(s[:, None], offsets)[..., :2]
            across = road.at(s[:, None], side * (road.kerb + np.array([0.3, 1.5, 3.0])))
            on_street = (ground.zone(across) == STREET).any(1)
            heights = np.broadcast_to([0, KERB_HEIGHT, KERB_HEIGHT, -0.02], lines.shape[:-1])
            vertices = np.concatenate([lines, heights[..., None]], -1).reshape(-1, 3)
            keep = np.flatnonzero(~(on_street[:-1] | on_street[1:]))
            quad = (4 * keep[:, None] + np.arange(3)).reshape(-1)
            faces = np.concatenate([np.stack([quad, quad + 1, quad + 5], 1), np.stack([quad, quad + 5, quad + 4], 1)])
            materials = np.full(len(faces), Material.GROUND, np.uint8)
            parts.append(Mesh(vertices.astype(np.float32), faces.astype(np.int32), materials))
    far = 900.0
    plane = np.array([[-far, -far, 0], [far, -far, 0], [far, far, 0], [-far, far, 0]], np.float32)
    plane[:, :2] += ground.extent / 2
    parts.append(Mesh(plane, np.array([[0, 1, 2], [0, 2, 3]], np.int32), np.full(2, Material.GROUND, np.uint8)))
    return merge(parts)


def buildings(rng: np.random.Generator, roads: list[Road], ground: Ground, occupied: Occupancy) -> list[Part]:
    """Line the streets with buildings, and claim their ground."""
    density = rng.uniform(0.55, 0.95)
    setback = rng.uniform(0.3, 6.0)
    grid = np.stack(np.meshgrid(np.linspace(-0.5, 0.5, 7), np.linspace(-0.5, 0.5, 5)), -1).reshape(-1, 2)
    parts = []
    for road in roads:
        for side in (-1, 1):
            s = rng.uniform(0, 8)
            while s < road.length:
                length, depth = rng.uniform(9, 22), rng.uniform(8, 15)
                back = road.kerb + PAVEMENT + setback + rng.uniform(0, 1.5) + depth / 2
                x, y, yaw = road.at(s + length / 2, side * back)
                c, sn = np.cos(yaw), np.sin(yaw)
                samples = grid * [length + 0.6, depth + 0.6] @ np.array([[c, sn], [-sn, c]]) + [x, y]
                footprint = corners(np.array([[x, y, yaw]]), length + 0.8, depth + 0.8)
                if rng.random() < density and (ground.zone(samples) == PLOT).all() and occupied.free(footprint):
                    occupied.add(footprint)
                    mesh, colours = _building(rng, length, depth)
                    parts.append(Part(mesh.moved(x, y, 0, yaw), colours))
                s += length + (0.9 if rng.random() < 0.6 else rng.uniform(2, 12))
    return parts


class _Wish(NamedTuple):
    """A thing that would like to stand on one side of a road."""

    mesh: Mesh
    s: float
    offset: float  # from the centre line, to whichever side
    radius: float
    turn: float = 0.0  # heading against the road's


def furniture(rng: np.random.Generator, roads: list[Road], ground: Ground, occupied: Occupancy) -> list[Part]:
    """Place trees, lamps, signs, bins and hedges along the pavements, and claim their ground."""
    nursery = [shapes.tree(rng) for _ in range(10)]
    lamp, trees, spacing = shapes.street_lamp(rng), rng.uniform(0.2, 0.9), rng.uniform(24, 36)
    placed = []
    for road in roads:
        for side in (-1, 1):
            with_traffic = 0.0 if side < 0 else np.pi
            wishes = [
                _Wish(lamp, s, road.kerb + 0.45, 0.15, -side * np.pi / 2)
                for s in np.arange(rng.uniform(0, spacing), road.length, spacing)
            ]
            for s in np.arange(rng.uniform(0, 11), road.length, 11):
                wishes += _clutter(rng, road, float(s), nursery, trees, with_traffic)
            for crossing in road.crossings:
                place = crossing.s + side * (crossing.clear + 3.5)
                signal = shapes.traffic_light(road.green)
                wishes.append(_Wish(signal, place, road.kerb + 0.5, 0.2, with_traffic))
            placed += [plain(mesh) for mesh in _stand(road, side, wishes, ground, occupied)]
    return placed


def _clutter(
    rng: np.random.Generator, road: Road, s: float, nursery: list[Mesh], trees: float, with_traffic: float
) -> list[_Wish]:
    """Draw what may stand near s: trees on the pavement and behind it, a sign, a bin, a hedge."""
    wishes = []
    behind = road.kerb + PAVEMENT
    if rng.random() < trees:
        tree = nursery[rng.integers(len(nursery))]
        wishes.append(_Wish(tree, s + rng.uniform(-3, 3), road.kerb + 0.6, 0.3, rng.uniform(0, 6.28)))
    if rng.random() < 0.35:
        tree = nursery[rng.integers(len(nursery))]
        wishes.append(_Wish(tree, s, behind + rng.uniform(2, 14), 1.2, rng.uniform(0, 6.28)))
    if rng.random() < 0.12:
        wishes.append(_Wish(shapes.sign(rng), s + 4, road.kerb + 0.4, 0.3, with_traffic))
    if rng.random() < 0.1:
        wishes.append(_Wish(shapes.litter_bin(rng), s + 6, road.kerb + 2.8, 0.35))
    if rng.random() < 0.2:
        wishes.append(_Wish(shapes.hedge(7.0, rng), s, behind + 0.9, 3.5))
    return wishes


def _stand(road: Road, side: int, wishes: list[_Wish], ground: Ground, occupied: Occupancy) -> list[Mesh]:
    """Put things on one side of a road where there is room."""
    placed = []
    for wish in wishes:
        x, y, yaw = road.at(wish.s, side * wish.offset)
        pose = np.array([[x, y, yaw + wish.turn]])
        footprint = corners(pose, 2 * wish.radius, min(2 * wish.radius, 1.0) if wish.radius > 3 else 2 * wish.radius)
        zones = ground.zone(np.concatenate([footprint[0], [[x, y]]]))
        if (zones != STREET).all() and occupied.free(footprint):
            occupied.add(footprint)
            placed.append(wish.mesh.moved(x, y, KERB_HEIGHT if zones[-1] else 0.0, yaw + wish.turn))
    return placed
