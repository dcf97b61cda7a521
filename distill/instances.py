"""Instance segmentation on a student's image features, learned from a teacher's instances (X³KD's X-IS)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import mmdet.models  # noqa: F401 (fills the registry)
import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from torch import Tensor, nn

from distill.term import Outcome, Term
from distill.terms import TermConfig
from models.detectors.segmenter import Instances, training_samples, two_stage_losses
from models.layers.initialising import initialise
from models.layers.roi_align import RoIAlign
from models.ports import Batch, Prediction

WIDTH = 64  # channels of the pyramid and the heads where `adapter.width` is not set
LEVELS = (0.5, 1, 2, 4)  # strides of the pyramid, in strides of the student's map
# Side of the square anchors, in strides of their level: 12 pixels on the finest level of a map of stride 8.
ANCHOR = 3.0
SAMPLED = {"rpn": 64, "rcnn": 32}  # anchors and proposals of an image that a step learns from
# mmdet's config of the proposals that the box head learns from.
PROPOSALS = ConfigDict(nms_pre=64, max_per_img=48, nms={"type": "nms", "iou_threshold": 0.7}, min_bbox_size=0)
MASK = 28  # cells along the side of a mask


class ScoredInstances(Instances, Protocol):
    """A teacher's instances in one image of the batch, as the student sees it."""

    @property
    def scores(self) -> Tensor:
        """[K]."""


class Chosen(NamedTuple):
    """The instances of one image that count."""

    boxes: Tensor
    labels: Tensor
    masks: Tensor


class Pyramid(nn.Module):
    """A map, narrowed, with its copies at twice, half and a quarter of its resolution."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.lateral = nn.Conv2d(channels, width, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps [B, width, h, w] of the strides `LEVELS`, of a map [B, channels, H, W]."""
        same = self.lateral(x)
        half = F.max_pool2d(same, 2, ceil_mode=True)
        return F.interpolate(same, scale_factor=2), same, half, F.max_pool2d(half, 2, ceil_mode=True)


class InstanceTerm(Term):
    """Mask R-CNN heads on the student's image features, with a teacher's instances as the truth (X³KD's X-IS).

    A pyramid of the map feeds a region proposal head, a box head and a mask head; their losses are summed with weight
    1 (ours, as are all sizes). Nothing of it is exported. An image without an instance whose score passes the
    threshold adds nothing: the teacher may have been unsure of what is there.

    Args:
        config: of the term; `adapter.width` are the channels of pyramid and heads.
        channels: of the student's tap.
        stride: pixels per cell of the student's tap.
        classes: of the teacher's instances.

    Raises:
        ValueError: naming what of the config does not apply.
    """

    def __init__(self, config: TermConfig, channels: int, stride: int, classes: int) -> None:
        super().__init__(config)
        if config.student != "pv":
            raise ValueError(f"instances compare with the student's tap 'pv', not with '{config.student}'")
        if config.mask.kind not in ("none", "teacher_conf"):
            raise ValueError(f"mask '{config.mask.kind}' does not apply to instances: use none or teacher_conf")
        if config.adapter.kind != "mask_rcnn":
            raise ValueError(f"adapter '{config.adapter.kind}' does not apply to instances: use mask_rcnn")
        if config.distance != "maskrcnn":
            raise ValueError(f"distance '{config.distance}' does not apply to instances: use maskrcnn")
        self.stride = stride
        self.threshold = config.mask.threshold if config.mask.kind == "teacher_conf" else 0.0
        width = config.adapter.width or WIDTH
        strides = [round(stride * level) for level in LEVELS]
        self.pyramid = Pyramid(channels, width)
        self.rpn_head = MODELS.build(rpn_config(width, strides))
        self.roi_head = MODELS.build(roi_config(width, strides, classes))
        initialise(self.rpn_head, self.roi_head)

    def forward(self, student: Prediction, teacher: Mapping[str, Any], batch: Batch, progress: float) -> Outcome:
        """See `Term`; the teacher's instances are a list over samples of lists over cameras."""
        maps = student.taps[self.config.student].flatten(0, 1)
        size = (batch.images.shape[-2], batch.images.shape[-1])
        if (maps.shape[-2] * self.stride, maps.shape[-1] * self.stride) != size:
            raise ValueError(
                f"student tap '{self.config.student}' is {list(maps.shape[-2:])} for images {list(size)}: "
                f"stride {self.stride} does not describe it"
            )
        images = [self.choose(camera) for cameras in teacher[self.config.teacher] for camera in cameras]
        if len(images) != len(maps):
            raise ValueError(f"'{self.config.teacher}' has instances of {len(images)} images, the batch {len(maps)}")
        used = [i for i, image in enumerate(images) if len(image.boxes)]
        # One image at least, so that the same parameters take part in every step.
        shown = used or [0]
        losses = self.losses(maps[shown], [images[i] for i in shown], size)
        parts = {name: value * (1.0 if used else 0.0) for name, value in losses.items()}
        return Outcome(torch.stack(list(parts.values())).sum(), {k: v.detach() for k, v in parts.items()})

    def choose(self, instances: ScoredInstances) -> Chosen:
        """The instances whose score passes the threshold."""
        keep = instances.scores.detach() > self.threshold
        return Chosen(instances.boxes[keep], instances.labels[keep], instances.masks[keep])

    def losses(self, maps: Tensor, images: Sequence[Instances], size: tuple[int, int]) -> dict[str, Tensor]:
        """Mask R-CNN's losses by name, of the student's maps [M, C, h, w]."""
        found = two_stage_losses(
            self.rpn_head, self.roi_head, self.pyramid(maps), training_samples(images, size), PROPOSALS
        )
        return {name.replace("loss_", ""): value for name, value in found.items()}


def rpn_config(width: int, strides: Sequence[int]) -> ConfigDict:
    """mmdet's config of the region proposal head."""
    return ConfigDict(
        type="RPNHead",
        in_channels=width,
        feat_channels=width // 2,
        anchor_generator={"type": "AnchorGenerator", "scales": [ANCHOR], "ratios": [1.0], "strides": list(strides)},
        bbox_coder={"type": "DeltaXYWHBBoxCoder"},
        loss_cls={"type": "CrossEntropyLoss", "use_sigmoid": True},
        loss_bbox={"type": "L1Loss"},
        train_cfg={
            "assigner": assigner(0.5, 0.3, 0.3),
            "sampler": sampler("rpn", 0.5, truth=False),
            "allowed_border": -1,
            "pos_weight": -1,
        },
        test_cfg=PROPOSALS,
    )


def roi_config(width: int, strides: Sequence[int], classes: int) -> ConfigDict:
    """mmdet's config of the box head and the mask head."""
    return ConfigDict(
        type="StandardRoIHead",
        bbox_roi_extractor=extractor(width, strides, 7),
        bbox_head={
            "type": "Shared2FCBBoxHead",
            "in_channels": width,
            "fc_out_channels": 2 * width,
            "roi_feat_size": 7,
            "num_classes": classes,
            "reg_class_agnostic": True,
            "bbox_coder": {"type": "DeltaXYWHBBoxCoder", "target_stds": [0.1, 0.1, 0.2, 0.2]},
            "loss_cls": {"type": "CrossEntropyLoss"},
            "loss_bbox": {"type": "L1Loss"},
        },
        mask_roi_extractor=extractor(width, strides, MASK // 2),
        mask_head={
            "type": "FCNMaskHead",
            "num_convs": 1,
            "in_channels": width,
            "conv_out_channels": width,
            "num_classes": classes,
        },
        train_cfg={
            "assigner": assigner(0.5, 0.5, 0.5),
            "sampler": sampler("rcnn", 0.25, truth=True),
            "mask_size": MASK,
            "pos_weight": -1,
        },
        test_cfg=None,
    )


def extractor(width: int, strides: Sequence[int], side: int) -> dict[str, Any]:
    """Features of a box as side x side cells, from the level that fits its size."""
    return {
        "type": "SingleRoIExtractor",
        "roi_layer": {"type": RoIAlign, "output_size": side, "sampling_ratio": 1},
        "out_channels": width,
        "featmap_strides": list(strides),
        "finest_scale": 7 * strides[0],
    }


def assigner(positive: float, negative: float, least: float) -> dict[str, Any]:
    """Which boxes count as an instance, by overlap."""
    return {
        "type": "MaxIoUAssigner",
        "pos_iou_thr": positive,
        "neg_iou_thr": negative,
        "min_pos_iou": least,
        "match_low_quality": True,
        "ignore_iof_thr": -1,
    }


def sampler(part: str, positive: float, *, truth: bool) -> dict[str, Any]:
    """A random choice of boxes with a share of positives; `truth` adds the instances' own boxes."""
    return {"type": "RandomSampler", "num": SAMPLED[part], "pos_fraction": positive, "add_gt_as_proposals": truth}
