"""CenterPoint's head, with targets, loss and decoding that work on all boxes of a batch at once.

Yin, Zhou, Kraehenbuehl, CVPR 2021. Weights have the names of mmdet3d's CenterHead, whose import costs seconds
(models.layers.registry).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule
from torch import Tensor, nn

from models.head.targets import REGRESSION, TargetEncoder, Targets
from models.layers.grid import Grid
from models.layers.processes import across_processes, divisor
from models.layers.registry import MODELS
from models.ports import Detections

MAX_LOG_SIZE = 5.0  # log of the largest box side that decoding returns (148 m): an untrained head must not overflow


@MODELS.register_module()
class JointTaskHead(BaseModule):
    """A task head whose branches share one hidden layer and one output convolution.

    `SeparateHead` runs a pair of 3x3 convolutions per branch; with six tasks of six branches those are most of a
    small detector's cost. Takes the arguments of `SeparateHead`.
    """

    def __init__(
        self,
        in_channels: int,
        heads: dict[str, tuple[int, int]],
        head_conv: int = 32,
        init_bias: float = -2.19,
        norm_cfg: dict[str, Any] | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(init_cfg={"type": "Kaiming", "layer": "Conv2d"})
        self.channels = {name: channels for name, (channels, _) in heads.items()}
        self.init_bias = init_bias
        self.hidden = ConvModule(
            in_channels, head_conv, 3, padding=1, bias=False, norm_cfg=norm_cfg or {"type": "BN2d"}
        )
        self.output = nn.Conv2d(head_conv, sum(self.channels.values()), 1)

    def init_weights(self) -> None:
        """Kaiming; small outputs, and a heatmap bias at which a cell is rarely an object."""
        super().init_weights()
        nn.init.normal_(self.output.weight, std=0.01)
        bias = [self.init_bias if name == "heatmap" else 0.0 for name, n in self.channels.items() for _ in range(n)]
        self.output.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Maps [B, channels, H, W] by name, of a feature map [B, in_channels, H, W]."""
        maps = self.output(self.hidden(x)).split(list(self.channels.values()), dim=1)
        return dict(zip(self.channels, maps, strict=True))


def per_class(value: Any, classes: int) -> tuple[Any, ...]:
    """One number for all classes, or one per class, as one per class."""
    return tuple(value) if isinstance(value, Sequence) else (value,) * classes


def gaussian_focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """CenterNet's focal loss (alpha 2, beta 4) per cell, from logits; positives are the cells whose target is 1."""
    log_p, log_q = F.logsigmoid(logits), F.logsigmoid(-logits)
    p = logits.sigmoid()
    positive = -((1 - p) ** 2) * log_p
    negative = -((1 - target) ** 4) * p**2 * log_q
    return torch.where(target == 1, positive, negative)


def gather_cells(maps: Tensor, cell: Tensor) -> Tensor:
    """Values [..., K, C] of maps [..., C, H, W] at cells [..., K] (y * W + x)."""
    flat = maps.flatten(-2)
    index = cell.unsqueeze(-2).expand(*flat.shape[:-1], cell.shape[-1])
    return flat.gather(-1, index).transpose(-1, -2)


def circle_nms(xy: Tensor, scores: Tensor, radius: Tensor) -> Tensor:
    """Greedy suppression of centres that lie within a radius of a better one.

    Args:
        xy: [..., K, 2] metres, best first.
        scores: [..., K]; entries that are not positive neither stay nor suppress.
        radius: [...] metres.

    Returns:
        [..., K] bool, the centres that stay.
    """
    close = (xy.unsqueeze(-2) - xy.unsqueeze(-3)).square().sum(-1) <= radius.square()[..., None, None]
    better = torch.ones(close.shape[-2:], dtype=torch.bool, device=xy.device).tril(-1)
    suppresses = (close & better).float()  # [..., i, j]: j would suppress i
    alive = scores > 0
    keep = alive
    # The greedy result is the only fixed point: each pass settles at least one more link of every chain.
    while True:
        suppressed = (suppresses @ keep.unsqueeze(-1).float()).squeeze(-1) > 0
        updated = alive & ~suppressed
        if torch.equal(updated, keep):
            return keep
        keep = updated


@MODELS.register_module()
class GridCenterHead(BaseModule):
    """CenterPoint head on a `models.layers.grid.Grid`.

    Args:
        grid: keywords of `models.layers.grid.Grid`.
        tasks: class names of each task; labels count through them.
        in_channels: channels of the feature map.
        separate_head: config of the branches: `JointTaskHead` (default) or mmdet3d's `SeparateHead`.
        branch_convs: convolutions per branch of `SeparateHead`.
        share_conv_channel: channels of the convolution before the branches.
        min_radius: least Gaussian radius in cells; one, or one per class.
        gaussian_overlap: see `models.head.targets.TargetEncoder`.
        code_weights: weight of each of the ten regression codes.
        box_weight: weight of the regression loss.
        nms_radius: circle NMS in metres; one, or one per class.
        candidates: most peaks per class that decoding considers.
        max_detections: most boxes per sample.
        score_threshold: boxes at or below it are dropped.
        norm_bbox: sizes are logarithms.
        num_heatmap_convs: as `branch_convs`, of the heatmap's branch.
        norm_cfg: config of the normalisation of the shared convolution.
    """

    def __init__(
        self,
        grid: dict[str, Any],
        tasks: list[list[str]],
        in_channels: int,
        *,
        separate_head: dict[str, Any] | None = None,
        branch_convs: int = 2,
        share_conv_channel: int = 64,
        min_radius: int | list[int] = 2,
        gaussian_overlap: float = 0.1,
        code_weights: Sequence[float] = (1.0,) * 10,
        box_weight: float = 0.25,
        nms_radius: float | list[float] = 0.5,
        candidates: int = 200,
        max_detections: int = 500,
        score_threshold: float = 0.01,
        norm_bbox: bool = True,
        num_heatmap_convs: int = 2,
        norm_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.grid = Grid(**grid)
        self.class_names = [list(names) for names in tasks]
        sizes = tuple(len(names) for names in tasks)
        classes = sum(sizes)
        self.targets = TargetEncoder(
            self.grid, sizes, per_class(min_radius, classes), gaussian_overlap, norm_bbox=norm_bbox
        )
        if len(code_weights) != 10:
            raise ValueError(f"head code_weights {list(code_weights)} must be ten numbers")
        self.code_weights, self.box_weight = tuple(code_weights), box_weight
        self.nms_radius = per_class(nms_radius, classes)
        if len(self.nms_radius) != classes:
            raise ValueError(f"head nms_radius has {len(self.nms_radius)} entries for {classes} classes")
        self.candidates, self.max_detections, self.score_threshold = candidates, max_detections, score_threshold
        margin = self.grid.range + 10.0
        self.center_range = (-margin, -margin, -10.0, margin, margin, 10.0)

        norm_cfg = norm_cfg or {"type": "BN2d"}
        self.shared_conv = ConvModule(in_channels, share_conv_channel, 3, padding=1, norm_cfg=norm_cfg)
        branches = {name: (channels, branch_convs) for name, channels in REGRESSION.items()}
        self.task_heads = nn.ModuleList(
            MODELS.build(
                {
                    "type": "JointTaskHead",
                    **(separate_head or {}),
                    "in_channels": share_conv_channel,
                    "heads": branches | {"heatmap": (size, num_heatmap_convs)},
                    "num_cls": size,
                }
            )
            for size in sizes
        )

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        """Maps of each task from a feature map [B, in_channels, H, W]; float32, so that losses and boxes are."""
        shared = self.shared_conv(x)
        return [{name: value.float() for name, value in task(shared).items()} for task in self.task_heads]

    def init_weights(self) -> None:
        """Initialise the task heads too: mmengine passes over plain module lists."""
        super().init_weights()
        for task in self.task_heads:
            assert isinstance(task, BaseModule)
            task.init_weights()

    def losses(
        self, head: list[dict[str, Tensor]], targets: Targets, labelled: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Gaussian focal and L1 losses, each the sum over tasks of a mean over that task's objects.

        Objects of all processes: mmdet3d takes the mean over a process's own, so that its losses depend on which
        process has which sample.

        Args:
            head: maps of each task.
            targets: of the boxes.
            labelled: bool [B], the samples whose boxes are known; others must have none, and their heatmaps do not
                count. None: all.
        """
        heat = torch.cat([task["heatmap"] for task in head], dim=1)
        focal = gaussian_focal_loss(heat, targets.heatmap)
        cells = (focal if labelled is None else focal * labelled.view(-1, 1, 1, 1)).sum((0, 2, 3))
        peaks = (targets.heatmap == 1).sum((0, 2, 3))
        task_of_class = torch.tensor(self.targets.task_of_class, device=heat.device)
        task_peaks = torch.zeros(len(head), device=heat.device).index_add(0, task_of_class, peaks.float())
        loss_heatmap = (cells / divisor(task_peaks)[task_of_class]).sum()

        maps = torch.stack([torch.cat([task[name] for name in REGRESSION], dim=1) for task in head], dim=1)
        # mmdet3d multiplies by a zero weight instead, and NaN velocities become NaN losses.
        known = targets.valid.unsqueeze(-1) & ~targets.code.isnan()
        weights = known * heat.new_tensor(self.code_weights)
        error = (gather_cells(maps, targets.cell) - targets.code.nan_to_num(0.0)).abs() * weights
        objects, processes = across_processes(targets.valid.sum((0, 2)))
        loss_box = (error.sum((0, 2, 3)) / ((objects + 1e-4) / processes)).sum()
        return {"heatmap": loss_heatmap, "box": self.box_weight * loss_box}

    def _candidates(self, task: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Best cells of each class of a task as boxes [B, C, K, 9] with centred z, and scores [B, C, K]."""
        heat = task["heatmap"].sigmoid()
        classes, height, width = heat.shape[1:]
        scores, cell = heat.flatten(2).topk(min(self.candidates, height * width), dim=-1)
        maps = torch.cat([task[name] for name in REGRESSION], dim=1)
        code = gather_cells(maps.unsqueeze(1).expand(-1, classes, -1, -1, -1), cell)
        offset, z, size, rot, velocity = code.split(list(REGRESSION.values()), dim=-1)
        column_row = torch.stack([cell % width, torch.div(cell, width, rounding_mode="floor")], dim=-1)
        xy = (column_row + offset) * self.grid.cell - self.grid.range
        size = size.clamp(max=MAX_LOG_SIZE).exp() if self.targets.norm_bbox else size
        yaw = torch.atan2(rot[..., :1], rot[..., 1:])
        return torch.cat([xy, z, size, yaw, velocity], dim=-1), scores

    @torch.no_grad()
    def decode(self, head: list[dict[str, Tensor]]) -> list[Detections]:
        """Boxes of each sample after circle NMS inside each class, best first."""
        parts = [self._candidates(task) for task in head]
        boxes, scores = (torch.cat(values, dim=1) for values in zip(*parts, strict=True))
        limits = boxes.new_tensor(self.center_range)
        good = ((boxes[..., :3] >= limits[:3]) & (boxes[..., :3] <= limits[3:])).all(-1)
        scores = scores * (good & (scores > self.score_threshold))
        radius = boxes.new_tensor(self.nms_radius).expand(scores.shape[:2])
        scores = scores * circle_nms(boxes[..., :2], scores, radius)
        boxes = torch.cat([boxes[..., :2], boxes[..., 2:3] - boxes[..., 5:6] * 0.5, boxes[..., 3:]], dim=-1)
        labels = torch.arange(scores.shape[1], device=scores.device)[:, None].expand(scores.shape[1:]).flatten()
        return [self._best(*sample, labels) for sample in zip(boxes.flatten(1, 2), scores.flatten(1), strict=True)]

    def _best(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> Detections:
        """The best surviving boxes of one sample."""
        order = scores.argsort(descending=True, stable=True)[: self.max_detections]
        order = order[scores[order] > 0]
        return Detections(boxes[order], scores[order], labels[order])
