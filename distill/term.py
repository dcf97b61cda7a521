"""One distillation loss: the interface that all terms share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn

from distill.terms import TermConfig
from models.ports import Batch, Prediction


class Outcome(NamedTuple):
    """What a term makes of a batch."""

    loss: Tensor  # scalar, not yet weighted
    # Scalars by name that are logged and never minimised; the same names every step.
    watched: Mapping[str, Tensor] = MappingProxyType({})


class Term(nn.Module, ABC):
    """One distillation loss, not yet weighted."""

    def __init__(self, config: TermConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def student_taps(self) -> set[str]:
        """Taps that the student's forward must return; its head maps come in any case."""
        return {self.config.student} - {"head"}

    @abstractmethod
    def forward(self, student: Prediction, teacher: Mapping[str, Any], batch: Batch, progress: float) -> Outcome:
        """The loss; no gradient reaches the teacher's outputs.

        Args:
            student: the student's prediction with `student_taps`.
            teacher: outputs by `<store>.<tap>` in the batch's augmented frame.
            batch: the student's batch.
            progress: fraction of training done, 0 to 1.
        """
