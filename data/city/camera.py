"""Pictures of the six cameras: ray cast, shaded, hazy and slightly noisy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.city.mesh import Material, vec
from data.city.raycast import Bodies, Hits, Snapshot, build
from data.city.rig import Sensor
from data.city.weather import Weather
from data.city.world import World

Array = NDArray[np.float32]

_FLOOR = np.float32(3.1)  # metres between the rows of windows
_SHADOW_RANGE = 60.0


class Pictures(NamedTuple):
    """What six cameras see at one instant."""

    images: NDArray[np.uint8]  # [6, H, W, 3] RGB
    actors: NDArray[np.int32]  # [6, H, W] index of the actor, -1 where none
    origins: Array  # [6, 3] camera centres in the city frame
    directions: Array  # [6, H, W, 3] unit rays in the city frame


def pixel_rays(cameras: list[Sensor], image: tuple[int, int]) -> Array:
    """Return unit rays through the pixels' centres in the ego frame, [6, H, W, 3].

    The centre of pixel (row, column) is at image coordinates (column, row), as the devkit draws boxes.
    """
    height, width = image
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    rays = []
    for camera in cameras:
        assert camera.intrinsic is not None
        k = camera.intrinsic
        d = np.stack([(columns - k[0, 2]) / k[0, 0], (rows - k[1, 2]) / k[1, 1], np.ones(image)], -1)
        rays.append(d / np.linalg.norm(d, axis=-1, keepdims=True) @ camera.rotation.T)
    return np.stack(rays).astype(np.float32)


class Renderer:
    """Renders the pictures of one scene."""

    def __init__(self, world: World, cameras: list[Sensor], image: tuple[int, int], rng: np.random.Generator) -> None:
        self.world, self.cameras, self.image = world, cameras, image
        self._rays = pixel_rays(cameras, image)
        self._pixel = np.float32(1 / np.mean([c.intrinsic[0, 0] for c in cameras if c.intrinsic is not None]))
        self._noise = rng.normal(0, world.weather.noise, 6 * image[0] * image[1] * 3 + 4096).astype(np.float32)
        self._clouds = _cloud_map(rng)
        self._rng = rng

    def render(self, snapshot: Snapshot, city_SE3_ego: NDArray[np.float64]) -> Pictures:
        """Render all cameras from an ego pose [4, 4]."""
        rotation = city_SE3_ego[:3, :3].astype(np.float32)
        directions = self._rays @ rotation.T
        origins = np.stack([city_SE3_ego[:3, :3] @ c.translation + city_SE3_ego[:3, 3] for c in self.cameras])
        origins = origins.astype(np.float32)
        flat = np.ascontiguousarray(directions.reshape(-1, 3))
        starts = np.repeat(origins, self.image[0] * self.image[1], axis=0)
        hits = snapshot.cast(starts, flat)
        colours = self._shade(snapshot, starts, flat, hits)
        start = int(self._rng.integers(4096))
        noisy = colours.reshape(-1) * np.float32(255) + self._noise[start : start + colours.size]
        images = noisy.clip(0, 255).astype(np.uint8).reshape(6, *self.image, 3)
        actors = np.where(hits.face < 0, -1, self.world.actor_of_face[hits.face]).reshape(6, *self.image)
        return Pictures(images, actors, origins, directions)

    def _shade(self, snapshot: Snapshot, starts: Array, directions: Array, hits: Hits) -> Array:
        """Return colours [R, 3] around 0-1."""
        missed = hits.face < 0
        picture = np.empty_like(directions)
        picture[missed] = self._sky(directions[missed])
        seen = np.flatnonzero(~missed)
        points = starts[seen] + directions[seen] * hits.distance[seen, None]
        normals, faces = hits.normal[seen], hits.face[seen]
        albedo, glow = self._surface(points, normals, faces, hits.distance[seen], directions[seen])
        weather = self.world.weather
        facing = (normals @ weather.sun).clip(0)
        lit = np.flatnonzero((facing > 0) & (hits.distance[seen] < _SHADOW_RANGE))
        dark = snapshot.shadowed(points[lit] + normals[lit] * np.float32(0.02), weather.sun)
        facing[lit[dark]] = 0
        light = facing[:, None] * weather.sunlight + (0.62 + 0.38 * normals[:, 2:]) * weather.ambient
        colours = albedo * (light + glow[:, None])
        clear = np.exp(-hits.distance[seen] / np.float32(weather.visibility))[:, None]
        picture[seen] = colours * clear + weather.horizon * (1 - clear)
        return picture

    def _sky(self, directions: Array) -> Array:
        """Return the colour of the sky in every direction, [R, 3]."""
        weather = self.world.weather
        up = directions[:, 2].clip(0)
        blend = np.sqrt(up)[:, None]
        colours = weather.horizon * (1 - blend) + weather.zenith * blend
        high = np.flatnonzero(directions[:, 2] > 0.01)
        plane = directions[high, :2] / (up[high, None] + np.float32(0.12)) * np.float32(60)
        cells = plane.astype(np.int32) % 512
        cover = self._clouds[cells[:, 0], cells[:, 1]] * np.float32(weather.clouds)
        white = (weather.horizon + np.float32(0.12)).clip(0, 1)
        colours[high] += (white - colours[high]) * cover[:, None]
        return colours

    def _surface(
        self, points: Array, normals: Array, faces: NDArray[np.int32], distance: Array, rays: Array
    ) -> tuple[Array, Array]:
        """Return albedo [R, 3] and own light [R] of surfaces seen at points [R, 3]."""
        world = self.world
        albedo = world.colour[faces]
        glow = world.glow[faces] * np.float32(0.25 + world.weather.lights)
        material = world.material[faces]
        ground = np.flatnonzero(material == Material.GROUND)
        slope = np.maximum(-rays[ground, 2], np.float32(0.02))
        # Between the widths across and along the ray: sharp far lines would flicker, blurred near ones vanish.
        footprint = distance[ground] * self._pixel / slope ** np.float32(0.75)
        albedo[ground] = world.ground.colour(points[ground, :2], footprint)
        kerb = ground[normals[ground, 2] < 0.5]
        albedo[kerb] = vec([0.66, 0.65, 0.63])
        walls = np.flatnonzero(material == Material.FACADE)
        shade, lit = _facade(points[walls], normals[walls], world.building_of_face[faces[walls]], world.weather)
        albedo[walls] = np.where(shade[:, :1] < 0, albedo[walls] * -shade[:, :1], shade)
        glow[walls] += lit
        leaves = np.flatnonzero(material == Material.LEAVES)
        albedo[leaves] *= (0.75 + 0.5 * _hash(np.floor(points[leaves] * 5) @ vec([1.7, 5.3, 11.9])))[:, None]
        glass = np.flatnonzero((material == Material.GLASS) | (material == Material.PAINT))
        reflected = rays[glass] - 2 * np.einsum("ij,ij->i", rays[glass], normals[glass])[:, None] * normals[glass]
        mirror = np.where(material[glass] == Material.GLASS, 0.35, 0.07)[:, None] * (reflected[:, 2:] > 0)
        albedo[glass] += mirror.astype(np.float32) * world.weather.horizon
        return albedo, glow


def _hash(values: Array) -> Array:
    """Return numbers in 0-1 that look random, the same for the same values."""
    return np.abs(np.sin(values * np.float32(12.9898)) * np.float32(437.585)) % np.float32(1)


def _facade(points: Array, normals: Array, building: NDArray[np.int32], weather: Weather) -> tuple[Array, Array]:
    """Return what windows do to walls: their colours [R, 3], or minus a factor on the wall; and their light [R]."""
    style = _hash(building.astype(np.float32))
    pitch = 2.2 + 2.2 * style
    along = points[:, 0] * -normals[:, 1] + points[:, 1] * normals[:, 0]
    column, row = along / pitch, points[:, 2] / _FLOOR
    u, v = column - np.floor(column), row - np.floor(row)
    shop = (row < 1) & (style > 0.35)
    margin = np.where(shop, 0.06, 0.18 + 0.12 * _hash(style * 7))
    window = (u > margin) & (u < 1 - margin) & (v > np.where(shop, 0.12, 0.28)) & (v < 0.82)
    number = _hash(np.floor(column) * 3.1 + np.floor(row) * 7.7 + building)
    glass = (0.12 + 0.22 * number)[:, None] * vec([0.8, 0.95, 1.1])
    lit = window & (number > 1 - 0.55 * weather.lights)
    glass = np.where(lit[:, None], vec([0.95, 0.82, 0.5]), glass)
    wall = np.where((v < 0.06) & (row > 0.5), -0.8, -1.0 + 0.08 * _hash(np.floor(points[:, 2] * 4) + building))
    wall = np.where(shop & ~window, wall * 0.75, wall)
    return np.where(window[:, None], glass, wall[:, None]).astype(np.float32), np.where(lit, 0.6, 0).astype(np.float32)


def _cloud_map(rng: np.random.Generator) -> Array:
    """Return a field of cloud cover in 0-1 that tiles, [512, 512]."""
    rows, columns = np.fft.fftfreq(512)[:, None], np.fft.rfftfreq(512)
    spectrum = 1 / (np.hypot(rows, columns) + 0.004) ** 1.7
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((512, 512))) * spectrum)
    return (0.35 + 0.5 * (field - field.mean()) / field.std()).clip(0, 1).astype(np.float32)


def visible_fractions(
    world: World,
    boxes: NDArray[np.float64],
    pictures: Pictures,
    cameras: list[Sensor],
    city_SE3_ego: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Measure how much of every actor is seen, over all cameras.

    Every pixel whose ray meets an actor's box in the camera's picture is cast again against that actor alone, as if
    nothing stood before it. Each actor alone is in a layer of its own, far above the others, so one cast does all.

    Returns:
        Visible pixels over unoccluded pixels, [N], 0 where an actor is in no picture; and the visible pixels [N].
    """

    count = len(boxes)
    seen = np.bincount(pictures.actors[pictures.actors >= 0].ravel(), minlength=count)
    rays, owners = _box_rays(boxes, pictures, cameras, city_SE3_ego)
    if len(owners) == 0:
        return np.zeros(count), seen
    layer = 300.0
    used, inverse = np.unique(owners, return_inverse=True)
    bodies = Bodies([world.traffic.actors[k].mesh for k in used])
    poses = boxes[used][:, [0, 1, 6]]
    scene = build(bodies.at(poses, world.heights[used] + layer * np.arange(len(used))), bodies.faces)
    camera = rays // (pictures.directions.shape[1] * pictures.directions.shape[2])
    origins = pictures.origins[camera]
    origins[:, 2] += layer * inverse.astype(np.float32)
    directions = np.ascontiguousarray(pictures.directions.reshape(-1, 3)[rays])
    hit = scene.run(np.ascontiguousarray(origins), directions, dists=np.full(len(rays), 150, np.float32)) >= 0
    visible = pictures.actors.reshape(-1)[rays] == owners
    whole = np.bincount(owners[hit], minlength=count)
    open_ = np.bincount(owners[hit & visible], minlength=count)
    return np.divide(open_, whole, out=np.zeros(count), where=whole > 0), seen


def _box_rays(
    boxes: NDArray[np.float64],
    pictures: Pictures,
    cameras: list[Sensor],
    city_SE3_ego: NDArray[np.float64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the pixels (flat index over cameras, rows, columns) inside the boxes' outlines, and whose they are.

    Large outlines are sampled on every second or fourth row and column.
    """
    _, height, width = pictures.actors.shape
    rays, owners = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for k, camera in enumerate(cameras):
        rectangles = outlines(boxes, camera, city_SE3_ego, (height, width))
        near = np.linalg.norm(boxes[:, :2] - city_SE3_ego[:2, 3], axis=1) < 90
        inside = (rectangles[:, 2] > rectangles[:, 0]) & (rectangles[:, 3] > rectangles[:, 1]) & near
        for actor in np.flatnonzero(inside):
            x0, y0, x1, y1 = rectangles[actor]
            area = (x1 - x0) * (y1 - y0)
            step = 1 if area < 600 else 2 if area < 4000 else 4
            grid = np.arange(y0, y1, step)[:, None] * width + np.arange(x0, x1, step) + k * height * width
            rays.append(grid.ravel())
            owners.append(np.full(grid.size, actor))
    return np.concatenate(rays), np.concatenate(owners)


def outlines(
    boxes: NDArray[np.float64],
    camera: Sensor,
    city_SE3_ego: NDArray[np.float64],
    image: tuple[int, int],
) -> NDArray[np.int64]:
    """Return pixel rectangles x0, y0, x1, y1 [N, 4] around projected boxes [N, 7], clipped; empty where out of view."""
    assert camera.intrinsic is not None
    signs = np.array([[i, j, k] for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)]) / 2
    local = signs * boxes[:, None, 3:6]
    c, s = np.cos(boxes[:, 6:7]), np.sin(boxes[:, 6:7])
    turned = np.stack([c * local[..., 0] - s * local[..., 1], s * local[..., 0] + c * local[..., 1], local[..., 2]], -1)
    camera_SE3_city = np.linalg.inv(city_SE3_ego @ camera.ego_SE3_sensor)
    points = (turned + boxes[:, None, :3]) @ camera_SE3_city[:3, :3].T + camera_SE3_city[:3, 3]
    depth = points[..., 2]
    pixels = points @ camera.intrinsic.T
    pixels = pixels[..., :2] / np.maximum(depth, 0.05)[..., None]
    low, high = np.floor(pixels.min(1)), np.ceil(pixels.max(1)) + 1
    limit = np.array([image[1], image[0]])
    rectangle = np.concatenate([low.clip(0, limit), high.clip(0, limit)], 1)
    rectangle[depth.max(1) < 0.1] = 0
    return rectangle.astype(np.int64)
