"""Footprints of upright bodies, and whether they overlap."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def corners(poses: Array, length: Array | float, width: Array | float) -> Array:
    """Return the corners [..., 4, 2] of rectangles at poses [..., 3] (x, y, yaw)."""
    c, s = np.cos(poses[..., 2]), np.sin(poses[..., 2])
    along = np.stack([c, s], -1) * np.asarray(length)[..., None] / 2
    across = np.stack([-s, c], -1) * np.asarray(width)[..., None] / 2
    centre = poses[..., :2]
    return np.stack([centre + along + across, centre - along + across, centre - along - across, centre + along - across], -2)


def overlap(a: Array, b: Array) -> NDArray[np.bool_]:
    """Whether rectangles overlap: corners [..., 4, 2] against [..., 4, 2], by separating axes."""
    separated = np.zeros(np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), bool)
    for shape in (a, b):
        for k in (0, 1):
            axis = shape[..., k + 1, :] - shape[..., k, :]
            p, q = (np.einsum("...ij,...j->...i", v, axis) for v in (a, b))
            separated |= (p.max(-1) < q.min(-1)) | (q.max(-1) < p.min(-1))
    return ~separated


class Occupancy:
    """Bodies that are already placed, each with its footprint at every checked time."""

    def __init__(self, times: int) -> None:
        self.times = times
        self._corners: list[Array] = []

    def free(self, footprint: Array) -> bool:
        """Whether a footprint [T or 1, 4, 2] meets none that is already there, at any time."""
        if not self._corners:
            return True
        others = np.stack(self._corners)
        centre, other_centres = footprint.mean(-2), others.mean(-2)
        radius = np.linalg.norm(footprint[0, 0] - centre[0])
        radii = np.linalg.norm(others[:, 0, 0] - other_centres[:, 0], axis=-1)
        gap = np.linalg.norm(other_centres - centre, axis=-1).min(-1)
        near = np.flatnonzero(gap < radius + radii)
        return len(near) == 0 or not overlap(footprint, others[near]).any()

    def add(self, footprint: Array) -> None:
        """Claim a footprint [T or 1, 4, 2]."""
        self._corners.append(np.broadcast_to(footprint, (self.times, 4, 2)))

    def taken(self) -> Array:
        """Return all footprints, [N, T, 4, 2]."""
        return np.stack(self._corners) if self._corners else np.empty((0, self.times, 4, 2))
