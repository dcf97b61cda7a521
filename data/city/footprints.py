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
    return np.stack(
        [centre + along + across, centre - along + across, centre - along - across, centre + along - across], -2
    )


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
        self.times, self._count = times, 0
        self._corners = np.empty((64, times, 4, 2))
        self._radii = np.empty(64)

    def free(self, footprint: Array) -> bool:
        """Whether a footprint [T or 1, 4, 2] meets none that is already there, at any time."""
        others = self.taken()
        centre = (footprint[:, 0] + footprint[:, 2]) / 2
        apart = (others[:, :, 0] + others[:, :, 2]) / 2 - centre
        reach = np.linalg.norm(footprint[0, 0] - centre[0]) + self._radii[: self._count]
        near = np.flatnonzero((apart**2).sum(-1).min(-1) < reach**2)
        return len(near) == 0 or not overlap(footprint, others[near]).any()

    def add(self, footprint: Array) -> None:
        """Claim a footprint [T or 1, 4, 2]."""
        if self._count == len(self._radii):
            self._corners = np.concatenate([self._corners, np.empty_like(self._corners)])
            self._radii = np.concatenate([self._radii, np.empty_like(self._radii)])
        self._corners[self._count] = footprint
        self._radii[self._count] = np.linalg.norm(footprint[0, 0] - footprint[0, 2]) / 2
        self._count += 1

    def taken(self) -> Array:
        """Return all footprints, [N, T, 4, 2]."""
        return self._corners[: self._count]
