"""spconv, which voxel encoders compute with, made right on a CPU.

Models without sparse convolutions import neither spconv nor, therefore, what is mended here: the imports stand in the
functions.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch


def require_spconv(name: str) -> None:
    """Have sparse convolutions ready for a middle encoder.

    Args:
        name: type of the encoder, for the message.

    Raises:
        ModuleNotFoundError: spconv is missing; with what to do.
    """
    if importlib.util.find_spec("spconv") is None:
        raise ModuleNotFoundError(
            f"the middle encoder {name} needs sparse convolutions: run `make setup`, which "
            "brings those for this machine, or use pillars"
        )
    train_without_cuda()
    add_up_on_one_thread()


def train_without_cuda() -> None:
    """Let gradients pass through sparse convolutions on a machine without CUDA.

    The backward pass of spconv (2.3.8) asks torch for CUDA's current stream on a CPU too, where it makes no use of it,
    and torch raises without CUDA. This can go when spconv asks on GPUs only, as its forward pass does.
    """
    if torch.cuda.is_available():
        return
    import spconv.pytorch.ops

    spconv.pytorch.ops.get_current_stream = lambda: 0


def add_up_on_one_thread() -> None:
    """Have spconv add the results of a sparse convolution up on one thread, where it computes on a CPU.

    Its kernel for that (spconv 2.3.8) lets threads overwrite one another: with two threads, a third of the results of
    small convolutions were wrong, and differed when repeated. This can go when `scatter_add_cpu` is right with several
    threads. spconv-triton, which has no such kernel, is left as it is.
    """
    from spconv.pytorch import ops

    kernels = getattr(ops, "SpconvOps", None)
    if kernels is None or hasattr(kernels.scatter_add_cpu, "__wrapped__"):
        return
    kernels.scatter_add_cpu = staticmethod(_on_one_thread(kernels.scatter_add_cpu))


def _on_one_thread(kernel: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(kernel)
    def alone(*arguments: Any) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            kernel(*arguments)
        finally:
            torch.set_num_threads(threads)

    return alone
