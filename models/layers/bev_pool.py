"""BEV pooling of lift-splat detectors: sum depth-weighted image features into the cells their rays cross.

A point of the frustum is a (pixel, depth bin) pair. Its value `depth[pixel, bin] * features[pixel]` is never
materialised: with the points sorted by cell, a cell's sum is one bag of `embedding_bag` over feature rows, weighted
by depth. The gradient to the features is the same operation with the roles of pixels and cells exchanged (points in
pixel order need no sort), and the gradient to the depth is a dot product per point, a sampled matrix product.
Every output has one owner that adds its points in a fixed order, so results are deterministic.

Sums run in float32 under autocast as well: a cell adds up to hundreds of small terms, which bfloat16's eight bits lose.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

LARGEST_PRODUCT = 2**27  # entries of a matrix of `bev_pool_by_product`, 512 MiB


class PoolIndex(NamedTuple):
    """Which points fall into which cells, in both orders; P valid points, R pixels, D depth bins.

    32-bit rows because `embedding_bag` reads them twice as fast as 64-bit ones.
    """

    point_by_cell: Tensor  # [P] int64, flat position in `depth` [R, D], sorted by cell
    pixel_by_cell: Tensor  # [P] int32, feature row of the same points
    cell_offsets: Tensor  # [cells + 1] int32, where each cell's points begin
    point_by_pixel: Tensor  # [P] int64, flat position in `depth`, sorted by pixel
    cell_by_pixel: Tensor  # [P] int32, cell of the same points
    pixel_offsets: Tensor  # [R + 1] int32, where each pixel's points begin


def pool_index(cell: Tensor, cells: int) -> PoolIndex:
    """Sort the points of a frustum by cell.

    Args:
        cell: [R, D] integer, BEV cell of each point; negative where the point is outside the grid.
        cells: number of cells of the output.
    """
    valid = cell >= 0
    point = valid.flatten().nonzero().squeeze(1)
    cell_by_pixel = cell.flatten()[point].int()
    # Stable: the order of addition inside a cell, hence the rounding, is that of the pixels.
    by_cell, order = cell_by_pixel.sort(stable=True)
    point_by_cell = point[order]
    ends = torch.arange(cells + 1, device=cell.device, dtype=torch.int32)
    return PoolIndex(
        point_by_cell=point_by_cell,
        pixel_by_cell=(point_by_cell // cell.shape[1]).int(),
        cell_offsets=torch.searchsorted(by_cell, ends, out_int32=True),
        point_by_pixel=point,
        cell_by_pixel=cell_by_pixel,
        pixel_offsets=F.pad(valid.sum(1).cumsum(0), (1, 0)).int(),
    )


def _weighted_bags(rows: Tensor, table: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Sum `weights * table[rows]` over each bag; [bags, C]."""
    return F.embedding_bag(rows, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


def _point_dots(features: Tensor, grad: Tensor, index: PoolIndex) -> Tensor:
    """Dot product of a point's feature row [R, C] and its cell's gradient row [cells, C]; [P] in pixel order."""
    if index.point_by_pixel.numel() == 0:
        return features.new_zeros(0)
    zeros = features.new_zeros(index.point_by_pixel.numel())
    # A ray may cross a cell in several bins; torch accepts such repeated entries up to the size of the full matrix.
    grad = F.pad(grad, (0, 0, 0, max(0, -(-len(zeros) // len(features)) - len(grad))))
    pattern = torch.sparse_csr_tensor(
        index.pixel_offsets, index.cell_by_pixel, zeros, size=(len(features), len(grad)), check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, features, grad.t(), beta=0.0).values()


class _BevPool(torch.autograd.Function):
    """`embedding_bag` by cell forward; by pixel, plus a sampled product, backward."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, depth: Tensor, index: PoolIndex) -> Tensor:
        ctx.save_for_backward(features, depth, *index)
        weights = depth.flatten()[index.point_by_cell]
        return _weighted_bags(index.pixel_by_cell, features, index.cell_offsets, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        features, depth, *tensors = ctx.saved_tensors
        index = PoolIndex(*tensors)
        grad = grad.contiguous()
        grad_features = grad_depth = None
        if ctx.needs_input_grad[0]:
            weights = depth.flatten()[index.point_by_pixel]
            grad_features = _weighted_bags(index.cell_by_pixel, grad, index.pixel_offsets, weights)
        if ctx.needs_input_grad[1]:
            grad_depth = torch.zeros_like(depth).flatten()
            grad_depth[index.point_by_pixel] = _point_dots(features, grad, index)
            grad_depth = grad_depth.view_as(depth)
        return grad_features, grad_depth, None


def bev_pool(features: Tensor, depth: Tensor, index: PoolIndex) -> Tensor:
    """Pool image features into BEV cells.

    Args:
        features: [R, C], a row per pixel of the feature maps of all cameras and samples.
        depth: [R, D], weight of each depth bin of that pixel.
        index: from `pool_index` with the same R and D.

    Returns:
        [cells, C] in float32 (float64 for float64 input); cells without points are zero.

    Raises:
        ValueError: if the shapes do not belong to the index.
    """
    if len(features) != len(depth) or len(depth) + 1 != len(index.pixel_offsets):
        raise ValueError(
            f"bev_pool: {len(features)} feature rows and {len(depth)} depth rows, but the index was made "
            f"for {len(index.pixel_offsets) - 1} pixels: all three must agree"
        )
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    with torch.autocast(features.device.type, enabled=False):
        return _BevPool.apply(features.to(dtype).contiguous(), depth.to(dtype).contiguous(), index)


def bev_pool_by_product(features: Tensor, depth: Tensor, cell: Tensor, cells: int) -> Tensor:
    """`bev_pool` as products of matrices, whose shapes depend on no value: what an exported graph holds.

    A pixel's weights are laid out by cell, [cells, R], a part of the pixels at a time where that is large. Only single
    numbers are added at places that repeat: onnxruntime adds whole rows in several threads and loses some (ScatterND).

    Args:
        features: [R, C].
        depth: [R, D].
        cell: [R, D] integer, as `pool_index` takes it.
        cells: number of cells of the output.
    """
    most, total = max(1, LARGEST_PRODUCT // cells), features.new_zeros(cells, features.shape[1])
    for rows, weights, places in zip(features.split(most), depth.split(most), cell.split(most), strict=True):
        pixels = len(rows)
        # Points outside the grid go to one cell more, which is dropped.
        places = torch.where(places < 0, cells, places) * pixels + torch.arange(pixels, device=cell.device)[:, None]
        matrix = weights.new_zeros((cells + 1) * pixels).scatter_add(0, places.flatten(), weights.flatten())
        total = total + matrix.view(cells + 1, pixels)[:cells] @ rows
    return total


def bev_pool_reference(features: Tensor, depth: Tensor, cell: Tensor, cells: int) -> Tensor:
    """The definition: materialise every point [R, D, C] and add it to its cell. Slow; for tests and benchmarks."""
    values = (depth.unsqueeze(-1) * features.unsqueeze(1)).flatten(0, 1)
    valid = cell.flatten() >= 0
    return features.new_zeros(cells, features.shape[1]).index_add(0, cell.flatten()[valid].long(), values[valid])
