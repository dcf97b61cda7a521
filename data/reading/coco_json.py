"""What scoring and drawing know of COCO's JSON and of instances, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from base.errors import PipelineError
from data.reading.classes import CATEGORY_TO_CLASS

RESULTS: Final = "results_coco.json"  # what a segmenter has found, in a folder of predictions


class CocoError(PipelineError, ValueError):
    """A COCO JSON that cannot be used."""


class InstanceArrays(NamedTuple):
    """K instances of one image of H x W pixels, as `data.reading.instances.ImageInstances` has them in tensors."""

    boxes: NDArray[np.float32]  # [K, 4] x0, y0, x1, y1 at the edges of pixels
    labels: NDArray[np.int64]  # [K], positions in CLASSES
    scores: NDArray[np.float32]  # [K]
    masks: NDArray[np.uint8]  # [K, H, W], 0 or 1

    @classmethod
    def of(cls, tensors: Sequence[Any]) -> Self:
        """Of tensors on the CPU, in the same order."""
        return cls(*(np.asarray(tensor) for tensor in tensors))

    def above(self, score: float) -> InstanceArrays:
        """Those with at least a score."""
        keep = self.scores >= score
        return InstanceArrays(self.boxes[keep], self.labels[keep], self.scores[keep], self.masks[keep])


def category_labels(categories: Sequence[dict[str, Any]], classes: Sequence[str | None]) -> dict[int, int]:
    """Positions in `classes` by category id, of the categories that are one of them.

    Raises:
        ValueError: none is.
    """
    known = {name: position for position, name in enumerate(classes) if name is not None}
    labels: dict[int, int] = {}
    for entry in categories:
        for name in (entry["name"], CATEGORY_TO_CLASS.get(entry["name"])):
            if name in known:
                labels.setdefault(int(entry["id"]), known[name])
    if not labels:
        found = ", ".join(entry["name"] for entry in categories) or "none"
        raise ValueError(f"none of its categories ({found}) is one of the classes {', '.join(known)}")
    return labels


def encode_masks(masks: NDArray[Any]) -> list[bytes]:
    """Masks [K, H, W] as the compressed `counts` of COCO's run-length encoding."""
    if not len(masks):
        return []
    columns = np.asfortranarray(masks.astype(np.uint8, copy=False).transpose(1, 2, 0))
    return [rle["counts"] for rle in coco_mask.encode(columns)]


def as_results(image_id: int, found: InstanceArrays) -> list[dict[str, Any]]:
    """Instances in raw pixels in COCO's form of results, fit for JSON."""
    size = list(found.masks.shape[1:])
    rles = encode_masks(found.masks)
    boxes = found.boxes.astype(np.float64)
    boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    return [
        {
            "image_id": image_id,
            "category_id": int(label) + 1,
            "bbox": box.tolist(),
            "segmentation": {"size": size, "counts": rle.decode()},
            "score": float(score),
        }
        for box, label, score, rle in zip(boxes, found.labels.tolist(), found.scores.tolist(), rles, strict=True)
    ]
