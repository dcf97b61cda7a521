"""The settings of a training run."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from base.section import Count, Fraction, Positive, Section


class TrainConfig(Section):
    """Settings of one training run."""

    epochs: Count
    batch_size: Count  # samples per step over all processes
    lr: Positive
    weight_decay: float = Field(0.01, ge=0.0)
    warmup: float = Field(0.3, ge=0.0, lt=1.0)  # fraction of the steps over which the rate rises
    grad_clip: float = Field(0.0, ge=0.0)  # largest gradient norm; 0 = no clipping
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    ema_decay: float = Field(0.0, ge=0.0, lt=1.0)  # 0 = off
    schedule: Literal["one_cycle", "cosine", "multi_step"] = "one_cycle"
    milestones: list[Fraction] = []  # multi_step: shares of the training after each of which the rate falls to a tenth
    balanced: bool = False  # class-balanced resampling of the keyframes (CBGS)
    accumulate: Count = 1  # micro-batches that a process makes of its part of a step, to save memory
    checkpoint_minutes: float = Field(5.0, ge=0.0)  # 0 = after every step
    log_every: Count = 10  # steps
    # Steps from one comparison of the losses' gradients to the next; each takes a backward pass per loss. 0: none.
    gradients_every: int = Field(0, ge=0)
    workers: int | None = Field(None, ge=0)  # loader processes; none given: 1, or one per core up to 8 beside a GPU
    lr_factors: dict[str, Annotated[float, Field(ge=0.0)]] = {}  # module of the model -> factor of its rate; 0: frozen

    @model_validator(mode="after")
    def _milestones_belong_to_steps(self) -> Self:
        if (self.schedule == "multi_step") != bool(self.milestones):
            raise ValueError(
                f"milestones {self.milestones} with schedule {self.schedule!r}: multi_step, and it alone, needs them"
            )
        if self.milestones != sorted(set(self.milestones)):
            raise ValueError(f"milestones {self.milestones} must ascend")
        return self
