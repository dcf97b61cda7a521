"""Weight inheriting: a module's weights at the size of a smaller one.

Structured KD inherits weights so that teacher and student have one and the same input of learned embeddings; how is not
known beyond that, and all of this is our reconstruction (docs/structured.md). Learned embeddings are pooled or
interpolated over their places and projected to the student's width; other weights lose evenly spaced channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from models.bevformer import BEVEmbeddings


def inherited(model: nn.Module, name: str, weight: Tensor) -> Tensor:
    """A teacher's weight at the size that a model has; the weight itself where the sizes are equal.

    Args:
        model: that inherits.
        name: of its parameter or buffer.
        weight: the teacher's of that name.

    Raises:
        ValueError: naming the weight, if it cannot be brought to that size.
    """
    own = model.state_dict()[name]
    if own.shape == weight.shape:
        return weight
    owner = model.get_submodule(name.rpartition(".")[0])
    try:
        if isinstance(owner, BEVEmbeddings):
            return embedding(weight, own.shape, of_places=name != "embeddings.camera")
        return narrowed(weight, own.shape, 0 if isinstance(owner, _ConvTransposeNd) else 1)
    except ValueError as error:
        raise ValueError(f"{name} cannot be inherited: {error}") from None


def embedding(weight: Tensor, shape: torch.Size, *, of_places: bool) -> Tensor:
    """A learned embedding at other places and of another width.

    Fewer places: the mean of those that fall together, so the mean over all is kept where they divide evenly. More:
    linear interpolation. Fewer channels: see :func:`projected`.

    Args:
        weight: [C, *places], or [n, C] of n things whose number stays.
        shape: of the result, laid out alike.
        of_places: which of the two.
    """
    if of_places:
        return projected(placed(weight, list(shape[1:])).flatten(1), shape[0]).view(shape)
    if weight.shape[0] != shape[0]:
        raise ValueError(f"the teacher has {weight.shape[0]} of them, the student {shape[0]}")
    return projected(weight.T, shape[1]).T.contiguous()


def placed(weight: Tensor, places: list[int]) -> Tensor:
    """[C, *places] of an embedding on other places; axes that shrink are pooled, others interpolated."""
    smaller = [min(new, old) for new, old in zip(places, weight.shape[1:], strict=True)]
    if len(places) == 1:
        return F.interpolate(F.adaptive_avg_pool1d(weight, smaller[0])[None], places, mode="linear")[0]
    return F.interpolate(F.adaptive_avg_pool2d(weight, (smaller[0], smaller[1]))[None], places, mode="bilinear")[0]


def projected(weight: Tensor, channels: int) -> Tensor:
    """[channels, P] of an embedding [C, P]: its principal components, scaled to the norm of the whole.

    The mean over the places is projected with the rest. Fewer components than channels are filled up with zeros.
    """
    if weight.shape[0] == channels:
        return weight
    mean = weight.mean(1, keepdim=True)
    centered = (weight - mean).double()
    basis, _, _ = torch.linalg.svd(torch.cat([centered, mean.double()], dim=1), full_matrices=False)
    basis = basis[:, :channels]
    basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()  # the sign of a component is arbitrary
    components = basis.T @ weight.double()
    components = components * (weight.double().norm() / components.norm().clamp(min=1e-12))
    return F.pad(components, (0, 0, 0, channels - len(components))).to(weight.dtype)


def narrowed(weight: Tensor, shape: torch.Size, inputs: int) -> Tensor:
    """A weight with fewer channels: evenly spaced ones stay, in all layers the same, so that they still fit each other.

    That holds behind a concatenation, too, if its parts shrink alike. Sums over fewer inputs are scaled up by their
    share.

    Args:
        weight: of a convolution, a linear layer or a norm.
        shape: of the result.
        inputs: the axis of a matrix or kernel over which it sums.
    """
    if weight.ndim != len(shape) or any(new > old for new, old in zip(shape, weight.shape, strict=True)):
        raise ValueError(f"the teacher's is {list(weight.shape)}, the student's {list(shape)}: a student inherits "
                         "from one that is not narrower")
    if shape[2:] != weight.shape[2:]:
        raise ValueError(f"the teacher's kernel is {list(weight.shape[2:])}, the student's {list(shape[2:])}")
    for axis, new in enumerate(shape[:2]):
        kept = torch.arange(new) * weight.shape[axis] // new
        gain = weight.shape[axis] / new if axis == inputs and weight.ndim > 1 else 1.0
        weight = weight.index_select(axis, kept) * gain if new < weight.shape[axis] else weight
    return weight
