"""BEVFormer's encoder: queries on the ground read the previous map and the images at places that they choose.

Li et al., "BEVFormer", ECCV 2022. Differences, which are our choices: no dropout; positions are added in both
attentions; self-attention reads the current queries as they enter its layer; a point of a pillar that a camera does
not see is not read there.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.layers.deformable import cell_centers, deformable_attention, full
from models.layers.projection import pillar_points, project
from models.ports import Batch


class Sight(NamedTuple):
    """For each camera: the k queries whose pillars it sees, and where it sees them.

    k is the number of queries that the camera with the most of them sees.
    """

    # [B, N, k] queries; a camera that sees fewer than k is filled up with others. None: all queries, in order.
    queries: Tensor | None
    # [B, N, k, Z, 2] of the points of their pillars: x and y, 0 and 1 at the outer edges of the image.
    positions: Tensor
    inside: Tensor  # [B, N, k, Z] bool: the camera sees the point
    cameras: Tensor  # [B, Q] how many see a query's pillar


def look(centers: Tensor, heights: list[float], batch: Batch, frame: int) -> Sight:
    """Where the cameras of a frame see pillars with these centres [H, W, 2] (metres, augmented frame) and heights."""
    positions, inside = project(pillar_points(centers, heights), batch, frame)
    positions, inside = positions.unflatten(2, (-1, len(heights))), inside.unflatten(2, (-1, len(heights)))
    visible = inside.any(-1)
    # An exported graph has fixed shapes: all queries.
    index = None if torch.compiler.is_exporting() else seen_first(visible)
    return Sight(index, pick(positions, index), pick(inside, index), visible.sum(1))


def seen_first(visible: Tensor) -> Tensor:
    """Of visible [B, N, Q], for each camera the same number k of queries [B, N, k], all visible ones among them."""
    return visible.float().topk(max(1, int(visible.sum(-1).max()))).indices


def pick(x: Tensor, index: Tensor | None) -> Tensor:
    """Entries [B, N, k, ...] of x [B, N, Q, ...] or, the same for every camera, [B, 1, Q, ...]; without index x."""
    if index is None:
        return x
    shape = (*index.shape, *x.shape[3:])
    index = index.reshape(*index.shape, *[1] * (x.dim() - 3)).expand(shape)
    return x.expand(-1, shape[1], *x.shape[2:]).gather(2, index)


class Samples(nn.Module):
    """Where, relative to a place, and with what weight each query and head reads.

    Args:
        in_channels: of what it is read off.
        heads: of attention.
        places: around each of which there are samples of their own.
        points: samples of a head around a place.
    """

    def __init__(self, in_channels: int, heads: int, places: int, points: int) -> None:
        super().__init__()
        self.shape = (heads, places, points)
        self.offsets = nn.Linear(in_channels, heads * places * points * 2)
        self.weights = nn.Linear(in_channels, heads * places * points)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Deformable DETR's: the points of a head lie on a ray of its own, one cell apart, and weigh the same."""
        heads, places, points = self.shape
        angle = torch.arange(heads) * (2 * math.pi / heads)
        ray = torch.stack([angle.cos(), angle.sin()], dim=-1)
        steps = (ray / ray.abs().amax(-1, keepdim=True))[:, None] * torch.arange(1, points + 1)[:, None]
        self.offsets.bias.copy_(steps[:, None].expand(-1, places, -1, -1).flatten())
        for parameter in (self.offsets.weight, self.weights.weight, self.weights.bias):
            nn.init.zeros_(parameter)

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Offsets in cells [..., heads, places, points, 2] and logits [..., heads, places, points] of [..., C]."""
        return self.offsets(query).unflatten(-1, (*self.shape, 2)), self.weights(query).unflatten(-1, self.shape)


class TemporalSelfAttention(nn.Module):
    """Queries read the previous map and themselves around their own cells; the mean of both.

    Args:
        channels: of the queries.
        heads: that divide the channels.
        points: samples of a head in each of both maps.
    """

    def __init__(self, channels: int, heads: int, points: int) -> None:
        super().__init__()
        self.heads = heads
        self.samples = Samples(2 * channels, heads, 2, points)
        self.value = projection(channels)
        self.output = projection(channels)

    def forward(self, query: Tensor, position: Tensor, previous: Tensor) -> Tensor:
        """What is read, [B, Q, C].

        Args:
            query: [B, Q, C], cells of a square map row by row.
            position: [Q, C], added where a query chooses what it reads.
            previous: [B, Q, C].
        """
        maps = self.value(torch.stack([previous, query], dim=1).flatten(0, 1)).unflatten(-1, (self.heads, -1))
        chooser = torch.cat([previous, query + position], dim=-1)
        side = math.isqrt(query.shape[1])
        with torch.autocast(query.device.type, enabled=False):
            offsets, logits = self.samples(full(chooser))
            locations = cell_centers((side, side), offsets)[:, None, None, None] + offsets / side
            read = deformable_attention(full(maps), (side, side), by_map(locations), by_map(logits.softmax(-1)))
        return self.output(read.unflatten(0, (-1, 2)).mean(1))


class SpatialCrossAttention(nn.Module):
    """Queries read each camera that sees their pillar around the pillar's points; the mean over these cameras.

    Args:
        channels: of queries and image features.
        heads: that divide the channels.
        heights: points of a pillar.
        points: samples of a head around each of them.
    """

    def __init__(self, channels: int, heads: int, heights: int, points: int) -> None:
        super().__init__()
        self.heads = heads
        self.samples = Samples(channels, heads, heights, points)
        self.value = projection(channels)
        self.output = projection(channels)

    def forward(self, query: Tensor, position: Tensor, features: Tensor, sight: Sight) -> tuple[Tensor, Tensor]:
        """What is read, [B, Q, C], and of it each camera's part [B, N, Q, C] before the mean: zero where it sees none.

        Args:
            query: [B, Q, C].
            position: [Q, C], added where a query chooses what it reads.
            features: [B, N, C, h, w] of the images.
            sight: of the queries.
        """
        views = self.views(query + position, features, sight)
        mean = views.sum(1) / sight.cameras.clamp(min=1).unsqueeze(-1)
        return self.output(mean), views

    def views(self, chooser: Tensor, features: Tensor, sight: Sight) -> Tensor:
        """Each camera's part [B, N, Q, C] of what queries [B, Q, C] read."""
        height, width = features.shape[-2:]
        value = self.value(features.flatten(3).transpose(2, 3)).unflatten(-1, (self.heads, -1)).flatten(0, 1)
        with torch.autocast(chooser.device.type, enabled=False):
            offsets, logits = self.samples(full(chooser))
            weights = logits.flatten(-2).softmax(-1).view_as(logits)
            chosen = pick((offsets / offsets.new_tensor([width, height])).unsqueeze(1), sight.queries)
            locations = sight.positions[:, :, :, None, :, None] + chosen  # [B, N, k, heads, Z, P, 2]
            share = pick(weights.unsqueeze(1), sight.queries) * sight.inside[:, :, :, None, :, None]
            read = deformable_attention(
                full(value), (height, width), locations.flatten(0, 1).flatten(3, 4), share.flatten(0, 1).flatten(3, 4)
            )
        return self._spread(read.unflatten(0, features.shape[:2]), sight.queries, chooser.shape[1])

    @staticmethod
    def _spread(read: Tensor, index: Tensor | None, queries: int) -> Tensor:
        """Entries [B, N, k, C] at their queries, zero elsewhere: [B, N, Q, C]."""
        if index is None:
            return read
        spread = read.new_zeros(*index.shape[:2], queries, read.shape[-1])
        return spread.scatter(2, index.unsqueeze(-1).expand_as(read), read)


class EncoderLayer(nn.Module):
    """Self-attention, cross-attention and two linear layers, each with a residual and a norm after it.

    Args:
        channels: of the queries.
        heads: of both attentions.
        heights: points of a pillar.
        points: samples of a head around each place.
        feedforward: channels between the linear layers.
    """

    def __init__(self, channels: int, heads: int, heights: int, points: int, feedforward: int) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"BEVFormer: {heads} heads do not divide {channels} channels: set heads to a divisor")
        self.temporal = TemporalSelfAttention(channels, heads, points)
        self.spatial = SpatialCrossAttention(channels, heads, heights, points)
        self.feedforward = nn.Sequential(
            projection(channels, feedforward), nn.ReLU(inplace=True), projection(feedforward, channels)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(3))

    def forward(
        self, query: Tensor, position: Tensor, previous: Tensor, features: Tensor, sight: Sight
    ) -> tuple[Tensor, Tensor]:
        """Queries of the next layer [B, Q, C], and what each camera gave them; see the attentions."""
        query = self.norms[0](query + self.temporal(query, position, previous))
        read, views = self.spatial(query, position, features, sight)
        query = self.norms[1](query + read)
        return self.norms[2](query + self.feedforward(query)), views


class BEVEncoder(nn.Module):
    """Layers one after another; see `EncoderLayer`."""

    def __init__(self, layers: int, channels: int, heads: int, heights: int, points: int, feedforward: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(channels, heads, heights, points, feedforward) for _ in range(layers))

    def forward(
        self,
        query: Tensor,
        position: Tensor,
        features: Tensor,
        sight: Sight,
        previous: Tensor | None,
        has_previous: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The map [B, Q, C], and of what its last layer read each camera's part [B, N, Q, C].

        Args:
            query: [B, Q, C].
            position: [Q, C].
            features: [B, N, C, h, w] of the images.
            sight: of the queries.
            previous: map [B, Q, C] of the previous frame. None, and where `has_previous` [B] is False: the queries
                of each layer take its place.
        """
        views = query.new_zeros(0)
        for layer in self.layers:
            past = query if previous is None else torch.where(has_previous[:, None, None], previous, query)
            query, views = layer(query, position, past, features, sight)
        return query, views


def projection(channels: int, out_channels: int | None = None) -> nn.Linear:
    """A linear layer as transformers begin: Xavier's weights, no bias to begin with."""
    layer = nn.Linear(channels, out_channels or channels)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def by_map(x: Tensor) -> Tensor:
    """[B, Q, heads, maps, ...] as [B * maps, Q, heads, ...]."""
    return x.movedim(3, 1).flatten(0, 1)
