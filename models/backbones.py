"""ResNets that mmdet does not have: BEVDepth's on a BEV map, and one for images that do not fit into memory."""

from __future__ import annotations

from typing import Any

from mmdet.models.backbones import ResNet
from mmdet3d.registry import MODELS
from torch import Tensor
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
