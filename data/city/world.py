"""One scene's world: streets, town and traffic, ready for ray casting."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data.city import ground as ground_module
from data.city import raycast, rig, town, traffic, weather
from data.city.footprints import Occupancy, corners
from data.city.mesh import GLOW, REFLECTIVITY, Material, Mesh, merge, vec
from data.city.roads import LANE, SIDE_MIDDLE, lay_roads
from data.city.traffic import Actor, Traffic

Array = NDArray[np.float64]

REACH = 85.0  # metres of street that are built and populated around the way of the ego vehicle


class World:
    """A world that is complete once built; time is its only argument. City frame: metres, x east, y north, z up."""

    def __init__(self, rng: np.random.Generator, duration: float) -> None:
        """Build the world of a scene that lasts `duration` seconds."""
        self.weather = weather.draw(rng)
        red = rng.random() < 0.2
        speed = 0.0 if red else rng.uniform(4.0, 9.5)
        extent = 2 * REACH + 10 + speed * duration
        half = (extent + 40) / 2  # half the length of the street
        start, end = half - speed * duration / 2, half + speed * duration / 2
        self.roads = lay_roads(rng, extent, start, end, red)
        self.extent = extent
        times = np.append(np.arange(-0.5, duration, 0.25), duration)
        self.traffic = self._ego(rng, start, speed)
        self._build(rng, times, (start - REACH, end + REACH))
        self._assemble()

    def _ego(self, rng: np.random.Generator, start: float, speed: float) -> Traffic:
        street = self.roads[0]
        lane = int(rng.integers(street.lanes))
        shell = Mesh(vec([[-2, -1, 0], [2, 1, 1]]), np.zeros((0, 3), np.int32), np.zeros(0, np.uint8))
        ego = Actor("", "", shell, np.zeros((0, 3), np.float32), 0, start, -(lane + 0.5) * LANE, speed)
        return Traffic(self.roads, float(rng.uniform(0, 2 * np.pi)), ego)

    def _build(self, rng: np.random.Generator, times: Array, near: tuple[float, float]) -> None:
        """Place everything: first what must stand where it stands, last what gives way."""
        roads, occupied = self.roads, Occupancy(len(times))
        middle = roads[0].at(sum(near) / 2)[:2]
        yards = town.yards(rng, roads, middle)
        plots = corners(yards, *town.YARD)
        self.ground = ground_module.paint(rng, self.extent, roads, plots, self.weather.wet)
        reserved = Occupancy(1)
        for plot in plots:
            reserved.add(plot[None])
        self.parts = town.buildings(rng, roads, self.ground, reserved)
        for footprint in reserved.taken()[len(plots) :]:
            occupied.add(footprint)
        poses = self.traffic.pose(self.traffic.ego, times)
        poses[:, :2] += traffic.EGO_CENTRE * np.stack([np.cos(poses[:, 2]), np.sin(poses[:, 2])], 1)
        occupied.add(corners(poses, traffic.EGO_SIZE[0] + 2.0, traffic.EGO_SIZE[1] + 0.6))
        self._populate(rng, occupied, times, near, yards)

    def _populate(
        self, rng: np.random.Generator, occupied: Occupancy, times: Array, near: tuple[float, float], yards: Array
    ) -> None:
        """Let furniture and actors in, in this order; `near` is the populated part of the street."""
        roads = self.roads

        def admit(wishes: list[Actor], kind: str) -> None:
            traffic.admit(self.traffic, wishes, self.ground, occupied, times, kind)

        if rng.random() < 0.45:
            admit(traffic.road_works(rng, roads, 0, (near[0] + 50, near[1] - 60)), "any")
        self.parts += town.furniture(rng, roads, self.ground, occupied)
        spans = [near] + [(SIDE_MIDDLE - 45, SIDE_MIDDLE + 45)] * (len(roads) - 1)
        for road, span in enumerate(spans):
            pace = (road == 0 and self.traffic.ego.speed) or rng.uniform(4, 8)
            admit(traffic.lane_traffic(rng, roads, road, span, pace), "street")
            admit(traffic.parked_row(rng, roads, road, span), "street")
            admit(traffic.people(rng, roads, road, span), "walk")
        admit(traffic.crossing_people(rng, roads), "street")
        admit(traffic.yard_vehicles(rng, roads, yards), "yard")

    def _assemble(self) -> None:
        """Merge the meshes into the still scene and the moving bodies, with one table of triangles for both."""
        actors = self.traffic.actors
        self.moving = [k for k, a in enumerate(actors) if a.speed]
        still = [k for k, a in enumerate(actors) if not a.speed]
        poses = self.traffic.poses(0.0)
        meshes = [town.pavements(self.roads, self.ground)] + [p.mesh for p in self.parts]
        town_faces = sum(len(m.faces) for m in meshes)
        placed = [actors[k].mesh.moved(poses[k, 0], poses[k, 1], actors[k].z, poses[k, 2]) for k in still]
        body = merge(meshes + placed)
        self._still, self._still_faces = raycast.build(body.vertices, body.faces), len(body.faces)
        order = [actors[k] for k in (*still, *self.moving)]
        self.bodies = raycast.Bodies([actors[k].mesh for k in self.moving]) if self.moving else None
        self.material = np.concatenate([body.materials[:town_faces], *(a.mesh.materials for a in order)])
        plain = town.plain(meshes[0]).colours
        colours = [plain, *(p.colours for p in self.parts), *(a.colours for a in order)]
        self.colour = np.concatenate(colours).astype(np.float32)
        self.actor_of_face = np.concatenate(
            [np.full(town_faces, -1), *(np.full(len(actors[k].mesh.faces), k) for k in (*still, *self.moving))]
        ).astype(np.int32)
        building = np.repeat(np.arange(len(meshes)), [len(m.faces) for m in meshes])
        self.building_of_face = np.zeros(len(self.material), np.int32)
        self.building_of_face[:town_faces] = building
        self.glow = GLOW[self.material]
        self.reflectivity = REFLECTIVITY[self.material] * (0.4 + 0.6 * self.colour.mean(1))
        self.is_ground = self.material == Material.GROUND
        self.heights = np.array([a.z for a in actors])

    def snapshot(self, time: float) -> raycast.Snapshot:
        """Return the scene as it is at a time in seconds."""
        moving = None
        if self.bodies is not None:
            poses = self.traffic.poses(time)[self.moving]
            moving = raycast.build(self.bodies.at(poses, self.heights[self.moving]), self.bodies.faces)
        return raycast.Snapshot(self._still, self._still_faces, moving)

    def ego_pose(self, time: float) -> Array:
        """Return city_SE3_ego at a time in seconds, [4, 4]."""
        x, y, yaw = self.traffic.pose(self.traffic.ego, np.array([time]))[0]
        return rig.planar(x, y, 0.0, yaw)

    def boxes(self, time: float) -> Array:
        """Return the actors' boxes [N, 7]: centre x, y, z, length, width, height, yaw, in the city frame."""
        poses = self.traffic.poses(time)
        extents = np.array([a.extents for a in self.traffic.actors]).reshape(-1, 3)
        z = self.heights + extents[:, 2] / 2
        return np.concatenate([poses[:, :2], z[:, None], extents, poses[:, 2:]], 1)

    def velocities(self, time: float) -> Array:
        """Return the actors' velocities [N, 2] in m/s, city frame."""
        step = 0.01
        return (self.traffic.poses(time + step)[:, :2] - self.traffic.poses(time - step)[:, :2]) / (2 * step)
