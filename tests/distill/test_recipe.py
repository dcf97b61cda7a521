"""Distillation terms: zero at agreement, gradient otherwise, masks, and what is exported."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from distill.adapters import ADAPTERS
from distill.distances import ELEMENTWISE
from distill.features import DISTANCES
from distill.masks import MASKS
from distill.output import HeadTerm
from distill.recipe import Recipe
from distill.relations import RELATIONS
from distill.terms import AdapterConfig, MaskConfig, TermConfig
from models.detectors.build import build_detector
from models.detectors.detector import Detector
from models.head.targets import REGRESSION
from models.ports import Prediction, head_map
from tests.models.factory import CAMERAS, IMAGE, camera_config, lidar_config, random_batch, random_boxes

CLS = {
    "student": "head",
    "teacher": "lidar.boxes",
    "mask": {"kind": "teacher_conf", "threshold": 0.3},
    "distance": "qfl",
    "weight": 1.0,
}
REG = CLS | {"distance": "sl1", "weight": 0.25}
XFD = {
    "student": "bev_neck",
    "teacher": "lidar.bev_lift",
    "mask": {"kind": "balanced"},
    "adapter": {"kind": "decoder"},
    "distance": "l1",
    "weight": 0.3,
}
DIRECT = XFD | {"adapter": {"kind": "id"}, "distance": "l2", "mask": {"kind": "none"}}
FLAT = REG | {"mask": {"kind": "teacher_conf", "threshold": 0.3, "weighted": False}}
DENSE = {"teacher": "online.head", "mask": {"kind": "teacher_conf", "threshold": 0.3}}
XAT = {
    "student": "bev_neck",
    "teacher": "lidar.bev_lift",
    "adapter": {"kind": "grl_disc", "width": 8},
    "distance": "bce_adv",
    "weight": 0.1,
}
XIS = {
    "student": "pv",
    "teacher": "instance.inst2d",
    "mask": {"kind": "teacher_conf", "threshold": 0.5},
    "adapter": {"kind": "mask_rcnn", "width": 16},
    "distance": "maskrcnn",
    "weight": 0.3,
}
TERMS = {
    "xod_cls": CLS,
    "xod_gfl": CLS | {"distance": "gfl"},
    "xod_reg": REG,
    "xod_reg_flat": FLAT,
    "xod_dense_cls": CLS | DENSE,
    "xod_dense_gfl": CLS | DENSE | {"distance": "gfl"},
    "xod_dense_reg": REG | DENSE,
    "xod_dense_flat": FLAT | DENSE | {"mask": FLAT["mask"]},
    "xfd": XFD,
    "xfd_all": XFD | {"mask": {"kind": "none"}},
    "xfd_direct": XFD | {"mask": {"kind": "none"}, "adapter": {"kind": "conv1x1"}},
    "xfd_gauss": XFD | {"mask": {"kind": "gt_gauss"}},
    "xfd_pearson": XFD | {"distance": "pearson"},
    "xat": XAT,
    "xis": XIS,
}
"""One of each kind of X³KD's terms."""
AGREEING = [name for name, term in TERMS.items() if name.startswith("xod") and term["distance"] != "gfl"]
"""Terms on outputs that vanish at agreement; gfl pulls peaks to 1 whatever the teacher's score is."""
HEAD_CHANNELS = 70
SIZE = 32


@pytest.fixture(scope="module")
def student() -> Detector:
    torch.manual_seed(0)
    return build_detector(camera_config())


def recipe(student: Detector, teacher_channels: int = 12, std: Tensor | None = None, **terms: dict[str, Any]) -> Recipe:
    channels = {"lidar.bev_lift": teacher_channels, "lidar.head": HEAD_CHANNELS, "online.head": HEAD_CHANNELS}
    return Recipe(
        {name: TermConfig(**term) for name, term in terms.items()},
        student.targets,
        student.tap_channels,
        channels,
        None if std is None else {"lidar.bev_lift": std},
        stride=8,
        losses=student.head.losses,
    )


def teacher_boxes(count: int, seed: int = 5) -> Tensor:
    boxes, labels = random_boxes(count, 12.0, seed)
    score = torch.linspace(0.95, 0.05, count)
    return torch.cat([boxes.nan_to_num(0.5), score[:, None], labels[:, None]], dim=1)


def teacher_outputs(batch: Any, channels: int = 12, count: int = 10) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    lift = torch.randn(len(batch.boxes), channels, SIZE, SIZE, generator=generator).relu()
    lift = lift * (torch.rand(len(batch.boxes), 1, SIZE, SIZE, generator=generator) < 0.3)
    head = 2 * torch.randn(len(batch.boxes), HEAD_CHANNELS, SIZE, SIZE, generator=generator) - 1
    return {
        "lidar.boxes": [teacher_boxes(count, 5 + i) for i in range(len(batch.boxes))],
        "lidar.bev_lift": lift,
        "online.head": head,
        "lidar.head": head.clone(),
        "instance.inst2d": [
            [instances(min(count, 3), seed=9 * i + j) for j in range(CAMERAS)] for i in range(len(batch.boxes))
        ],
    }


def instances(count: int, seed: int) -> Any:
    """A teacher's instances of one image: boxes filled by their masks, the first with the best score."""
    draw = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed))
    low = (draw[:, :2] * torch.tensor([IMAGE[1] - 16.0, IMAGE[0] - 16.0])).floor()
    boxes = torch.cat([low, low + 8 + (8 * draw[:, 2:]).floor()], 1)
    masks = torch.zeros(count, *IMAGE, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = 1
    scores = torch.linspace(0.9, 0.55, count)
    return SimpleNamespace(boxes=boxes, labels=torch.arange(count), scores=scores, masks=masks)


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
    head = [
        {name: part[:, task] for name, part in zip(REGRESSION, parts, strict=True)} | {"heatmap": logits[task]}
        for task in range(6)
    ]
    return Prediction(head, {})


@pytest.mark.parametrize("name", AGREEING)
def test_terms_on_outputs_are_zero_where_the_student_agrees(student: Detector, name: str) -> None:
    boxes = [teacher_boxes(6, 1), teacher_boxes(4, 2)]
    head = agreeing(student, boxes).head
    if "dense" in name:  # what is below the threshold is background
        head = [
            task | {"heatmap": task["heatmap"].masked_fill(task["heatmap"].sigmoid() <= 0.3, -30.0)} for task in head
        ]
    outputs = {"lidar.boxes": boxes, "online.head": head_map(head)}
    terms = recipe(student, x=TERMS[name])
    assert terms(Prediction(head, {}), outputs, random_batch(), 0.0)["x"] < 1e-6
    moved = [{key: value + 0.5 for key, value in task.items()} for task in head]
    assert terms(Prediction(moved, {}), outputs, random_batch(), 0.0)["x"] > 1e-3


@pytest.mark.parametrize("name", TERMS)
def test_every_term_teaches_the_student_and_its_own_modules_only(student: Detector, name: str) -> None:
    batch = random_batch()
    outputs = teacher_outputs(batch)
    outputs["lidar.boxes"] = [boxes.requires_grad_() for boxes in outputs["lidar.boxes"]]
    leaves = [
        *outputs["lidar.boxes"],
        outputs["lidar.bev_lift"].requires_grad_(),
        outputs["online.head"].requires_grad_(),
    ]
    torch.manual_seed(3)
    terms = recipe(student, x=TERMS[name])
    student.zero_grad()
    prediction = student(batch, terms.student_taps)
    losses = terms(prediction, outputs, batch, 0.5)
    assert {key for key in losses if not key.startswith("watch/")} == {"x"}
    losses["x"].backward()
    assert losses["x"] > 0
    assert student.images.backbone.conv1.weight.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in terms.parameters())
    assert all(leaf.grad is None for leaf in leaves)
    assert (student.head.shared_conv.conv.weight.grad is not None) == (TERMS[name]["student"] == "head")


@pytest.mark.parametrize("name", TERMS)
def test_every_term_is_finite_without_any_box(student: Detector, name: str) -> None:
    batch = random_batch(boxes=0)
    outputs = teacher_outputs(batch, count=0) | {"online.head": torch.full((2, HEAD_CHANNELS, SIZE, SIZE), -9.0)}
    terms = recipe(student, x=TERMS[name])
    prediction = student(batch, terms.student_taps)
    losses = terms(prediction, outputs, batch, 0.5)
    losses["x"].backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in terms.parameters())
    if TERMS[name]["distance"] in ("sl1", "maskrcnn"):
        assert losses["x"] == 0


def brute_force(student: list[dict[str, Tensor]], teacher: Tensor, term: dict[str, Any]) -> float:
    """The dense reading cell by cell, in numpy; of each task the head has ten codes, then the classes.

    Every task has a mean of its own.
    """
    threshold, weighted = term["mask"]["threshold"], term["mask"].get("weighted", True)
    ours, theirs = (maps.double().detach().numpy() for maps in (head_map(student), teacher))
    losses, start = [], 0
    for task in student:
        total, count = 0.0, 0.0
        classes = task["heatmap"].shape[1]
        code, heat = slice(start, start + 10), slice(start + 10, start + 10 + classes)
        start += 10 + classes
        score = 1 / (1 + np.exp(-theirs[:, heat]))
        score[score <= threshold] = 0
        if term["distance"] == "sl1":
            weight = score.max(1) if weighted else (score.max(1) > 0).astype(float)
            error = np.abs(ours[:, code] - theirs[:, code])
            total, count = (np.where(error < 1, error**2 / 2, error - 0.5).sum(1) * weight).sum(), weight.sum()
            losses.append(total / max(count, 1.0))
            continue
        p = 1 / (1 + np.exp(-ours[:, heat]))
        for sample, label, y, x in np.ndindex(*score.shape):
            target, own = score[sample, label, y, x], p[sample, label, y, x]
            near = score[sample, label, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
            peak = target > 0 and target == near.max()
            count += peak
            if term["distance"] == "qfl":
                total += (own - target) ** 2 * -(target * np.log(own) + (1 - target) * np.log(1 - own))
            elif peak:
                total += -target * (1 - own) ** 2 * np.log(own)
            else:
                total += -((1 - target) ** 4) * own**2 * np.log(1 - own)
        losses.append(total / max(count, 1.0))
    return sum(losses)


@pytest.mark.parametrize("name", ["xod_cls", "xod_gfl", "xod_reg", "xod_reg_flat"])
def test_boxes_of_other_tasks_do_not_make_a_term_weaker(student: Detector, name: str) -> None:
    """The truth's losses are means over the boxes of a task; so are a teacher's."""
    batch = random_batch(batch_size=1)
    boxes = teacher_boxes(3)
    boxes[:, 9], boxes[:, 10] = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0.0, 5.0, 5.0])  # a car, two barriers
    prediction = student(batch)
    terms = recipe(student, x=TERMS[name] | {"weight": 1.0})

    def gradient(chosen: Tensor) -> Tensor:
        """At the maps of the car's task."""
        loss = terms(prediction, {"lidar.boxes": [chosen]}, batch, 0.0)["x"]
        maps = list(prediction.head[0].values())
        found = torch.autograd.grad(loss, maps, retain_graph=True, allow_unused=True)
        return torch.cat([gradient.flatten() for gradient in found if gradient is not None])

    alone, among = gradient(boxes[:1]), gradient(boxes)
    assert alone.abs().sum() > 0
    torch.testing.assert_close(among, alone)


@pytest.mark.parametrize("name", ["xod_dense_cls", "xod_dense_gfl", "xod_dense_reg", "xod_dense_flat"])
def test_the_dense_reading_is_its_formula(student: Detector, name: str) -> None:
    """From logits on both sides: probabilities taken for logits would give other numbers."""
    batch = random_batch(batch_size=1)
    prediction, teacher = student(batch), teacher_outputs(batch)["online.head"]
    found = recipe(student, x=TERMS[name] | {"weight": 1.0})(prediction, {"online.head": teacher}, batch, 0.0)["x"]
    assert float(found) == pytest.approx(brute_force(prediction.head, teacher, TERMS[name]), rel=1e-4)


def test_both_readings_of_the_regression_agree_on_peaks(student: Detector) -> None:
    batch = random_batch(batch_size=1)
    boxes = teacher_boxes(1)
    boxes[:, 9] = 0.9
    teacher = agreeing(student, [boxes])
    alone = {"mask": {"kind": "teacher_conf", "threshold": 0.89}, "weight": 1.0}  # the Gaussian's centre and no more
    terms = recipe(student, boxes=REG | alone, dense=REG | DENSE | alone)
    losses = terms(student(batch), {"lidar.boxes": [boxes], "online.head": head_map(teacher.head)}, batch, 0.0)
    torch.testing.assert_close(losses["boxes"], losses["dense"])


def test_what_a_teacher_says_below_the_threshold_has_no_effect(student: Detector) -> None:
    batch = random_batch()
    prediction, outputs = student(batch, ["pv"]), teacher_outputs(batch)
    chosen = [name for name in TERMS if name.startswith(("xod", "xis"))]
    terms = recipe(student, **{name: TERMS[name] for name in chosen})
    torch.manual_seed(0)
    before = terms(prediction, outputs, batch, 0.0)
    unsure = teacher_boxes(4, 8)
    unsure[:, 9] = 0.29
    maps, start = outputs["online.head"].clone(), 0
    for size in student.targets.task_sizes:
        heat = maps[:, start + 10 : start + 10 + size]
        quiet = heat.sigmoid() <= 0.3
        maps[:, start : start + 10] += 100 * quiet.all(1, keepdim=True)
        heat[quiet] = -5.0
        start += 10 + size
    doubtful = [[extended(image) for image in cameras] for cameras in outputs["instance.inst2d"]]
    torch.manual_seed(0)
    after = terms(
        prediction,
        {
            "lidar.boxes": [torch.cat([b, unsure]) for b in outputs["lidar.boxes"]],
            "online.head": maps,
            "instance.inst2d": doubtful,
        },
        batch,
        0.0,
    )
    assert before == after


def extended(image: Any) -> Any:
    """One more instance of which the teacher is not sure."""
    more = instances(1, seed=99)
    more.scores[:] = 0.49
    return SimpleNamespace(**{key: torch.cat([value, vars(more)[key]]) for key, value in vars(image).items()})


@pytest.mark.parametrize("name", ["xod_dense_cls", "xod_dense_gfl", "xod_dense_reg"])
def test_head_cells_without_a_source_have_no_effect(student: Detector, name: str) -> None:
    batch = random_batch()
    outputs = teacher_outputs(batch)
    valid = torch.rand(2, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(2)) < 0.5
    head = student(batch).head
    disturbed = [{key: torch.where(valid, value, value + 7) for key, value in task.items()} for task in head]
    known = {"online.head.valid": valid}
    terms = recipe(student, x=TERMS[name])
    before = terms(Prediction(head, {}), outputs | known, batch, 0.0)["x"]
    maps = torch.where(valid, outputs["online.head"], 5.0)
    after = terms(Prediction(disturbed, {}), {"online.head": maps} | known, batch, 0.0)["x"]
    torch.testing.assert_close(after, before, rtol=1e-6, atol=0)


def test_a_flat_regression_counts_every_box_alike(student: Detector) -> None:
    batch = random_batch(batch_size=1)
    boxes = teacher_boxes(2)
    boxes[:, 9], boxes[:, 10] = torch.tensor([0.9, 0.45]), 0.0  # of one task
    terms = recipe(student, x=FLAT | {"weight": 1.0})
    both, one, two = (
        terms(student(batch), {"lidar.boxes": [chosen]}, batch, 0.0)["x"] for chosen in (boxes, boxes[:1], boxes[1:])
    )
    torch.testing.assert_close(both, (one + two) / 2)


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
    boxes[:, 9], boxes[:, 10] = torch.tensor([0.9, 0.45]), 0.0  # of one task
    prediction = student(batch)
    terms = recipe(student, reg=REG | {"weight": 1.0})
    both, one, two = (
        float(terms(prediction, {"lidar.boxes": [chosen]}, batch, 0.0)["reg"])
        for chosen in (boxes, boxes[:1], boxes[1:])
    )
    # Alone, a box's score divides out up to 1: sums of score-weighted distances.
    assert both == pytest.approx((one + two) / 1.35, rel=1e-4)


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
    losses = [
        terms(Prediction([], {"bev_neck": x}), outputs, batch, 0.0)["direct"]
        for x in (source, torch.where(occupied, source, source + 100))
    ]
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


def test_pearson_correlates_the_channels_of_each_cell(student: Detector) -> None:
    batch = random_batch()
    outputs = teacher_outputs(batch, 32)
    target = outputs["lidar.bev_lift"]
    source = student(batch, ["bev_neck"]).taps["bev_neck"].detach().requires_grad_()
    terms = recipe(student, 32, term=DIRECT | {"distance": "pearson", "weight": 1.0})

    def loss(maps: Tensor, given: Tensor) -> Tensor:
        return terms(Prediction([], {"bev_neck": maps}), {"lidar.bev_lift": given}, batch, 0.0)["term"]

    contrast = target.std(1) > 0
    assert contrast.any()
    assert not contrast.all()
    cells = [(values.detach().movedim(1, -1)[contrast].numpy()) for values in (source, target)]
    correlation = [np.corrcoef(*pair)[0, 1] for pair in zip(*cells, strict=True)]
    expected = 1 - sum(correlation) / contrast.numel()  # cells of the teacher without contrast count as uncorrelated
    torch.testing.assert_close(loss(source, target).item(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(loss(3 * source + 5, target), loss(source, target), atol=1e-5, rtol=0)
    torch.testing.assert_close(loss(source, 0.2 * target + 7), loss(source, target), atol=1e-5, rtol=0)
    loss(source, target).backward()
    moved = source.grad.abs().sum(1) > 0
    assert torch.equal(moved, contrast)


def test_a_channel_that_never_fires_does_not_rule_the_loss(student: Detector) -> None:
    std = torch.ones(32)
    std[0] = 0.0
    terms = recipe(student, 32, std, term=DIRECT)
    assert terms.terms["term"].std.min() > 0.04


@pytest.mark.parametrize("kind", ["conv1x1", "conv3x3bnrelu", "decoder", "resize", "projection"])
def test_every_adapter_reaches_the_teachers_shape(student: Detector, kind: str) -> None:
    assert kind in ADAPTERS
    batch = random_batch()
    channels, size = 32 if kind == "resize" else 12, 16 if kind in ("resize", "projection") else SIZE
    outputs = {"lidar.bev_lift": torch.rand(2, channels, size, size)}
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
    """One step of all terms with an online teacher: what may change does, what may not does not."""
    teacher = build_detector(lidar_config()).eval().requires_grad_(False)
    learner = copy.deepcopy(student)
    names = set(learner.state_dict())
    count = sum(p.numel() for p in learner.parameters())
    terms = recipe(learner, **TERMS)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    own = [p.clone() for p in terms.parameters()]
    optimiser = torch.optim.SGD([*learner.parameters(), *terms.parameters()], 0.1)
    batch = random_batch()
    with torch.no_grad():
        prediction = teacher(batch, ["bev_lift", "head"])
    boxes = [torch.cat([d.boxes, d.scores[:, None], d.labels[:, None]], 1) for d in teacher.decode(prediction)]
    outputs = teacher_outputs(batch) | {
        "lidar.boxes": boxes,
        "lidar.bev_lift": prediction.taps["bev_lift"],
        "online.head": prediction.taps["head"],
    }
    losses = terms(learner(batch, terms.student_taps), outputs, batch, 0.5)
    torch.stack([value for name, value in losses.items() if name in TERMS]).sum().backward()
    optimiser.step()
    assert {name for name in losses if not name.startswith("watch/")} == set(TERMS)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(not torch.equal(p, q) for p, q in zip(terms.parameters(), own, strict=True))
    assert set(learner.state_dict()) == names
    assert sum(p.numel() for p in learner.parameters()) == count
    assert not {id(p) for p in learner.parameters()} & {id(p) for p in terms.parameters()}


def test_watched_values_are_named_after_term_and_value(student: Detector) -> None:
    batch = random_batch()
    terms = recipe(student, one=XAT, late=XAT | {"start": 0.5})
    losses = terms(student(batch, terms.student_taps), teacher_outputs(batch), batch, 0.25)
    assert set(losses) == {"one", "late", *(f"watch/{n}/{v}" for n in ("one", "late") for v in ("accuracy", "grl"))}
    assert losses["late"] == losses["watch/late/grl"] == 0
    assert losses["watch/one/grl"] > 0.8
    assert not any(value.requires_grad for name, value in losses.items() if name.startswith("watch/"))


def test_a_head_of_other_tasks_or_another_grid_is_named(student: Detector) -> None:
    config = {"x": TermConfig(**CLS | DENSE)}
    with pytest.raises(ValueError, match=r"'online\.head' has 60 channels, the student's head 70: .*the same tasks"):
        Recipe(config, student.targets, student.tap_channels, {"online.head": 60})
    batch = random_batch()
    with pytest.raises(ValueError, match=r"is \[2, 70, 16, 16\], the student's head \[2, 70, 32, 32\]"):
        recipe(student, x=CLS | DENSE)(student(batch), {"online.head": torch.zeros(2, 70, 16, 16)}, batch, 0.0)


def test_instances_need_a_student_with_images(student: Detector) -> None:
    with pytest.raises(ValueError, match=r"term 'x': .*no image neck"):
        Recipe({"x": TermConfig(**XIS)}, student.targets, {"bev_neck": 32}, {})


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (
            CLS | {"student": "bev_neck"},
            "term 'x': a teacher's output compares with .* head, not with its tap 'bev_neck'",
        ),
        (CLS | {"mask": {"kind": "balanced"}}, "'balanced' does not apply to outputs .* qfl: use none or teacher_conf"),
        (
            REG | {"mask": {"kind": "gt_centers"}},
            "'gt_centers' does not apply to outputs .* sl1: use none or teacher_conf",
        ),
        (CLS | {"adapter": {"kind": "decoder"}}, "does not apply to outputs"),
        (XFD | {"mask": {"kind": "teacher_conf"}}, "mask 'teacher_conf' does not apply to dense maps"),
        (XFD | {"distance": "qfl"}, "distance 'qfl' does not apply to dense maps"),
        (CLS | {"distance": "bce_adv"}, "distance 'bce_adv' does not apply to outputs"),
        (XAT | {"student": "head"}, "the student has no dense tap 'head'"),
        (XAT | {"mask": {"kind": "balanced"}}, "mask 'balanced' does not apply to bce_adv"),
        (CLS | DENSE | {"mask": {"kind": "gt_centers"}}, "does not apply to outputs .* qfl: use teacher_conf or none"),
        (REG | DENSE | {"mask": {"kind": "none"}}, "does not apply to outputs .* sl1: use teacher_conf or gt_centers"),
        (
            CLS | DENSE | {"mask": {"kind": "none"}, "distance": "gfl"},
            "does not apply to outputs .* gfl: use teacher_conf",
        ),
        (CLS | {"teacher": "other.head"}, r"the store has no dense tap 'other\.head'"),
        (XIS | {"mask": {"kind": "balanced"}}, "mask 'balanced' does not apply to instances"),
        (XFD | {"teacher": "online.bev_lift", "mask": {"kind": "phi_softmax"}}, r"no dense tap 'online\.bev_lift'"),
        (XFD | {"adapter": {"kind": "id"}}, "keeps the student's 32 channels, the teacher's tap has 12"),
        (XFD | {"student": "bev_prev"}, "the student has no dense tap 'bev_prev'"),
        (XFD | {"teacher": "fusion.bev_fused"}, r"the store has no dense tap 'fusion\.bev_fused'"),
    ],
)
def test_terms_that_make_no_sense_are_named(student: Detector, term: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(student, x=term)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": "lidar"}, "must be <store>.<tap>"),
        ({"distance": "cosine"}, "distance"),
        ({"weight": -1}, "weight"),
        ({"wieght": 1}, "wieght"),
        ({"start": 2}, "start"),
        ({"normalise": False}, "normalise has no effect on qfl of 'head' with mask .*: leave out"),
        ({"beta": 0.5}, "beta has no effect on qfl"),
        ({"code_weights": [1.0] * 10}, "code_weights has no effect on qfl"),
        (REG | {"beta": 0.0}, "beta"),
        (REG | {"code_weights": [1.0] * 9}, "code_weights"),
        (XFD | {"code_weights": [1.0] * 10}, "code_weights has no effect on l1 of 'bev_neck'"),
        ({"mask": {"kind": "none", "threshold": 0.5}}, "mask.threshold has no effect on .* with mask 'none'"),
        ({"mask": {"kind": "teacher_conf", "weighted": False}}, "mask.weighted has no effect on qfl"),
        (XFD | {"mask": {"kind": "balanced", "clip": 2.0, "temperature": 0.5}}, "mask.clip, mask.temperature have no"),
        (XFD | {"adapter": {"kind": "conv1x1", "width": 8}}, "adapter.width has no effect .* adapter 'conv1x1'"),
    ],
)
def test_wrong_term_configs_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TermConfig(**(CLS | change))


def test_pseudo_labels_are_the_truth_of_samples_that_have_none(student: Detector) -> None:
    batch, boxes = random_batch(), [teacher_boxes(8, 1), teacher_boxes(8, 2)]
    batch.labelled = torch.tensor([True, False])
    prediction = student(batch)
    terms = recipe(student, x=CLS | {"distance": "labels", "weight": 1.0})

    def loss(given: list[Tensor]) -> Tensor:
        return terms(prediction, {"lidar.boxes": given}, batch, 0.0)["x"]

    sure = boxes[1][boxes[1][:, 9] > 0.3]
    assert 0 < len(sure) < 8
    alone = [{name: value[1:] for name, value in task.items()} for task in prediction.head]
    expected = student.head.losses(alone, student.targets([sure[:, :9]], [sure[:, 10]]))
    torch.testing.assert_close(loss(boxes), sum(expected.values()))
    assert loss([teacher_boxes(3, 7), boxes[1]]) == loss(boxes)  # of a labelled sample a teacher's boxes are not asked
    assert loss([boxes[0], sure]) == loss(boxes)
    assert loss([boxes[0], boxes[1][:0]]) != loss(boxes)
    batch.labelled = torch.tensor([True, True])
    assert loss(boxes) == 0


def test_the_schema_knows_every_name_and_no_other() -> None:
    def allowed(section: type[BaseModel], key: str) -> set[str]:
        return set(get_args(section.model_fields[key].annotation))

    assert allowed(MaskConfig, "kind") == {*MASKS, "teacher_conf", "gt_centers", "visible_views"}
    assert allowed(AdapterConfig, "kind") == {*ADAPTERS, "grl_disc", "mask_rcnn"}
    assert allowed(TermConfig, "distance") == {
        *ELEMENTWISE, *DISTANCES, *RELATIONS, *HeadTerm.distances, "bce_adv", "maskrcnn", "labels"
    }  # fmt: skip
