"""ResNets that mmdet does not have: BEVDepth's and BEVFusion's on a BEV map, one for images too large for memory."""

from __future__ import annotations

from typing import Any

from mmdet.models.backbones import ResNet
from mmdet.models.backbones.resnet import BasicBlock
from mmdet.models.layers import ResLayer
from mmdet3d.registry import MODELS
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@MODELS.register_module()
class BEVResNet(ResNet):
    """A ResNet on a BEV map: no max-pool, and the map itself is the first output.

    The stem halves the map, so stages with strides 1, 2, 2 end on a half, a quarter and an eighth of it; the neck
    brings all four back to the grid. Takes mmdet's arguments, with those of BEVDepth's released code as defaults.
    """

    def __init__(self, in_channels: int, depth: int = 18, base_channels: int = 160, **config: Any) -> None:
        stages = {"num_stages": 3, "strides": (1, 2, 2), "dilations": (1, 1, 1), "out_indices": (0, 1, 2)}
        super().__init__(depth, in_channels=in_channels, base_channels=base_channels, norm_eval=False,
                         **stages | config)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The map [B, in_channels, H, W] and the outputs of the stages."""
        maps = [x]
        x = self.relu(self.norm1(self.conv1(x)))
        for number, name in enumerate(self.res_layers):
            x = getattr(self, name)(x)
            if number in self.out_indices:
                maps.append(x)
        return tuple(maps)


@MODELS.register_module()
class StagedResNet(BaseModule):
    """Residual blocks on a BEV map, stage after stage, with no stem: the decoder's backbone of BEVFusion.

    Liu et al., "BEVFusion", ICRA 2023.

    Args:
        in_channels: channels of the map.
        channels: of each stage.
        strides: of each stage's first block.
        blocks: of each stage.
    """

    def __init__(self, in_channels: int, channels: list[int], strides: list[int], blocks: list[int]) -> None:
        super().__init__(init_cfg={"type": "Kaiming", "layer": "Conv2d"})
        if not len(channels) == len(strides) == len(blocks):
            raise ValueError(f"StagedResNet channels {channels}, strides {strides}, blocks {blocks}: give one of each "
                             "per stage")
        before = [in_channels, *channels[:-1]]
        self.stages = nn.ModuleList(ResLayer(BasicBlock, *stage)
                                    for stage in zip(before, channels, blocks, strides, strict=True))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of all stages for a map [B, in_channels, H, W]."""
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return tuple(maps)


@MODELS.register_module()
class RecomputedResNet(ResNet):
    """mmdet's ResNet, of which the backward pass knows only the inputs of blocks and computes the rest again.

    mmdet's own ``with_cp`` does so by torch's reentrant checkpoints, which fail under DDP where parameters may be
    unused. Batch norms count a step's statistics twice; losses and gradients are those of the plain ResNet.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Outputs of the stages ``out_indices`` for images [B, 3, H, W]."""
        x = self.maxpool(self.relu(self.norm1(self.conv1(x))))
        maps = []
        for number, name in enumerate(self.res_layers):
            for block in getattr(self, name):
                x = checkpoint(block, x, use_reentrant=False) if self.training else block(x)
            if number in self.out_indices:
                maps.append(x)
        return tuple(maps)
