"""Ray casting against the still and the moving part of a scene."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore_scene import EmbreeScene
from numpy.typing import NDArray

from data.city.mesh import Mesh

Array = NDArray[np.float32]
FAR = np.float32(400.0)  # range in metres beyond which there is only sky


class Hits(NamedTuple):
    """What R rays met first."""

    distance: Array  # [R] metres along unit rays; FAR where nothing
    face: NDArray[np.int32]  # [R] index into the scene's triangles, -1 where nothing
    normal: Array  # [R, 3] unit, towards the ray's origin


def build(vertices: Array, faces: NDArray[np.int32]) -> EmbreeScene:
    """Return an Embree scene of one mesh."""
    scene = EmbreeScene()
    TriangleMesh(scene, np.ascontiguousarray(vertices, np.float32), np.ascontiguousarray(faces, np.int32))
    return scene


class Snapshot:
    """The scene at one instant: still triangles first, then those of moving bodies."""

    def __init__(self, still: EmbreeScene, still_faces: int, moving: EmbreeScene | None) -> None:
        self._still, self._offset, self._moving = still, still_faces, moving

    def cast(self, origins: Array, directions: Array) -> Hits:
        """Cast unit rays: origins [R, 3], directions [R, 3], metres in the city frame."""
        reach = np.full(len(origins), FAR, np.float32)
        found = self._still.run(origins, directions, dists=reach, output=True)
        distance, face, normal = found["tfar"], found["primID"], found["Ng"]
        if self._moving is not None:
            nearer = self._moving.run(origins, directions, dists=distance, output=True)
            hit = np.flatnonzero(nearer["primID"] >= 0)
            distance[hit] = nearer["tfar"][hit]
            face[hit] = nearer["primID"][hit] + self._offset
            normal[hit] = nearer["Ng"][hit]
        normal[face < 0] = (0, 0, 1)  # Embree leaves what missed uninitialised
        normal /= np.sqrt(np.einsum("ij,ij->i", normal, normal))[:, None]
        away = np.einsum("ij,ij->i", normal, directions) > 0
        normal[away] *= -1
        return Hits(distance, face, normal)

    def shadowed(self, origins: Array, direction: Array) -> NDArray[np.bool_]:
        """Whether anything stands between origins [R, 3] and a light in that direction [3]."""
        directions = np.ascontiguousarray(np.broadcast_to(direction, origins.shape))
        dark = self._still.run(origins, directions, query="OCCLUDED") >= 0
        if self._moving is not None:
            dark |= self._moving.run(origins, directions, query="OCCLUDED") >= 0
        return dark


class Bodies:
    """Meshes that move rigidly in the plane, kept as one vertex array."""

    def __init__(self, meshes: list[Mesh]) -> None:
        counts = [len(m.vertices) for m in meshes]
        self._owner = np.repeat(np.arange(len(meshes)), counts)
        starts = np.cumsum([0, *counts[:-1]])
        self._vertices = np.concatenate([m.vertices for m in meshes])
        self.faces = np.concatenate([m.faces + start for m, start in zip(meshes, starts, strict=True)]).astype(np.int32)

    def at(self, poses: NDArray[np.float64], heights: NDArray[np.float64]) -> Array:
        """Return all vertices with body k at poses[k] (x, y, yaw) and height heights[k]."""
        c, s = np.cos(poses[:, 2])[self._owner], np.sin(poses[:, 2])[self._owner]
        x, y, z = self._vertices.T
        place = poses[self._owner]
        moved = (c * x - s * y + place[:, 0], s * x + c * y + place[:, 1], z + heights[self._owner])
        return np.stack(moved, 1).astype(np.float32)
