"""The typed sections of params.yaml that say what a sample holds. No torch: the parameters are checked without it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from base.section import Count, Fraction, Positive, Section

Degrees = Annotated[float, Field(ge=0.0, le=180.0)]


class ImageConfig(Section):
    """How raw images become network images. At evaluation only `size` counts."""

    size: tuple[Count, Count]  # height, width that the network sees
    resize: tuple[Positive, Positive]  # training: range of the factor on the scale that fits the width
    rotate: Degrees  # training: +- degrees
    flip: Fraction  # training: probability

    @model_validator(mode="after")
    def _factors_ascend(self) -> Self:
        if self.resize[0] > self.resize[1]:
            raise ValueError(f"resize {list(self.resize)} must be [smallest, largest]")
        return self

    @property
    def augments(self) -> bool:
        """Whether training sees an image otherwise than evaluation does."""
        return self.resize != (1.0, 1.0) or self.rotate > 0 or self.flip > 0


class BevConfig(Section):
    """Training augmentation of the scene as a whole."""

    flip_x: Fraction  # probability of x -> -x
    flip_y: Fraction  # probability of y -> -y
    rotate: Degrees  # +- degrees about z
    scale: tuple[Positive, Positive]

    @model_validator(mode="after")
    def _factors_ascend(self) -> Self:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale {list(self.scale)} must be [smallest, largest]")
        return self


class InputConfig(Section):
    """What one sample holds."""

    frames: Literal[1, 2]  # 2 adds the previous keyframe
    sweeps: Count  # LiDAR sweeps, the keyframe's included
    radar: bool
    image: ImageConfig
    bev: BevConfig
    depth_stride: Count  # pixels per cell of the depth supervision

    @model_validator(mode="after")
    def _size_is_a_multiple_of_the_stride(self) -> Self:
        if any(side % self.depth_stride for side in self.image.size):
            raise ValueError(
                f"image.size {list(self.image.size)} must be multiples of depth_stride {self.depth_stride}"
            )
        return self


class GridConfig(Section):
    """The square BEV grid in the LiDAR frame: of boxes and points that are read, and of every model.

    What models compute on it is `models.layers.grid.Grid`, which a published config.json makes without these sections.
    """

    range: Positive  # |x|, |y| below it, metres
    cell: Positive  # side of a cell, metres
    z: tuple[float, float]  # lowest, highest, metres

    @model_validator(mode="after")
    def _whole_cells(self) -> Self:
        cells = 2.0 * self.range / self.cell
        if abs(cells - round(cells)) > 1e-6:
            raise ValueError(
                f"range {self.range} and cell {self.cell} give {cells:g} cells per side: a whole number is needed"
            )
        if self.z[0] >= self.z[1]:
            raise ValueError(f"z {list(self.z)} must be [lowest, highest]")
        return self
