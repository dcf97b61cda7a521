"""Distances between a student's and a teacher's value, element by element."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def quality_focal(logits: Tensor, target: Tensor) -> Tensor:
    """Focal loss for soft targets: squared error of the probability times its cross-entropy; 0 where they agree."""
    return (logits.sigmoid() - target).square() * F.binary_cross_entropy_with_logits(logits, target, reduction="none")


def soft_gaussian_focal(logits: Tensor, target: Tensor, peak: Tensor) -> Tensor:
    """CenterNet's focal loss whose positives are the cells of `peak`, weighted by their soft target.

    Unlike `quality_focal` it pulls peaks towards 1, not towards the teacher's score.
    """
    p = logits.sigmoid()
    positive = -target * (1 - p) ** 2 * F.logsigmoid(logits)
    negative = -((1 - target) ** 4) * p**2 * F.logsigmoid(-logits)
    return torch.where(peak, positive, negative)


def bernoulli_divergence(logits: Tensor, target: Tensor) -> Tensor:
    """KL(target || student) of the yes or no that each logit stands for; both are logits; 0 where they agree."""
    p = target.sigmoid()
    yes, no = F.logsigmoid(target) - F.logsigmoid(logits), F.logsigmoid(-target) - F.logsigmoid(-logits)
    return p * yes + (1 - p) * no


def pearson(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus Pearson's correlation [B, 1, H, W] of the channels of each cell of two maps [B, C, H, W].

    What a cell says counts, not how loudly: neither scale nor mean of a map matter. A cell of the teacher without
    contrast (no LiDAR point) teaches nothing. Cao et al., "PKD", NeurIPS 2022, correlate over a whole map instead.
    """
    ours, theirs = (values - values.mean(1, keepdim=True) for values in (student, teacher))
    return 1 - F.cosine_similarity(ours, theirs, dim=1, eps=1e-6).unsqueeze(1)


# Regression distances of student, teacher and beta, by name.
ELEMENTWISE: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "l1": lambda student, teacher, _: (student - teacher).abs(),
    "l2": lambda student, teacher, _: (student - teacher).square(),
    "sl1": lambda student, teacher, beta: F.smooth_l1_loss(student, teacher, reduction="none", beta=beta),
}
