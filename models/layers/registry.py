"""The registry of this project's model parts."""

from __future__ import annotations

from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry


class Models(Registry):
    """Finds this project's parts first, then mmcv's, then those of mmdet3d.

    One part of mmdet3d costs the import of all its models and all of mmdet's, seconds of CPU time. Only a config that
    names such a part (`SeparateHead`, `SparseEncoder`, `mmdet.SwinTransformer`) pays for it.
    """

    def get(self, key: str) -> type | None:
        """The class of a name; None where nobody has registered it."""
        found: type | None = super().get(key)
        if found is not None:
            return found
        from mmdet3d.registry import MODELS as MMDET3D_MODELS  # late: see the class

        other: type | None = MMDET3D_MODELS.get(key)
        return other


MODELS = Models("model", parent=MMENGINE_MODELS)
