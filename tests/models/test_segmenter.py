"""The instance segmenter against mmdet's own loss and prediction, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from mmcv.ops import RoIAlign as MmcvRoIAlign
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor

from models.detectors.segmenter import Found, Segmenter, build_segmenter

CLASSES = ["car", "bus", "cone"]
SIZE = (64, 96)


def small_model(**overrides: Any) -> dict[str, Any]:
    """A Mask R-CNN that is small enough for tests."""
    strides, levels = [4, 8, 16, 32], {"out_channels": 16, "featmap_strides": [4, 8, 16, 32], "finest_scale": 28}
    coder = {"type": "DeltaXYWHBBoxCoder"}
    nms = {"nms_pre": 60, "max_per_img": 30, "nms": {"type": "nms", "iou_threshold": 0.7}, "min_bbox_size": 0}

    def extractor(side: int) -> dict[str, Any]:
        roi_align = {"type": "RoIAlign", "output_size": side, "sampling_ratio": 1}
        return {"type": "SingleRoIExtractor", "roi_layer": roi_align, **levels}

    def learning(positive: float, negative: float, count: int, share: float, truth: bool) -> dict[str, Any]:
        return {
            "assigner": {
                "type": "MaxIoUAssigner",
                "pos_iou_thr": positive,
                "neg_iou_thr": negative,
                "min_pos_iou": negative,
                "ignore_iof_thr": -1,
            },
            "sampler": {"type": "RandomSampler", "num": count, "pos_fraction": share, "add_gt_as_proposals": truth},
            "allowed_border": -1,
            "pos_weight": -1,
            "mask_size": 28,
        }

    return {
        "type": "MaskRCNN",
        "backbone": {"type": "ResNet", "depth": 18, "base_channels": 8, "norm_cfg": {"type": "BN"}},
        "neck": {"type": "FPN", "in_channels": [8, 16, 32, 64], "out_channels": 16, "num_outs": 4},
        "rpn_head": {
            "type": "RPNHead",
            "in_channels": 16,
            "feat_channels": 16,
            "bbox_coder": coder,
            "anchor_generator": {
                "type": "AnchorGenerator",
                "scales": [4],
                "ratios": [0.5, 1.0, 2.0],
                "strides": strides,
            },
            "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": True},
            "loss_bbox": {"type": "L1Loss"},
        },
        "roi_head": {
            "type": "StandardRoIHead",
            "bbox_roi_extractor": extractor(7),
            "mask_roi_extractor": extractor(14),
            "bbox_head": {
                "type": "Shared2FCBBoxHead",
                "in_channels": 16,
                "fc_out_channels": 32,
                "roi_feat_size": 7,
                "reg_class_agnostic": True,
                "bbox_coder": coder | {"target_stds": [0.1, 0.1, 0.2, 0.2]},
                "loss_cls": {"type": "CrossEntropyLoss"},
                "loss_bbox": {"type": "L1Loss"},
            },
            "mask_head": {"type": "FCNMaskHead", "num_convs": 1, "in_channels": 16, "conv_out_channels": 16},
        },
        "train_cfg": {
            "rpn": learning(0.7, 0.3, 32, 0.5, False),
            "rpn_proposal": nms,
            "rcnn": learning(0.5, 0.5, 16, 0.5, True),
        },
        "test_cfg": {
            "rpn": nms,
            "rcnn": {
                "score_thr": 0.05,
                "nms": {"type": "nms", "iou_threshold": 0.5},
                "max_per_img": 10,
                "mask_thr_binary": 0.5,
            },
        },
    } | overrides


def rectangles(boxes: list[list[int]], labels: list[int]) -> Found:
    """Instances that fill their boxes."""
    masks = torch.zeros(len(boxes), *SIZE, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = 1
    return Found(
        torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        torch.tensor(labels, dtype=torch.long),
        torch.ones(len(boxes)),
        masks,
    )


NOTHING = rectangles([], [])
SOME = [rectangles([[8, 8, 40, 32], [60, 10, 76, 50]], [0, 2]), NOTHING, rectangles([[30, 20, 90, 60]], [1])]


def some_images(count: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, *SIZE), generator=generator, dtype=torch.uint8)


def segmenter(seed: int = 0) -> Segmenter:
    torch.manual_seed(seed)
    return build_segmenter({"model": small_model(), "classes": CLASSES})


def mmdet_samples(instances: list[Found]) -> list[DetDataSample]:
    samples = []
    for given in instances:
        sample = DetDataSample(
            metainfo={
                "img_shape": SIZE,
                "ori_shape": SIZE,
                "pad_shape": SIZE,
                "batch_input_shape": SIZE,
                "scale_factor": (1.0, 1.0),
            }
        )
        sample.gt_instances = InstanceData(
            bboxes=given.boxes.clone(), labels=given.labels.clone(), masks=BitmapMasks(given.masks.numpy(), *SIZE)
        )
        samples.append(sample)
    return samples


def mmdet_twin(model: Segmenter) -> Any:
    """mmdet's own detector of the same config, with the same weights."""
    config = ConfigDict(small_model())
    config.roi_head.bbox_head.num_classes = config.roi_head.mask_head.num_classes = len(CLASSES)
    twin = MODELS.build(config)
    twin.load_state_dict(model.detector.state_dict())
    return twin


def normalised(images: Tensor) -> Tensor:
    """By ImageNet's statistics."""
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    return (images.float() - mean[:, None, None]) / std[:, None, None]


def test_losses_are_those_of_mmdet() -> None:
    model, images = segmenter().train(), some_images()
    twin = mmdet_twin(model).train()
    torch.manual_seed(7)
    ours = model.loss(images, SOME)
    torch.manual_seed(7)
    theirs = twin.parse_losses(twin.loss(normalised(images), mmdet_samples(SOME)))[0]
    assert set(ours) == {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask"}
    assert all(value.ndim == 0 for value in ours.values())
    torch.testing.assert_close(sum(ours.values()), theirs)


def test_predictions_are_those_of_mmdet() -> None:
    model, images = segmenter().eval(), some_images()
    theirs = mmdet_twin(model).eval().predict(normalised(images), mmdet_samples(SOME), rescale=False)
    found = model.predict(images)
    assert sum(len(image.scores) for image in found) > 0
    for ours, sample in zip(found, theirs, strict=True):
        reference = sample.pred_instances
        order = reference.scores.argsort(descending=True, stable=True)
        torch.testing.assert_close(ours.boxes, reference.bboxes[order])
        torch.testing.assert_close(ours.scores, reference.scores[order])
        assert torch.equal(ours.labels, reference.labels[order])
        assert torch.equal(ours.masks, reference.masks[order])


def cascade_model() -> dict[str, Any]:
    """A Hybrid Task Cascade of three stages, whose semantic branch has a RoI extractor of its own."""
    model = small_model(type="HybridTaskCascade")
    roi_head, rcnn = model["roi_head"], model["train_cfg"]["rcnn"]
    boxes = roi_head["bbox_head"] | {"loss_bbox": {"type": "SmoothL1Loss"}}
    semantic = roi_head["mask_roi_extractor"] | {"featmap_strides": [8]}
    roi_head |= {
        "type": "HybridTaskCascadeRoIHead",
        "num_stages": 3,
        "stage_loss_weights": [1, 0.5, 0.25],
        "bbox_head": [boxes] * 3,
        "mask_head": [roi_head["mask_head"] | {"type": "HTCMaskHead"}] * 3,
        "semantic_roi_extractor": semantic,
        "semantic_head": {
            "type": "FusedSemanticHead",
            "num_ins": 4,
            "fusion_level": 1,
            "num_convs": 1,
            "in_channels": 16,
            "conv_out_channels": 16,
            "num_classes": 5,
        },
    }
    return model | {"train_cfg": model["train_cfg"] | {"rcnn": [rcnn] * 3}}


def test_the_semantic_branch_of_a_cascade_reads_the_map_as_it_is() -> None:
    """Its features are those of mmcv's operator on a contiguous map; the images' maps have their channels last."""
    torch.manual_seed(0)
    model = build_segmenter({"model": cascade_model(), "classes": CLASSES}).eval()
    assert not [name for name, module in model.named_modules() if isinstance(module, MmcvRoIAlign)]
    roi_head = model.detector.roi_head
    with torch.no_grad():
        maps = model.features(some_images())
        _, semantic = roi_head.semantic_head(maps)
        assert not semantic.is_contiguous()
        rois = torch.tensor([[0.0, 4, 6, 40, 50], [2, 20, 8, 90, 60]])
        given = roi_head.semantic_roi_extractor([semantic], rois)
        expected = MmcvRoIAlign(14, 1 / 8, 1)(semantic.contiguous(), rois)
        found = model.predict(some_images())
    torch.testing.assert_close(given, expected)
    assert sum(len(image.scores) for image in found) > 0


def test_boxes_and_masks_count_from_the_edges_of_pixels() -> None:
    """A mask head that says yes everywhere paints the pixels whose centres lie in the box (mmdet rounds corners)."""
    model = segmenter().eval()
    logits = model.detector.roi_head.mask_head.conv_logits
    torch.nn.init.zeros_(logits.weight)
    torch.nn.init.constant_(logits.bias, 20.0)
    painted = 0
    for image in model.predict(some_images()):
        for (x0, y0, x1, y1), mask in zip(image.boxes.tolist(), image.masks, strict=True):
            if min(x1 - x0, y1 - y0) < 4:
                continue
            columns, rows = torch.arange(SIZE[1]) + 0.5, torch.arange(SIZE[0]) + 0.5
            assert torch.equal(mask.any(0), (columns >= x0) & (columns <= x1))
            assert torch.equal(mask.any(1), (rows >= y0) & (rows <= y1))
            painted += 1
    assert painted > 5


def test_images_without_instances_teach_the_background_only() -> None:
    model = segmenter().train()
    losses = model.loss(some_images(), [NOTHING] * 3)
    assert losses["loss_rpn_cls"] > 0
    assert losses["loss_rpn_bbox"] == losses["loss_bbox"] == losses["loss_mask"] == 0
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_same_seed_gives_the_same_losses_and_gradients() -> None:
    runs = []
    for _ in range(2):
        model = segmenter().train()
        torch.manual_seed(3)
        losses = model.loss(some_images(), SOME)
        torch.stack(list(losses.values())).sum().backward()
        runs.append([*losses.values(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_it_runs_in_half_precision() -> None:
    model = segmenter().train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.loss(some_images(), SOME)
        found = model.eval().predict(some_images())
    assert all(value.dtype == torch.float32 and torch.isfinite(value) for value in losses.values())
    assert all(image.boxes.dtype == torch.float32 for image in found)


def test_scores_descend_and_an_empty_prediction_has_its_shapes() -> None:
    model = segmenter().eval()
    for image in model.predict(some_images()):
        assert (image.scores.diff() <= 0).all()
    model.detector.roi_head.test_cfg.score_thr = 2.0
    boxes, labels, scores, masks = model.predict(some_images(1))[0]
    assert [list(value.shape) for value in (boxes, labels, scores, masks)] == [[0, 4], [0], [0], [0, *SIZE]]


def test_parameters_are_mmdets_under_one_prefix() -> None:
    """So that checkpoints of mmdet can be imported; the normalisation is no weight."""
    model = segmenter()
    assert {name.removeprefix("detector.") for name in model.state_dict()} == set(mmdet_twin(model).state_dict())


def without(*path: str) -> dict[str, Any]:
    model = copy.deepcopy(small_model())
    part = model
    for name in path[:-1]:
        part = part[name]
    del part[path[-1]]
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (small_model(type="FCOS"), "'FCOS' is not a two-stage detector"),
        (small_model(type="NoSuchNet"), "'NoSuchNet' is not a two-stage detector"),
        (without("type"), "None is not a two-stage detector"),
        (without("roi_head", "mask_head"), "needs rpn_head and roi_head.mask_head"),
        (without("rpn_head"), "needs rpn_head and roi_head.mask_head"),
    ],
)
def test_other_models_are_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_segmenter({"model": model, "classes": CLASSES})


def test_another_number_of_classes_is_refused() -> None:
    model = copy.deepcopy(small_model())
    model["roi_head"]["mask_head"]["num_classes"] = 80
    with pytest.raises(ValueError, match="mask_head has num_classes 80, its classes are 3"):
        build_segmenter({"model": model, "classes": CLASSES})
    assert "num_classes" not in small_model()["roi_head"]["bbox_head"]
