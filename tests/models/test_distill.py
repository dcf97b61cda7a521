"""Distillation terms: zero at agreement, gradient otherwise, masks, and what is exported."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from models.center_head import REGRESSION
from models.detector import Detector, Prediction, build_detector
from models.distill import Recipe, TermConfig
from models.distill.adapters import ADAPTERS
from models.distill.masks import MASKS
from tests.models.factory import camera_config, lidar_config, random_batch, random_boxes

CLS = {"student": "head", "teacher": "lidar.boxes", "mask": {"kind": "teacher_conf", "threshold": 0.3},
       "distance": "qfl", "weight": 1.0}
REG = CLS | {"distance": "sl1", "weight": 0.25}
XFD = {"student": "bev_neck", "teacher": "lidar.bev_lift", "mask": {"kind": "balanced"},
       "adapter": {"kind": "decoder"}, "distance": "l1", "weight": 0.3}
DIRECT = XFD | {"adapter": {"kind": "id"}, "distance": "l2", "mask": {"kind": "none"}}
SIZE = 32


@pytest.fixture(scope="module")
def student() -> Detector:
    torch.manual_seed(0)
    return build_detector(camera_config())


def recipe(student: Detector, teacher_channels: int = 12, std: Tensor | None = None, **terms: dict[str, Any]) -> Recipe:
    return Recipe({name: TermConfig(**term) for name, term in terms.items()}, student.targets, student.tap_channels,
                  {"lidar.bev_lift": teacher_channels}, None if std is None else {"lidar.bev_lift": std})


def teacher_boxes(count: int, seed: int = 5) -> Tensor:
    boxes, labels = random_boxes(count, 12.0, seed)
    score = torch.linspace(0.95, 0.05, count)
    return torch.cat([boxes.nan_to_num(0.5), score[:, None], labels[:, None]], dim=1)


def teacher_outputs(batch: Any, channels: int = 12, count: int = 10) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    lift = torch.randn(len(batch.boxes), channels, SIZE, SIZE, generator=generator).relu()
    lift = lift * (torch.rand(len(batch.boxes), 1, SIZE, SIZE, generator=generator) < 0.3)
    return {"lidar.boxes": [teacher_boxes(count, 5 + i) for i in range(len(batch.boxes))], "lidar.bev_lift": lift}


def agreeing(student: Detector, boxes: list[Tensor], threshold: float = 0.3) -> Prediction:
    """A prediction that says just what the teacher's boxes say."""
    encoder = student.targets
    kept = [sample[sample[:, 9] > threshold] for sample in boxes]
    targets = encoder([sample[:, :9] for sample in kept], [sample[:, 10] for sample in kept])
    heat = torch.zeros_like(targets.heatmap)
    code = torch.zeros(len(boxes), 6, 10, SIZE * SIZE)
    for i, sample in enumerate(kept):
        encoded = encoder.encode(sample[:, :9], sample[:, 10].long())
        heat[i] = encoder.heatmap(encoded, sample[:, 10].long(), torch.zeros(len(sample)).long(), 1, sample[:, 9])[0]
        for task in range(6):
            valid = targets.valid[i, task]
            code[i, task][:, targets.cell[i, task, valid]] = targets.code[i, task, valid].T
    logits = torch.logit(heat.double().clamp(1e-12, 1 - 1e-7)).float().split(encoder.task_sizes, dim=1)
    parts = code.view(-1, 6, 10, SIZE, SIZE).split(list(REGRESSION.values()), dim=2)
    head = [{name: part[:, task] for name, part in zip(REGRESSION, parts, strict=True)} | {"heatmap": logits[task]}
            for task in range(6)]
    return Prediction(head, {})


def test_box_terms_are_zero_where_the_student_agrees(student: Detector) -> None:
    batch = random_batch()
    boxes = [teacher_boxes(6, 1), teacher_boxes(4, 2)]
    terms = recipe(student, cls=CLS, reg=REG)
    losses = terms(agreeing(student, boxes), {"lidar.boxes": boxes}, batch, 0.0)
    assert losses["cls"] < 1e-6
    assert losses["reg"] < 1e-6


@pytest.mark.parametrize("name", ["qfl", "gfl", "sl1", "l1", "l2"])
def test_box_terms_teach_the_student_only(student: Detector, name: str) -> None:
    batch = random_batch()
    outputs = teacher_outputs(batch)
    outputs["lidar.boxes"] = [boxes.requires_grad_() for boxes in outputs["lidar.boxes"]]
    student.zero_grad()
    loss = recipe(student, term=CLS | {"distance": name})(student(batch), outputs, batch, 0.0)["term"]
    loss.backward()
    assert loss > 0
    assert student.head.shared_conv.conv.weight.grad.abs().sum() > 0
    assert all(boxes.grad is None for boxes in outputs["lidar.boxes"])


def test_boxes_below_the_threshold_do_not_count(student: Detector) -> None:
    batch = random_batch()
    prediction = student(batch)
    many = [teacher_boxes(20, 1), teacher_boxes(20, 2)]
    kept = [boxes[boxes[:, 9] > 0.3] for boxes in many]
    terms = recipe(student, cls=CLS, reg=REG)
    first, second = (terms(prediction, {"lidar.boxes": boxes}, batch, 0.0) for boxes in (many, kept))
    assert first == second
    unmasked = recipe(student, cls=CLS | {"mask": {"kind": "none"}})
    assert unmasked(prediction, {"lidar.boxes": many}, batch, 0.0)["cls"] != first["cls"]


def test_confident_boxes_weigh_more_in_the_regression(student: Detector) -> None:
    batch = random_batch(batch_size=1)
    boxes = teacher_boxes(2)
    boxes[:, 9] = torch.tensor([0.9, 0.45])
    prediction = student(batch)
    terms = recipe(student, reg=REG | {"weight": 1.0})
    both, one, two = (float(terms(prediction, {"lidar.boxes": [chosen]}, batch, 0.0)["reg"])
                      for chosen in (boxes, boxes[:1], boxes[1:]))
    # Alone, a box's score divides out up to 1: sums of score-weighted distances.
    assert both == pytest.approx((one + two) / 1.35, rel=1e-4)


def test_terms_are_finite_without_any_box(student: Detector) -> None:
    batch = random_batch(boxes=0)
    outputs = teacher_outputs(batch, count=0)
    losses = recipe(student, cls=CLS, gfl=CLS | {"distance": "gfl"}, reg=REG, xfd=XFD,
                    gauss=XFD | {"mask": {"kind": "gt_gauss"}})(student(batch, ["bev_neck"]), outputs, batch, 0.0)
    assert all(torch.isfinite(value) for value in losses.values())
    assert losses["reg"] == 0


def test_map_terms_are_zero_where_the_student_agrees(student: Detector) -> None:
    batch = random_batch()
    terms = recipe(student, 32, direct=DIRECT, masked=DIRECT | {"mask": {"kind": "balanced"}, "distance": "l1"})
    taps = student(batch, ["bev_neck"]).taps
    losses = terms(Prediction([], taps), {"lidar.bev_lift": taps["bev_neck"]}, batch, 0.0)
    assert all(value == 0 for value in losses.values())


@pytest.mark.parametrize("mask", list(MASKS))
def test_map_terms_teach_student_and_adapter_only(student: Detector, mask: str) -> None:
    batch = random_batch()
    outputs = teacher_outputs(batch)
    outputs["lidar.bev_lift"].requires_grad_()
    terms = recipe(student, xfd=XFD | {"mask": {"kind": mask}})
    prediction = student(batch, ["bev_neck"])
    prediction.taps["bev_neck"].retain_grad()
    loss = terms(prediction, outputs, batch, 0.0)["xfd"]
    loss.backward()
    assert loss > 0
    assert prediction.taps["bev_neck"].grad.abs().sum() > 0
    assert all(p.grad is not None for p in terms.parameters())
    assert outputs["lidar.bev_lift"].grad is None


def test_cells_that_are_masked_have_no_effect(student: Detector) -> None:
    batch = random_batch()
    outputs = teacher_outputs(batch, 32)
    source = student(batch, ["bev_neck"]).taps["bev_neck"].detach()
    valid = torch.rand(2, 1, SIZE, SIZE) < 0.5
    disturbed = torch.where(valid, source, source + 100)
    for kind in MASKS:
        terms = recipe(student, 32, direct=DIRECT | {"mask": {"kind": kind}})
        given = outputs | {"lidar.bev_lift.valid": valid}
        losses = [terms(Prediction([], {"bev_neck": x}), given, batch, 0.0)["direct"] for x in (source, disturbed)]
        assert losses[0] == losses[1]
    occupied = (outputs["lidar.bev_lift"] != 0).any(1, keepdim=True)
    terms = recipe(student, 32, direct=DIRECT | {"mask": {"kind": "occupied"}})
    losses = [terms(Prediction([], {"bev_neck": x}), outputs, batch, 0.0)["direct"]
              for x in (source, torch.where(occupied, source, source + 100))]
    assert losses[0] == losses[1]


def test_balanced_is_the_mean_over_occupied_plus_the_mean_over_empty(student: Detector) -> None:
    batch = random_batch()
    outputs = teacher_outputs(batch, 32)
    source = student(batch, ["bev_neck"]).taps["bev_neck"].detach()
    terms = recipe(student, 32, term=DIRECT | {"mask": {"kind": "balanced"}, "distance": "l1", "weight": 1.0})
    target = outputs["lidar.bev_lift"]
    error = (source - target).abs().mean(1)
    cells = (target != 0).any(1)
    loss = terms(Prediction([], {"bev_neck": source}), outputs, batch, 0.0)["term"]
    torch.testing.assert_close(loss, error[cells].mean() + error[~cells].mean())


def test_both_maps_are_divided_by_the_teachers_std(student: Detector) -> None:
    batch = random_batch()
    outputs = teacher_outputs(batch, 32)
    taps = {"bev_neck": student(batch, ["bev_neck"]).taps["bev_neck"].detach()}
    plain = recipe(student, 32, term=DIRECT | {"distance": "l1"})(Prediction([], taps), outputs, batch, 0.0)["term"]
    scaled = recipe(student, 32, torch.full((32,), 4.0), term=DIRECT | {"distance": "l1"})
    torch.testing.assert_close(scaled(Prediction([], taps), outputs, batch, 0.0)["term"], plain / 4)


def test_a_channel_that_never_fires_does_not_rule_the_loss(student: Detector) -> None:
    std = torch.ones(32)
    std[0] = 0.0
    terms = recipe(student, 32, std, term=DIRECT)
    assert terms.terms["term"].std.min() > 0.04


@pytest.mark.parametrize("kind", ["conv1x1", "conv3x3bnrelu", "decoder", "resize"])
def test_every_adapter_reaches_the_teachers_shape(student: Detector, kind: str) -> None:
    assert kind in ADAPTERS
    batch = random_batch()
    channels = 32 if kind == "resize" else 12
    outputs = {"lidar.bev_lift": torch.rand(2, channels, 16, 16) if kind == "resize"
               else torch.rand(2, channels, SIZE, SIZE)}
    terms = recipe(student, channels, term=XFD | {"adapter": {"kind": kind}})
    assert terms(student(batch, ["bev_neck"]), outputs, batch, 0.0)["term"].isfinite()


def test_a_term_waits_for_its_start_and_weighs(student: Detector) -> None:
    batch = random_batch()
    prediction, outputs = student(batch), teacher_outputs(batch)
    terms = recipe(student, late=CLS | {"start": 0.5}, double=CLS | {"weight": 2.0}, plain=CLS)
    before, after = terms(prediction, outputs, batch, 0.49), terms(prediction, outputs, batch, 0.5)
    assert before["late"] == 0
    assert after["late"] == after["plain"] > 0
    assert after["double"] == 2 * after["plain"]


def test_a_recipe_says_which_taps_it_needs_and_which_are_missing(student: Detector) -> None:
    terms = recipe(student, cls=CLS, xfd=XFD)
    assert terms.student_taps == {"bev_neck"}
    assert terms.teacher_taps == {"lidar.boxes", "lidar.bev_lift"}
    batch = random_batch()
    with pytest.raises(KeyError, match=r"lidar\.bev_lift are missing"):
        terms(student(batch, ["bev_neck"]), {"lidar.boxes": []}, batch, 0.0)


def test_no_train_only_module_is_in_the_student_and_the_teacher_stays(student: Detector) -> None:
    """One distillation step with an online teacher: what may change does, what may not does not."""
    teacher = build_detector(lidar_config()).eval().requires_grad_(False)
    learner = copy.deepcopy(student)
    names = set(learner.state_dict())
    count = sum(p.numel() for p in learner.parameters())
    terms = recipe(learner, cls=CLS | {"mask": {"kind": "none"}}, reg=REG | {"mask": {"kind": "none"}}, xfd=XFD)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    adapters = [p.clone() for p in terms.parameters()]
    optimiser = torch.optim.SGD([*learner.parameters(), *terms.parameters()], 0.1)
    batch = random_batch()
    with torch.no_grad():
        prediction = teacher(batch, ["bev_lift"])
    boxes = [torch.cat([d.boxes, d.scores[:, None], d.labels[:, None]], 1) for d in teacher.decode(prediction)]
    outputs = {"lidar.boxes": boxes, "lidar.bev_lift": prediction.taps["bev_lift"]}
    losses = terms(learner(batch, terms.student_taps), outputs, batch, 0.0)
    sum(losses.values()).backward()  # type: ignore[union-attr]
    optimiser.step()
    assert set(losses) == {"cls", "reg", "xfd"}
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(terms.parameters(), adapters, strict=True))
    assert set(learner.state_dict()) == names
    assert sum(p.numel() for p in learner.parameters()) == count


@pytest.mark.parametrize(("term", "message"), [
    (CLS | {"student": "bev_neck"}, "term 'x': teacher boxes compare with the student's head"),
    (CLS | {"mask": {"kind": "balanced"}}, "does not apply to boxes"),
    (CLS | {"adapter": {"kind": "decoder"}}, "does not apply to boxes"),
    (XFD | {"mask": {"kind": "teacher_conf"}}, "mask 'teacher_conf' does not apply to dense maps"),
    (XFD | {"distance": "qfl"}, "distance 'qfl' does not apply to dense maps"),
    (XFD | {"adapter": {"kind": "id"}}, "keeps the student's 32 channels, the teacher's tap has 12"),
    (XFD | {"student": "bev_prev"}, "the student has no dense tap 'bev_prev'"),
    (XFD | {"teacher": "fusion.bev_fused"}, r"the store has no dense tap 'fusion\.bev_fused'"),
])
def test_terms_that_make_no_sense_are_named(student: Detector, term: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(student, x=term)


@pytest.mark.parametrize(("change", "message"), [
    ({"teacher": "lidar"}, "must be <teacher>.<tap>"), ({"distance": "cosine"}, "distance"),
    ({"weight": -1}, "weight"), ({"wieght": 1}, "wieght"), ({"start": 2}, "start"),
])
def test_wrong_term_configs_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TermConfig(**(CLS | change))
