"""The necks of BEVFusion's published code, which mmdet3d's wheel lacks: of its images and of its decoder.

Liu et al., "BEVFusion: Multi-Task Multi-Sensor Fusion with Unified Bird's-Eye View Representation", ICRA 2023. Both
concatenate levels where an FPN adds them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmdet3d.registry import MODELS
from mmengine.model import BaseModule
from torch import Tensor, nn

NORM = {"type": "BN2d"}


@MODELS.register_module()
class ConcatFPN(BaseModule):
    """From the coarsest level to the finest: upsample, concatenate, a 1x1 and a 3x3 convolution.

    BEVFusion calls it GeneralizedLSSFPN; this one returns its finest level, which is all that a lift reads.

    Args:
        in_channels: of the levels, finest first.
        out_channels: of the result.
    """

    def __init__(self, in_channels: list[int], out_channels: int) -> None:
        super().__init__(init_cfg={"type": "Kaiming", "layer": "Conv2d"})
        if len(in_channels) < 2:
            raise ValueError(f"ConcatFPN in_channels {in_channels}: two levels or more are needed")
        coarser = [*[out_channels] * (len(in_channels) - 2), in_channels[-1]]
        self.joins = nn.ModuleList(ConvModule(fine + coarse, out_channels, 1, norm_cfg=NORM)
                                   for fine, coarse in zip(in_channels[:-1], coarser, strict=True))
        self.smooths = nn.ModuleList(ConvModule(out_channels, out_channels, 3, padding=1, norm_cfg=NORM)
                                     for _ in coarser)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """[B, out_channels, h, w] of levels [B, C, h, w], [B, C, h / 2, w / 2] and so on."""
        x = levels[-1]
        steps = zip(levels[:-1], self.joins, self.smooths, strict=True)
        for fine, join, smooth in reversed(list(steps)):
            up = F.interpolate(x, size=fine.shape[-2:], mode="bilinear", align_corners=False)
            x = smooth(join(torch.cat([fine, up], dim=1)))
        return x


@MODELS.register_module()
class UpsamplingFPN(BaseModule):
    """The first and the last level of a BEV backbone, joined at the size of the first, then upsampled.

    BEVFusion calls it LSSFPN. It interpolates between the centres of the corner cells (``align_corners``).

    Args:
        in_channels: of the backbone's levels; those between the first and the last are not read.
        out_channels: of the result.
        upsample: cells of the result per cell of the first level and axis.
    """

    def __init__(self, in_channels: list[int], out_channels: int, upsample: int = 2) -> None:
        super().__init__(init_cfg={"type": "Kaiming", "layer": "Conv2d"})
        self.upsample = upsample
        self.join = ConvModule(in_channels[0] + in_channels[-1], out_channels, 1, norm_cfg=NORM)
        self.smooth = ConvModule(out_channels, out_channels, 3, padding=1, norm_cfg=NORM)
        self.sharpen = ConvModule(out_channels, out_channels, 3, padding=1, norm_cfg=NORM)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """[B, out_channels, upsample * H, upsample * W] of levels, of which the first is [B, C, H, W]."""
        height, width = levels[0].shape[-2:]
        deep = enlarged(levels[-1], (height, width))
        x = self.smooth(self.join(torch.cat([deep, levels[0]], dim=1)))
        return self.sharpen(enlarged(x, (self.upsample * height, self.upsample * width)))


def enlarged(x: Tensor, size: tuple[int, int]) -> Tensor:
    """A map [B, C, h, w] interpolated to a size (height, width), corner cells staying corner cells."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)
