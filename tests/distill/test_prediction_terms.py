"""SimDistill's terms, IMD, CMD, MMD-F and MMD-P, against their formulas: agreement, gradients, masks, no boxes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.recipe import Recipe
from distill.terms import TermConfig
from models.head.targets import REGRESSION, TargetEncoder, draw_gaussians
from models.layers.grid import Grid
from models.ports import Prediction, head_map
from tests.models.factory import random_boxes

TASKS = (1, 2, 2, 1, 2, 2)
CELLS, CHANNELS, WIDE = 16, 6, 8
ENCODER = TargetEncoder(Grid(6.4, 0.8), TASKS, (1,) * 10)
CODE_WEIGHTS = [1.0] * 8 + [0.2, 0.2]
MAP: dict[str, Any] = {"distance": "l2", "normalise": False, "weight": 1.0}
HEAD: dict[str, Any] = {"student": "head", "teacher": "fusion.head", "weight": 0.25}
SIMDISTILL: dict[str, dict[str, Any]] = {
    "imd": MAP | {"student": "bev_lift_camera", "teacher": "fusion.bev_lift_camera"},
    "cmd": MAP
    | {
        "student": "bev_lift_simulated",
        "teacher": "fusion.bev_lift_lidar",
        "mask": {"kind": "gt_gauss"},
        "adapter": {"kind": "conv3x3bnrelu"},
        "weight": 100.0,
    },
    "mmdf": MAP | {"student": "bev_fused", "teacher": "fusion.bev_fused"},
    "mmdp_cls": HEAD | {"distance": "qfl"},
    "mmdp_box": HEAD | {"mask": {"kind": "gt_centers"}, "distance": "sl1", "beta": 1 / 9, "code_weights": CODE_WEIGHTS},
}
STUDENT = {"bev_lift_camera": CHANNELS, "bev_lift_simulated": CHANNELS, "bev_fused": WIDE}
TEACHER = {
    "fusion.bev_lift_camera": CHANNELS,
    "fusion.bev_lift_lidar": WIDE,
    "fusion.bev_fused": WIDE,
    "fusion.head": 10 + 10 * len(TASKS),
}
STD = {name: torch.full((channels,), 3.0) for name, channels in TEACHER.items()}


def recipe(*names: str, **changes: Any) -> Recipe:
    torch.manual_seed(0)
    configs = {name: TermConfig(**SIMDISTILL[name] | changes) for name in names}
    return Recipe(configs, ENCODER, STUDENT, TEACHER, STD)


def random_head(seed: int, samples: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            name: torch.randn(samples, channels, CELLS, CELLS, generator=generator)
            for name, channels in (REGRESSION | {"heatmap": classes}).items()
        }
        for classes in TASKS
    ]


def student(seed: int = 1) -> Prediction:
    """Of random taps and maps that have a gradient."""
    generator = torch.Generator().manual_seed(seed)
    taps = {
        tap: torch.randn(2, channels, CELLS, CELLS, generator=generator).requires_grad_()
        for tap, channels in STUDENT.items()
    }
    head = random_head(seed)
    for maps in (maps for task in head for maps in task.values()):
        maps.requires_grad_()
    return Prediction(head, taps)


def teacher(seed: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    maps = {
        tap: torch.randn(2, channels, CELLS, CELLS, generator=generator).relu().requires_grad_()
        for tap, channels in TEACHER.items()
        if tap != "fusion.head"
    }
    return maps | {"fusion.head": head_map(random_head(seed)).requires_grad_()}


def truth(count: int = 9) -> Any:
    pairs = [random_boxes(count, 7.0, seed) for seed in (3, 4)]  # some centres lie outside the grid
    return SimpleNamespace(boxes=[boxes for boxes, _ in pairs], labels=[labels for _, labels in pairs])


def agreed(prediction: Prediction, terms: Recipe) -> dict[str, Any]:
    """A teacher that says what the student says, after its adapter where it has one."""
    outputs = {"fusion.head": head_map(prediction.head)}
    for term in terms.terms.values():
        if term.config.student != "head":
            outputs[term.config.teacher] = term.adapter(prediction.taps[term.config.student])
    return {name: maps.detach() for name, maps in outputs.items()}


@pytest.mark.parametrize("name", SIMDISTILL)
def test_a_term_is_zero_at_agreement_and_teaches_the_student_otherwise(name: str) -> None:
    terms, prediction, batch = recipe(name), student(), truth()
    assert terms(prediction, agreed(prediction, terms), batch, 0.0)[name] == 0
    outputs = teacher()
    loss = terms(prediction, outputs, batch, 0.0)[name]
    loss.backward()
    tap = SIMDISTILL[name]["student"]
    leaves = [maps for task in prediction.head for maps in task.values()] if tap == "head" else [prediction.taps[tap]]
    assert loss > 0
    assert sum(float(leaf.grad.abs().sum()) for leaf in leaves if leaf.grad is not None) > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in terms.parameters())
    assert all(maps.grad is None for maps in outputs.values())


@pytest.mark.parametrize("name", SIMDISTILL)
def test_a_term_is_finite_without_boxes(name: str) -> None:
    terms, prediction = recipe(name), student()
    loss = terms(prediction, teacher(), truth(0), 0.0)[name]
    loss.backward()
    assert loss.isfinite()
    assert (loss == 0) == (name in ("cmd", "mmdp_box"))
    gradients = [maps.grad for task in prediction.head for maps in task.values() if maps.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", SIMDISTILL)
def test_what_a_teacher_says_where_nothing_is_known_has_no_effect(name: str) -> None:
    terms, prediction, batch, outputs = recipe(name), student(), truth(), teacher()
    tap = SIMDISTILL[name]["teacher"]
    valid = torch.rand(2, 1, CELLS, CELLS, generator=torch.Generator().manual_seed(5)) < 0.5
    changed = torch.where(valid, outputs[tap], 3.0)
    everywhere = terms(prediction, outputs, batch, 0.0)[name]
    masked, same = (
        terms(prediction, {tap: maps, f"{tap}.valid": valid}, batch, 0.0)[name] for maps in (outputs[tap], changed)
    )
    assert torch.equal(masked, same)
    assert not torch.isclose(masked, everywhere)


@pytest.mark.parametrize("name", ["cmd", "mmdp_box"])
def test_away_from_the_objects_a_teacher_has_no_effect(name: str) -> None:
    terms, prediction, batch, outputs = recipe(name), student(), truth(), teacher()
    tap = SIMDISTILL[name]["teacher"]
    before = terms(prediction, outputs, batch, 0.0)[name]
    near = ENCODER(batch.boxes, batch.labels).heatmap.sum(1, keepdim=True) > 0
    assert 0.1 < near.float().mean() < 0.9
    assert torch.equal(before, terms(prediction, {tap: torch.where(near, outputs[tap], 9.0)}, batch, 0.0)[name])
    assert not torch.isclose(before, terms(prediction, {tap: torch.where(near, 9.0, outputs[tap])}, batch, 0.0)[name])


def test_features_are_compared_as_they_are() -> None:
    """Means over all elements of squared differences of raw values, whatever the teacher's statistics are."""
    terms, prediction, batch, outputs = recipe("imd", "cmd", "mmdf"), student(), truth(), teacher()
    losses = terms(prediction, outputs, batch, 0.0)
    for name in ("imd", "mmdf"):
        expected = (prediction.taps[SIMDISTILL[name]["student"]] - outputs[SIMDISTILL[name]["teacher"]]).square().mean()
        torch.testing.assert_close(losses[name], expected)
    normalised = recipe("imd", normalise=True)(prediction, outputs, batch, 0.0)["imd"]
    torch.testing.assert_close(normalised, losses["imd"] / 9)

    mask = torch.zeros(2, CELLS, CELLS)
    for i, (boxes, labels) in enumerate(zip(batch.boxes, batch.labels, strict=True)):
        encoded = ENCODER.encode(boxes, labels)
        for label in range(10):
            mine = encoded.inside & (labels == label)
            plane, peak = torch.zeros(int(mine.sum()), dtype=torch.long), torch.ones(int(mine.sum()))
            mask[i] += draw_gaussians(encoded.column_row[mine], encoded.radius[mine], plane, peak, 1, CELLS)[0]
    assert mask.max() > 1  # Gaussians of classes add up
    adapted = terms.terms["cmd"].adapter(prediction.taps["bev_lift_simulated"])
    expected = 100 * (mask[:, None] * adapted - mask[:, None] * outputs["fusion.bev_lift_lidar"]).square().mean()
    torch.testing.assert_close(losses["cmd"], expected)


def arrays(head: list[dict[str, Tensor]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Codes [B, 10, H, W] and heatmap logits [B, C, H, W] of each task in float64."""
    return [
        (
            torch.cat([task[name] for name in REGRESSION], 1).detach().double().numpy(),
            task["heatmap"].detach().double().numpy(),
        )
        for task in head
    ]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def quality(student_p: np.ndarray, teacher_p: np.ndarray) -> float:
    """MMD-P's heatmap loss of a task, from probabilities."""
    entropy = -(teacher_p * np.log(student_p) + (1 - teacher_p) * np.log(1 - student_p))
    return float(((student_p - teacher_p) ** 2 * entropy).sum() / max(1, (teacher_p > 0.1).sum()))


def test_heatmaps_are_compared_as_probabilities_that_are_made_once() -> None:
    prediction, theirs = student(), random_head(2)
    theirs[3]["heatmap"] -= 9  # of one task the teacher sees nothing: its normaliser is 1
    outputs = {"fusion.head": head_map(theirs)}
    found = float(recipe("mmdp_cls", weight=1.0)(prediction, outputs, truth(), 0.0)["mmdp_cls"])
    logits = [(ours[1], other[1]) for ours, other in zip(arrays(prediction.head), arrays(theirs), strict=True)]
    assert found == pytest.approx(sum(quality(sigmoid(s), sigmoid(t)) for s, t in logits), rel=1e-5)
    twice = sum(quality(sigmoid(sigmoid(s)), sigmoid(sigmoid(t))) for s, t in logits)
    assert abs(found - twice) > 0.5 * found  # the release's defect would be seen
    given_probabilities = {
        "fusion.head": torch.cat(
            [torch.cat([task[name] for name in REGRESSION] + [task["heatmap"].sigmoid()], 1) for task in theirs], 1
        )
    }
    wrong = float(recipe("mmdp_cls", weight=1.0)(prediction, given_probabilities, truth(), 0.0)["mmdp_cls"])
    assert abs(found - wrong) > 0.1 * found


def box_loss(ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]], batch: Any, valid: np.ndarray) -> float:
    """MMD-P's box loss, box by box."""
    sums, counts = np.zeros(len(TASKS)), np.zeros(len(TASKS))
    first = np.cumsum((0, *TASKS))
    mine, other = arrays(ours), arrays(theirs)
    for i, (boxes, labels) in enumerate(zip(batch.boxes, batch.labels, strict=True)):
        for box, label in zip(boxes.double().numpy(), labels.tolist(), strict=True):
            column, row = ((box[:2] + 6.4) / 0.8).astype(int)
            if not (0 <= column < CELLS and 0 <= row < CELLS and valid[i, row, column]):
                continue
            task = int(np.searchsorted(first, label, side="right")) - 1
            error = np.abs(np.array(CODE_WEIGHTS) * (mine[task][0] - other[task][0])[i, :, row, column])
            sums[task] += np.where(error < 1 / 9, error**2 / 2 * 9, error - 1 / 18).sum()
            counts[task] += 1
    return float((sums / counts.clip(1)).sum())


@pytest.mark.parametrize("known", [1.0, 0.6])
def test_boxes_are_compared_at_true_centres_task_by_task(known: float) -> None:
    prediction, theirs, batch = student(), random_head(2), truth(40)
    valid = torch.rand(2, 1, CELLS, CELLS, generator=torch.Generator().manual_seed(5)) < known
    outputs = {"fusion.head": head_map(theirs), "fusion.head.valid": valid}
    found = float(recipe("mmdp_box", weight=1.0)(prediction, outputs, batch, 0.0)["mmdp_box"])
    expected = box_loss(prediction.head, theirs, batch, valid[:, 0].numpy())
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("code", range(10))
def test_each_code_counts_by_its_weight(code: int) -> None:
    """A teacher that differs in one code by 2: each task's mean over boxes is what one box gives."""
    prediction, batch = student(), truth(40)
    theirs = [dict(task) for task in random_head(1)]
    name, channel = [(n, c) for n, channels in REGRESSION.items() for c in range(channels)][code]
    for task in theirs:
        task[name][:, channel] += 2.0
    found = recipe("mmdp_box", weight=1.0)(prediction, {"fusion.head": head_map(theirs)}, batch, 0.0)["mmdp_box"]
    assert float(found) == pytest.approx(len(TASKS) * (2.0 * CODE_WEIGHTS[code] - 1 / 18), rel=1e-5)
