"""Weight inheriting: a module's weights at the size of a smaller one.

Structured KD inherits weights so that teacher and student have one and the same input of learned embeddings; how is not
known beyond that, and all of this is our reconstruction (docs/structured.md). Learned embeddings are pooled or
interpolated over their places. Everything that is narrower keeps evenly spaced channels, the same ones in all weights,
so that they still fit each other: behind a concatenation, too, if its parts shrink alike, and in heads of attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from models.detectors.bevformer import BEVEmbeddings


def inherited(model: nn.Module, name: str, weight: Tensor) -> Tensor:
    """A teacher's weight at the size that a model has; the weight itself where the sizes are equal.

    Args:
        model: that inherits.
        name: of its parameter or buffer.
        weight: the teacher's of that name.

    Raises:
        ValueError: naming the weight, if it cannot be brought to that size.
    """
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    shape = getattr(owner, leaf).shape
    if shape == weight.shape:
        return weight
    try:
        if not isinstance(owner, BEVEmbeddings):
            return narrowed(weight, shape, 0 if isinstance(owner, _ConvTransposeNd) else 1)
        if name.endswith(".camera"):
            return spaced(weight, 1, shape[1])
        return spaced(placed(weight, list(shape[1:])), 0, shape[0])
    except ValueError as error:
        raise ValueError(f"{name} cannot be inherited: {error}") from None


def placed(weight: Tensor, places: list[int]) -> Tensor:
    """[C, *places] of an embedding [C, n] or [C, n, n] on other places.

    Fewer: the mean of those that fall together, so the mean over all is kept where they divide evenly. More: linear
    interpolation.
    """
    smaller = [min(new, old) for new, old in zip(places, weight.shape[1:], strict=True)]
    if len(places) == 1:
        return F.interpolate(F.adaptive_avg_pool1d(weight, smaller[0])[None], places, mode="linear")[0]
    return F.interpolate(F.adaptive_avg_pool2d(weight, (smaller[0], smaller[1]))[None], places, mode="bilinear")[0]


def narrowed(weight: Tensor, shape: torch.Size, inputs: int) -> Tensor:
    """A weight with fewer channels; sums over fewer inputs are scaled up by their share.

    Args:
        weight: of a convolution, a linear layer or a norm.
        shape: of the result.
        inputs: the axis of a matrix or kernel over which it sums.
    """
    if weight.shape[2:] != shape[2:]:
        raise ValueError(f"the teacher's kernel is {list(weight.shape[2:])}, the student's {list(shape[2:])}")
    for axis, new in enumerate(shape[:2]):
        gain = weight.shape[axis] / new if axis == inputs and weight.ndim > 1 else 1.0
        weight = spaced(weight, axis, new) * gain
    return weight


def spaced(weight: Tensor, axis: int, channels: int) -> Tensor:
    """A weight with so many evenly spaced channels of an axis.

    Raises:
        ValueError: it has fewer.
    """
    if channels > weight.shape[axis]:
        raise ValueError(
            f"the teacher has {weight.shape[axis]} channels, the student {channels}: a student inherits "
            "from one that is not narrower"
        )
    return weight.index_select(axis, torch.arange(channels) * weight.shape[axis] // channels)
