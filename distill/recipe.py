"""A recipe: the distillation terms of a variant, with everything that trains beside the student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from base.taps import TapRef
from base.watching import WATCHED
from distill.adversarial import AdversarialTerm
from distill.features import MapTerm, check_tasks
from distill.output import BoxTerm, HeadTerm
from distill.pseudo_labels import HeadLosses, PseudoLabels
from distill.relations import RELATIONS
from distill.term import Term
from distill.terms import TermConfig
from models.head.targets import TargetEncoder
from models.ports import Batch, Prediction


class Recipe(nn.Module):
    """The weighted distillation losses of a variant.

    It trains with the student and is no part of it: leaving it out is the export.

    Args:
        terms: term configs by name.
        targets: the student's target encoder.
        student_channels: channels of the student's taps.
        teacher_channels: channels of the teachers' dense taps, by `<store>.<tap>`.
        statistics: standard deviation per channel [C] of the teachers' dense taps; 1 where absent.
        stride: pixels per cell of the student's tap `pv`; terms in the image need it.
        losses: of the student's head, `models.head.center_head.GridCenterHead.losses`; pseudo labels need it.

    Raises:
        ValueError: naming the term and what does not fit.
    """

    def __init__(
        self,
        terms: Mapping[str, TermConfig],
        targets: TargetEncoder,
        student_channels: Mapping[str, int],
        teacher_channels: Mapping[str, int],
        statistics: Mapping[str, Tensor] | None = None,
        *,
        stride: int | None = None,
        losses: HeadLosses | None = None,
    ) -> None:
        super().__init__()
        self.terms: dict[str, Term] = {}
        for name, config in terms.items():
            try:
                self.terms[name] = build_term(
                    config, targets, student_channels, teacher_channels, statistics or {}, stride, losses
                )
            except ValueError as error:
                raise ValueError(f"term '{name}': {error}") from error
        # A list, because a ModuleDict refuses names that modules have as attributes ("double", "type").
        self.modules_of_terms = nn.ModuleList(self.terms.values())

    @property
    def student_taps(self) -> set[str]:
        """Taps that the student's forward must return."""
        return {tap for term in self.terms.values() for tap in term.student_taps}

    @property
    def teacher_taps(self) -> set[TapRef]:
        """The taps that the batch must hold."""
        return {tap for term in self.terms.values() for tap in term.config.teacher_taps}

    def forward(
        self, student: Prediction, teacher: Mapping[str, Any], batch: Batch, progress: float
    ) -> dict[str, Tensor]:
        """Weighted losses by term, and as `watch/<term>/<what>` what a term gives to look at.

        A term that has not started is computed with weight 0, so that the same parameters take part in every step.

        Args:
            student: the student's prediction with `student_taps`.
            teacher: outputs by `<store>.<tap>` in the batch's augmented frame; `boxes` a list of [K, 11] (box,
                score, label), `inst2d` per sample and camera its instances, maps [B, C, H, W], with
                `<store>.<tap>.valid` bool [B, 1, H, W] where warped.
            batch: the student's batch.
            progress: fraction of training done, 0 to 1.

        Raises:
            KeyError: naming the teacher's outputs that are missing.
        """
        missing = sorted(self.teacher_taps - set(teacher))
        if missing:
            raise KeyError(f"teacher outputs {', '.join(missing)} are missing: they must be in the teacher's taps")
        losses = {}
        for name, term in self.terms.items():
            weight = term.config.weight if progress >= term.config.start else 0.0
            outcome = term(student, teacher, batch, progress)
            losses[name] = weight * outcome.loss
            losses |= {f"{WATCHED}{name}/{what}": value.detach() for what, value in outcome.watched.items()}
        return losses


def build_term(
    config: TermConfig,
    targets: TargetEncoder,
    student_channels: Mapping[str, int],
    teacher_channels: Mapping[str, int],
    statistics: Mapping[str, Tensor],
    stride: int | None,
    losses: HeadLosses | None,
) -> Term:
    """The term of a config: by its distance where that has a model of its own, else by the teacher's tap."""
    tap = config.teacher.tap
    if config.distance == "labels":
        return PseudoLabels(config, targets, losses)
    if config.distance == "maskrcnn":
        if stride is None:
            raise ValueError("maskrcnn learns in the image: the student has no image neck")
        from distill.instances import InstanceTerm  # late: it brings all of mmdet, which no other term needs

        return InstanceTerm(config, _channels(config.student, student_channels, "the student"), stride, targets.classes)
    if tap == "boxes":
        return BoxTerm(config, targets)
    widths = {name: _channels(name, teacher_channels, "the store") for name in sorted(config.teacher_taps)}
    teacher = widths[config.teacher]
    if tap == "head" and config.student == "head":
        return HeadTerm(config, targets, teacher)
    if config.distance in RELATIONS:
        return _known(RELATIONS[config.distance](config, targets), student_channels)
    if (head := config.teacher.beside("head")) in widths:
        check_tasks(head, widths[head], targets)
    student, std = _channels(config.student, student_channels, "the student"), statistics.get(config.teacher)
    if config.distance == "bce_adv":
        return AdversarialTerm(config, student, teacher, std)
    return MapTerm(config, student, teacher, std, targets)


def _known(term: Term, student_channels: Mapping[str, int]) -> Term:
    """The term, if the student has all that it reads."""
    for tap in sorted(term.student_taps):
        _channels(tap, student_channels, "the student")
    return term


def _channels(tap: str, known: Mapping[str, int], whose: str) -> int:
    if tap not in known:
        raise ValueError(f"{whose} has no dense tap '{tap}': it has {', '.join(known) or 'none'}")
    return known[tap]
