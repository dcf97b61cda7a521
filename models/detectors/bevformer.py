"""A detector whose bird's-eye view is made by attention: learned queries on the ground read the images.

Li et al., "BEVFormer", ECCV 2022, of which the encoder is; a convolutional BEV encoder and CenterPoint's head follow it
here, so that its head maps lie on the grid that every other detector has.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.detectors.camera import CAMERAS, CameraDetector
from models.layers.bev_attention import BEVEncoder, look
from models.layers.grid import Grid
from models.layers.registry import MODELS
from models.ports import Batch, Prediction


class BEVEmbeddings(nn.Module):
    """All that is learned of the queries, the places and the cameras themselves.

    All queries begin with the same vector, which is our choice: BEVFormer's random ones differ from cell to cell, and
    the norm of the first layer makes that noise as large as what is read, in a map that convolutions read next.

    Args:
        channels: of each.
        size: queries along a side of the square.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(channels, 1, 1).expand(-1, size, size).clone())
        self.row = nn.Parameter(torch.rand(channels // 2, size))
        self.column = nn.Parameter(torch.rand(channels - channels // 2, size))
        self.camera = nn.Parameter(torch.randn(CAMERAS, channels))

    def position(self) -> Tensor:
        """Of each query, [Q * Q, C] row by row: its row's embedding, then its column's."""
        size = self.row.shape[1]
        return (
            torch.cat([self.row[:, :, None].expand(-1, -1, size), self.column[:, None].expand(-1, size, -1)], dim=0)
            .flatten(1)
            .T
        )


@MODELS.register_module()
class BEVFormer(CameraDetector):
    """BEVFormer-type camera detector. It predicts no depth.

    At evaluation it reads `images`, `intrinsics`, `image_aug`, `lidar_SE3_cam`, `bev_aug` and, with frames 2,
    `has_previous`, nothing else.

    Args:
        grid: see `models.detectors.camera.CameraDetector`, as for all that is not named here.
        channels: of the queries; image features of another width come to it by a 1x1 convolution.
        queries: along a side of the square that `grid` covers. The map is resized to `grid` bilinearly.
        layers: of the encoder.
        heads: of attention, which divide the channels.
        points: samples of a head, around a cell of either map and around each point of a pillar.
        pillar: heights of these points, metres.
        feedforward: channels between the linear layers of a layer.
        bev_backbone: see `models.detectors.camera.CameraBEVDepth`.
        bev_neck: see `models.detectors.camera.CameraBEVDepth`.
        head: see `models.detectors.camera.CameraBEVDepth`.
        frames: 2 has the queries read the map of the previous keyframe, made without gradient.
        image: see `models.detectors.camera.CameraDetector`.

    Taps: `pv`, `bev_neck`, `head` as of `CameraBEVDepth`; `bev_lift` [B, C, Q, Q] the encoder's output;
    `bev_prev` the same of the previous frame, by its own cameras on the current frame's grid (with frames 2);
    `bev_view` [B, N * C, Q, Q] what the last layer read in each camera, zero where it does not see the pillar;
    `bev_fused` [B, C, H, W] `bev_lift` on `grid`.
    """

    sensors = ("images",)

    def __init__(
        self,
        grid: dict[str, Any],
        image_backbone: dict[str, Any],
        image_neck: dict[str, Any],
        stride: int,
        channels: int,
        queries: int,
        layers: int,
        heads: int,
        points: int,
        pillar: list[float],
        feedforward: int,
        bev_backbone: dict[str, Any],
        bev_neck: dict[str, Any],
        head: dict[str, Any],
        frames: int = 2,
        image: list[int] | None = None,
    ) -> None:
        super().__init__(grid, image_backbone, image_neck, stride, None, image=image)
        if frames not in (1, 2):
            raise ValueError(f"BEVFormer frames {frames} must be 1, or 2 for the previous keyframe as well")
        self.frames, self.pillar = frames, pillar
        self.cells = Grid(self.grid.range, 2 * self.grid.range / queries, self.grid.z)
        narrow = self.images.channels == channels
        self.reduce = nn.Identity() if narrow else nn.Conv2d(self.images.channels, channels, 1)
        self.embeddings = BEVEmbeddings(channels, queries)
        self.encoder = BEVEncoder(layers, channels, heads, len(pillar), points, feedforward)
        self.build_bev(channels, bev_backbone, bev_neck, head)
        self.tap_channels |= {"bev_lift": channels, "bev_view": CAMERAS * channels}
        if frames == 2:
            self.tap_channels["bev_prev"] = channels

    def forward(self, batch: Batch, taps: Collection[str] = ()) -> Prediction:
        """See `Detector`."""
        if batch.images.shape[1] < self.frames:
            raise ValueError(
                f"BEVFormer was built for {self.frames} frames, the batch has {batch.images.shape[1]}: set input.frames"
            )
        batch = self.at_own_size(batch)
        previous = self._encode_previous(batch) if self.frames == 2 else None
        features = self.images(batch.images[:, 0])
        cells, views = self.encode(features, batch, 0, previous)
        lifts = {"pv": features, "bev_lift": self._map(cells)}
        if "bev_view" in taps:
            lifts["bev_view"] = self._map(views).flatten(1, 2)
        if previous is not None:
            lifts["bev_prev"] = self._map(previous)
        size = (self.grid.size, self.grid.size)
        fused = F.interpolate(lifts["bev_lift"], size, mode="bilinear", align_corners=False)
        return self.predict(fused, (), taps, lifts)

    def encode(self, features: Tensor, batch: Batch, frame: int, previous: Tensor | None) -> tuple[Tensor, Tensor]:
        """The encoder's output on image features [B, N, C_I, h, w] of a frame; see `BEVEncoder`."""
        batch_size, cameras = features.shape[:2]
        narrow = self.reduce(features.flatten(0, 1)).unflatten(0, (batch_size, cameras))
        narrow = narrow + self.embeddings.camera[:cameras, :, None, None]
        # A copy: without gradients a view of a parameter still claims to need them, which torch's FLOP counter refuses.
        queries = self.embeddings.queries.flatten(1).T.contiguous().expand(batch_size, -1, -1)
        sight = look(self.cells.centers(features.device), self.pillar, batch, frame)
        return self.encoder(queries, self.embeddings.position(), narrow, sight, previous, batch.has_previous)

    @torch.no_grad()
    def _encode_previous(self, batch: Batch) -> Tensor:
        """The map [B, Q * Q, C] of the previous keyframe, without a previous one of its own.

        The camera poses of that frame lead to the current LiDAR frame, so the map is aligned by ego motion.
        """
        return self.encode(self.images(batch.images[:, 1]), batch, 1, None)[0]

    def _map(self, cells: Tensor) -> Tensor:
        """Maps [..., C, Q, Q] of cells [..., Q * Q, C]."""
        return cells.transpose(-1, -2).unflatten(-1, (self.cells.size, self.cells.size))
