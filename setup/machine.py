"""What set-up asks about the machine."""

from __future__ import annotations

import os


def for_cuda() -> bool:
    """Whether the environment is made for a GPU: torch sees one, or FORCE_CUDA=1 says that there will be one."""
    import torch

    return torch.cuda.is_available() or os.environ.get("FORCE_CUDA") == "1"
