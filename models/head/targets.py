"""CenterPoint targets: boxes to Gaussian heatmaps and regression codes, for all boxes of a batch at once.

Yin, Zhou, Kraehenbuehl, "Center-based 3D Object Detection and Tracking", CVPR 2021; numerically equal to
mmdet3d's `CenterHead.get_targets`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers.grid import Grid

# Channels of a task's regression maps, in the order of the code: offset in the cell, height of the centre, log size,
# sine and cosine of yaw, velocity.
REGRESSION = {"reg": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2}
CODE_SIZE = sum(REGRESSION.values())


class Targets(NamedTuple):
    """Dense and per-object targets; B samples, C classes, T tasks, K object slots per task."""

    heatmap: Tensor  # [B, C, H, W]
    code: Tensor  # [B, T, K, 10]; velocities may be NaN
    cell: Tensor  # [B, T, K] int64, y * W + x
    valid: Tensor  # [B, T, K] bool


class EncodedBoxes(NamedTuple):
    """Boxes on the grid, still flat."""

    code: Tensor  # [M, 10]
    column_row: Tensor  # [M, 2] int64, ix and iy of the centre's cell
    radius: Tensor  # [M] int64, Gaussian radius in cells
    inside: Tensor  # [M] bool, the centre is on the grid and the size is positive


def gaussian_radius(length: Tensor, width: Tensor, min_overlap: float) -> Tensor:
    """Radius [M] within which a shifted box keeps the overlap (the released CornerNet formula, as mmdet3d has it)."""
    total, area = length + width, length * width

    def root(a: float, b: Tensor, c: Tensor) -> Tensor:
        return (b + torch.sqrt(b**2 - 4 * a * c)) / 2

    inner = root(1.0, total, area * (1 - min_overlap) / (1 + min_overlap))
    outer = root(4.0, 2 * total, (1 - min_overlap) * area)
    shifted = root(4 * min_overlap, -2 * min_overlap * total, (min_overlap - 1) * area)
    return torch.minimum(torch.minimum(inner, outer), shifted)


def draw_gaussians(column_row: Tensor, radius: Tensor, plane: Tensor, peak: Tensor, planes: int, size: int) -> Tensor:
    """Maximum of all Gaussians of each plane.

    Args:
        column_row: [M, 2] int64 cell of each centre, on the grid.
        radius: [M] int64, cells; the Gaussian ends there and has sigma (2 radius + 1) / 6.
        plane: [M] int64, plane of the output that a Gaussian belongs to.
        peak: [M] value at the centre.
        planes: number of planes.
        size: cells along a side.

    Returns:
        [planes, size, size] float32.
    """
    canvas = peak.new_zeros(planes * size * size, dtype=torch.float32)
    if len(radius) == 0:
        return canvas.view(planes, size, size)
    reach = torch.arange(-int(radius.max()), int(radius.max()) + 1, device=radius.device)
    dy, dx = (axis.flatten() for axis in torch.meshgrid(reach, reach, indexing="ij"))
    x, y = column_row[:, :1] + dx, column_row[:, 1:] + dy
    drawn = (torch.maximum(dx.abs(), dy.abs()) <= radius[:, None]) & (x >= 0) & (x < size) & (y >= 0) & (y < size)
    # In float64 as mmdet3d's numpy kernel, so that heatmaps are equal to the last bit.
    sigma = (2 * radius[:, None] + 1).double() / 6
    value = torch.exp(-(dx**2 + dy**2) / (2 * sigma * sigma)).float() * peak[:, None]
    position = (plane[:, None] * size + y) * size + x
    return canvas.scatter_reduce(0, position[drawn], value[drawn], "amax").view(planes, size, size)


def flatten_boxes(boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes of all samples as [M, 9], labels [M] and sample numbers [M]."""
    counts = torch.tensor([len(sample) for sample in boxes], device=boxes[0].device)
    sample = torch.arange(len(boxes), device=counts.device).repeat_interleave(counts)
    return torch.cat(list(boxes)).float(), torch.cat(list(labels)).long(), sample


@dataclass(frozen=True)
class TargetEncoder:
    """Turns boxes into targets on a grid."""

    grid: Grid
    task_sizes: tuple[int, ...]  # classes of each task; labels count through the tasks
    min_radius: tuple[int, ...]  # least Gaussian radius of each class, cells
    min_overlap: float = 0.1  # overlap that a box shifted by the Gaussian radius keeps
    max_objects: int = 500  # object slots per task and sample; further boxes keep their heatmap peaks out as well
    norm_bbox: bool = True  # regress the logarithm of the size
    task_of_class: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        if len(self.min_radius) != self.classes:
            raise ValueError(
                f"min_radius has {len(self.min_radius)} entries for {self.classes} classes: "
                "give one number, or one per class"
            )
        tasks = tuple(task for task, size in enumerate(self.task_sizes) for _ in range(size))
        object.__setattr__(self, "task_of_class", tasks)

    @property
    def classes(self) -> int:
        """Number of classes over all tasks."""
        return sum(self.task_sizes)

    @property
    def task_channels(self) -> list[int]:
        """Channels of each task in the tap `head`: its code, then its heatmaps."""
        return [CODE_SIZE + classes for classes in self.task_sizes]

    def encode(self, boxes: Tensor, labels: Tensor) -> EncodedBoxes:
        """Codes, cells and radii of boxes [M, 9] with labels [M]."""
        center = self.grid.to_cells(boxes[:, :2])
        # Truncation, not floor, as mmdet3d has it: centres less than a cell outside the low edges count as inside.
        column_row = center.long()
        size = boxes[:, 3:6]
        inside = ((column_row >= 0) & (column_row < self.grid.size)).all(1) & (size[:, :2] > 0).all(1)
        radius = gaussian_radius(size[:, 0] / self.grid.cell, size[:, 1] / self.grid.cell, self.min_overlap)
        least = torch.tensor(self.min_radius, device=boxes.device)[labels]
        yaw = boxes[:, 6:7]
        code = torch.cat(
            [
                center - column_row,
                boxes[:, 2:3] + size[:, 2:3] * 0.5,
                size.log() if self.norm_bbox else size,
                yaw.sin(),
                yaw.cos(),
                boxes[:, 7:9],
            ],
            dim=1,
        )
        return EncodedBoxes(code, column_row, torch.maximum(radius.nan_to_num(0).long(), least), inside)

    def heatmap(self, encoded: EncodedBoxes, labels: Tensor, sample: Tensor, batch_size: int, peak: Tensor) -> Tensor:
        """Heatmaps [B, C, H, W] of encoded boxes whose Gaussians rise to `peak` [M]."""
        keep = encoded.inside
        plane = sample * self.classes + labels
        drawn = draw_gaussians(
            encoded.column_row[keep],
            encoded.radius[keep],
            plane[keep],
            peak[keep],
            batch_size * self.classes,
            self.grid.size,
        )
        return drawn.view(batch_size, self.classes, self.grid.size, self.grid.size)

    def __call__(self, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> Targets:
        """Targets of a batch: lists of [M, 9] boxes and [M] labels, one per sample."""
        batch_size, tasks = len(boxes), len(self.task_sizes)
        flat_boxes, flat_labels, sample = flatten_boxes(boxes, labels)
        # mmdet3d fills a task's slots class by class, boxes in their given order inside a class.
        order = (sample * self.classes + flat_labels).argsort(stable=True)
        flat_boxes, flat_labels, sample = flat_boxes[order], flat_labels[order], sample[order]
        group = sample * tasks + torch.tensor(self.task_of_class, device=sample.device)[flat_labels]
        first = F.pad(torch.bincount(group, minlength=batch_size * tasks).cumsum(0), (1, 0))
        slot = torch.arange(len(group), device=group.device) - first[group]
        keep = slot < self.max_objects
        flat_boxes, flat_labels, sample, group, slot = (
            values[keep] for values in (flat_boxes, flat_labels, sample, group, slot)
        )

        encoded = self.encode(flat_boxes, flat_labels)
        heatmap = self.heatmap(encoded, flat_labels, sample, batch_size, torch.ones_like(flat_boxes[:, 0]))
        inside = encoded.inside
        where = (group[inside], slot[inside])
        code = flat_boxes.new_zeros(batch_size * tasks, self.max_objects, CODE_SIZE)
        code[where] = encoded.code[inside]
        cell = group.new_zeros(batch_size * tasks, self.max_objects)
        cell[where] = encoded.column_row[inside, 1] * self.grid.size + encoded.column_row[inside, 0]
        valid = torch.zeros_like(cell, dtype=torch.bool)
        valid[where] = True
        shape = (batch_size, tasks, self.max_objects)
        return Targets(heatmap, code.view(*shape, CODE_SIZE), cell.view(shape), valid.view(shape))
