"""Weights from a file, or from another module, into a module."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor, nn


def load_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Set all weights and buffers of a module, which have its own names and layouts.

    Modules may turn the weights of an older version of themselves around, and torch tells the version by what it keeps
    beside a state dict, which no file of safetensors holds. mmdet3d takes a sparse kernel without a version for one of
    spconv 1 and permutes its axes: a kernel that does not fit any more is an error, and one that does is wrong without
    a word. So the weights are given the versions of the module that they are for.

    Args:
        module: gets the weights.
        weights: by name, as `module.state_dict()` names them.

    Raises:
        RuntimeError: a weight is missing, unused or of another shape.
    """
    state: OrderedDict[str, Tensor] = OrderedDict(weights)
    state._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]
    module.load_state_dict(state)
