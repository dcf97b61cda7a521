"""X-IS: which images and instances teach, what reaches the student, and that aligned features make it small."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData
from torch import Tensor

from distill.instances import PROPOSALS, InstanceTerm
from distill.term import Outcome
from distill.terms import TermConfig
from models.ports import Prediction

CHANNELS, STRIDE, CLASSES, CAMERAS = 6, 8, 3, 2
SIZE = (64, 96)
CONFIG = {
    "student": "pv",
    "teacher": "instance.inst2d",
    "mask": {"kind": "teacher_conf", "threshold": 0.5},
    "adapter": {"kind": "mask_rcnn", "width": 16},
    "distance": "maskrcnn",
    "weight": 0.3,
}
PARTS = {"rpn_cls", "rpn_bbox", "cls", "bbox", "mask"}


class Instances(NamedTuple):
    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: Tensor


def instances(*given: tuple[tuple[int, int, int, int], int, float]) -> Instances:
    """Instances of (box, label, score) that fill their boxes."""
    masks = torch.zeros(len(given), *SIZE, dtype=torch.uint8)
    for mask, ((x0, y0, x1, y1), _, _) in zip(masks, given, strict=True):
        mask[y0:y1, x0:x1] = 1
    boxes = torch.tensor([box for box, _, _ in given], dtype=torch.float32).view(-1, 4)
    return Instances(
        boxes,
        torch.tensor([label for _, label, _ in given], dtype=torch.long),
        torch.tensor([score for _, _, score in given]),
        masks,
    )


NOTHING = instances()
LEFT = instances(((8, 8, 40, 32), 0, 0.9), ((60, 12, 84, 52), 2, 0.8))
RIGHT = instances(((50, 20, 90, 60), 1, 0.7))
UNSURE = instances(((10, 10, 30, 30), 1, 0.4))
TEACHER = [[LEFT, NOTHING], [UNSURE, RIGHT]]


def term(**overrides: Any) -> InstanceTerm:
    torch.manual_seed(0)
    return InstanceTerm(TermConfig(**CONFIG | overrides), CHANNELS, STRIDE, CLASSES)


def student_map(samples: int = 2, seed: int = 1) -> Tensor:
    shape = (samples, CAMERAS, CHANNELS, SIZE[0] // STRIDE, SIZE[1] // STRIDE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def outcome(term: InstanceTerm, pv: Tensor, teacher: list[list[Instances]], seed: int = 3) -> Outcome:
    torch.manual_seed(seed)
    batch: Any = SimpleNamespace(images=torch.zeros(len(pv), 1, CAMERAS, 3, *SIZE, dtype=torch.uint8))
    return term(Prediction([], {"pv": pv}), {"instance.inst2d": teacher}, batch, 0.0)


def test_losses_are_those_of_mmdets_heads() -> None:
    heads, pv = term(), student_map()
    ours = outcome(heads, pv, TEACHER)
    info = {"img_shape": SIZE, "pad_shape": SIZE, "ori_shape": SIZE, "scale_factor": (1.0, 1.0)}
    samples = [DetDataSample(metainfo=info) for _ in range(2)]
    for sample, given in zip(samples, (LEFT, RIGHT), strict=True):
        sample.gt_instances = InstanceData(
            bboxes=given.boxes, labels=given.labels, masks=BitmapMasks(given.masks.numpy(), *SIZE)
        )
    objects = copy.deepcopy(samples)
    for sample in objects:
        sample.gt_instances.labels.zero_()
    torch.manual_seed(3)
    maps = heads.pyramid(torch.stack([pv[0, 0], pv[1, 1]]))
    rpn, proposals = heads.rpn_head.loss_and_predict(maps, objects, proposal_cfg=PROPOSALS)
    roi = heads.roi_head.loss(maps, proposals, samples)
    expected = sum(rpn["loss_rpn_cls"]) + sum(rpn["loss_rpn_bbox"])
    expected = expected + roi["loss_cls"] + roi["loss_bbox"] + roi["loss_mask"].sum()
    torch.testing.assert_close(ours.loss, expected)
    assert set(ours.watched) == PARTS
    torch.testing.assert_close(sum(ours.watched.values()), expected.detach())
    assert not any(value.requires_grad for value in ours.watched.values())


def test_only_images_with_sure_instances_teach_the_student() -> None:
    pv = student_map()
    outcome(term(), pv, TEACHER).loss.backward()
    assert pv.grad is not None
    taught = pv.grad.flatten(2).abs().sum(-1) > 0
    assert taught.tolist() == [[True, False], [False, True]]


def test_the_teacher_gets_no_gradient() -> None:
    heads, pv = term(), student_map()
    boxes, scores = LEFT.boxes.clone().requires_grad_(), LEFT.scores.clone().requires_grad_()
    outcome(heads, pv, [[LEFT._replace(boxes=boxes, scores=scores), NOTHING], [NOTHING, NOTHING]]).loss.backward()
    assert boxes.grad is None
    assert scores.grad is None
    assert all(p.grad is not None for p in heads.parameters())


def test_instances_below_the_threshold_do_not_count() -> None:
    heads, pv = term(), student_map()
    both = Instances(*(torch.cat(values) for values in zip(LEFT, UNSURE, strict=True)))
    few, many = (outcome(heads, pv, [[first, NOTHING], [NOTHING, RIGHT]]).loss for first in (LEFT, both))
    assert few == many
    unmasked = term(mask={"kind": "none"})
    few, many = (outcome(unmasked, pv, [[first, NOTHING], [NOTHING, RIGHT]]).loss for first in (LEFT, both))
    assert few != many


def test_without_any_instance_the_loss_is_zero_and_the_same_parameters_take_part() -> None:
    heads, pv = term(), student_map()
    result = outcome(heads, pv, [[NOTHING, UNSURE], [NOTHING, NOTHING]])
    assert result.loss == 0
    assert set(result.watched) == PARTS
    result.loss.backward()
    assert pv.grad is not None
    assert not pv.grad.any()
    assert all(p.grad is not None and not p.grad.any() for p in heads.parameters())


def test_the_same_seed_gives_the_same_loss_and_gradients() -> None:
    runs = []
    for _ in range(2):
        heads, pv = term(), student_map()
        loss = outcome(heads, pv, TEACHER).loss
        loss.backward()
        runs.append([loss, pv.grad, *(p.grad for p in heads.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_masks_change_the_mask_loss_and_nothing_else() -> None:
    heads, pv = term(), student_map()
    hollow = LEFT._replace(masks=LEFT.masks * (torch.arange(SIZE[1]) % 16 < 8))
    plain, other = (outcome(heads, pv, [[given, NOTHING], [NOTHING, NOTHING]]).watched for given in (LEFT, hollow))
    assert {name for name in PARTS if plain[name] != other[name]} == {"mask"}


def test_half_precision_stays_finite_and_reaches_the_student() -> None:
    heads, pv = term(), student_map().detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = outcome(heads, pv, TEACHER).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert pv.grad is not None
    assert torch.isfinite(pv.grad).all()
    assert pv.grad.any()


def test_a_mask_teaches_the_features_where_it_is() -> None:
    """Proposals overlap the instance by half at least: they end within its own width and height of it."""
    heads, size = term(), (128, 192)
    maps = torch.randn(1, CHANNELS, 16, 24, generator=torch.Generator().manual_seed(2)).requires_grad_()
    x0, y0, x1, y1 = 104, 16, 152, 40
    masks = torch.zeros(1, *size, dtype=torch.uint8)
    masks[0, y0:y1, x0:x1] = 1
    given = Instances(torch.tensor([[x0, y0, x1, y1]]).float(), torch.tensor([1]), torch.ones(1), masks)
    heads.losses(maps, [given], size)["mask"].backward()
    assert maps.grad is not None
    taught = maps.grad.abs().sum((0, 1)) > 0
    assert taught[y0 // STRIDE : y1 // STRIDE, x0 // STRIDE : x1 // STRIDE].all()
    rows, columns = (STRIDE * cells for cells in taught.nonzero().T)
    # A cell more, because features are interpolated.
    assert columns.min() >= x0 - (x1 - x0) - STRIDE
    assert rows.max() + STRIDE <= y1 + (y1 - y0) + STRIDE


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"student": "bev_neck"}, "tap 'pv', not with 'bev_neck'"),
        ({"mask": {"kind": "balanced"}}, "mask 'balanced' does not apply to instances"),
        ({"adapter": {"kind": "decoder"}}, "adapter 'decoder' does not apply to instances"),
        ({"distance": "l1"}, "distance 'l1' does not apply to instances"),
    ],
)
def test_what_does_not_apply_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        term(**config)


def test_another_stride_or_number_of_images_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[8, 12\] for images \[64, 96\]: stride 16 does not describe it"):
        outcome(InstanceTerm(TermConfig(**CONFIG), CHANNELS, 16, CLASSES), student_map(), TEACHER)
    with pytest.raises(ValueError, match=r"has instances of 2 images, the batch 4"):
        outcome(term(), student_map(), TEACHER[:1])


def test_levels_lie_at_half_to_four_strides() -> None:
    heads = term()
    levels = heads.pyramid(torch.zeros(1, CHANNELS, 8, 12))
    assert [SIZE[0] / level.shape[-2] for level in levels] == [4, 8, 16, 32]
    assert heads.rpn_head.prior_generator.strides == [(4, 4), (8, 8), (16, 16), (32, 32)]
    assert MODELS.get("RPNHead") is type(heads.rpn_head)
