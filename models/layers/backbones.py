"""ResNets for images and for BEV maps, and SECOND's blocks.

`ResNet` and `SECOND` are those of mmdet and mmdet3d, with the same arguments, weights and draws, as far as detectors of
this project use them: either package imports everything it has for one of them (see models.layers.registry).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmcv.cnn import build_conv_layer, build_norm_layer
from mmengine.model import BaseModule, Sequential
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from models.layers.registry import MODELS

Config = dict[str, Any]


class BasicBlock(BaseModule):
    """Two 3x3 convolutions and the way around them.

    Args:
        in_channels: channels of the input.
        channels: width; the output has `expansion` times as many.
        stride: of the first 3x3 convolution.
        dilation: of the first 3x3 convolution.
        downsample: what brings the input to the shape of the output.
        norm_cfg: config of the normalisation.
        dcn: config of a deformable convolution; only bottlenecks have one.
        init_cfg: of the weights.
    """

    expansion = 1
    last_norm = "bn2"

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        dilation: int = 1,
        downsample: nn.Module | None = None,
        norm_cfg: Config | None = None,
        dcn: Config | None = None,
        init_cfg: Config | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if dcn is not None:
            raise ValueError("ResNet dcn: depth 18 and 34 have no deformable convolutions, use depth 50 or more")
        self.conv1 = conv(in_channels, channels, 3, stride, dilation)
        self.bn1 = norm(norm_cfg, channels)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = norm(norm_cfg, channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] of a map [B, in_channels, H, W]."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(BaseModule):
    """A 3x3 convolution between two of 1x1, and the way around them; arguments as of `BasicBlock`."""

    expansion = 4
    last_norm = "bn3"

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        dilation: int = 1,
        downsample: nn.Module | None = None,
        norm_cfg: Config | None = None,
        dcn: Config | None = None,
        init_cfg: Config | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.conv1 = conv(in_channels, channels, 1)
        self.bn1 = norm(norm_cfg, channels)
        self.conv2 = conv(channels, channels, 3, stride, dilation, dcn)
        self.bn2 = norm(norm_cfg, channels)
        self.conv3 = conv(channels, channels * self.expansion, 1)
        self.bn3 = norm(norm_cfg, channels * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """[B, 4 C, h, w] of a map [B, in_channels, H, W]."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def conv(
    in_channels: int, out_channels: int, size: int, stride: int = 1, dilation: int = 1, config: Config | None = None
) -> nn.Module:
    """A convolution that keeps the map's size, but for its stride; without bias, as a normalisation follows."""
    padding = dilation * (size // 2)
    return build_conv_layer(
        config, in_channels, out_channels, size, stride=stride, padding=padding, dilation=dilation, bias=False
    )


def norm(config: Config | None, channels: int) -> nn.Module:
    """The batch norm of a config; None is the plain one.

    Raises:
        ValueError: it is another kind of normalisation, whose weights have other names.
    """
    name, layer = build_norm_layer(config or {"type": "BN"}, channels)
    if name != "bn":
        raise ValueError(f"ResNet norm_cfg {config}: use BN or SyncBN, or mmdet.ResNet for other normalisations")
    return layer


def residual_stage(
    block: type[BasicBlock | Bottleneck], in_channels: int, channels: int, blocks: int, stride: int, **config: Any
) -> Sequential:
    """Blocks one after the other, the first of which has the stride; `config` goes to each."""
    width = channels * block.expansion
    downsample = None
    if stride != 1 or in_channels != width:
        downsample = nn.Sequential(conv(in_channels, width, 1, stride), norm(config.get("norm_cfg"), width))
    first = block(in_channels, channels, stride, downsample=downsample, **config)
    return Sequential(first, *(block(width, channels, **config) for _ in range(1, blocks)))


@MODELS.register_module()
class ResNet(BaseModule):
    """He et al., "Deep Residual Learning for Image Recognition", CVPR 2016; the stride is in the 3x3 convolution.

    Args:
        depth: 18, 34, 50, 101 or 152.
        in_channels: channels of the input.
        base_channels: width of the first stage; each one after it is twice as wide.
        num_stages: stages, at most 4.
        strides: of each stage.
        dilations: of each stage.
        out_indices: stages whose outputs are returned, from 0.
        frozen_stages: -1 trains everything, 0 all but the stem, n all but the stem and the first n stages.
        norm_cfg: config of the normalisation; with `requires_grad: false` its weights stay.
        norm_eval: batch norms use and keep their averages in training, too: for pretrained weights.
        dcn: config of the deformable convolution that replaces the 3x3 ones of bottlenecks; `fallback_on_stride`
            true keeps the plain one.
        stage_with_dcn: stages that have them.
        init_cfg: of the weights; default: Kaiming, blocks that start as the identity.

    Raises:
        ValueError: naming the argument that does not fit the others.
    """

    BLOCKS: dict[int, tuple[type[BasicBlock | Bottleneck], tuple[int, ...]]] = {  # noqa: RUF012 (never changed)
        18: (BasicBlock, (2, 2, 2, 2)),
        34: (BasicBlock, (3, 4, 6, 3)),
        50: (Bottleneck, (3, 4, 6, 3)),
        101: (Bottleneck, (3, 4, 23, 3)),
        152: (Bottleneck, (3, 8, 36, 3)),
    }

    def __init__(
        self,
        depth: int,
        in_channels: int = 3,
        base_channels: int = 64,
        num_stages: int = 4,
        strides: Sequence[int] = (1, 2, 2, 2),
        dilations: Sequence[int] = (1, 1, 1, 1),
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_cfg: Config | None = None,
        norm_eval: bool = True,
        dcn: Config | None = None,
        stage_with_dcn: Sequence[bool] = (False, False, False, False),
        init_cfg: Config | list[Config] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if depth not in self.BLOCKS:
            raise ValueError(f"ResNet depth {depth}: use {', '.join(map(str, self.BLOCKS))}")
        if not num_stages == len(strides) == len(dilations) or max(out_indices) >= num_stages:
            raise ValueError(
                f"ResNet num_stages {num_stages}, strides {list(strides)}, dilations {list(dilations)}, "
                f"out_indices {list(out_indices)}: give one stride and dilation per stage, and stages"
            )
        block, counts = self.BLOCKS[depth]
        block_init = None
        if init_cfg is None:
            self.init_cfg = [
                {"type": "Kaiming", "layer": "Conv2d"},
                {"type": "Constant", "val": 1, "layer": ["_BatchNorm", "GroupNorm"]},
            ]
            block_init = {"type": "Constant", "val": 0, "override": {"name": block.last_norm}}
        self.depth, self.out_indices = depth, tuple(out_indices)
        self.frozen_stages, self.norm_eval = frozen_stages, norm_eval
        self.conv1 = build_conv_layer(None, in_channels, base_channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(norm_cfg, base_channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        deformable = without_fallback(dcn)
        self.res_layers = [f"layer{i + 1}" for i in range(num_stages)]
        width = base_channels
        for i, name in enumerate(self.res_layers):
            channels = base_channels * 2**i
            self.add_module(
                name,
                residual_stage(
                    block,
                    width,
                    channels,
                    counts[i],
                    strides[i],
                    dilation=dilations[i],
                    norm_cfg=norm_cfg,
                    dcn=deformable if stage_with_dcn[i] else None,
                    init_cfg=block_init,
                ),
            )
            width = channels * block.expansion
        self._freeze()

    def stem(self, x: Tensor) -> Tensor:
        """The map before max-pooling, at half the size."""
        return self.relu(self.bn1(self.conv1(x)))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Outputs of the stages `out_indices` for maps [B, in_channels, H, W]."""
        x = self.maxpool(self.stem(x))
        maps = []
        for number, name in enumerate(self.res_layers):
            x = getattr(self, name)(x)
            if number in self.out_indices:
                maps.append(x)
        return tuple(maps)

    def train(self, mode: bool = True) -> ResNet:
        """Training mode, in which what is frozen stays as in evaluation."""
        super().train(mode)
        self._freeze()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _freeze(self) -> None:
        frozen = [self.conv1, self.bn1] if self.frozen_stages >= 0 else []
        frozen += [getattr(self, name) for name in self.res_layers[: max(self.frozen_stages, 0)]]
        for module in frozen:
            module.eval().requires_grad_(False)


def without_fallback(dcn: Config | None) -> Config | None:
    """mmdet's config of deformable convolutions as the layer takes it; None where plain ones stay."""
    if dcn is None or dcn.get("fallback_on_stride"):
        return None
    return {key: value for key, value in dcn.items() if key != "fallback_on_stride"}


@MODELS.register_module()
class SECOND(BaseModule):
    """Plain convolutions on a BEV map, stage after stage. Yan et al., "SECOND", Sensors 2018.

    Args:
        in_channels: channels of the map.
        out_channels: of each stage.
        layer_nums: convolutions of each stage after its first.
        layer_strides: of each stage's first convolution.
        norm_cfg: config of the normalisation.
    """

    def __init__(
        self,
        in_channels: int = 128,
        out_channels: Sequence[int] = (128, 128, 256),
        layer_nums: Sequence[int] = (3, 5, 5),
        layer_strides: Sequence[int] = (2, 2, 2),
        norm_cfg: Config | None = None,
    ) -> None:
        super().__init__(init_cfg={"type": "Kaiming", "layer": "Conv2d"})
        if not len(out_channels) == len(layer_nums) == len(layer_strides):
            raise ValueError(
                f"SECOND out_channels {list(out_channels)}, layer_nums {list(layer_nums)}, layer_strides "
                f"{list(layer_strides)}: give one of each per stage"
            )
        norm_cfg = norm_cfg or {"type": "BN", "eps": 1e-3, "momentum": 0.01}
        self.blocks = nn.ModuleList()
        before = in_channels
        for channels, more, stride in zip(out_channels, layer_nums, layer_strides, strict=True):
            layers: list[nn.Module] = []
            for step in (stride, *[1] * more):
                layers += [conv(before, channels, 3, step), build_norm_layer(norm_cfg, channels)[1]]
                layers.append(nn.ReLU(inplace=True))
                before = channels
            self.blocks.append(nn.Sequential(*layers))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of all stages for a map [B, in_channels, H, W]."""
        maps = []
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        return tuple(maps)


@MODELS.register_module()
class BEVResNet(ResNet):
    """A ResNet on a BEV map: no max-pool, and the map itself is the first output.

    The stem halves the map, so stages with strides 1, 2, 2 end on a half, a quarter and an eighth of it; the neck
    brings all four back to the grid. Takes ResNet's arguments, with those of BEVDepth's released code as defaults.
    """

    def __init__(self, in_channels: int, depth: int = 18, base_channels: int = 160, **config: Any) -> None:
        stages: Config = {"num_stages": 3, "strides": (1, 2, 2), "dilations": (1, 1, 1), "out_indices": (0, 1, 2)}
        super().__init__(
            depth, in_channels=in_channels, base_channels=base_channels, norm_eval=False, **stages | config
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The map [B, in_channels, H, W] and the outputs of the stages."""
        maps = [x]
        x = self.stem(x)
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
            raise ValueError(
                f"StagedResNet channels {channels}, strides {strides}, blocks {blocks}: give one of each per stage"
            )
        before = [in_channels, *channels[:-1]]
        self.stages = nn.ModuleList(
            residual_stage(BasicBlock, *stage) for stage in zip(before, channels, blocks, strides, strict=True)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of all stages for a map [B, in_channels, H, W]."""
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return tuple(maps)


@MODELS.register_module()
class RecomputedResNet(ResNet):
    """A ResNet, of which the backward pass knows only the inputs of blocks and computes the rest again.

    mmdet's own `with_cp` does so by torch's reentrant checkpoints, which fail under DDP where parameters may be
    unused. Batch norms count a step's statistics twice; losses and gradients are those of the plain ResNet.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Outputs of the stages `out_indices` for images [B, 3, H, W]."""
        x = self.maxpool(self.stem(x))
        maps = []
        for number, name in enumerate(self.res_layers):
            for block in getattr(self, name):
                x = checkpoint(block, x, use_reentrant=False) if self.training else block(x)
            if number in self.out_indices:
                maps.append(x)
        return tuple(maps)
