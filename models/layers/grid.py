"""The square bird's-eye-view grid that every model and target shares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """A square BEV grid centred on the LiDAR.

    Dense maps are `[..., H=y, W=x]`; cell `(iy, ix)` covers x from `-range + ix * cell` on, and y alike.
    """

    range: float  # half the side of the square, metres
    cell: float  # side of a cell, metres
    z: tuple[float, float] = (-5.0, 3.0)  # lowest and highest point that counts, metres

    def __post_init__(self) -> None:
        object.__setattr__(self, "z", tuple(self.z))
        if self.cell <= 0 or abs(2 * self.range / self.cell - self.size) > 1e-6 or self.size < 1:
            raise ValueError(
                f"grid: range {self.range} m does not hold a whole number of cells of {self.cell} m: "
                "2 * range must be a multiple of cell"
            )
        if len(self.z) != 2 or self.z[0] >= self.z[1]:
            raise ValueError(f"grid: z {self.z} must be [low, high] in metres with low < high")

    @property
    def size(self) -> int:
        """Cells along a side."""
        return round(2 * self.range / self.cell)

    @property
    def point_cloud_range(self) -> list[float]:
        """mmdet3d's `[x_min, y_min, z_min, x_max, y_max, z_max]`."""
        return [-self.range, -self.range, self.z[0], self.range, self.range, self.z[1]]

    def to_cells(self, xy: Tensor) -> Tensor:
        """Metres `[..., 2]` to continuous cell coordinates `[..., 2]`; cell i covers [i, i + 1)."""
        return (xy + self.range) / self.cell

    def centers(self, device: torch.device | None = None) -> Tensor:
        """Cell centres `[H, W, 2]` (x, y) in metres."""
        axis = (torch.arange(self.size, device=device) + 0.5) * self.cell - self.range
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        return torch.stack([x, y], dim=-1)
