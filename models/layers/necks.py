"""SECOND's neck, and those of BEVFusion's published code, which mmdet3d's wheel lacks: of its images, of its decoder.

`SECONDFPN` is mmdet3d's, with the same arguments, weights and draws (see models.layers.registry). The others are of
Liu et al., "BEVFusion: Multi-Task Multi-Sensor Fusion with Unified Bird's-Eye View Representation", ICRA 2023. All
concatenate levels where an FPN adds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule, build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn

from models.layers.registry import MODELS

NORM = {"type": "BN2d"}


@MODELS.register_module()
class SECONDFPN(BaseModule):
    """Every level brought to one size, then concatenated. Yan et al., "SECOND", Sensors 2018.

    Args:
        in_channels: of each level.
        out_channels: of each level's part of the result.
        upsample_strides: cells of the result per cell of each level and axis; 0.5 halves a level that is too fine.
        norm_cfg: config of the normalisation.
        use_conv_for_no_stride: a level that has the size already gets a convolution, not a transposed one.
    """

    def __init__(
        self,
        in_channels: Sequence[int] = (128, 128, 256),
        out_channels: Sequence[int] = (256, 256, 256),
        upsample_strides: Sequence[float] = (1, 2, 4),
        norm_cfg: dict[str, Any] | None = None,
        use_conv_for_no_stride: bool = False,
    ) -> None:
        super().__init__(init_cfg={"type": "Kaiming", "layer": "ConvTranspose2d"})
        if not len(in_channels) == len(out_channels) == len(upsample_strides):
            raise ValueError(
                f"SECONDFPN in_channels {list(in_channels)}, out_channels {list(out_channels)}, "
                f"upsample_strides {list(upsample_strides)}: give one of each per level"
            )
        norm_cfg = norm_cfg or {"type": "BN", "eps": 1e-3, "momentum": 0.01}
        self.deblocks = nn.ModuleList()
        for before, after, stride in zip(in_channels, out_channels, upsample_strides, strict=True):
            resize: nn.Module
            if stride > 1 or (stride == 1 and not use_conv_for_no_stride):
                resize = nn.ConvTranspose2d(before, after, int(stride), int(stride), bias=False)
            else:
                step = round(1 / stride)
                resize = nn.Conv2d(before, after, step, step, bias=False)
            self.deblocks.append(nn.Sequential(resize, build_norm_layer(norm_cfg, after)[1], nn.ReLU(inplace=True)))

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """One map [B, sum of out_channels, H, W] of as many levels as there are in_channels."""
        return [torch.cat([deblock(level) for deblock, level in zip(self.deblocks, levels, strict=True)], dim=1)]


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
        self.joins = nn.ModuleList(
            ConvModule(fine + coarse, out_channels, 1, norm_cfg=NORM)
            for fine, coarse in zip(in_channels[:-1], coarser, strict=True)
        )
        self.smooths = nn.ModuleList(
            ConvModule(out_channels, out_channels, 3, padding=1, norm_cfg=NORM) for _ in coarser
        )

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

    BEVFusion calls it LSSFPN. It interpolates between the centres of the corner cells (`align_corners`).

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
