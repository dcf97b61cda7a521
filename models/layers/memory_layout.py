"""mmcv's operators on maps in channels-last layout.

Image and BEV backbones run in channels-last layout, which is faster. Most of mmcv's operators take the memory of every
map for contiguous: some refuse such a map on a CPU (``DCN``), others compute garbage from it without a word (``DCNv2``,
``RoIAlign``, ``RoIAlignRotated``).
"""

from __future__ import annotations

from typing import Any

from mmcv.ops import DeformConv2dPack, ModulatedDeformConv2dPack
from mmcv.ops import RoIAlign as MmcvRoIAlign
from torch import Tensor, nn

from models.layers.deformable import FullPrecisionDCN, FullPrecisionDCNv2
from models.layers.roi_align import RoIAlign

FULL_PRECISION: dict[type[nn.Module], type[nn.Module]] = {
    DeformConv2dPack: FullPrecisionDCN,
    ModulatedDeformConv2dPack: FullPrecisionDCNv2,
}
"""Deformable convolutions of mmcv, which has none for bfloat16 on a CPU, and those that stand in for them."""


def read_any_layout(model: nn.Module) -> None:
    """Have all of mmcv's operators in a model read maps of any memory layout; weights and their names stay.

    Average RoIAlign is replaced by this project's operator, which reads any layout as it is. Deformable convolutions
    get a forward pass in full precision. The inputs of every other operator are copied where they are not contiguous.
    Operators that a module calls as a function, not as a module, are not seen.

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
            elif type(child).__module__.startswith("mmcv.ops."):
                child.register_forward_pre_hook(_contiguous)


def _contiguous(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.contiguous() if isinstance(value, Tensor) else value for value in inputs)
