"""X-AT: the sign of the reversed gradient, the loss in closed form, what the mask hides, and that it does confuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill.adversarial import AdversarialTerm, Discriminator, ramp, reverse_gradient
from distill.terms import TermConfig
from models.ports import Prediction

CONFIG = {
    "student": "bev_neck",
    "teacher": "lidar.bev_lift",
    "adapter": {"kind": "grl_disc", "width": 8},
    "distance": "bce_adv",
    "weight": 0.1,
}
STUDENT, TEACHER, SIZE = 6, 5, 16


def term(std: Tensor | None = None, **changes: Any) -> AdversarialTerm:
    """In evaluation mode, in which spectral norm stands still and passes can be compared."""
    torch.manual_seed(0)
    return AdversarialTerm(TermConfig(**(CONFIG | changes)), STUDENT, TEACHER, std).eval()


def maps(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(2, STUDENT, SIZE, SIZE, generator=generator)
    return source, torch.rand(2, TEACHER, SIZE, SIZE, generator=generator)


def outcome(module: AdversarialTerm, source: Tensor, target: Tensor, progress: float = 0.3, **more: Tensor) -> Any:
    teacher = {"lidar.bev_lift": target} | {f"lidar.bev_lift.{name}": value for name, value in more.items()}
    return module(Prediction([], {"bev_neck": source}), teacher, None, progress)  # type: ignore[arg-type]


def by_hand(module: AdversarialTerm, source: Tensor, target: Tensor) -> Tensor:
    """The loss without reversal, from probabilities."""
    student = module.discriminator(module.project(source)).sigmoid()
    teacher = module.discriminator(target / module.std).sigmoid()
    return ((1 - student).log().mean() + teacher.log().mean()) / -2


def test_the_loss_is_the_cross_entropy_of_patches() -> None:
    source, target = maps()
    module = term(torch.linspace(0.5, 2.0, TEACHER))
    torch.testing.assert_close(outcome(module, source, target).loss, by_hand(module, source, target))
    assert module.discriminator(target).shape == (2, 1, SIZE // 4, SIZE // 4)


@pytest.mark.parametrize("progress", [0.05, 0.3, 1.0])
def test_only_the_gradient_behind_the_reversal_changes(progress: float) -> None:
    """-factor times the plain gradient for student and projection; the discriminator's is the plain one."""
    source, target = maps()
    plain, module = term(), term()
    first, second = (source.clone().requires_grad_() for _ in range(2))
    by_hand(plain, first, target).backward()
    outcome(module, second, target, progress).loss.backward()
    factor = 2 / (1 + np.exp(-10 * progress)) - 1
    torch.testing.assert_close(second.grad, -factor * first.grad)
    for (name, parameter), other in zip(module.named_parameters(), plain.parameters(), strict=True):
        expected = other.grad if name.startswith("discriminator") else -factor * other.grad
        torch.testing.assert_close(parameter.grad, expected, atol=1e-7, rtol=1e-4)
        assert parameter.grad.abs().sum() > 0


def test_the_reversal_is_an_identity_forward() -> None:
    x = torch.randn(3, requires_grad=True)
    y = reverse_gradient(x, 0.7)
    assert torch.equal(x, y)
    (y * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([-0.7, -1.4, -2.1]))


def test_the_ramp_counts_from_the_terms_start() -> None:
    assert ramp(0.0) == 0
    assert ramp(1.0) == pytest.approx(0.99991, abs=1e-5)
    assert all(ramp(a) < ramp(a + 0.1) for a in np.arange(0, 1, 0.1))
    source, target = maps()
    late = term(start=0.2)
    factors = {p: float(outcome(late, source, target, p).watched["grl"]) for p in (0.0, 0.2, 0.6, 1.0)}
    assert factors == pytest.approx({0.0: 0.0, 0.2: 0.0, 0.6: ramp(0.5), 1.0: ramp(1.0)})


def test_no_gradient_reaches_the_teacher_and_what_is_watched_has_none() -> None:
    source, target = maps()
    target.requires_grad_()
    found = outcome(term(), source.requires_grad_(), target)
    found.loss.backward()
    assert target.grad is None
    assert source.grad is not None
    assert set(found.watched) == {"accuracy", "grl"}
    assert not any(value.requires_grad for value in found.watched.values())


def test_accuracy_counts_patches_of_both() -> None:
    source, target = maps()
    module = term()
    with torch.no_grad():
        student, teacher = module.discriminator(module.project(source)), module.discriminator(target)
        right = (student < 0).sum() + (teacher > 0).sum()
    assert outcome(module, source, target).watched["accuracy"] == right / (student.numel() + teacher.numel())
    with torch.no_grad():
        module.discriminator[-1].bias.fill_(1e3)  # says "teacher" always
    assert outcome(module, source, target).watched["accuracy"] == 0.5


def test_cells_without_a_source_have_no_effect_in_either_map() -> None:
    source, target = maps()
    module = term()
    valid = torch.rand(2, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(3)) < 0.6
    first, second = source.clone().requires_grad_(), torch.where(valid, source, 50.0).requires_grad_()
    plain = outcome(module, first, target, valid=valid).loss
    disturbed = outcome(module, second, torch.where(valid, target, -30.0), valid=valid).loss
    assert plain == disturbed
    disturbed.backward()
    assert (second.grad[~valid.expand_as(second)] == 0).all()
    assert outcome(module, source, target, valid=torch.zeros_like(valid)).loss.isfinite()


def test_the_teachers_map_is_divided_by_its_std() -> None:
    source, target = maps()
    scale = torch.linspace(0.5, 8.0, TEACHER)
    plain = outcome(term(), source, target).loss
    scaled = outcome(term(scale), source, target * scale.view(-1, 1, 1)).loss
    torch.testing.assert_close(scaled, plain)


def test_it_is_finite_and_close_in_mixed_precision() -> None:
    source, target = maps()
    module = term()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = outcome(module, source, target * 100)
    assert mixed.loss.dtype == torch.float32
    torch.testing.assert_close(mixed.loss, outcome(module, source, target * 100).loss, rtol=0.05, atol=0.05)


def train(progress: float) -> tuple[float, float]:
    """A student of one shift per channel, from 0, against a teacher around 2: last accuracy and distance of shifts."""
    torch.manual_seed(0)
    module = AdversarialTerm(TermConfig(**CONFIG), TEACHER, TEACHER, None)
    nn.init.dirac_(module.project[0].weight)
    nn.init.zeros_(module.project[0].bias)
    shift = nn.Parameter(torch.zeros(TEACHER, 1, 1))
    groups = [{"params": [shift], "lr": 0.05}, {"params": module.discriminator.parameters(), "lr": 0.002}]
    optimizer = torch.optim.Adam(groups, betas=(0.5, 0.9))
    accuracy = []
    for _ in range(120):
        noise, target = (torch.randn(8, TEACHER, 8, 8) for _ in range(2))
        found = outcome(module, noise + shift, (target + 2).relu(), progress)
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
        accuracy.append(float(found.watched["accuracy"]))
    return float(np.mean(accuracy[-30:])), float((2 - shift.detach()).abs().mean())


def test_the_student_learns_not_to_be_told_from_the_teacher() -> None:
    assert train(progress=0.0) == pytest.approx((1.0, 2.0), abs=0.03)
    accuracy, distance = train(progress=1.0)
    assert accuracy < 0.75
    assert distance < 1.2


def test_the_discriminator_has_no_weight_decay_and_sees_each_map_alone() -> None:
    discriminator = Discriminator(4, 8).eval()
    assert discriminator.weight_decay is False
    x = torch.randn(4, 4, 8, 8)
    torch.testing.assert_close(discriminator(x)[:1], discriminator(x[:1]))


def test_the_discriminators_slope_is_bounded() -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(4, 8)
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.mul_(1000)
        for _ in range(200):
            discriminator(torch.zeros(1, 4, 8, 8))
    for layer in discriminator:
        if isinstance(layer, nn.Conv2d):
            largest = np.linalg.svd(layer.weight.detach().flatten(1).numpy(), compute_uv=False)[0]
            assert largest == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": {"kind": "balanced"}}, "mask 'balanced' does not apply to bce_adv: use none"),
        ({"adapter": {"kind": "decoder"}}, "adapter 'decoder' does not apply to bce_adv: use grl_disc"),
    ],
)
def test_settings_that_do_not_apply_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        term(**change)


def test_grids_that_differ_are_named() -> None:
    source, target = maps()
    with pytest.raises(ValueError, match=r"'bev_neck' is \[2, 5, 16, 16\].*'lidar.bev_lift' \[2, 5, 8, 8\]"):
        outcome(term(), source, target[..., :8, :8])
