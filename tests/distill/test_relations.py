"""Terms on relations within maps, against loops over cameras, cells and neighbours: Structured KD's and baselines."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.recipe import Recipe
from distill.relations import EMPTY
from distill.terms import TermConfig
from models.head.targets import TargetEncoder
from models.layers.grid import Grid
from models.ports import Prediction
from tests.models.factory import CAMERAS, IMAGE, random_batch

CELLS, OURS, THEIRS = 10, 4, 5
ENCODER = TargetEncoder(Grid(12.8, 2.56, (-5.0, 3.0)), (1, 2, 2, 1, 2, 2), (1,) * 10)
RELATIONS: dict[str, dict[str, Any]] = {
    "cos_rel": {"student": "bev_view", "teacher": "large.bev_view", "mask": {"kind": "visible_views"}},
    "kl_rel": {"student": "bev_lift", "teacher": "large.bev_lift"},
    "attention": {"student": "bev_lift", "teacher": "large.bev_lift"},
    "similarity": {"student": "bev_lift", "teacher": "large.bev_lift"},
}
STUDENT = {"bev_view": CAMERAS * OURS, "bev_lift": OURS, "bev_prev": OURS}
TEACHER = {f"large.{tap}": channels // OURS * THEIRS for tap, channels in STUDENT.items()}


def recipe(distance: str, **changes: Any) -> Recipe:
    config = TermConfig(**RELATIONS[distance] | {"distance": distance, "weight": 1.0} | changes)
    return Recipe({"x": config}, ENCODER, STUDENT, TEACHER)


def draw(channels: dict[str, int], seed: int, cells: int = CELLS, samples: int = 2) -> Any:
    """Random maps of some sparsity: cells without any feature are part of the matter."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for tap, count in channels.items():
        filled = torch.rand(samples, 1, cells, cells, generator=generator) < 0.9
        found[tap] = torch.randn(samples, count, cells, cells, generator=generator) * filled
    return found


def sample_batch(samples: int = 2) -> Any:
    """With cameras that overlap; turned, mirrored and scaled in part; the second sample has no previous keyframe."""
    batch = random_batch(samples)
    batch.intrinsics[..., 0, 0] = 22.0
    turn = torch.tensor([[math.cos(0.4), math.sin(0.4)], [math.sin(0.4), -math.cos(0.4)]])
    batch.bev_aug[0, :2, :2], batch.bev_aug[0, 2, 2] = 1.05 * turn, 1.05
    batch.has_previous[1:] = False
    return batch


def loss(distance: str, ours: dict[str, Tensor], theirs: dict[str, Tensor], batch: Any) -> Tensor:
    return recipe(distance)(Prediction([], ours), theirs, batch, 0.0)["x"]


def as_teacher(taps: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"large.{tap}": maps.detach().clone() for tap, maps in taps.items()}


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    lengths = np.linalg.norm(first) * np.linalg.norm(second)
    return float(first @ second / lengths) if lengths else 0.0


def visible(batch: Any, sample: int, camera: int, x: float, y: float) -> bool:
    """Whether a camera sees one of the four points of a pillar, from the definition of each matrix."""
    pose = (batch.bev_aug[sample] @ batch.lidar_SE3_cam[sample, 0, camera]).double().numpy()
    for z in (-4.0, -2.0, 0.0, 2.0):
        point = np.linalg.inv(pose) @ np.array([x, y, z, 1.0])
        pixel = (
            batch.image_aug[sample, 0, camera].double().numpy()
            @ batch.intrinsics[sample, 0, camera].double().numpy()
            @ point[:3]
        )
        column, row = pixel[:2] / pixel[2] + 0.5
        if pixel[2] > 0.1 and 0 <= column <= IMAGE[1] and 0 <= row <= IMAGE[0]:
            return True
    return False


def pillars() -> Any:
    """Row, column, x and y of each cell."""
    axis = np.arange(CELLS) * 2 * 12.8 / CELLS - 12.8 + 12.8 / CELLS
    return [(row, column, axis[column], axis[row]) for row, column in np.ndindex(CELLS, CELLS)]


def parts(views: Tensor, sample: int, row: int, column: int) -> np.ndarray:
    """[N, C] of one cell."""
    return views[sample, :, row, column].double().numpy().reshape(CAMERAS, -1)


def spatial(ours: Tensor, theirs: Tensor, batch: Any, valid: Tensor) -> tuple[float, int]:
    """The loss pillar by pillar, and how many pillars several cameras see."""
    errors, shared = [], 0
    for sample in range(len(ours)):
        for row, column, x, y in pillars():
            seeing = [k for k in range(CAMERAS) if visible(batch, sample, k, x, y)]
            if not seeing or not valid[sample, 0, row, column]:
                continue
            shared += len(seeing) > 1
            relations = []
            for maps in (ours, theirs):
                part = parts(maps, sample, row, column)
                relations.append([cosine(part[k], part.sum(0) if k == m else part[m]) for k in seeing for m in seeing])
            errors.append(np.abs(np.subtract(relations[0], relations[1])).mean())
    return float(np.mean(errors)), shared


def window(maps: Tensor, previous: Tensor, known: Tensor, sample: int, row: int, column: int) -> list[float]:
    """Cosines of a cell with its known neighbours in the previous map."""
    cell = maps[sample, :, row, column].double().numpy()
    near = [(row + dy, column + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return [
        cosine(cell, previous[sample, :, r, c].double().numpy())
        for r, c in near
        if 0 <= r < CELLS and 0 <= c < CELLS and known[sample, 0, r, c]
    ]


def temporal(ours: dict[str, Tensor], theirs: dict[str, Tensor], batch: Any, valid: Tensor, known: Tensor) -> float:
    """The loss cell by cell."""
    found = []
    for sample in np.flatnonzero(batch.has_previous.numpy()):
        for row, column, _, _ in pillars():
            student = window(ours["bev_lift"], ours["bev_prev"], known, sample, row, column)
            teacher = window(theirs["large.bev_lift"], theirs["large.bev_prev"], known, sample, row, column)
            if not student or not valid[sample, 0, row, column]:
                continue
            p, q = (np.exp(np.array(r) / 0.1) / np.exp(np.array(r) / 0.1).sum() for r in (teacher, student))
            found.append((p * np.log(p / q)).sum())
    return float(np.mean(found))


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_relations_between_views_are_their_formula(share: float) -> None:
    ours, theirs, batch = draw(STUDENT, 1), draw(TEACHER, 2), sample_batch()
    valid = torch.rand(2, 1, CELLS, CELLS, generator=torch.Generator().manual_seed(5)) < share
    expected, shared = spatial(ours["bev_view"], theirs["large.bev_view"], batch, valid)
    assert shared > 10
    found = loss("cos_rel", ours, theirs | {"large.bev_view.valid": valid}, batch)
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_relations_between_keyframes_are_their_formula(share: float) -> None:
    ours, theirs, batch = draw(STUDENT, 1), draw(TEACHER, 2), sample_batch()
    draws = torch.rand(2, 2, 1, CELLS, CELLS, generator=torch.Generator().manual_seed(5)) < share
    known = {"large.bev_lift.valid": draws[0], "large.bev_prev.valid": draws[1]}
    expected = temporal(ours, theirs, batch, *draws)
    assert float(loss("kl_rel", ours, theirs | known, batch)) == pytest.approx(expected, rel=1e-5)


def test_attention_is_its_formula() -> None:
    ours, theirs = draw(STUDENT, 1), draw(TEACHER, 2)
    expected = 0.0
    for sample in range(2):
        maps = [taps[sample].double().square().mean(0).numpy() for taps in (ours["bev_lift"], theirs["large.bev_lift"])]
        first, second = (activity / np.linalg.norm(activity) for activity in maps)
        expected += ((first - second) ** 2).sum() / 2
    assert float(loss("attention", ours, theirs, sample_batch())) == pytest.approx(expected, rel=1e-5)


def test_similarity_is_its_formula() -> None:
    ours, theirs = draw(STUDENT, 1, samples=3), draw(TEACHER, 2, samples=3)
    grams = []
    for maps in (ours["bev_lift"], theirs["large.bev_lift"]):
        flat = maps.flatten(1).double().numpy()
        gram = np.array([[row @ other for other in flat] for row in flat])
        grams.append(np.array([row / np.linalg.norm(row) for row in gram]))
    expected = ((grams[0] - grams[1]) ** 2).sum() / 9
    found = float(loss("similarity", ours, theirs, sample_batch(3)))
    assert found == pytest.approx(expected, rel=1e-4)
    one = [{tap: maps[:1] for tap, maps in taps.items()} for taps in (ours, theirs)]
    assert loss("similarity", one[0], one[1], sample_batch(1)) < 1e-12  # one sample is like itself


@pytest.mark.parametrize("distance", RELATIONS)
def test_a_relation_is_zero_at_equality_and_teaches_the_student_otherwise(distance: str) -> None:
    ours, batch = {tap: maps.requires_grad_() for tap, maps in draw(STUDENT, 1).items()}, sample_batch()
    terms = recipe(distance)
    assert loss(distance, ours, as_teacher(ours), batch) == 0
    theirs = {tap: maps.requires_grad_() for tap, maps in draw(TEACHER, 2).items()}
    found = loss(distance, ours, theirs, batch)
    found.backward()
    assert found > 1e-4
    for tap in terms.student_taps:
        assert ours[tap].grad.isfinite().all()
        assert ours[tap].grad.abs().sum() > 1e-4
    assert all(maps.grad is None for maps in theirs.values())
    assert not list(terms.parameters())


@pytest.mark.parametrize("distance", RELATIONS)
@pytest.mark.parametrize("empty", ["student", "teacher", "both", "one sample"])
def test_a_relation_is_finite_with_maps_of_zeros(distance: str, empty: str) -> None:
    ours, theirs = draw(STUDENT, 1), draw(TEACHER, 2)
    for maps in ours.values():
        maps[: 1 if empty == "one sample" else 2 if empty in ("student", "both") else 0] = 0
        maps.requires_grad_()
    if empty in ("teacher", "both"):
        theirs = {tap: torch.zeros_like(maps) for tap, maps in theirs.items()}
    found = loss(distance, ours, theirs, sample_batch())
    found.backward()
    assert found.isfinite()
    assert all(maps.grad.abs().max() < 1e3 for maps in ours.values() if maps.grad is not None)


@pytest.mark.parametrize("distance", ["cos_rel", "kl_rel"])
def test_empty_cells_of_the_student_get_no_gradient(distance: str) -> None:
    """Their direction is not defined, and a hair beside it the gradient would be endless."""
    ours = draw(STUDENT, 1)
    for maps in ours.values():
        maps[..., ::2] = 1e-3 * math.sqrt(EMPTY)
        maps.requires_grad_()
    loss(distance, ours, draw(TEACHER, 2), sample_batch()).backward()
    gradient = ours[RELATIONS[distance]["student"]].grad
    assert (gradient[..., ::2] == 0).all()
    assert (gradient[..., 1::2] != 0).any()


@pytest.mark.parametrize("distance", RELATIONS)
def test_what_is_not_known_of_the_teacher_has_no_effect(distance: str) -> None:
    ours, theirs, batch = draw(STUDENT, 1), draw(TEACHER, 2), sample_batch()
    valid = torch.rand(2, 1, CELLS, CELLS, generator=torch.Generator().manual_seed(5)) < 0.5
    known = {f"{tap}.valid": valid for tap in theirs}
    before = loss(distance, ours, theirs | known, batch)
    disturbed = {tap: torch.where(valid, maps, maps + 3) for tap, maps in (ours | theirs).items()}
    student, teacher = ({tap: disturbed[tap] for tap in taps} for taps in (ours, theirs))
    after = loss(distance, student, teacher | known, batch)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=0)
    assert not torch.isclose(loss(distance, ours, theirs, batch), before)


def test_a_pillar_that_nobody_sees_does_not_count_and_one_camera_alone_has_nothing_to_teach() -> None:
    ours, theirs, batch = draw(STUDENT, 1), draw(TEACHER, 2), sample_batch()
    seen = torch.zeros(2, CAMERAS, CELLS, CELLS, dtype=torch.bool)
    for sample, camera in np.ndindex(2, CAMERAS):
        for row, column, x, y in pillars():
            seen[sample, camera, row, column] = visible(batch, sample, camera, x, y)
    nobody = ~seen.any(1, keepdim=True)
    assert nobody.any()
    before = loss("cos_rel", ours, theirs, batch)
    filled = {"bev_view": torch.where(nobody, 7.0, ours["bev_view"])}
    assert torch.equal(loss("cos_rel", filled, theirs, batch), before)
    alone = seen & (seen.sum(1, keepdim=True) == 1)
    student, teacher = (
        {"bev_view": alone.repeat_interleave(OURS, 1) * (ours["bev_view"] + 9)},
        {"large.bev_view": alone.repeat_interleave(THEIRS, 1) * (theirs["large.bev_view"] + 9)},
    )
    assert loss("cos_rel", student, teacher, batch) < 1e-6


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("distance", RELATIONS)
def test_relations_are_blind_to_what_the_student_may_choose(distance: str, turned: bool) -> None:
    """A scale of the map and, but for nothing, a rotation of channel space; a comparison of features sees both."""
    ours, batch = draw(STUDENT, 1), sample_batch()
    theirs = as_teacher(draw(STUDENT, 2))
    rotation = torch.linalg.qr(torch.randn(OURS, OURS, generator=torch.Generator().manual_seed(3)))[0]
    changed = {}
    for tap, maps in ours.items():
        groups = maps.unflatten(1, (-1, OURS))
        changed[tap] = torch.einsum("dc,bkchw->bkdhw", rotation, groups).flatten(1, 2) if turned else 3 * maps
    before, after = (loss(distance, taps, theirs, batch) for taps in (ours, changed))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-6)
    features: dict[str, Any] = {"student": "bev_lift", "teacher": "large.bev_lift", "distance": "l1", "weight": 1.0}
    terms = Recipe({"x": TermConfig(**features)}, ENCODER, STUDENT, {"large.bev_lift": OURS})
    plain = [terms(Prediction([], taps), theirs, batch, 0.0)["x"] for taps in (ours, changed)]
    assert abs(plain[0] - plain[1]) > 0.01


def test_samples_without_a_previous_keyframe_have_no_temporal_relation() -> None:
    ours, theirs, batch = draw(STUDENT, 1), draw(TEACHER, 2), sample_batch()
    first = random_batch(1)
    alone = [{tap: maps[:1] for tap, maps in taps.items()} for taps in (ours, theirs)]
    torch.testing.assert_close(loss("kl_rel", ours, theirs, batch), loss("kl_rel", alone[0], alone[1], first))
    batch.has_previous[:] = False
    assert loss("kl_rel", ours, theirs, batch) == 0


@pytest.mark.parametrize("distance", RELATIONS)
@pytest.mark.parametrize("cells", [5, 20])
def test_a_student_on_another_grid_is_brought_to_the_teachers(distance: str, cells: int) -> None:
    ours, theirs, batch = draw(STUDENT, 1, cells), draw(TEACHER, 2), sample_batch()
    brought = {
        tap: torch.nn.functional.interpolate(maps, (CELLS, CELLS), mode="bilinear") for tap, maps in ours.items()
    }
    torch.testing.assert_close(loss(distance, ours, theirs, batch), loss(distance, brought, theirs, batch))


@pytest.mark.parametrize("distance", RELATIONS)
def test_a_step_in_half_precision_changes_nothing(distance: str) -> None:
    ours, theirs, batch = draw(STUDENT, 1), draw(TEACHER, 2), sample_batch()
    plain = loss(distance, ours, theirs, batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(distance, ours, theirs, batch), plain)


@pytest.mark.parametrize("distance", RELATIONS)
def test_a_recipe_names_the_taps_of_both_keyframes(distance: str) -> None:
    term = RELATIONS[distance]
    terms = recipe(distance)
    before = {"bev_prev"} if distance == "kl_rel" else set()
    assert terms.student_taps == {term["student"]} | before
    assert terms.teacher_taps == {term["teacher"]} | {f"large.{tap}" for tap in before}
    assert terms.terms["x"].config.teacher_taps == terms.teacher_taps


@pytest.mark.parametrize(
    ("distance", "change", "message"),
    [
        ("cos_rel", {"mask": {"kind": "none"}}, "mask 'none' does not apply to cos_rel: use visible_views"),
        ("kl_rel", {"mask": {"kind": "balanced"}}, "mask 'balanced' does not apply to kl_rel: use none"),
        ("attention", {"mask": {"kind": "phi_softmax"}, "teacher": "large.bev_lift"}, "'large.head'"),
        (
            "similarity",
            {"adapter": {"kind": "conv1x1"}},
            "adapter 'conv1x1' does not apply to similarity, which needs no",
        ),
        (
            "cos_rel",
            {"student": "bev_lift"},
            "does not compare 'bev_lift' with 'large.bev_view': use 'bev_view' of both",
        ),
        ("kl_rel", {"teacher": "large.bev_view"}, "use 'bev_lift' of both"),
        ("attention", {"student": "pv"}, "the student has no dense tap 'pv'"),
    ],
)
def test_relations_that_make_no_sense_are_named(distance: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(distance, **change)


def test_a_student_or_a_store_without_a_previous_map_is_named() -> None:
    config = {"x": TermConfig(**RELATIONS["kl_rel"], distance="kl_rel", weight=1.0)}
    one = {tap: channels for tap, channels in STUDENT.items() if tap != "bev_prev"}
    with pytest.raises(ValueError, match="term 'x': the student has no dense tap 'bev_prev'"):
        Recipe(config, ENCODER, one, TEACHER)
    with pytest.raises(ValueError, match=r"term 'x': the store has no dense tap 'large\.bev_prev'"):
        Recipe(config, ENCODER, STUDENT, {"large.bev_lift": THEIRS})


def test_views_of_another_number_of_cameras_are_named() -> None:
    ours, theirs, batch = draw(STUDENT, 1), draw(TEACHER, 2), copy.copy(sample_batch())
    batch.images, batch.intrinsics, batch.image_aug, batch.lidar_SE3_cam = (
        values.repeat_interleave(3, 2)[:, :, :8]
        for values in (batch.images, batch.intrinsics, batch.image_aug, batch.lidar_SE3_cam)
    )
    with pytest.raises(ValueError, match="bev_view has 12 channels, which 8 cameras cannot share"):
        loss("cos_rel", ours, theirs, batch)
