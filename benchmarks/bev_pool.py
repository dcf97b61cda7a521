"""BEV pooling side by side: ours, the cumsum trick of Lift-Splat-Shoot, and adding every point with `index_add`.

One sample of BEVDepth's size on one thread: `python benchmarks/bev_pool.py`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from models.layers.bev_pool import bev_pool, bev_pool_reference, pool_index

CAMERAS, BINS, HEIGHT, WIDTH, CHANNELS, CELLS = 6, 59, 16, 44, 80, 128
REPEATS = 5


class CumsumTrick(torch.autograd.Function):
    """Philion and Fidler, ECCV 2020, section 3.1: prefix sums over points sorted by cell, subtracted at the ends."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """Sums [K, C] and cells [K] of sorted points [P, C], [P]."""
        last = torch.ones_like(cell, dtype=torch.bool)
        last[:-1] = cell[1:] != cell[:-1]
        sums = values.cumsum(0)[last]
        ctx.save_for_backward(last)
        return torch.cat([sums[:1], sums[1:] - sums[:-1]]), cell[last]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        """Each point gets its cell's gradient."""
        (last,) = ctx.saved_tensors
        owner = last.cumsum(0) - last.long()
        return grad[owner], None


def cumsum_pool(features: Tensor, depth: Tensor, cell: Tensor, cells: int) -> Tensor:
    """Materialise the frustum, drop, sort, prefix-sum, place."""
    values, flat = (depth.unsqueeze(-1) * features.unsqueeze(1)).flatten(0, 1), cell.flatten()
    keep = flat >= 0
    values, flat = values[keep], flat[keep]
    order = flat.argsort()
    sums, owner = CumsumTrick.apply(values[order], flat[order])
    out = features.new_zeros(cells, features.shape[1])
    out[owner] = sums
    return out


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Features [R, C], depth [R, D] and cells [R, D] of rays that leave six cameras outwards from the centre."""
    generator = torch.Generator().manual_seed(0)
    pixels = CAMERAS * HEIGHT * WIDTH
    angle = torch.arange(CAMERAS)[:, None] * 1.05 + torch.linspace(-0.5, 0.5, WIDTH)
    angle = angle[:, None].expand(CAMERAS, HEIGHT, WIDTH).reshape(-1, 1)
    reach = torch.linspace(1, 60, BINS)
    column, row = (((reach * f(angle) + 51.2) / 0.8).floor().long() for f in (torch.cos, torch.sin))
    inside = (column >= 0) & (column < CELLS) & (row >= 0) & (row < CELLS)
    return (
        torch.randn(pixels, CHANNELS, generator=generator),
        torch.rand(pixels, BINS, generator=generator).softmax(1),
        torch.where(inside, row * CELLS + column, -1),
    )


def milliseconds(call: Callable[[], object]) -> float:
    """Best of a few runs."""
    call()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def both_ways(pool: Callable[[Tensor, Tensor], Tensor], features: Tensor, depth: Tensor) -> tuple[float, float, Tensor]:
    """Milliseconds forward, forward and backward, and the gradients as one vector."""
    features, depth = features.clone().requires_grad_(), depth.clone().requires_grad_()
    grad = torch.linspace(-1, 1, CELLS * CELLS * CHANNELS).view(CELLS * CELLS, CHANNELS)

    def step() -> None:
        features.grad = depth.grad = None
        pool(features, depth).backward(grad)

    with torch.no_grad():
        forward = milliseconds(lambda: pool(features, depth))
    total = milliseconds(step)
    assert features.grad is not None
    assert depth.grad is not None
    return forward, total, torch.cat([features.grad.flatten(), depth.grad.flatten()])


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    features, depth, cell = problem()
    cells = CELLS * CELLS
    index = pool_index(cell, cells)
    rows: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "cumsum trick (LSS, BEVFusion)": lambda f, d: cumsum_pool(f, d, cell, cells),
        "index_add of the frustum": lambda f, d: bev_pool_reference(f, d, cell, cells),
        "ours, index made each time": lambda f, d: bev_pool(f, d, pool_index(cell, cells)),
        "ours, index given": lambda f, d: bev_pool(f, d, index),
    }
    print(
        f"1x{CAMERAS}x{BINS}x{HEIGHT}x{WIDTH}, C {CHANNELS}, {CELLS}x{CELLS} cells, "
        f"{len(index.point_by_cell)} of {cell.numel()} points inside, one thread"
    )
    print(f"{'':32s}{'fwd ms':>9s}{'fwd+bwd ms':>12s}{'speed-up':>10s}{'gradient error':>16s}")
    results = {name: both_ways(pool, features, depth) for name, pool in rows.items()}
    slow, exact = results["cumsum trick (LSS, BEVFusion)"], results["index_add of the frustum"][2]
    for name, (forward, total, gradient) in results.items():
        error = float((gradient - exact).abs().max())
        print(f"{name:32s}{forward:9.1f}{total:12.1f}{slow[1] / total:9.0f}x{error:16.1e}")


if __name__ == "__main__":
    main()
