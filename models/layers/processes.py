"""What the processes of one training have in common."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def across_processes(count: Tensor) -> tuple[Tensor, int]:
    """The sum of a count [...] over all processes of a training, and their number.

    A loss that is a sum divided by a count is divided by sum / number instead: the mean over the processes, which is
    what distributed training minimises, is then the loss of one process on all their samples. Every process must call
    this equally often. Alone: the count itself, and 1.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return count, 1
    total = count.clone()
    dist.all_reduce(total)
    return total, dist.get_world_size()


def divisor(count: Tensor) -> Tensor:
    """What each process divides its sum by for a mean over a count [...] of all processes, taken as 1 at least.

    See `across_processes`.
    """
    total, processes = across_processes(count)
    return total.clamp(min=1) / processes
