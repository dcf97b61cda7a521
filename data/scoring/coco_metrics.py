"""Average precision of 2D instances as COCO defines it, by pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data.reading.classes import CLASSES
from data.reading.coco_json import CocoError, InstanceArrays, category_labels

# Our word -> pycocotools' word, and what of a result it does not look at: else a mask would have the area of its box.
KINDS: Final = {"bbox": ("bbox", "segmentation"), "mask": ("segm", "bbox")}
# COCOeval.stats by position. Small, medium and large: area of the truth below 32^2, below 96^2, above, in raw pixels.
SUMMARY: Final = {"AP": 0, "AP50": 1, "AP75": 2, "AP_small": 3, "AP_medium": 4, "AP_large": 5, "AR": 8}


class InstanceTruth:
    """The annotations of a COCO JSON, their categories taken together to the ten detection classes."""

    def __init__(self, file: Path) -> None:
        """Read a JSON.

        Raises:
            CocoError: it is absent, no COCO JSON, or has no category that is a detection class.
        """
        try:
            content = json.loads(file.read_bytes())
            labels = category_labels(content["categories"], CLASSES)
            kept = [entry for entry in content["annotations"] if entry["category_id"] in labels]
        except OSError as error:
            raise CocoError(f"{file} cannot be read ({error.strerror}): see data.instances in params.yaml") from error
        except KeyError as error:
            raise CocoError(f"{file} is no COCO JSON of instances: it lacks {error}") from error
        except (TypeError, ValueError) as error:
            raise CocoError(f"{file}: {error}") from error
        annotations = [entry | {"category_id": labels[entry["category_id"]] + 1} for entry in kept]
        categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, 1)]
        self.coco = _coco({"images": content["images"], "annotations": annotations, "categories": categories})

    @property
    def images(self) -> dict[int, str]:
        """Id -> name of the file, in the order of the JSON."""
        return {entry["id"]: entry["file_name"] for entry in self.coco.dataset["images"]}

    def of(self, image_id: int) -> InstanceArrays:
        """The annotations of an image, to be drawn; crowds left out."""
        entries = [entry for entry in self.coco.imgToAnns[image_id] if not entry.get("iscrowd")]
        image = self.coco.imgs[image_id]
        boxes = np.array([entry["bbox"] for entry in entries], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = np.zeros((len(entries), image["height"], image["width"]), np.uint8)
        for mask, entry in zip(masks, entries, strict=True):
            mask[:] = self.coco.annToMask(entry)
        labels = np.array([entry["category_id"] - 1 for entry in entries], np.int64)
        return InstanceArrays(boxes, labels, np.ones(len(entries), np.float32), masks)

    def found(self, image_id: int, results: Iterable[Mapping[str, Any]]) -> InstanceArrays:
        """Those of `results` that are of an image, to be drawn."""
        own = [entry for entry in results if entry["image_id"] == image_id]
        image = self.coco.imgs[image_id]
        boxes = np.array([entry["bbox"] for entry in own], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = np.zeros((len(own), image["height"], image["width"]), np.uint8)
        for mask, entry in zip(masks, own, strict=True):
            mask[:] = coco_mask.decode(entry["segmentation"])
        labels = np.array([entry["category_id"] - 1 for entry in own], np.int64)
        return InstanceArrays(boxes, labels, np.array([entry["score"] for entry in own], np.float32), masks)

    def score(self, results: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """COCO's metrics of `results` over all images of the JSON.

        Returns:
            `bbox` and `mask`: the keys of SUMMARY. `classes`: by class the number of annotations as `truth`,
            and again `bbox` and `mask` with AP and AP50. What has no truth is None and counts in no mean.
        """
        found = list(results)
        evaluations = {kind: self._evaluate(found, *words) for kind, words in KINDS.items()}
        scores: dict[str, Any] = {
            kind: {name: _defined(evaluation.stats[position]) for name, position in SUMMARY.items()}
            for kind, evaluation in evaluations.items()
        }
        scores["classes"] = {
            name: {"truth": len(self.coco.catToImgs[number])}
            | {kind: _of_class(evaluation, number - 1) for kind, evaluation in evaluations.items()}
            for number, name in enumerate(CLASSES, 1)
        }
        return scores

    def _evaluate(self, results: Sequence[Mapping[str, Any]], kind: str, unread: str) -> COCOeval:
        given = [{name: value for name, value in result.items() if name != unread} for result in results]
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
            nothing = _coco({**self.coco.dataset, "annotations": []})  # it cannot read an empty list
            evaluation = COCOeval(self.coco, self.coco.loadRes(given) if given else nothing, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return evaluation


def _coco(content: Mapping[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = dict(content)
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _of_class(evaluation: COCOeval, position: int) -> dict[str, float | None]:
    """AP and AP50 of a class, over all areas and up to 100 results per image."""
    precision = evaluation.eval["precision"][:, :, position, 0, -1]  # [IoU, recall]
    return {"AP": _mean(precision), "AP50": _mean(precision[0])}


def _mean(precision: np.ndarray) -> float | None:
    there = precision[precision > -1]
    return float(there.mean()) if there.size else None


def _defined(value: float) -> float | None:
    """COCO's -1 means that there is no truth."""
    return None if value < 0 else float(value)
