"""Random state as a function of position.

Saving generator states is fragile: every rank and every loader worker has several, libraries add their own, and a state
file of the wrong step or rank goes unnoticed. Here each step of each rank, and each sample, seeds all of them from its
position instead, so a resumed run draws what an uninterrupted one would have drawn and there is nothing to save.
"""

from __future__ import annotations

import os
import random

import numpy as np
import torch

MODEL, RECIPE, STEP, SAMPLE = range(4)  # first number of a position: what it is the position of


def seed_everything(*position: int, cuda: bool = True) -> None:
    """Seed Python's, NumPy's and torch's global generators from a tuple of non-negative integers."""
    state = np.random.SeedSequence(position).generate_state(4, np.uint64)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]) & 0xFFFFFFFF)  # noqa: NPY002 - libraries that draw from the global state
    torch.default_generator.manual_seed(int(state[2]))
    if cuda and torch.cuda.is_initialized():
        torch.cuda.manual_seed(int(state[3]))


def make_deterministic() -> None:
    """Let torch raise on operations that have no deterministic implementation."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs a write of every new tensor
    torch.backends.cudnn.benchmark = False
