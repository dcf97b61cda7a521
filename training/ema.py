"""Exponential moving average of a module's weights and buffers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def ema_decay(decay: float, n: int) -> float:
    """Decay of update `n` (1-based): min(decay, (1 + n) / (10 + n)), so that short runs forget their start."""
    return min(decay, (1 + n) / (10 + n))


class EMA:
    """Average a_n = d_n a_{n-1} + (1 - d_n) w_n of the floating-point tensors of a module's state; integers are copied.

    Buffers are averaged as the weights are: batch-norm statistics of the last step belong to the last weights, not to
    their average. With decay 0 the average is the module's state itself.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay {decay} is outside [0, 1)")
        self.decay = decay
        self.state = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, updates: int) -> None:
        """Take in the module's state after optimiser step number `updates` (1-based)."""
        current = module.state_dict()
        floats = [name for name, tensor in current.items() if tensor.is_floating_point()]
        weight = 1 - ema_decay(self.decay, updates) if self.decay else 1.0
        torch._foreach_lerp_([self.state[name] for name in floats], [current[name] for name in floats], weight)
        for name in current.keys() - set(floats):
            self.state[name].copy_(current[name])

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from a saved average."""
        for name, tensor in self.state.items():
            tensor.copy_(state[name])
