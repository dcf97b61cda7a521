"""Weights are set as they lie in the file, by one function, whatever version of themselves modules would look for."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from base.environment import ROOMS
from tests.models.factory import voxel_encoder
from training.loading import load_weights

ROOT = Path(__file__).resolve().parents[2]
# What is loaded there has no layout of a module: the optimiser's and the loss scaler's state.
OTHER_STATES = {"training/trainer.py": ["self.optimizer", "self.fabric.strategy.precision"]}


def plain(module: nn.Module) -> dict[str, Tensor]:
    """A state as a file holds it."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_a_cubic_kernel_keeps_its_axes() -> None:
    """Its sides are all equal, so that mmdet3d permutes it without an error where nothing says its version."""
    blocks, other = (voxel_encoder().get_submodule("encoder_layers") for _ in range(2))
    weights = plain(blocks)
    kernels = {name for name, weight in weights.items() if weight.ndim == 5}
    assert {tuple(weights[name].shape) for name in kernels} == {(3, 3, 3, 3, 3)}
    load_weights(other, weights)
    assert all(torch.equal(value, weights[name]) for name, value in other.state_dict().items())
    other.load_state_dict(weights)
    turned = {name for name, value in other.state_dict().items() if not torch.equal(value, weights[name])}
    assert turned == kernels, "the trap is gone: mmdet3d reads plain states as they are"


def test_what_does_not_fit_is_an_error() -> None:
    layer = nn.BatchNorm2d(2)
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        load_weights(layer, {name: value for name, value in plain(layer).items() if name != "num_batches_tracked"})
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        load_weights(layer, plain(layer) | {"weight": torch.ones(3)})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        load_weights(layer, plain(layer) | {"more": torch.ones(3)})


def test_weights_are_set_in_one_place() -> None:
    found: dict[str, list[str]] = {}
    for path in (path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "load_state_dict":
                found.setdefault(str(path.relative_to(ROOT)), []).append(ast.unparse(node.value))
    assert found == {"training/loading.py": ["module"], **OTHER_STATES}, "call training.loading.load_weights"
