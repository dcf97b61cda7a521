"""Operators that fail on maps in channels-last layout.

Image and BEV backbones run in channels-last layout, which is faster. Most of mmcv's operators take the memory of every
map for contiguous: some refuse such a map on a CPU (`DCN`), others compute garbage from it without a word (`DCNv2`,
`RoIAlign`, `RoIAlignRotated`). One of torch's convolutions writes where it must not, see `Pointwise`.
"""

from __future__ import annotations

from typing import Any

from mmcv.ops import DeformConv2dPack, ModulatedDeformConv2dPack
from mmcv.ops import RoIAlign as MmcvRoIAlign
from torch import Tensor, nn
from torch.nn import functional

from models.layers.deformable import FullPrecisionDCN, FullPrecisionDCNv2
from models.layers.roi_align import RoIAlign

# Deformable convolutions of mmcv, which has none for bfloat16 on a CPU, and those that stand in for them.
FULL_PRECISION: dict[type[nn.Module], type[nn.Module]] = {
    DeformConv2dPack: FullPrecisionDCN,
    ModulatedDeformConv2dPack: FullPrecisionDCNv2,
}


AVX2_LANES = 8  # float32 values in a vector of AVX2


class Pointwise(nn.Conv2d):
    """A 1 x 1 convolution with strides, as one without them over the places that it reads.

    On a CPU with AVX2 and without AVX-512, oneDNN's backward pass of a strided one writes behind its buffer if its
    inputs have fewer channels than a vector has lanes: the process ends, or goes on with broken memory (torch 2.13.0).
    This class can go when `tests/models/test_memory_layout.py` passes without it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C', ceil(H / stride), ceil(W / stride)]."""
        rows, columns = self.stride
        return functional.conv2d(x[..., ::rows, ::columns], self.weight, self.bias)

    @staticmethod
    def stands_for(module: nn.Module) -> bool:
        """Whether a module is a convolution that oneDNN fails on."""
        return (
            type(module) is nn.Conv2d
            and module.kernel_size == (1, 1)
            and max(module.stride) > 1
            and module.padding == (0, 0)
            and module.groups == 1
            and module.in_channels < AVX2_LANES
        )


def read_any_layout(model: nn.Module) -> None:
    """Have all operators in a model read maps of any memory layout; weights and their names stay.

    Average RoIAlign is replaced by this project's operator, which reads any layout as it is. Deformable convolutions
    get a forward pass in full precision. The inputs of mmcv's other operators are copied where they are not contiguous.
    Strided pointwise convolutions of few channels become `Pointwise`. Operators that a module calls as a
    function, not as a module, are not seen.

    Args:
        model: is changed in place.
    """
    child: Any  # mmcv has no types
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is MmcvRoIAlign and child.aligned and child.pool_mode == "avg":
                setattr(parent, name, RoIAlign(child.output_size, child.spatial_scale, child.sampling_ratio))
            elif type(child) in FULL_PRECISION:
                child.__class__ = FULL_PRECISION[type(child)]
            elif Pointwise.stands_for(child):
                child.__class__ = Pointwise
            elif type(child).__module__.startswith("mmcv.ops."):
                child.register_forward_pre_hook(_contiguous)


def _contiguous(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.contiguous() if isinstance(value, Tensor) else value for value in inputs)
