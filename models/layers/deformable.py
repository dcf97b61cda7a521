"""Geometry compensation: a map may read itself at places that it chooses, to undo what the lift displaced.

Zhao et al., "SimDistill", AAAI 2024; the attention is that of Zhu et al., "Deformable DETR", ICLR 2021, on one map.
With mmcv's CUDA operators it runs mmcv's kernel, else the same sum in plain torch.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.ops import (
    DeformConv2dPack,
    ModulatedDeformConv2dPack,
    MultiScaleDeformableAttention,
    get_compiling_cuda_version,
)
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction
from mmengine.registry import MODELS
from torch import Tensor, nn

KINDS = ("attention", "deform_conv", "conv")
HAS_KERNEL = get_compiling_cuda_version() != "not available"  # whether mmcv was built with its CUDA operators


def deformable_attention(value: Tensor, shape: tuple[int, int], locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples, for each query and head.

    A sample reads zeros beyond the map's edges.

    Args:
        value: [B, h * w, heads, c], the map's cells row by row.
        shape: its rows h and columns w.
        locations: [B, Q, heads, P, 2] x and y, 0 and 1 at the outer edges of the map's first and last cells.
        weights: [B, Q, heads, P].

    Returns:
        [B, Q, heads * c].
    """
    if value.is_cuda and HAS_KERNEL:
        return _kernel(value, shape, locations, weights)
    batch, queries, heads, points, _ = locations.shape
    maps = value.permute(0, 2, 3, 1).reshape(batch * heads, -1, *shape)
    # The queries last: they are many, and the sum over points then runs along contiguous rows.
    grid = (2 * locations - 1).permute(0, 2, 3, 1, 4).reshape(batch * heads, points, queries, 2)
    sampled = F.grid_sample(maps, grid, align_corners=False)
    share = weights.permute(0, 2, 3, 1).reshape(batch * heads, 1, points, queries)
    return (sampled * share).sum(2).view(batch, -1, queries).transpose(1, 2)


def full(x: Tensor) -> Tensor:
    """`x` in at least float32: places of eight bits, as bfloat16 has them, are off by a good part of a cell."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cell_centers(shape: tuple[int, int], like: Tensor) -> Tensor:
    """Centres [h * w, 2] of a map's cells row by row, x and y of 0 to 1, with dtype and device of `like`."""
    rows, columns = ((torch.arange(n, device=like.device, dtype=like.dtype) + 0.5) / n for n in shape)
    return torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).flatten(0, 1)


def _kernel(value: Tensor, shape: tuple[int, int], locations: Tensor, weights: Tensor) -> Tensor:
    """`deformable_attention` by mmcv's kernel."""
    sizes = torch.tensor([shape], device=value.device)
    # The last argument must divide the batch.
    return MultiScaleDeformableAttnFunction.apply(
        value.contiguous(),
        sizes,
        sizes.new_zeros(1),
        locations.unsqueeze(3).contiguous(),
        weights.unsqueeze(3).contiguous(),
        len(value),
    )


class DeformableSelfAttention(MultiScaleDeformableAttention):
    """mmcv's module with the map as query and value, the cells' centres as reference points, and no residual.

    The parameters and their names are mmcv's. The output projection starts at zero, so the module adds nothing to
    begin with; that is our choice, with which a model may start from weights of one that lacks the module.

    Args:
        embed_dims: channels of the map; a multiple of `num_heads`.
        num_heads: heads, each with its own samples of its own channels.
        num_points: samples of a query and head.
    """

    def __init__(self, embed_dims: int, num_heads: int = 8, num_points: int = 10) -> None:
        if embed_dims % num_heads:
            raise ValueError(
                f"deformable attention: {num_heads} heads do not divide {embed_dims} channels: set heads to a divisor"
            )
        with warnings.catch_warnings():
            # A head's width that is no power of two is slower in CUDA; the papers' sizes are what they are.
            warnings.filterwarnings("ignore", message="You'd better set embed_dims")
            super().__init__(embed_dims, num_heads, num_levels=1, num_points=num_points, dropout=0.0, batch_first=True)

    def init_weights(self) -> None:
        """mmcv's, of which the points of a head lie on a ray of its own; then zero for the output projection."""
        super().init_weights()
        nn.init.zeros_(self.output_proj.weight)

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        """What the cells of maps [M, C, h, w] read, in the same shape.

        Args:
            x: the maps.
            position: [C, h, w], added where a cell chooses what it reads, not to what is read.
        """
        shape = (x.shape[-2], x.shape[-1])
        cells = x.flatten(2).transpose(1, 2)
        query = cells if position is None else cells + position.flatten(1).T
        value = self.value_proj(cells).unflatten(-1, (self.num_heads, -1))
        with torch.autocast(x.device.type, enabled=False):
            locations, weights = self._samples(full(query), shape)
            read = deformable_attention(full(value), shape, locations, weights)
        return self.output_proj(read).transpose(1, 2).unflatten(2, shape)

    def _samples(self, query: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Where and with what weight each query [M, h * w, C] reads: [M, h * w, heads, P, 2] and without the 2."""
        height, width = shape
        centers = cell_centers(shape, query)[:, None, None]
        offsets = self.sampling_offsets(query).unflatten(-1, (self.num_heads, self.num_points, 2))
        weights = self.attention_weights(query).unflatten(-1, (self.num_heads, self.num_points)).softmax(-1)
        return centers + offsets / query.new_tensor([width, height]), weights


class GeometryCompensation(nn.Module):
    """A map [M, C, h, w] and what a small network adds to it; nothing before training.

    Args:
        channels: channels of the map.
        kind: `attention`: `DeformableSelfAttention`; `deform_conv`: two deformable 3x3 convolutions;
            `conv`: two plain ones. Between convolutions is a ReLU. The last layer starts at zero.
        heads: of attention.
        points: of attention, by head.
        position: rows and columns of the map, of attention whose cells shall know where they are; None: they do not.
    """

    def __init__(
        self,
        channels: int,
        kind: str = "attention",
        heads: int = 8,
        points: int = 10,
        position: list[int] | None = None,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"compensation kind {kind!r} must be one of {', '.join(KINDS)}")
        if position is not None and kind != "attention":
            raise ValueError(f"compensation position {position} needs kind attention, the kind is {kind!r}")
        self.layers: nn.Module = (
            DeformableSelfAttention(channels, heads, points)
            if kind == "attention"
            else two_convolutions(channels, deformable=kind == "deform_conv")
        )
        self.position = None if position is None else LearnedPosition(channels, *position)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [M, C, h, w] with what is added to them."""
        return x + (self.layers(x) if self.position is None else self.layers(x, self.position(x.shape[-2:])))


class LearnedPosition(nn.Module):
    """An embedding of each column and each row of a map, half of the channels each."""

    def __init__(self, channels: int, rows: int, columns: int) -> None:
        super().__init__()
        self.column = nn.Parameter(torch.rand(channels // 2, columns))
        self.row = nn.Parameter(torch.rand(channels - channels // 2, rows))

    def forward(self, shape: torch.Size) -> Tensor:
        """[C, rows, columns], for a map of that shape.

        Raises:
            ValueError: if the map has another shape.
        """
        rows, columns = self.row.shape[1], self.column.shape[1]
        if shape != (rows, columns):
            raise ValueError(
                f"compensation position [{rows}, {columns}] for a map of {list(shape)}: set it to "
                "rows and columns of the map, or to null"
            )
        return torch.cat([self.column[:, None].expand(-1, rows, -1), self.row[:, :, None].expand(-1, -1, columns)])


class FullPrecisionDeformConv(DeformConv2dPack):
    """mmcv's deformable convolution of maps in any memory layout, in float32 under autocast.

    mmcv has no kernel for bfloat16 on a CPU, and takes contiguous maps only.
    """

    def __init__(self, channels: int) -> None:
        # Samples one by one: mmcv wants the batch divisible by how many it takes at once.
        super().__init__(channels, channels, 3, padding=1, im2col_step=1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [M, C, h, w] of maps [M, C, h, w]."""
        with torch.autocast(x.device.type, enabled=False):
            x = full(x).contiguous()
            if torch.compiler.is_exporting():
                return convolve_samples(x, self.conv_offset(x), self.weight)
            return super().forward(x)


def convolve_samples(x: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    """mmcv's deformable 3x3 convolution with padding 1, in operators that an exported graph can hold.

    Args:
        x: [M, C, h, w].
        offset: [M, 18, h, w] cells, y and x of each of the nine samples.
        weight: [C', C, 3, 3].
    """
    height, width = x.shape[-2:]
    down, right = offset.unflatten(1, (9, 2)).unbind(2)
    kernel = torch.arange(9, device=x.device).view(9, 1, 1)
    row = torch.arange(height, device=x.device)[:, None] + kernel // 3 - 1 + down
    column = torch.arange(width, device=x.device) + kernel % 3 - 1 + right
    places = torch.stack([(2 * column + 1) / width - 1, (2 * row + 1) / height - 1], dim=-1)
    read = F.grid_sample(x, places.flatten(1, 2), align_corners=False).unflatten(2, (9, height))
    return torch.einsum("mckhw,ock->mohw", read, weight.flatten(2))


class _FullPrecision(nn.Module):
    """The forward pass that comes before one of mmcv's."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps [M, C_out, h, w] of maps [M, C_in, h, w].

        Raises:
            ValueError: while a graph is exported: no operator of it does what mmcv's does.
        """
        if torch.compiler.is_exporting():
            raise ValueError(
                f"export of {type(self).__name__}: only detectors without dcn, in backbone and head, can be exported"
            )
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(full(x).contiguous())


class FullPrecisionDCN(_FullPrecision, DeformConv2dPack):
    """mmcv's `DCN` of maps in any memory layout, in float32 under autocast."""


@MODELS.register_module()
class FullPrecisionDCNv2(_FullPrecision, ModulatedDeformConv2dPack):
    """mmcv's `DCNv2` in the same way, for mmdet's backbones: `dcn: {type: FullPrecisionDCNv2}`."""


def two_convolutions(channels: int, deformable: bool) -> nn.Sequential:
    """Two 3x3 convolutions with a ReLU between them, the last one zero."""
    kind: Any = FullPrecisionDeformConv if deformable else lambda width: nn.Conv2d(width, width, 3, padding=1)
    layers = nn.Sequential(kind(channels), nn.ReLU(inplace=True), kind(channels))
    for parameter in layers[-1].parameters():
        nn.init.zeros_(parameter)
    return layers
