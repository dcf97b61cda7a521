"""Learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Shape = Literal["one_cycle", "cosine", "multi_step"]
START, END = 1 / 25, 1e-4  # one-cycle: first and last rate, as fractions of the peak and of the first rate
DECAY = 0.1  # multi-step: what each milestone leaves of the rate


def learning_rate(
    step: int, total: int, peak: float, warmup: float, shape: Shape = "one_cycle", milestones: Sequence[float] = ()
) -> float:
    """Learning rate of step `step` (0-based) of `total`.

    `one_cycle` (Smith and Topin, "Super-Convergence", 2018; the form of `torch.optim.lr_scheduler.OneCycleLR`):
    half a cosine from peak / 25 up to `peak` over the first `warmup` fraction of the steps, half a cosine down to
    peak / 250000 over the rest. `cosine`: linear from 0 over `warmup`, then half a cosine down to 0.
    `multi_step`: linear from 0 over `warmup`, then `peak`, a tenth as much from each of the `milestones` on, which
    are fractions of the steps.
    """
    top = warmup * total - 1 if shape == "one_cycle" else warmup * total
    last = total - 1 if shape == "one_cycle" else total
    if step < top:
        rising = step / top
        return _blend(peak * START, peak, rising) if shape == "one_cycle" else peak * rising
    if shape == "multi_step":
        # Rounded, because a fraction of a whole number of steps may come out a hair above one.
        return peak * DECAY ** sum(step >= round(milestone * total) for milestone in milestones)
    falling = (step - top) / (last - top) if last > top else 1.0
    return _blend(peak, peak * START * END if shape == "one_cycle" else 0.0, falling)


def _blend(start: float, end: float, fraction: float) -> float:
    """Half a cosine from `start` (fraction 0) to `end` (fraction 1)."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * fraction))
