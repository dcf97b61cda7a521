"""What a distillation term is made of: the typed config of an entry of `terms` in params.yaml."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from base.section import Section


class Written(Section):
    """A section that is shown as it was written: what was left to its default is left out."""

    @model_serializer(mode="wrap")
    def _written(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in serialise(self).items() if name in self.model_fields_set}


class MaskConfig(Written):
    """Where a term looks."""

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
    """For dense maps a name in `masks.MASKS`; what other terms take is in docs/models.md."""
    threshold: float = Field(default=0.3, ge=0, le=1)
    """`teacher_conf`: score above which a teacher's box, head cell or instance counts."""
    weighted: bool = True
    """Whether regression from a teacher's boxes or head maps is weighted by the teacher's score."""
    clip: float | None = Field(default=None, gt=0)
    """Largest weight of a cell: of `gt_gauss` (default unbounded), of `phi_softmax` (default `masks.CLIP`)."""
    temperature: float = Field(default=0.1, gt=0)
    """`phi_softmax`: of the softmax over the cells' scores."""


class AdapterConfig(Written):
    """How a student's map is brought to the teacher's width; trained with the student, never exported."""

    kind: Literal["id", "conv1x1", "conv3x3bnrelu", "decoder", "resize", "projection", "grl_disc", "mask_rcnn"] = "id"
    """For dense maps a name in `adapters.ADAPTERS`; `grl_disc` for `bce_adv`, `mask_rcnn` for `maskrcnn`."""
    width: int | None = Field(default=None, gt=0)
    """Hidden channels of `decoder` (default the teacher's), of the discriminator or of the instance heads."""


class TermConfig(Written):
    """One distillation loss."""

    student: str
    """Tap of the student."""
    teacher: str
    """`<teacher>.<tap>`."""
    mask: MaskConfig = MaskConfig()
    adapter: AdapterConfig = AdapterConfig()
    distance: Literal[
        "l1", "l2", "sl1", "gfl", "qfl", "kl", "cos_rel", "kl_rel", "attention", "similarity", "bce_adv", "maskrcnn"
    ]
    weight: float = Field(ge=0)
    start: float = Field(default=0.0, ge=0, le=1)
    """Fraction of training after which the term counts."""
    normalise: bool = True
    """Dense maps: whether both are divided by the teacher's standard deviation per channel."""
    beta: float = Field(default=1.0, gt=0)
    """`sl1`: difference below which the distance is quadratic."""
    code_weights: tuple[float, ...] | None = Field(default=None, min_length=10, max_length=10)
    """Regression into the head: factors of the ten codes' differences, inside the distance; default all 1."""

    @property
    def teacher_taps(self) -> frozenset[str]:
        """`<teacher>.<tap>` that the term reads: its own, and what its distance and its mask look at beside it."""
        previous = {self.beside("bev_prev")} if self.distance == "kl_rel" else set()
        head = {self.beside("head")} if self.mask.kind == "phi_softmax" else set()
        return frozenset({self.teacher} | previous | head)

    @property
    def store(self) -> str:
        """The entry of `stores` that the term reads."""
        return self.teacher.partition(".")[0]

    def beside(self, tap: str) -> str:
        """`<teacher>.<tap>` of another tap of the term's teacher."""
        return f"{self.store}.{tap}"

    @model_validator(mode="after")
    def _teacher_tap(self) -> TermConfig:
        name, dot, tap = self.teacher.partition(".")
        if not (name and dot and tap):
            raise ValueError(f"teacher '{self.teacher}' must be <teacher>.<tap>, such as lidar.boxes")
        return self

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> TermConfig:
        regression = self.distance in ("l1", "l2", "sl1")
        heeded = {
            "normalise": regression and self.student != "head",
            "beta": self.distance == "sl1",
            "code_weights": regression and self.student == "head",
        }
        for option in sorted(self.model_fields_set & heeded.keys()):
            if not heeded[option]:
                raise ValueError(f"{option} has no effect on {self.distance} of '{self.student}': leave it out")
        return self
