"""Instance segmentation teachers: two-stage detectors of mmdet on single camera images."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import mmdet.models  # noqa: F401 (fills the registry)
import torch
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.detectors import TwoStageDetector
from mmdet.models.roi_heads import BaseRoIHead
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor, nn

from models.layers.images import IMAGE_MEAN, IMAGE_STD
from models.layers.initialising import initialise
from models.layers.memory_layout import read_any_layout

CLASS_HEADS = ("bbox_head", "mask_head")  # parts of a RoI head that tell classes apart


class Instances(Protocol):
    """Instances of one image that a loss reads; boxes count from the edges of pixels."""

    @property
    def boxes(self) -> Tensor:
        """[K, 4] x0, y0, x1, y1 in pixels; the image covers [0, W] x [0, H]."""

    @property
    def labels(self) -> Tensor:
        """[K] int64."""

    @property
    def masks(self) -> Tensor:
        """[K, H, W], not zero on the instance."""


class Found(NamedTuple):
    """Instances that a segmenter found in one image, best first."""

    boxes: Tensor  # [K, 4] x0, y0, x1, y1 in pixels of its input, from the edges of pixels
    labels: Tensor  # [K] int64, positions in the segmenter's classes
    scores: Tensor  # [K]
    masks: Tensor  # [K, H, W] bool


class Segmenter(nn.Module):
    """A two-stage instance segmenter, such as Mask R-CNN, with its image normalisation.

    Losses and predictions follow the conventions of mmdet. Backbone and neck run in the precision of the caller, the
    heads in float32: their boxes need it.

    Args:
        model: config of an mmdet two-stage detector with a mask head, without `data_preprocessor`. The RoI heads'
            `num_classes` are filled in.
        classes: names of its outputs in order.

    Raises:
        ValueError: if the config is not such a detector, or speaks of another number of classes.
    """

    mean: Tensor
    std: Tensor

    sensors = ("images",)

    def __init__(self, model: Mapping[str, Any], classes: Sequence[str]) -> None:
        super().__init__()
        self.classes = tuple(classes)
        self.detector: TwoStageDetector = MODELS.build(with_classes(model, len(self.classes)))
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD).view(3, 1, 1), persistent=False)

    def loss(self, images: Tensor, instances: Sequence[Instances]) -> dict[str, Tensor]:
        """Losses by name, scalars whose sum is minimised; an image without instances teaches the background.

        Args:
            images: [B, 3, H, W] uint8 RGB.
            instances: of each image, labelled by position in `classes`.
        """
        samples = training_samples(instances, (images.shape[-2], images.shape[-1]))
        config = self.detector.train_cfg.get("rpn_proposal", self.detector.test_cfg.rpn)
        return two_stage_losses(self.detector.rpn_head, self.detector.roi_head, self.features(images), samples, config)

    @torch.no_grad()
    def predict(self, images: Tensor) -> list[Found]:
        """Instances of each image [B, 3, H, W] uint8 RGB; the model must be in eval mode."""
        samples = [DetDataSample(metainfo=image_info((images.shape[-2], images.shape[-1]))) for _ in images]
        features = self.features(images)
        with torch.autocast(images.device.type, enabled=False):
            maps = tuple(level.float() for level in features)
            proposals = self.detector.rpn_head.predict(maps, samples, rescale=False)
            results = self.detector.roi_head.predict(maps, proposals, samples, rescale=False)
        return [best_first(result) for result in results]

    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        """The neck's maps of images [B, 3, H, W] uint8 RGB."""
        x = (images.float() - self.mean) / self.std
        return tuple(self.detector.extract_feat(x.contiguous(memory_format=torch.channels_last)))


def build_segmenter(config: Mapping[str, Any]) -> Segmenter:
    """A segmenter of a config with `model` and `classes`, its weights initialised by the model's `init_cfg`.

    Raises:
        ValueError: see `Segmenter`.
    """
    segmenter = Segmenter(config["model"], config["classes"])
    initialise(segmenter.detector)
    read_any_layout(segmenter.detector)
    return segmenter


def with_classes(model: Mapping[str, Any], count: int) -> ConfigDict:
    """The config of a two-stage detector with the number of classes in its RoI heads.

    Raises:
        ValueError: see `Segmenter`.
    """
    name, known = model.get("type"), MODELS.get(str(model.get("type")))
    if known is None or not issubclass(known, TwoStageDetector):
        raise ValueError(
            f"segmenter model type {name!r} is not a two-stage detector of mmdet: use MaskRCNN, "
            "CascadeRCNN or another with an RPN and a RoI head"
        )
    filled = ConfigDict(copy.deepcopy(dict(model)))
    roi_head = filled.get("roi_head") or {}
    if roi_head.get("mask_head") is None or filled.get("rpn_head") is None:
        raise ValueError(
            f"segmenter model {name} needs rpn_head and roi_head.mask_head: it finds masks as well as boxes"
        )
    for part in CLASS_HEADS:
        heads = roi_head[part]
        for head in heads if isinstance(heads, list) else [heads]:
            stated = head.setdefault("num_classes", count)
            if stated != count:
                raise ValueError(
                    f"segmenter model {name}: roi_head.{part} has num_classes {stated}, its classes are "
                    f"{count}: leave num_classes out, or name all classes"
                )
    return filled


def image_info(size: tuple[int, int]) -> dict[str, Any]:
    """What mmdet wants to know of an image of a size (height, width) that was neither scaled nor padded."""
    return {
        "img_shape": size,
        "ori_shape": size,
        "pad_shape": size,
        "batch_input_shape": size,
        "scale_factor": (1.0, 1.0),
    }


def training_samples(instances: Sequence[Instances], size: tuple[int, int]) -> list[DetDataSample]:
    """Images of a size (height, width) with their instances, as mmdet's losses read them."""
    samples = []
    for given in instances:
        sample = DetDataSample(metainfo=image_info(size))
        masks = BitmapMasks(given.masks.detach().to(torch.uint8).cpu().numpy(), *size)
        sample.gt_instances = InstanceData(bboxes=given.boxes.detach().float(), labels=given.labels, masks=masks)
        samples.append(sample)
    return samples


def two_stage_losses(
    rpn_head: BaseDenseHead,
    roi_head: BaseRoIHead,
    features: Sequence[Tensor],
    samples: list[DetDataSample],
    proposals: ConfigDict,
) -> dict[str, Tensor]:
    """Losses of a region proposal head and a RoI head, scalars by mmdet's names; computed in float32.

    Args:
        rpn_head: finds proposals.
        roi_head: tells their classes, boxes and masks.
        features: maps [B, C, h, w] of the levels, finest first.
        samples: see `training_samples`.
        proposals: mmdet's config of the proposals that the RoI head learns from.
    """
    with torch.autocast(features[0].device.type, enabled=False):
        maps = tuple(level.float() for level in features)
        losses, found = rpn_head.loss_and_predict(
            maps, [without_classes(sample) for sample in samples], proposal_cfg=proposals
        )
        losses |= roi_head.loss(maps, found, samples)
    # Some come per level, some with one element, and figures such as the accuracy stand between them.
    return {
        name: torch.stack(value).sum() if isinstance(value, list) else value.sum()
        for name, value in losses.items()
        if "loss" in name
    }


def without_classes(sample: DetDataSample) -> DetDataSample:
    """The sample as a region proposal head reads it: boxes that are objects."""
    boxes = sample.gt_instances.bboxes
    plain = DetDataSample(metainfo=sample.metainfo)
    plain.gt_instances = InstanceData(bboxes=boxes, labels=boxes.new_zeros(len(boxes), dtype=torch.long))
    return plain


def best_first(result: InstanceData) -> Found:
    """mmdet's result of one image in the order of its scores."""
    order = result.scores.argsort(descending=True, stable=True)
    return Found(result.bboxes[order], result.labels[order], result.scores[order], result.masks[order].bool())
