"""Everything that is annotated: vehicles, riders, people, cones and barriers, with their paths.

Vehicles of a lane drive as a platoon, with one speed and one rhythm, so they keep their distances. Where a street has
red, they queue at its stop line. Whoever would touch another footprint at any checked time is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.city import shapes
from data.city.footprints import Occupancy, corners
from data.city.ground import PLOT, STREET, WALK, Ground
from data.city.mesh import COLOURS, Material, Mesh
from data.city.roads import KERB_HEIGHT, LANE, PARKING, PAVEMENT, Road

Array = NDArray[np.float64]
Rng = np.random.Generator

MARGIN = 0.03  # metres that a box is larger than its mesh on every side but the bottom
EGO_SIZE = (4.6, 1.9)
EGO_CENTRE = 1.3  # metres from the rear axle, the ego frame's origin, to the middle of the vehicle

_PAINTS = np.array([
    [0.86, 0.86, 0.86], [0.80, 0.80, 0.80], [0.10, 0.10, 0.11], [0.22, 0.23, 0.25], [0.55, 0.57, 0.60],
    [0.60, 0.08, 0.08], [0.10, 0.20, 0.45], [0.16, 0.33, 0.52], [0.35, 0.29, 0.22], [0.10, 0.28, 0.20],
    [0.75, 0.62, 0.18], [0.72, 0.33, 0.10],
])  # fmt: skip
_CLOTHES = np.array([
    [0.75, 0.15, 0.15], [0.15, 0.25, 0.60], [0.12, 0.12, 0.14], [0.80, 0.78, 0.72], [0.20, 0.45, 0.28],
    [0.85, 0.65, 0.15], [0.45, 0.20, 0.45], [0.30, 0.50, 0.65], [0.55, 0.40, 0.30], [0.85, 0.50, 0.55],
])  # fmt: skip
_LEGS = np.array([[0.12, 0.14, 0.22], [0.10, 0.10, 0.10], [0.35, 0.30, 0.24], [0.25, 0.27, 0.30], [0.45, 0.42, 0.38]])
_BUSES = np.array([[0.70, 0.10, 0.10], [0.85, 0.85, 0.82], [0.12, 0.36, 0.55], [0.20, 0.45, 0.25], [0.90, 0.70, 0.15]])
_CARGO = np.array([[0.88, 0.88, 0.86], [0.75, 0.76, 0.78], [0.25, 0.35, 0.55], [0.60, 0.18, 0.15], [0.28, 0.42, 0.32]])

# Who drives, who parks on the street and who stands in a yard, with weights: rare classes are commoner than in life.
_DRIVING = {
    "vehicle.car": 0.52, "vehicle.truck": 0.13, "vehicle.bus.rigid": 0.10, "vehicle.motorcycle": 0.12,
    "vehicle.bicycle": 0.09, "vehicle.construction": 0.04,
}  # fmt: skip
_PARKING = {
    "vehicle.car": 0.62, "vehicle.truck": 0.08, "vehicle.motorcycle": 0.12, "vehicle.trailer": 0.06,
    "vehicle.construction": 0.05, "vehicle.bus.rigid": 0.04, "vehicle.bicycle": 0.03,
}  # fmt: skip
_YARD = {
    "vehicle.trailer": 0.27, "vehicle.construction": 0.27, "vehicle.truck": 0.2, "vehicle.car": 0.14,
    "vehicle.bus.rigid": 0.12,
}  # fmt: skip


@dataclass
class Actor:
    """One annotated object: its looks, and its way along a road."""

    category: str  # nuScenes category
    attribute: str  # nuScenes attribute, empty for cones and barriers
    mesh: Mesh  # centred over the origin, standing on z = 0
    colours: NDArray[np.float32]  # [F, 3] of the triangles
    road: int
    s: float
    offset: float
    speed: float = 0.0  # along the road's direction, m/s, times the rhythm of the traffic
    turn: float = 0.0  # heading against the road's
    z: float = 0.0  # of the bottom

    @property
    def extents(self) -> tuple[float, float, float]:
        """Length, width and height of the box, with its margin."""
        low, high = self.mesh.extents()
        length, width, height = (high - low).tolist()
        return length + 2 * MARGIN, width + 2 * MARGIN, height + MARGIN


def rhythm(times: Array, phase: float) -> Array:
    """Return how far traffic of 1 m/s has come at times [T] in seconds: it speeds up and slows down smoothly."""
    rate = 0.7
    return times + 0.25 / rate * (np.sin(rate * times + phase) - np.sin(phase))


class Traffic:
    """All actors of a scene, and the ego vehicle."""

    def __init__(self, roads: list[Road], phase: float, ego: Actor) -> None:
        self.roads, self.phase, self.ego = roads, phase, ego
        self.actors: list[Actor] = []

    def pose(self, actor: Actor, times: Array) -> Array:
        """Return x, y, heading at times [T]: [T, 3]."""
        s = actor.s + actor.speed * rhythm(np.asarray(times, np.float64), self.phase)
        return self.roads[actor.road].at(s, actor.offset) + np.array([0.0, 0.0, actor.turn])

    def poses(self, time: float) -> Array:
        """Return x, y, heading of all actors at one time: [N, 3]."""
        way = np.array([(a.road, a.s, a.offset, a.speed, a.turn) for a in self.actors]).reshape(-1, 5)
        s = way[:, 1] + way[:, 3] * rhythm(np.array([time]), self.phase)
        poses = np.zeros((len(way), 3))
        for k, road in enumerate(self.roads):
            mine = way[:, 0] == k
            poses[mine] = road.at(s[mine], way[mine, 2])
        poses[:, 2] += way[:, 4]
        return poses


def _choose(rng: Rng, table: dict[str, float]) -> str:
    weights = np.array(list(table.values()))
    return [*table][rng.choice(len(table), p=weights / weights.sum())]


def _pick(rng: Rng, palette: Array) -> Array:
    return (palette[rng.integers(len(palette))] * rng.uniform(0.85, 1.12) + rng.normal(0, 0.02, 3)).clip(0.03, 0.97)


def make(
    rng: Rng, category: str, road: int, s: float, offset: float, speed: float = 0.0, turn: float = 0.0, state: str = ""
) -> Actor:
    """Draw the looks of an actor. `state` is the second half of its attribute (moving, parked, with_rider, ...)."""
    cycle = category in ("vehicle.motorcycle", "vehicle.bicycle")
    person = category.startswith("human")
    mesh = shapes.build(category, rng, rider=cycle and state == "with_rider")
    paint, trim = _pick(rng, _CLOTHES if person else _PAINTS), _pick(rng, _LEGS if person else _CARGO)
    if category == "vehicle.bus.rigid":
        paint, trim = _pick(rng, _BUSES), _pick(rng, _PAINTS)
    elif cycle:
        trim = _pick(rng, _CLOTHES)
    colours = COLOURS[mesh.materials]
    colours[mesh.materials == Material.PAINT] = paint
    colours[mesh.materials == Material.TRIM] = trim
    if category == "vehicle.construction":
        yellow = mesh.materials == Material.YELLOW
        colours[yellow] *= np.float32(rng.choice([[1.0, 1.0, 1.0], [1.02, 0.6, 0.3]])) * rng.uniform(0.85, 1.05)
    kind = "cycle" if cycle else "pedestrian" if person else "vehicle"
    attribute = f"{kind}.{state}" if state else ""
    return Actor(category, attribute, mesh, colours.clip(0, 1), road, s, offset, speed, turn)


def _drive(rng: Rng, category: str, road: int, s: float, offset: float, speed: float, turn: float) -> Actor:
    """Make a vehicle in a lane; cycles there have riders."""
    cycle = category in ("vehicle.motorcycle", "vehicle.bicycle")
    state = "with_rider" if cycle else "moving" if speed else "stopped"
    return make(rng, category, road, s, offset, speed, turn, state)


def lane_traffic(rng: Rng, roads: list[Road], road: int, near: tuple[float, float], speed: float) -> list[Actor]:
    """Fill the lanes of a road between s = near[0] and near[1] with platoons and queues."""
    street, actors = roads[road], []
    sparse = rng.uniform(50, 170)
    for direction in (1, -1):
        for lane in range(street.lanes):
            offset = -direction * (lane + 0.5) * LANE
            pace = speed * rng.uniform(0.8, 1.2) if lane == 0 else speed
            front = near[1] if direction > 0 else near[0]
            behind = near[0] if direction > 0 else near[1]
            s = front - direction * rng.uniform(0, 20)
            while (s - behind) * direction > 0:
                category = _choose(rng, _DRIVING)
                s, moving = _hold(street, s, direction)
                actor = _drive(rng, category, road, s, offset + rng.uniform(-0.25, 0.25), direction * pace * moving,
                               0.0 if direction > 0 else np.pi)  # fmt: skip
                length = actor.extents[0]
                actor.s = s - direction * length / 2
                actors.append(actor)
                s -= direction * (length + 0.5)
                if category == "vehicle.truck" and rng.random() < 0.4:
                    towed = _drive(rng, "vehicle.trailer", road, s, actor.offset, actor.speed, actor.turn)
                    towed.s = s - direction * towed.extents[0] / 2
                    actors.append(towed)
                    s -= direction * towed.extents[0]
                queue = rng.uniform(1.5, 8.0) if rng.random() < 0.75 else 40.0
                s -= direction * (rng.uniform(6, sparse) if moving else queue)
    return actors


def _hold(street: Road, s: float, direction: int) -> tuple[float, bool]:
    """Move a front bumper at s out of a red street's junction; return it, and whether the vehicle may move.

    With red, vehicles up to 30 m before a stop line wait, others behind them too; those past the junction drive on.
    """
    if street.green or not street.crossings:
        return s, True
    crossing = street.crossings[0]
    past = (s - crossing.s) * direction
    if past > crossing.clear + 20:
        return s, True
    stop = crossing.s - direction * (crossing.clear + 4.6)
    return (stop if (s - stop) * direction > 0 else s), False


def parked_row(rng: Rng, roads: list[Road], road: int, near: tuple[float, float]) -> list[Actor]:
    """Park vehicles along the kerbs of a road."""
    street = roads[road]
    actors: list[Actor] = []
    if not street.parking:
        return actors
    full = rng.uniform(0.02, 0.18)
    for side in (-1, 1):
        bays = np.arange(near[0] // 6.5 * 6.5, near[1], 6.5) + 3.25
        for s in bays[~street.blocked(bays, 9.0)]:
            if rng.random() < full:
                category = _choose(rng, _PARKING)
                state = "without_rider" if category in ("vehicle.motorcycle", "vehicle.bicycle") else "parked"
                offset = side * (street.lanes * LANE + PARKING / 2 + 0.05) + rng.uniform(-0.1, 0.1)
                turn = (0.0 if side < 0 else np.pi) + rng.normal(0, 0.02)
                actors.append(make(rng, category, road, float(s), offset, 0.0, turn, state))
    return actors


def road_works(rng: Rng, roads: list[Road], road: int, near: tuple[float, float]) -> list[Actor]:
    """Close a stretch of the kerb side with cones and barriers, a machine and workers inside."""
    street = roads[road]
    side, start = int(rng.choice([-1, 1])), rng.uniform(*near)
    length, edge = rng.uniform(14, 24), street.lanes * LANE + 0.15
    turn = 0.0 if side < 0 else np.pi
    category = "vehicle.construction" if rng.random() < 0.8 else "vehicle.truck"
    middle = side * (street.kerb + 0.35)
    actors = [make(rng, category, road, start + rng.uniform(0.3, 0.7) * length, middle, 0.0, turn, "parked")]
    for s in np.arange(start, start + length, rng.uniform(2.6, 3.4)):
        fenced = rng.random() < 0.75
        category = "movable_object.barrier" if fenced else "movable_object.trafficcone"
        actors.append(make(rng, category, road, float(s), side * (edge + 0.25), 0.0, side * np.pi / 2))
    for k in range(3):  # the taper that leads traffic round it
        s = start - 2.0 - 2.0 * k if side < 0 else start + length + 2.0 + 2.0 * k
        actors.append(make(rng, "movable_object.trafficcone", road, s, side * (edge + 0.35 * (k + 1)), 0.0))
    for s in rng.uniform(start, start + length, rng.integers(1, 4)):
        place = side * (street.kerb + rng.uniform(0.5, 2.5))
        actors.append(make(rng, "human.pedestrian.construction_worker", road, float(s), place, 0.0,
                           rng.uniform(-np.pi, np.pi), "standing"))  # fmt: skip
    return [a for a in actors if not street.blocked(a.s, 1.0)]


def people(rng: Rng, roads: list[Road], road: int, near: tuple[float, float]) -> list[Actor]:
    """Put walkers, groups, parked cycles, barriers and cones on the pavements."""
    street, actors = roads[road], []
    crowd = rng.uniform(0.15, 0.8)
    for side in (-1, 1):
        for s in np.arange(near[0], near[1], 9.0) + rng.uniform(0, 9):
            draw, s = rng.random(), float(s + rng.uniform(-3, 3))
            offset = side * (street.kerb + rng.uniform(1.0, PAVEMENT - 0.4))
            if draw < 0.10 * crowd:
                pace = rng.uniform(0.9, 1.6) * rng.choice([-1, 1])
                category = "human.pedestrian.child" if rng.random() < 0.1 else "human.pedestrian.adult"
                actors.append(make(rng, category, road, s, offset, pace, 0.0 if pace > 0 else np.pi, "moving"))
            elif draw < 0.13 * crowd:
                actors += _group(rng, road, s, offset, (1.0, 0.7))
            elif draw > 0.957:
                actors += _kerbside(rng, street, road, s, side)
    return actors


def _group(rng: Rng, road: int, s: float, offset: float, spread: tuple[float, float]) -> list[Actor]:
    """Let one to three people stand about (s, offset)."""
    actors = []
    for turn in rng.uniform(-np.pi, np.pi, rng.integers(1, 4)):
        ds, across = rng.uniform(-1, 1, 2) * spread
        actors.append(make(rng, "human.pedestrian.adult", road, s + ds, offset + across, 0.0, float(turn), "standing"))
    return actors


def _kerbside(rng: Rng, street: Road, road: int, s: float, side: int) -> list[Actor]:
    """Put one to three cycles, barriers or cones in a row on the pavement."""
    category, spacing, place = [
        ("vehicle.bicycle", 0.95, 2.2),
        ("vehicle.motorcycle", 1.1, 2.1),
        ("movable_object.barrier", 2.9, 0.5),
        ("movable_object.trafficcone", 1.5, 0.5),
    ][rng.choice(4, p=[0.35, 0.16, 0.28, 0.21])]
    state, turn = "", side * np.pi / 2
    if category.startswith("vehicle"):
        state, turn = "without_rider", float(rng.choice([0.0, np.pi, np.pi / 2]) + rng.normal(0, 0.1))
    row = s + spacing * np.arange(rng.integers(1, 4))
    return [make(rng, category, road, float(k), side * (street.kerb + place), 0.0, turn, state) for k in row]


def crossing_people(rng: Rng, roads: list[Road]) -> list[Actor]:
    """Let people stand on the zebra crossings of streets that have red."""
    actors = []
    for road, street in enumerate(roads):
        for crossing in street.crossings if not street.green else []:
            for direction in (-1, 1):
                if rng.random() < 0.6:
                    s = crossing.s + direction * (crossing.clear + 1.5)
                    actors += _group(rng, road, s, rng.uniform(-0.5, 0.5) * street.kerb, (0.8, 0.45 * street.kerb))
    return actors


def yard_vehicles(rng: Rng, roads: list[Road], yards: Array) -> list[Actor]:
    """Park large vehicles side by side in the yards [N, 3]."""
    actors = []
    for x, y, _ in yards:
        road = min(range(len(roads)), key=lambda k: np.linalg.norm(roads[k].points - (x, y), axis=1).min())
        street = roads[road]
        nearest = int(np.argmin(np.linalg.norm(street.points - (x, y), axis=1)))
        heading = street.headings[nearest]
        offset = -(x - street.points[nearest, 0]) * np.sin(heading) + (y - street.points[nearest, 1]) * np.cos(heading)
        for place in (-6.2, -2.1, 2.1, 6.2):
            if rng.random() < 0.45:
                turn = float(rng.choice([-1, 1]) * np.pi / 2 + rng.normal(0, 0.05))
                actors.append(make(rng, _choose(rng, _YARD), road, nearest + place + rng.uniform(-0.3, 0.3),
                                   float(offset + rng.uniform(-1, 1)), 0.0, turn, "parked"))  # fmt: skip
        for _ in range(rng.integers(0, 3)):
            actors.append(make(rng, "movable_object.trafficcone", road, nearest + rng.uniform(-8, 8),
                               float(offset + rng.choice([-7.3, 7.3]))))  # fmt: skip
    return actors


def admit(traffic: Traffic, wishes: list[Actor], ground: Ground, occupied: Occupancy, times: Array, kind: str) -> None:
    """Take in, first come first served, who touches nobody at any of the times [T] and stands where it belongs.

    Args:
        traffic: receives the actors.
        wishes: the candidates.
        ground: where streets and pavements are.
        occupied: what is placed already; the admitted claim their footprints there.
        times: seconds at which footprints are compared.
        kind: "street" for traffic, "walk" for pavements, "yard" for paved plots, "any" for road works.
    """
    allowed = {"street": (STREET,), "walk": (WALK,), "yard": (PLOT,), "any": (STREET, WALK)}[kind]
    for actor in wishes:
        length, width, _ = actor.extents
        poses = traffic.pose(actor, times if actor.speed else times[:1])
        zones = ground.zone(poses[:, :2])
        if not np.isin(zones, allowed).all():
            continue
        footprint = corners(poses, length + 0.15, width + 0.15)
        if actor.speed == 0 and len(set(ground.zone(footprint[0]).tolist())) > 1 and kind == "walk":
            continue
        if occupied.free(footprint):
            occupied.add(footprint)
            actor.z = KERB_HEIGHT if zones[0] == WALK else 0.0
            traffic.actors.append(actor)
