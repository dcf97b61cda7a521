"""Response per pillar, its weights in maps and heads, logit distillation and the feature anchor, against loops."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.masks import PILLARS, MaskInput
from distill.recipe import Recipe
from distill.terms import MaskConfig, TermConfig
from models.detectors.build import build_detector
from models.head.targets import REGRESSION, TargetEncoder
from models.layers.grid import Grid
from models.ports import Prediction, head_map
from tests.models.factory import camera_config, random_batch, second

TASKS = (1, 2, 2, 1, 2, 2)
CELLS, OURS, THEIRS = 12, 4, 6
ENCODER = TargetEncoder(Grid(12.0, 2.0), TASKS, (1,) * 10)
PHI = {"mask": {"kind": "phi_softmax"}}
HEAD: dict[str, Any] = {"student": "head", "teacher": "large.head", "weight": 1.0}
RESPONSE: dict[str, dict[str, Any]] = {
    **{f"cls_{mask}": HEAD | {"mask": {"kind": mask}, "distance": "qfl"} for mask in PILLARS},
    **{f"reg_{mask}": HEAD | {"mask": {"kind": mask}, "distance": "sl1"} for mask in PILLARS},
    "reg_l1": HEAD | PHI | {"distance": "l1"},
    "reg_l2": HEAD | PHI | {"distance": "l2"},
    "logit": HEAD | {"distance": "kl"},
}
ANCHOR: dict[str, Any] = {
    "student": "bev_lift",
    "teacher": "large.bev_lift",
    "adapter": {"kind": "projection"},
    "distance": "l1",
    "weight": 1.0,
}
CHANNELS = {"large.head": sum(TASKS) + 10 * len(TASKS), "large.bev_lift": THEIRS}


def recipe(**terms: dict[str, Any]) -> Recipe:
    torch.manual_seed(0)
    return Recipe({name: TermConfig(**term) for name, term in terms.items()}, ENCODER, {"bev_lift": OURS}, CHANNELS)


def random_head(seed: int, samples: int = 2) -> list[dict[str, Tensor]]:
    """Heads with few scores that matter, as trained ones have them."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            name: torch.randn(samples, channels, CELLS, CELLS, generator=generator) * (2 if name == "heatmap" else 1)
            - (3 if name == "heatmap" else 0)
            for name, channels in (REGRESSION | {"heatmap": classes}).items()
        }
        for classes in TASKS
    ]


def loss(term: dict[str, Any], head: list[dict[str, Tensor]], outputs: dict[str, Any], batch: Any) -> Tensor:
    return recipe(x=term)(Prediction(head, {}), outputs, batch, 0.0)["x"]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def arrays(head: list[dict[str, Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    """Codes [B, T, 10, H, W] and heatmap logits [B, C, H, W] in float64."""
    codes = [torch.cat([task[name] for name in REGRESSION], 1) for task in head]
    return torch.stack(codes, 1).double().numpy(), torch.cat([task["heatmap"] for task in head], 1).double().numpy()


def weights(
    mask: str, score: np.ndarray, valid: np.ndarray, batch: Any, temperature: float = 0.1, clip: float = 20.0
) -> np.ndarray:
    """[B, H, W] of each cell, from the teacher's scores [B, C, H, W]."""
    if mask == "uniform":
        return valid.astype(float)
    if mask == "gt_heat":
        return ENCODER(batch.boxes, batch.labels).heatmap.amax(1).double().numpy() * valid
    found = np.zeros(valid.shape)
    for sample in range(len(score)):
        power = np.exp(score[sample].max(0) / temperature) * valid[sample]
        found[sample] = np.minimum(valid[sample].sum() * power / power.sum(), clip)
    return found


def response(
    term: dict[str, Any], ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]], valid: np.ndarray, batch: Any
) -> float:
    """The loss cell by cell."""
    (code, logits), (goal, wanted) = arrays(ours), arrays(theirs)
    p, q = sigmoid(logits), sigmoid(wanted)
    weight = weights(term["mask"]["kind"], q, valid, batch)
    total = 0.0
    for sample, row, column in np.ndindex(*valid.shape):
        at = (sample, ..., row, column)
        if term["distance"] == "qfl":
            s, t = p[at], q[at]
            value = ((s - t) ** 2 * -(t * np.log(s) + (1 - t) * np.log(1 - s))).sum()
        else:
            error, value, first = np.abs(code[at] - goal[at]), 0.0, 0
            each = {"l1": error, "l2": error**2, "sl1": np.where(error < 1, error**2 / 2, error - 0.5)}
            for task, classes in enumerate(TASKS):
                if q[at][first : first + classes].max() > 0.1:
                    value += each[term["distance"]][task].mean()
                first += classes
        total += value * weight[sample, row, column] / weight[sample].sum() / len(valid)
    return float(total)


@pytest.mark.parametrize("share", [1.0, 0.6])
@pytest.mark.parametrize("name", [name for name in RESPONSE if name != "logit"])
def test_the_response_per_pillar_is_its_formula(name: str, share: float) -> None:
    ours, theirs, batch = random_head(1), random_head(2), random_batch(extent=11.0)
    valid = torch.rand(2, 1, CELLS, CELLS, generator=torch.Generator().manual_seed(5)) < share
    expected = response(RESPONSE[name], ours, theirs, valid[:, 0].numpy(), batch)
    found = loss(RESPONSE[name], ours, {"large.head": head_map(theirs), "large.head.valid": valid}, batch)
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_logit_distillation_is_the_divergence_of_the_scores() -> None:
    ours, theirs, batch = random_head(1), random_head(2), random_batch()
    teacher, student = (
        torch.distributions.Bernoulli(logits=torch.from_numpy(arrays(head)[1])) for head in (theirs, ours)
    )
    each = torch.distributions.kl_divergence(teacher, student).sum(1, keepdim=True)
    valid = torch.rand(2, 1, CELLS, CELLS, generator=torch.Generator().manual_seed(5)) < 0.5
    outputs = {"large.head": head_map(theirs)}
    assert float(loss(RESPONSE["logit"], ours, outputs, batch)) == pytest.approx(float(each.mean()), rel=1e-5)
    masked = loss(RESPONSE["logit"], ours, outputs | {"large.head.valid": valid}, batch)
    assert float(masked) == pytest.approx(float(each[valid].mean()), rel=1e-5)


@pytest.mark.parametrize("name", RESPONSE)
def test_a_response_is_zero_at_agreement_and_teaches_the_student_otherwise(name: str) -> None:
    ours, batch = random_head(1), random_batch(extent=11.0)
    leaves = [maps.requires_grad_() for task in ours for maps in task.values()]
    assert loss(RESPONSE[name], ours, {"large.head": head_map(ours).detach()}, batch) == 0
    target = head_map(random_head(2)).requires_grad_()
    found = loss(RESPONSE[name], ours, {"large.head": target}, batch)
    found.backward()
    assert found > 1e-3
    assert sum(float(leaf.grad.abs().sum()) for leaf in leaves if leaf.grad is not None) > 1e-3
    assert target.grad is None


@pytest.mark.parametrize("name", RESPONSE)
def test_cells_of_which_nothing_is_known_have_no_effect(name: str) -> None:
    ours, theirs, batch = random_head(1), head_map(random_head(2)), random_batch(extent=11.0)
    valid = torch.rand(2, 1, CELLS, CELLS, generator=torch.Generator().manual_seed(5)) < 0.5
    disturbed = [{key: torch.where(valid, maps, maps + 5) for key, maps in task.items()} for task in ours]
    known = {"large.head.valid": valid}
    before = loss(RESPONSE[name], ours, {"large.head": theirs} | known, batch)
    after = loss(RESPONSE[name], disturbed, {"large.head": torch.where(valid, theirs, 5.0)} | known, batch)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=0)
    nothing = {"large.head": theirs, "large.head.valid": torch.zeros_like(valid)}
    assert loss(RESPONSE[name], ours, nothing, batch) == 0


@pytest.mark.parametrize("name", RESPONSE)
def test_a_response_is_finite_without_boxes_and_with_maps_of_zeros(name: str) -> None:
    ours = [{key: torch.zeros_like(maps).requires_grad_() for key, maps in task.items()} for task in random_head(1)]
    batch = random_batch(boxes=0)
    for theirs in (head_map(ours).detach(), head_map(random_head(2)), torch.full_like(head_map(ours), -50.0)):
        found = loss(RESPONSE[name], ours, {"large.head": theirs}, batch)
        found.backward()
        assert found.isfinite()
        assert found == 0 or "gt_heat" not in name
        assert all(maps.grad is None or maps.grad.isfinite().all() for task in ours for maps in task.values())


@pytest.mark.parametrize("name", ["cls_phi_softmax", "cls_uniform", "cls_gt_heat", "logit"])
def test_scores_are_made_of_logits_once(name: str) -> None:
    """Probabilities in place of a teacher's logits, the defect of a second sigmoid, would be seen."""
    ours, theirs, batch = random_head(1), random_head(2), random_batch(extent=11.0)
    twice = [task | {"heatmap": task["heatmap"].sigmoid()} for task in theirs]
    found, wrong = (float(loss(RESPONSE[name], ours, {"large.head": head_map(h)}, batch)) for h in (theirs, twice))
    assert abs(found - wrong) > 0.3 * found


def phi(score: Tensor, valid: Tensor, **config: Any) -> Tensor:
    """[B, 1, H, W] that `phi_softmax` makes of best scores."""
    given = MaskInput(
        torch.zeros_like(score), valid, random_batch(), ENCODER, MaskConfig(kind="phi_softmax", **config), score
    )
    return PILLARS["phi_softmax"](given)


def test_phi_is_a_clipped_softmax_of_each_sample() -> None:
    score = torch.rand(2, 1, CELLS, CELLS, generator=torch.Generator().manual_seed(1)) * 0.2
    score[0, 0, 3, 4] = 0.9
    score[1] = 0.4
    valid = torch.ones_like(score, dtype=torch.bool)
    found = phi(score, valid)
    torch.testing.assert_close(found.sum((1, 2, 3)), torch.full((2,), 0.5))  # each sample counts alike
    torch.testing.assert_close(found[1], torch.full_like(found[1], 0.5 / CELLS**2))  # without a peak all cells do
    share = torch.softmax(score[0].flatten() / 0.1, 0)
    assert CELLS**2 * share.max() > 20
    clipped = (CELLS**2 * share).clamp(max=20)
    torch.testing.assert_close(found[0].flatten(), clipped / clipped.sum() / 2)
    for config, sharper in (({"clip": 5.0}, False), ({"temperature": 0.3}, False), ({"clip": 1000.0}, True)):
        assert (phi(score, valid, **config)[0].max() > found[0].max()) == sharper


def features(seed: int, channels: int, cells: int) -> Any:
    return torch.randn(2, channels, cells, cells, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mask", PILLARS)
def test_the_feature_anchor_weighs_cells_as_the_response_does(mask: str) -> None:
    """Teacher's features on twice the head's grid: projected, brought there, compared where the weights are."""
    term = ANCHOR | {"mask": {"kind": mask}}
    terms, batch, head = recipe(x=term), random_batch(extent=11.0), random_head(2)
    adapter: Any = terms.terms["x"].adapter
    ours, theirs = features(1, OURS, CELLS), features(2, THEIRS, 2 * CELLS)
    valid = torch.rand(2, 1, 2 * CELLS, 2 * CELLS, generator=torch.Generator().manual_seed(5)) < 0.7
    outputs = {"large.bev_lift": theirs, "large.bev_lift.valid": valid, "large.head": head_map(head)}
    found = terms(Prediction([], {"bev_lift": ours}), outputs, batch, 0.0)["x"]

    def enlarged(x: np.ndarray) -> np.ndarray:
        return F.interpolate(torch.from_numpy(x), scale_factor=2, mode="bilinear").numpy()

    weight, bias = (parameter.detach().numpy() for parameter in (adapter.conv.weight, adapter.conv.bias))
    projected = np.einsum("dc,bchw->bdhw", weight[:, :, 0, 0], ours.numpy()) + bias.reshape(-1, 1, 1)
    score = enlarged(sigmoid(arrays(head)[1]).max(1, keepdims=True))
    weight = (
        weights(mask, score, valid[:, 0].numpy(), batch)
        if mask != "gt_heat"
        else enlarged(ENCODER(batch.boxes, batch.labels).heatmap.amax(1, keepdim=True).numpy())[:, 0]
        * valid[:, 0].numpy()
    )
    error = np.abs(enlarged(projected) - theirs.numpy()).mean(1)
    expected = np.mean([(error[i] * weight[i]).sum() / weight[i].sum() for i in range(2)])
    assert float(found) == pytest.approx(expected, rel=1e-4)
    assert terms.teacher_taps == {"large.bev_lift"} | ({"large.head"} if mask == "phi_softmax" else set())


def test_cells_of_an_unknown_head_count_as_background_in_the_anchor() -> None:
    terms, batch = recipe(x=ANCHOR | PHI), random_batch()
    taps = {"bev_lift": features(1, OURS, CELLS)}
    head, quiet = (
        head_map(random_head(2)),
        head_map([task | {"heatmap": torch.full_like(task["heatmap"], -50.0)} for task in random_head(2)]),
    )
    known = torch.rand(2, 1, CELLS, CELLS, generator=torch.Generator().manual_seed(5)) < 0.5
    outputs = {"large.bev_lift": features(2, THEIRS, CELLS)}
    partly = terms(Prediction([], taps), outputs | {"large.head": head, "large.head.valid": known}, batch, 0.0)["x"]
    said = outputs | {"large.head": torch.where(known, head, quiet)}
    torch.testing.assert_close(terms(Prediction([], taps), said, batch, 0.0)["x"], partly)
    assert not torch.isclose(terms(Prediction([], taps), outputs | {"large.head": head}, batch, 0.0)["x"], partly)


def test_the_anchor_is_zero_where_the_projected_student_agrees() -> None:
    terms, batch = recipe(x=ANCHOR | PHI), random_batch()
    adapter: Any = terms.terms["x"].adapter
    ours = features(1, OURS, CELLS).requires_grad_()
    outputs = {"large.bev_lift": adapter(ours, (CELLS, CELLS)).detach(), "large.head": head_map(random_head(2))}
    assert terms(Prediction([], {"bev_lift": ours}), outputs, batch, 0.0)["x"] == 0
    terms(Prediction([], {"bev_lift": ours}), outputs | {"large.bev_lift": features(2, THEIRS, CELLS)}, batch, 0.0)[
        "x"
    ].backward()
    assert ours.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in terms.parameters())


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (HEAD | PHI | {"distance": "kl"}, "mask 'phi_softmax' does not apply to outputs with distance kl: use none"),
        (
            HEAD | PHI | {"distance": "gfl"},
            "'phi_softmax' does not apply to outputs with distance gfl: use teacher_conf",
        ),
        (HEAD | {"mask": {"kind": "balanced"}, "distance": "qfl"}, "or phi_softmax or uniform or gt_heat"),
        (HEAD | {"teacher": "large.boxes", "distance": "kl"}, "distance 'kl' does not apply to outputs: use one of"),
        (ANCHOR | {"distance": "kl"}, "distance 'kl' does not apply to dense maps"),
    ],
)
def test_responses_that_make_no_sense_are_named(term: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(x=term)


def test_a_teacher_of_other_tasks_cannot_weigh() -> None:
    config = {"x": TermConfig(**ANCHOR | PHI)}
    with pytest.raises(ValueError, match=r"'large\.head' has 60 channels, the student's head 70: .* the same tasks"):
        Recipe(config, ENCODER, {"bev_lift": OURS}, CHANNELS | {"large.head": 60})


STRUCTURED: dict[str, dict[str, Any]] = {
    "spatial": {
        "student": "bev_view",
        "teacher": "large.bev_view",
        "mask": {"kind": "visible_views"},
        "distance": "cos_rel",
        "weight": 1.0,
    },
    "temporal": {"student": "bev_lift", "teacher": "large.bev_lift", "distance": "kl_rel", "weight": 1.0},
    "anchor": ANCHOR | PHI | {"weight": 0.1},
    "cls": RESPONSE["cls_phi_softmax"],
    "reg": RESPONSE["reg_phi_softmax"],
}
"""All terms of Structured KD."""


def test_a_student_learns_from_a_camera_teacher_of_other_widths_that_stays_as_it_is() -> None:
    torch.manual_seed(0)
    depth_net, two = {"mid_channels": 8, "context_channels": 6, "blocks": 1}, {"frames": 2}
    teacher = build_detector(camera_config(**two, bev_backbone=second(24, [1, 2]))).eval().requires_grad_(False)
    student = build_detector(camera_config(**two, depth_net=depth_net))
    before = copy.deepcopy(teacher.state_dict())
    channels = {f"large.{tap}": count for tap, count in (teacher.tap_channels | {"head": 70}).items()}
    terms = Recipe(
        {name: TermConfig(**term) for name, term in STRUCTURED.items()}, student.targets, student.tap_channels, channels
    )
    batch = random_batch(frames=2)
    read = {tap.partition(".")[2] for tap in terms.teacher_taps}
    assert read == {"bev_view", "bev_lift", "bev_prev", "head"}
    outputs = {f"large.{tap}": maps for tap, maps in teacher(batch, read).taps.items()}
    first: Any = student.get_parameter("images.backbone.conv1.weight")
    for name in STRUCTURED:
        student.zero_grad()
        losses = terms(student(batch, terms.student_taps), outputs, batch, 0.5)
        assert set(losses) == set(STRUCTURED)
        losses[name].backward()
        assert losses[name] > 0
        assert first.grad.abs().sum() > 0
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
