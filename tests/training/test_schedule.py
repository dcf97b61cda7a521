"""The multi-step learning rate, against torch's."""

from __future__ import annotations

import pytest
import torch
from torch.optim.lr_scheduler import LinearLR, MultiStepLR

from training.schedule import learning_rate


@pytest.mark.parametrize(("epochs", "drops"), [(20, [16, 19]), (24, [19, 23]), (10, [5]), (3, [0, 1, 2])])
@pytest.mark.parametrize("steps", [1, 7, 1758])
def test_multi_step_is_torchs(epochs: int, drops: list[int], steps: int) -> None:
    """Milestones are fractions of the training; the rate drops at the first step of the epoch, not one step late."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 2e-4)
    scheduler = MultiStepLR(optimizer, drops, gamma=0.1)
    milestones = [drop / epochs for drop in drops]
    for epoch in range(epochs):
        expected = optimizer.param_groups[0]["lr"]
        for step in {epoch * steps, (epoch + 1) * steps - 1}:
            rate = learning_rate(step, epochs * steps, 2e-4, 0.0, "multi_step", milestones)
            assert rate == pytest.approx(expected, rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_multi_step_warms_up_like_torchs_linear() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.5)
    scheduler = LinearLR(optimizer, 1e-9, total_iters=20)
    for step in range(60):
        expected = optimizer.param_groups[0]["lr"]
        assert learning_rate(step, 100, 0.5, 0.2, "multi_step", [0.8]) == pytest.approx(expected, abs=1e-8)
        optimizer.step()
        scheduler.step()
