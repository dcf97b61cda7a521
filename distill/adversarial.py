"""Adversarial feature distillation (X³KD's X-AT; our reconstruction): a map from which nobody can tell its sensor.

A discriminator learns to tell the student's map from the teacher's; through a gradient reversal the student learns
that it cannot. Ganin and Lempitsky, "Unsupervised Domain Adaptation by Backpropagation", ICML 2015.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.utils.parametrizations import spectral_norm

from distill.features import channel_scale, valid_cells
from distill.term import Outcome, Term
from distill.terms import TermConfig
from models.ports import Batch, Prediction

STEEPNESS = 10.0  # of the ramp of the reversal: 0.46 at a tenth of the training, 0.91 at three tenths


class _Reverse(torch.autograd.Function):
    """Identity whose gradient is multiplied by -factor."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * gradient, None  # type: ignore[attr-defined]


def reverse_gradient(x: Tensor, factor: float) -> Tensor:
    """`x`; its gradient is multiplied by `-factor`."""
    return _Reverse.apply(x, factor)


def ramp(progress: float) -> float:
    """Factor of the reversal, from 0 to almost 1: the discriminator learns before the student listens to it."""
    return 2 / (1 + math.exp(-STEEPNESS * progress)) - 1


class Discriminator(nn.Sequential):
    """Logits [B, 1, H/4, W/4] of patches of a map: positive for the teacher's.

    Spectral norm bounds how fast they change with the map. Without it they grow within some twenty steps until the
    loss has no gradient left for the student. There is no norm over the batch, in which maps would see each other.
    """

    weight_decay = False  # decay would pull it towards saying nothing; see the trainer

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(
            spectral_norm(nn.Conv2d(channels, width, 1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(width, width, 3, stride=2, padding=1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(width, width, 3, stride=2, padding=1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(width, 1, 1)),
        )


class AdversarialTerm(Term):
    """Binary cross-entropy of a discriminator between the student's projected map and the teacher's.

    The teacher's map is divided by its standard deviation per channel. The projection ends in a ReLU, as teachers'
    maps do, or negative values would tell the maps apart. Cells that `<tap>.valid` leaves out are zero in both, or
    the edge of what is known would.
    """

    std: Tensor

    def __init__(self, config: TermConfig, student_channels: int, teacher_channels: int, std: Tensor | None) -> None:
        super().__init__(config)
        if config.mask.kind != "none":
            raise ValueError(f"mask '{config.mask.kind}' does not apply to bce_adv: use none")
        if config.adapter.kind != "grl_disc":
            raise ValueError(f"adapter '{config.adapter.kind}' does not apply to bce_adv: use grl_disc")
        self.project = nn.Sequential(nn.Conv2d(student_channels, teacher_channels, 1), nn.ReLU())
        self.discriminator = Discriminator(teacher_channels, config.adapter.width or max(teacher_channels // 2, 1))
        self.register_buffer("std", channel_scale(std, teacher_channels, config.teacher))

    def forward(self, student: Prediction, teacher: Mapping[str, Any], batch: Batch, progress: float) -> Outcome:
        """See `Term`; watches the discriminator's `accuracy` (0.5: it cannot tell) and the factor `grl`."""
        target = teacher[self.config.teacher].detach().float()
        source = self.project(student.taps[self.config.student]).float()
        if source.shape != target.shape:
            raise ValueError(
                f"student tap '{self.config.student}' is {list(source.shape)} after its projection, "
                f"'{self.config.teacher}' {list(target.shape)}: choose taps on one grid"
            )
        valid = valid_cells(teacher, self.config.teacher, target)
        factor = ramp(self._since_start(progress))
        both = torch.cat([reverse_gradient(source * valid, factor), target / self.std * valid])
        # In float32 and in one pass: spectral norm moves on with every pass of the step.
        with torch.autocast(both.device.type, enabled=False):
            from_student, from_teacher = self.discriminator(both).chunk(2)
        loss = (F.softplus(from_student) + F.softplus(-from_teacher)).mean() / 2
        accuracy = torch.cat([from_student < 0, from_teacher > 0]).float().mean()
        return Outcome(loss, {"accuracy": accuracy, "grl": torch.full_like(accuracy, factor)})

    def _since_start(self, progress: float) -> float:
        """Progress of the term's own part of the training, 0 to 1."""
        left = 1 - self.config.start
        return max(progress - self.config.start, 0.0) / left if left else 0.0
