"""What stands and moves in the city: each builder draws sizes from a generator and returns a mesh of several parts.

Meshes stand on z = 0, centred in x and y, heading +x. `build` is the entry.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from data.city.mesh import Material as M
from data.city.mesh import Mesh, block, ellipsoid, frustum, merge, prism, ring, tube

Rng = np.random.Generator


def _wheels(positions: list[float], half_width: float, radius: float, width: float = 0.24) -> list[Mesh]:
    """Return a pair of wheels with hubs at every x."""
    parts = []
    for x in positions:
        for side in (-1, 1):
            outside = side * half_width
            inside = outside - side * width
            parts.append(tube((x, inside, radius), (x, outside, radius), radius, M.TYRE, sides=10))
            hub = outside + side * 0.01
            parts.append(tube((x, inside, radius), (x, hub, radius), 0.55 * radius, M.METAL, sides=6))
    return parts


def _lights(length: float, half_width: float, z: float, height: float = 0.14) -> list[Mesh]:
    """Return white lights in front, red ones behind, and two plates."""
    front, parts = length / 2, []
    for side in (-1, 1):
        y0, y1 = sorted((side * (half_width - 0.05), side * (half_width - 0.42)))
        parts.append(block(front - 0.1, front + 0.02, y0, y1, z, z + height, M.HEADLIGHT))
        parts.append(block(-front - 0.02, -front + 0.1, y0, y1, z, z + height, M.TAILLIGHT))
    for x in (front, -front):
        parts.append(block(x - 0.03, x + 0.03, -0.26, 0.26, z - 0.22, z - 0.1, M.WHITE))
    return parts


def car(rng: Rng) -> Mesh:
    """Return a saloon, estate or van."""
    style = rng.choice(3, p=[0.45, 0.35, 0.2])
    length, width, height = (
        rng.uniform(*((4.2, 4.9), (4.0, 4.8), (4.7, 5.3))[style]),
        rng.uniform(*((1.75, 1.9), (1.8, 1.98), (1.9, 2.05))[style]),
        rng.uniform(*((1.4, 1.5), (1.55, 1.8), (1.85, 2.1))[style]),
    )
    half, side = length / 2, width / 2
    belt = 0.62 * height if style < 2 else 0.55 * height
    bonnet = (0.28, 0.24, 0.12)[style] * length
    boot = (0.16, 0.04, 0.02)[style] * length
    body = [
        (-half, 0.32), (-half + 0.2, 0.2), (half - 0.2, 0.2), (half, 0.32),
        (half, belt - 0.22), (half - bonnet, belt), (-half + 0.05, belt), (-half, belt - 0.15),
    ]  # fmt: skip
    front, rear = half - bonnet, -half + boot
    lean = (0.65, 0.5, 0.45)[style]
    cabin = frustum(
        (rear, front, -side + 0.04, side - 0.04),
        (rear + (0.55, 0.25, 0.1)[style], front - lean, -side + 0.22, side - 0.22),
        belt, height - 0.05, M.GLASS,
    )  # fmt: skip
    roof = (rear + (0.5, 0.2, 0.06)[style], front - lean + 0.06, -side + 0.19, side - 0.19)
    parts = [prism(body, -side + 0.02, side - 0.02, M.PAINT), cabin]
    parts.append(frustum(roof, roof, height - 0.09, height, M.PAINT))
    pillar = (rear + front - lean) / 2
    parts.append(
        frustum(
            (pillar - 0.08, pillar + 0.08, -side + 0.03, side - 0.03),
            (pillar - 0.08, pillar + 0.08, -side + 0.2, side - 0.2),
            belt,
            height - 0.04,
            M.PAINT,
        )
    )
    if style == 2:  # a panel van: the rear half is closed
        parts.append(
            frustum(
                (rear - 0.01, pillar, -side + 0.03, side - 0.03),
                (rear + 0.07, pillar, -side + 0.2, side - 0.2),
                belt,
                height - 0.03,
                M.PAINT,
            )
        )
    radius = 0.17 * height + 0.07
    parts += _wheels([-0.3 * length, 0.31 * length], side, radius) + _lights(length, side, belt - 0.3)
    parts.append(block(-half - 0.01, half + 0.01, -side + 0.1, side - 0.1, 0.24, 0.38, M.DARK))
    return merge(parts)


def _truck_cab(front: float, side: float, height: float, depth: float) -> list[Mesh]:
    """Return a flat-nosed cab whose front is at x = front."""
    rear = front - depth
    return [
        block(rear, front, -side, side, 0.45, 0.58 * height, M.PAINT),
        frustum((rear, front, -side, side), (rear, front - 0.25, -side + 0.08, side - 0.08),
                0.58 * height, height - 0.15, M.GLASS),
        block(rear, front - 0.25, -side + 0.06, side - 0.06, height - 0.2, height, M.PAINT),
        block(rear, rear + 0.35, -side, side, 0.5, height - 0.1, M.PAINT),
        block(front - 0.1, front + 0.03, -side + 0.2, side - 0.2, 0.55, 0.9, M.DARK),
    ]  # fmt: skip


def truck(rng: Rng) -> Mesh:
    """Return a box truck, a flatbed or a tipper."""
    length, width = rng.uniform(6.2, 9.0), rng.uniform(2.2, 2.5)
    style = rng.choice(3, p=[0.6, 0.2, 0.2])
    half, side = length / 2, width / 2
    cab = rng.uniform(2.3, 2.7)
    parts = _truck_cab(half, side - 0.05, cab, 1.9)
    bed = (-half, half - 2.1)
    if style == 0:
        top = rng.uniform(2.9, 3.5)
        parts.append(block(*bed, -side, side, 0.95, top, M.TRIM))
        parts.append(block(bed[0] + 0.6, bed[1] - 0.6, -side - 0.01, side + 0.01, 1.9, 2.3, M.PAINT))
        parts.append(block(bed[0] - 0.02, bed[0] + 0.1, -side + 0.1, -0.03, 1.0, top - 0.1, M.METAL))
        parts.append(block(bed[0] - 0.02, bed[0] + 0.1, 0.03, side - 0.1, 1.0, top - 0.1, M.METAL))
    elif style == 1:
        parts.append(block(*bed, -side, side, 0.95, 1.15, M.METAL))
        parts.append(block(bed[1] - 0.15, bed[1], -side, side, 1.1, 2.2, M.METAL))
        parts += [block(bed[0] + 0.3, bed[1] - 1.2, -0.8, 0.8, 1.15, rng.uniform(1.5, 2.1), M.TRIM)]
    else:
        parts.append(frustum((bed[0] + 0.5, bed[1], -side + 0.15, side - 0.15), (*bed, -side, side), 0.95, 2.1, M.TRIM))
        parts.append(block(bed[0] + 0.4, bed[1] - 0.1, -side + 0.3, side - 0.3, 2.0, 2.25, M.BARK))
    parts.append(block(-half + 0.1, half - 0.5, -0.5, 0.5, 0.55, 0.95, M.DARK))
    axles = [-half + 1.2, half - 1.0] + ([-half + 2.3] if length > 7.2 else [])
    return merge(parts + _wheels(axles, side - 0.02, 0.48, 0.3) + _lights(length, side - 0.05, 0.72))


def bus(rng: Rng) -> Mesh:
    """Return a city bus."""
    length, width, height = rng.uniform(9.5, 12.3), rng.uniform(2.5, 2.75), rng.uniform(3.0, 3.4)
    half, side = length / 2, width / 2
    whole = (-half, half, -side, side)
    band = (-half + 0.02, half - 0.02, -side + 0.03, side - 0.03)
    parts = [
        frustum(whole, whole, 0.3, 1.05, M.PAINT),
        block(-half - 0.01, half + 0.01, -side - 0.01, side + 0.01, 0.75, 0.98, M.TRIM),
        frustum(band, band, 1.0, 2.45, M.GLASS),
        frustum(whole, (-half + 0.1, half - 0.1, -side + 0.12, side - 0.12), 2.4, height - 0.15, M.PAINT),
        block(-half + 1, half - 2.5, -0.8, 0.8, height - 0.2, height, M.WHITE),
        block(half - 0.1, half + 0.02, -0.8, 0.8, 2.5, 2.75, M.LAMP),
    ]
    for x in np.linspace(-half + 0.15, half - 1.4, 6):
        parts.append(block(x - 0.07, x + 0.07, -side, side, 1.0, 2.45, M.PAINT))
    parts.append(block(-half, -half + 0.1, -side + 0.1, side - 0.1, 1.0, 1.6, M.PAINT))
    return merge(parts + _wheels([-half + 2.6, half - 2.4], side + 0.02, 0.5, 0.3) + _lights(length, side, 0.5, 0.22))


def trailer(rng: Rng) -> Mesh:
    """Return a semi-trailer: closed, tank or flat."""
    length, width = rng.uniform(7.5, 12.0), rng.uniform(2.35, 2.6)
    half, side, style = length / 2, width / 2, rng.choice(3, p=[0.65, 0.2, 0.15])
    top = rng.uniform(3.5, 3.95)
    parts = [block(-half + 0.1, half - 0.1, -0.55, 0.55, 0.9, 1.2, M.DARK)]
    if style == 0:
        parts.append(block(-half, half, -side, side, 1.15, top, M.TRIM))
        parts.append(block(-half + 0.8, half - 0.8, -side - 0.01, side + 0.01, 1.9, 2.7, M.PAINT))
        for x in np.linspace(-half + 0.1, half - 0.1, 7):
            parts.append(block(x - 0.04, x + 0.04, -side - 0.02, side + 0.02, 1.15, top - 0.02, M.METAL))
    elif style == 1:
        parts.append(tube((-half, 0, 2.3), (half, 0, 2.3), side - 0.02, M.METAL, sides=12))
        parts.append(block(-half, half, -side, side, 1.1, 1.3, M.TRIM))
    else:
        parts.append(block(-half, half, -side, side, 1.15, 1.4, M.TRIM))
        parts.append(block(-half + 0.5, half * 0.1, -side + 0.1, side - 0.1, 1.4, rng.uniform(2.3, 2.9), M.PAINT))
        parts.append(block(half - 0.15, half, -side, side, 1.3, 2.4, M.METAL))
    for y in (-0.7, 0.7):
        parts.append(block(0.55 * half, 0.55 * half + 0.15, y - 0.08, y + 0.08, 0, 1.2, M.METAL))
    parts += _wheels([-half + 1.0, -half + 2.1], side - 0.02, 0.48, 0.4)
    parts.append(block(-half - 0.03, -half + 0.05, -side + 0.05, side - 0.05, 0.72, 0.95, M.TAILLIGHT))
    return merge(parts)


def construction_vehicle(rng: Rng) -> Mesh:
    """Return an excavator or a wheel loader."""
    scale = rng.uniform(0.85, 1.2)
    if rng.random() < 0.55:
        reach, lift = rng.uniform(2.6, 3.6), rng.uniform(2.8, 3.6)
        parts = [block(-1.5, 1.5, y - 0.28, y + 0.28, 0, 0.8, M.DARK) for y in (-1.05, 1.05)]
        parts += [
            block(-0.6, 0.6, -0.8, 0.8, 0.5, 0.95, M.METAL),
            block(-1.9, 0.9, -1.2, 1.2, 0.95, 1.7, M.YELLOW),
            block(-1.9, -0.9, -1.2, 1.2, 1.7, 2.1, M.DARK),
            frustum((-0.5, 0.95, 0.15, 1.2), (-0.4, 0.75, 0.25, 1.15), 1.7, 2.85, M.GLASS, M.YELLOW),
            block(-0.5, -0.35, 0.1, 1.2, 1.7, 2.9, M.YELLOW),
            tube((0.7, -0.4, 1.5), (reach, -0.4, lift), 0.22, M.YELLOW),
            tube((reach, -0.4, lift), (reach + 0.5, -0.4, 1.0), 0.17, M.YELLOW),
            frustum((reach + 0.1, reach + 0.8, -0.9, 0.1), (reach, reach + 0.9, -0.9, 0.1), 0.45, 1.1, M.METAL),
        ]
    else:
        parts = [
            block(-2.6, 0.4, -0.95, 0.95, 0.7, 1.55, M.YELLOW),
            block(0.4, 1.8, -0.6, 0.6, 0.7, 1.3, M.YELLOW),
            frustum((-1.2, 0.4, -0.75, 0.75), (-1.0, 0.2, -0.65, 0.65), 1.55, 2.9, M.GLASS, M.YELLOW),
            block(-2.65, -2.3, -0.7, 0.7, 0.8, 1.4, M.DARK),
            tube((0.7, -0.5, 1.3), (2.9, -0.5, 0.6), 0.13, M.YELLOW),
            tube((0.7, 0.5, 1.3), (2.9, 0.5, 0.6), 0.13, M.YELLOW),
            prism([(2.7, 0.15), (3.7, 0.15), (3.1, 1.1), (2.7, 1.1)], -1.25, 1.25, M.METAL),
            *_wheels([-1.7, 1.2], 1.2, 0.7, 0.5),
        ]
    parts.append(tube((-0.2, 0.6, 2.85), (-0.2, 0.6, 3.1), 0.1, M.ORANGE))
    mesh = merge(parts)
    return mesh._replace(vertices=mesh.vertices * np.float32(scale))


def _rider(x: float, seat: float) -> list[Mesh]:
    """Return a person who sits at height seat and leans to the handlebar."""
    head = seat + 0.72
    return [
        tube((x, 0, seat), (x + 0.25, 0, seat + 0.55), 0.19, M.TRIM, sides=6),
        ellipsoid((x + 0.32, 0, head), (0.13, 0.12, 0.15), M.PAINT),
        tube((x + 0.24, 0.2, seat + 0.48), (x + 0.62, 0.24, seat + 0.2), 0.06, M.TRIM, sides=4),
        tube((x + 0.24, -0.2, seat + 0.48), (x + 0.62, -0.24, seat + 0.2), 0.06, M.TRIM, sides=4),
        tube((x, 0.13, seat), (x + 0.35, 0.15, seat - 0.45), 0.08, M.DARK, sides=5),
        tube((x, -0.13, seat), (x + 0.35, -0.15, seat - 0.35), 0.08, M.DARK, sides=5),
    ]


def motorcycle(rng: Rng, rider: bool = False) -> Mesh:
    """Return a motorcycle or a scooter."""
    half, radius = rng.uniform(0.62, 0.75), rng.uniform(0.27, 0.33)
    seat = rng.uniform(0.76, 0.86)
    parts = [tube((x, -0.07, radius), (x, 0.07, radius), radius, M.TYRE, sides=12) for x in (-half, half)]
    parts += [tube((x, -0.08, radius), (x, 0.08, radius), 0.5 * radius, M.METAL, sides=6) for x in (-half, half)]
    parts += [
        frustum((-0.45, 0.4, -0.18, 0.18), (-0.3, 0.45, -0.16, 0.16), 0.25, seat - 0.08, M.DARK),
        frustum((-0.1, 0.5, -0.18, 0.18), (0.0, 0.4, -0.13, 0.13), seat - 0.12, seat + 0.14, M.PAINT),
        frustum((-half - 0.15, 0.0, -0.15, 0.15), (-half - 0.2, -0.05, -0.12, 0.12), seat - 0.1, seat, M.DARK),
        block(-half - 0.28, -half + 0.15, -0.12, 0.12, seat - 0.22, seat - 0.1, M.PAINT),
        tube((half, 0, radius), (half - 0.25, 0, 1.0), 0.06, M.METAL, sides=4),
        tube((half - 0.25, -0.36, 1.02), (half - 0.25, 0.36, 1.02), 0.035, M.DARK, sides=4),
        block(half - 0.2, half - 0.02, -0.1, 0.1, 0.82, 1.0, M.HEADLIGHT),
        block(-half - 0.3, -half - 0.24, -0.1, 0.1, seat - 0.2, seat - 0.1, M.TAILLIGHT),
    ]
    return merge(parts + (_rider(-0.25, seat) if rider else []))


def bicycle(rng: Rng, rider: bool = False) -> Mesh:
    """Return a bicycle with open wheels."""
    half, radius = rng.uniform(0.5, 0.58), rng.uniform(0.31, 0.36)
    seat = rng.uniform(0.86, 0.98)
    parts = [ring(x, y, radius, radius, 0.78 * radius, M.TYRE) for x in (-half, half) for y in (-0.02, 0.02)]
    for a, b, material in (
        ((-half, 0, radius), (-0.15, 0, 0.35), M.PAINT),
        ((-0.15, 0, 0.3), (-0.22, 0, seat), M.PAINT),
        ((-0.15, 0, 0.33), (half - 0.17, 0, 0.75), M.PAINT),
        ((-0.2, 0, 0.75), (half - 0.17, 0, 0.8), M.PAINT),
        ((-half, 0, radius), (-0.2, 0, 0.75), M.PAINT),
        ((half, 0, radius), (half - 0.2, 0, 1.05), M.METAL),
        ((half - 0.2, -0.29, 1.05), (half - 0.2, 0.29, 1.05), M.DARK),
    ):
        parts.append(tube(a, b, 0.028, material, sides=4))
    parts.append(block(-0.36, -0.1, -0.08, 0.08, seat - 0.04, seat + 0.02, M.DARK))
    parts.append(block(-half - 0.2, -half - 0.1, -0.06, 0.06, 0.6, 0.7, M.TAILLIGHT))
    return merge(parts + (_rider(-0.22, seat) if rider else []))


def pedestrian(rng: Rng, height: tuple[float, float] = (1.58, 1.88), worker: bool = False) -> Mesh:
    """Return a person in mid-step; a worker wears a vest and a helmet."""
    stride = rng.uniform(0.05, 0.3)
    coat = M.ORANGE if worker else M.PAINT
    parts = [
        tube((stride, 0.1, 0.04), (0, 0.1, 0.85), 0.085, M.TRIM, sides=5),
        tube((-stride, -0.1, 0.04), (0, -0.1, 0.85), 0.085, M.TRIM, sides=5),
        block(stride - 0.08, stride + 0.16, 0.04, 0.16, 0, 0.1, M.DARK),
        block(-stride - 0.08, -stride + 0.16, -0.16, -0.04, 0, 0.1, M.DARK),
        frustum((-0.12, 0.12, -0.17, 0.17), (-0.13, 0.13, -0.23, 0.23), 0.8, 1.42, coat),
        tube((0, 0.25, 1.38), (-0.6 * stride, 0.27, 0.82), 0.055, coat, sides=4),
        tube((0, -0.25, 1.38), (0.6 * stride, -0.27, 0.82), 0.055, coat, sides=4),
        ellipsoid((0.02, 0, 1.57), (0.11, 0.1, 0.14), M.SKIN),
        ellipsoid((-0.02, 0, 1.63), (0.13, 0.12, 0.11), M.YELLOW if worker else M.DARK),
    ]
    if worker:
        parts.append(block(-0.14, 0.14, -0.22, 0.22, 1.0, 1.1, M.WHITE))
    if not worker and rng.random() < 0.3:
        parts.append(block(-0.3, -0.12, -0.16, 0.16, 1.0, 1.4, M.DARK))
    mesh = merge(parts)
    return mesh._replace(vertices=mesh.vertices * np.float32(rng.uniform(*height) / 1.74))


def child(rng: Rng) -> Mesh:
    """Return a small person."""
    return pedestrian(rng, (1.05, 1.4))


def worker(rng: Rng) -> Mesh:
    """Return a person in a safety vest."""
    return pedestrian(rng, worker=True)


def traffic_cone(rng: Rng) -> Mesh:
    """Return a cone with two white bands."""
    height, foot = rng.uniform(0.65, 1.0), rng.uniform(0.17, 0.22)
    parts = [block(-foot, foot, -foot, foot, 0, 0.05, M.DARK)]
    cuts = np.array([0.05, 0.38, 0.55, 0.7, 0.82, 1.0]) * height
    radii = 0.88 * foot * (1 - 0.85 * cuts / height)
    for k, material in enumerate((M.ORANGE, M.WHITE, M.ORANGE, M.WHITE, M.ORANGE)):
        parts.append(tube((0, 0, cuts[k]), (0, 0, cuts[k + 1]), radii[k], material, sides=8, end_radius=radii[k + 1]))
    return merge(parts)


def barrier(rng: Rng) -> Mesh:
    """Return a concrete, plastic or plank barrier. As in nuScenes its length is the short side: it faces +x."""
    width, height = rng.uniform(1.8, 2.7), rng.uniform(0.85, 1.1)
    style = rng.choice(3)
    half = width / 2
    if style == 2:
        parts = [block(-0.25, 0.25, y - 0.06, y + 0.06, 0, 0.08, M.DARK) for y in (-half + 0.2, half - 0.2)]
        parts += [block(-0.04, 0.04, y - 0.05, y + 0.05, 0, height, M.METAL) for y in (-half + 0.2, half - 0.2)]
        for z in (0.4, 0.72):
            edges = np.linspace(-half, half, 8)
            for k in range(7):
                material = M.WHITE if k % 2 else M.RED
                parts.append(block(-0.06, 0.06, edges[k], edges[k + 1], z * height, (z + 0.24) * height, material))
        return merge(parts)
    profile = [(-0.28, 0.0), (0.28, 0.0), (0.28, 0.1), (0.1, height), (-0.1, height), (-0.28, 0.1)]
    low, high = (M.CONCRETE, M.CONCRETE) if style == 0 else (M.RED, M.WHITE)
    if style == 0:
        mark = block(-0.16, 0.16, -0.25 * half, 0.25 * half, 0.6 * height, 0.75 * height, M.YELLOW)
        return merge([prism(profile, -half, half, low), mark])
    edges = np.linspace(-half, half, 4)
    return merge([prism(profile, edges[k], edges[k + 1], high if k == 1 else low) for k in range(3)])


BUILDERS: dict[str, Callable[[Rng], Mesh]] = {
    "vehicle.car": car,
    "vehicle.truck": truck,
    "vehicle.bus.rigid": bus,
    "vehicle.trailer": trailer,
    "vehicle.construction": construction_vehicle,
    "vehicle.motorcycle": motorcycle,
    "vehicle.bicycle": bicycle,
    "human.pedestrian.adult": pedestrian,
    "human.pedestrian.child": child,
    "human.pedestrian.construction_worker": worker,
    "movable_object.trafficcone": traffic_cone,
    "movable_object.barrier": barrier,
}


def build(category: str, rng: Rng, rider: bool = False) -> Mesh:
    """Build the mesh of a nuScenes category, standing on z = 0 and centred over the origin."""
    if rider:
        mesh = motorcycle(rng, True) if category == "vehicle.motorcycle" else bicycle(rng, True)
    else:
        mesh = BUILDERS[category](rng)
    low, high = mesh.extents()
    centre = (low + high) / 2
    return mesh.moved(-centre[0], -centre[1], -low[2])


def tree(rng: Rng) -> Mesh:
    """Return a deciduous tree or a conifer."""
    height = rng.uniform(4.5, 9.0)
    trunk = tube((0, 0, 0), (0, 0, 0.5 * height), 0.14 + 0.012 * height, M.BARK, end_radius=0.1)
    if rng.random() < 0.25:
        tiers = [(0.25, 0.65, 0.2), (0.45, 0.85, 0.16), (0.65, 1.0, 0.11)]
        cones = [tube((0, 0, a * height), (0, 0, b * height), r * height, M.LEAVES, sides=7, end_radius=0.05)
                 for a, b, r in tiers]  # fmt: skip
        return merge([trunk, *cones])
    crown = []
    for _ in range(5):
        offset = rng.uniform(-0.14, 0.14, 2) * height
        radius = rng.uniform(0.14, 0.24) * height
        centre = (offset[0], offset[1], rng.uniform(0.55, 0.8) * height)
        crown.append(ellipsoid(centre, (radius, radius, 0.85 * radius), M.LEAVES))
    return merge([trunk, *crown])


def street_lamp(rng: Rng) -> Mesh:
    """Return a lamp whose arm reaches to +x."""
    height = rng.uniform(5.5, 7.5)
    return merge([
        tube((0, 0, 0), (0, 0, height), 0.09, M.METAL, end_radius=0.06),
        tube((0, 0, height - 0.05), (1.6, 0, height + 0.15), 0.045, M.METAL, sides=4),
        block(1.3, 1.9, -0.14, 0.14, height + 0.03, height + 0.13, M.LAMP),
    ])  # fmt: skip


def traffic_light(green: bool) -> Mesh:
    """Return a signal that faces -x, so that traffic heading +x reads it."""
    lit = (M.LEAVES, M.LAMP) if green else (M.TAILLIGHT, M.DARK)
    return merge([
        tube((0, 0, 0), (0, 0, 3.4), 0.07, M.METAL),
        block(-0.14, 0.14, -0.17, 0.17, 2.4, 3.4, M.DARK),
        block(-0.17, -0.13, -0.1, 0.1, 3.1, 3.3, lit[0] if not green else M.DARK),
        block(-0.17, -0.13, -0.1, 0.1, 2.5, 2.7, lit[1]),
    ])  # fmt: skip


def sign(rng: Rng) -> Mesh:
    """Return a road sign that faces -x."""
    plate = rng.choice([M.RED, M.YELLOW, M.WHITE])
    return merge([
        tube((0, 0, 0), (0, 0, 2.6), 0.035, M.METAL, sides=5),
        block(-0.05, -0.03, -0.32, 0.32, 1.95, 2.6, M(int(plate))),
    ])  # fmt: skip


def litter_bin(rng: Rng) -> Mesh:
    """Return a bin: upright clutter that is no annotated class."""
    height = rng.uniform(0.8, 1.15)
    body = tube((0, 0, 0), (0, 0, height), 0.26, M.DARK, sides=8, end_radius=0.3)
    return merge([body, tube((0, 0, height), (0, 0, height + 0.08), 0.32, M.LEAVES, sides=8)])


def hedge(length: float, rng: Rng) -> Mesh:
    """Return a hedge along x."""
    height = rng.uniform(0.7, 1.4)
    return frustum((-length / 2, length / 2, -0.4, 0.4), (-length / 2, length / 2, -0.3, 0.3), 0, height, M.LEAVES)
