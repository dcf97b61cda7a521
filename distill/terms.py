"""What a distillation term is made of: the typed config of an entry of `terms`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from base.section import Section
from base.taps import TapRef


class Written(Section):
    """A section that is shown as it was written: what was left to its default is left out."""

    @model_serializer(mode="wrap")
    def _written(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in serialise(self).items() if name in self.model_fields_set}


class MaskConfig(Written):
    """Where a term looks."""

    # For dense maps a name in `masks.MASKS`; what other terms take is in docs/models.md.
    kind: Literal[
        "none",
        "occupied",
        "balanced",
        "gt_gauss",
        "phi_softmax",
        "uniform",
        "gt_heat",
        "teacher_conf",
        "gt_centers",
        "visible_views",
    ] = "none"
    # `teacher_conf`: score above which a teacher's box, head cell or instance counts.
    threshold: float = Field(default=0.3, ge=0, le=1)
    weighted: bool = True  # whether regression from a teacher's boxes or head maps is weighted by the teacher's score
    # Largest weight of a cell: of `gt_gauss` (default unbounded), of `phi_softmax` (default `masks.CLIP`).
    clip: float | None = Field(default=None, gt=0)
    temperature: float = Field(default=0.1, gt=0)  # `phi_softmax`: of the softmax over the cells' scores


class AdapterConfig(Written):
    """How a student's map is brought to the teacher's width; trained with the student, never exported."""

    # For dense maps a name in `adapters.ADAPTERS`; `grl_disc` for `bce_adv`, `mask_rcnn` for `maskrcnn`.
    kind: Literal["id", "conv1x1", "conv3x3bnrelu", "decoder", "resize", "projection", "grl_disc", "mask_rcnn"] = "id"
    # Hidden channels of `decoder` (default the teacher's), of the discriminator or of the instance heads.
    width: int | None = Field(default=None, gt=0)


class TermConfig(Written):
    """One distillation loss."""

    student: str  # tap of the student
    teacher: TapRef  # tap of a teacher
    mask: MaskConfig = MaskConfig()
    adapter: AdapterConfig = AdapterConfig()
    distance: Literal[
        "l1",
        "l2",
        "sl1",
        "pearson",
        "gfl",
        "qfl",
        "kl",
        "cos_rel",
        "kl_rel",
        "attention",
        "similarity",
        "bce_adv",
        "maskrcnn",
        "labels",
    ]
    weight: float = Field(ge=0)
    start: float = Field(default=0.0, ge=0, le=1)  # fraction of training after which the term counts
    normalise: bool = True  # dense maps: whether both are divided by the teacher's standard deviation per channel
    beta: float = Field(default=1.0, gt=0)  # `sl1`: difference below which the distance is quadratic
    # Regression into the head: factors of the ten codes' differences, inside the distance; default all 1.
    code_weights: tuple[float, ...] | None = Field(default=None, min_length=10, max_length=10)

    @property
    def teacher_taps(self) -> frozenset[TapRef]:
        """The taps that the term reads: its own, and what its distance and its mask look at beside it."""
        previous = {self.teacher.beside("bev_prev")} if self.distance == "kl_rel" else set()
        head = {self.teacher.beside("head")} if self.mask.kind == "phi_softmax" else set()
        return frozenset({self.teacher} | previous | head)

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> TermConfig:
        regression, head, mask = self.distance in ("l1", "l2", "sl1"), self.student == "head", self.mask.kind
        heeded = {
            "normalise": (regression or self.distance == "pearson") and not head,
            "beta": self.distance == "sl1",
            "code_weights": regression and head,
            "mask.threshold": mask == "teacher_conf",
            "mask.weighted": regression and head and mask in ("none", "teacher_conf"),
            "mask.clip": mask in ("gt_gauss", "phi_softmax"),
            "mask.temperature": mask == "phi_softmax",
            "adapter.width": self.adapter.kind in ("decoder", "grl_disc", "mask_rcnn"),
        }
        given = self.model_fields_set | {f"mask.{name}" for name in self.mask.model_fields_set}
        given |= {f"adapter.{name}" for name in self.adapter.model_fields_set}
        idle = sorted(name for name, matters in heeded.items() if name in given and not matters)
        if idle:
            kinds = f"with mask '{mask}' and adapter '{self.adapter.kind}'"
            verb = "has" if len(idle) == 1 else "have"
            raise ValueError(
                f"{', '.join(idle)} {verb} no effect on {self.distance} of '{self.student}' {kinds}: leave out"
            )
        return self
