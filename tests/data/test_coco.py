"""Images and instances out of a COCO JSON, against pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from data.reading.blobs import BlobError
from data.reading.classes import CLASSES
from data.reading.coco import CocoInstances, ImageBatch, collate_images
from data.reading.coco_json import CocoError
from data.reading.config import ImageConfig

RAW = (60, 100)
SQUARE = [10.0, 20.0, 40.0, 20.0, 40.0, 50.0, 10.0, 50.0]  # a polygon's corners
CONFIG = ImageConfig(size=(48, 80), resize=(0.9, 1.3), rotate=10.0, flip=0.5)


def disc(x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[: RAW[0], : RAW[1]]
    return (np.hypot(columns - x, rows - y) < radius).astype(np.uint8)


def compressed(mask: np.ndarray) -> dict[str, Any]:
    return {"size": list(RAW), "counts": coco_mask.encode(np.asfortranarray(mask))["counts"].decode()}


def counts(mask: np.ndarray) -> dict[str, Any]:
    flat = np.concatenate([[0], mask.T.reshape(-1), [2]])
    edges = np.flatnonzero(np.diff(flat.astype(int)))
    first = [] if flat[1] == 0 else [0]
    return {"size": list(RAW), "counts": [*first, *np.diff([0, *edges[edges > 0]]).tolist()]}


def content() -> dict[str, Any]:
    """Three images; the first has an instance of every form of segmentation, the last has none."""
    discs = [disc(70, 30, 12), disc(50, 45, 9), disc(30, 55, 10)]
    segmentations = [compressed(discs[0]), counts(discs[1]), [SQUARE], compressed(discs[2]), compressed(discs[0])]
    categories = [(3, "car"), (5, "human.pedestrian.adult"), (7, "animal"), (9, "vehicle.bus.rigid")]
    return {
        "images": [{"id": 10 * n, "file_name": f"cam/{n}.jpg", "height": RAW[0], "width": RAW[1]} for n in (1, 2, 3)],
        "categories": [{"id": number, "name": name} for number, name in categories],
        "annotations": [
            {"id": k, "image_id": image, "category_id": category, "segmentation": segmentation, "iscrowd": crowd}
            for k, (image, category, segmentation, crowd) in enumerate(
                zip((10, 10, 10, 20, 20), (3, 5, 9, 7, 3), segmentations, (0, 0, 0, 0, 1), strict=True)
            )
        ],
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with the JSON and its images, where the instances of the first are white."""
    (tmp_path / "cam").mkdir()
    (tmp_path / "instances.json").write_text(json.dumps(content()))
    for n in (1, 2, 3):
        picture = np.zeros(RAW, np.uint8)
        for item in content()["annotations"]:
            if item["image_id"] == 10 * n == 10:
                picture |= decoded(tmp_path, item["id"])
        cv2.imwrite(str(tmp_path / f"cam/{n}.jpg"), 255 * picture, [cv2.IMWRITE_JPEG_QUALITY, 98])
    return tmp_path


def decoded(root: Path, annotation: int) -> np.ndarray:
    """As pycocotools reads it."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(root / "instances.json"))
    return coco.annToMask(coco.anns[annotation])


def dataset(root: Path, train: bool = False, **changes: Any) -> CocoInstances:
    arguments: dict[str, Any] = {"config": CONFIG, "classes": CLASSES, "seed": 3} | changes
    return CocoInstances(root / "instances.json", root, train=train, **arguments)


def test_masks_are_pycocotools_and_categories_are_the_classes(root: Path) -> None:
    samples = dataset(root, config=CONFIG.model_copy(update={"size": RAW}))
    assert samples.tokens == ["cam/1.jpg", "cam/2.jpg", "cam/3.jpg"]
    first, second, third = (samples[i] for i in range(len(samples)))
    assert [CLASSES[label] for label in first.instances.labels] == ["car", "pedestrian", "bus"]
    assert first.instances.scores.tolist() == [1, 1, 1]
    for mask, annotation in zip(first.instances.masks, (0, 1, 2), strict=True):
        np.testing.assert_array_equal(mask.numpy(), decoded(root, annotation))
    boxes = coco_mask.toBbox(coco_mask.encode(np.asfortranarray(first.instances.masks.numpy().transpose(1, 2, 0))))
    np.testing.assert_array_equal(first.instances.boxes[:, :2], boxes[:, :2])
    np.testing.assert_array_equal(first.instances.boxes[:, 2:], boxes[:, :2] + boxes[:, 2:])
    for sample in (second, third):  # another category, a crowd; nothing
        assert list(sample.instances.masks.shape) == [0, *RAW]
    assert (first.token, first.image_id, first.raw_size) == ("cam/1.jpg", 10, RAW)
    assert torch.equal(first.image_aug, torch.eye(3, dtype=torch.float64))


def test_a_segmenters_own_classes(root: Path) -> None:
    """Labels are positions in its classes; what it has no class for is left out."""
    assert dataset(root, classes=["bus", "car", None])[0].instances.labels.tolist() == [1, 0]
    assert dataset(root, classes=["animal"])[1].instances.labels.tolist() == [0]
    with pytest.raises(CocoError, match=r"none of its categories \(car, .*\) is one of the classes zebra"):
        dataset(root, classes=["zebra", None])


def test_what_has_no_mask_is_left_out(root: Path) -> None:
    changed = content()
    changed["annotations"][0]["segmentation"] = None
    (root / "instances.json").write_text(json.dumps(changed))
    assert [CLASSES[label] for label in dataset(root)[0].instances.labels] == ["pedestrian", "bus"]


def test_training_moves_image_and_instances_alike(root: Path) -> None:
    samples = dataset(root, train=True)
    seen = []
    for epoch in range(12):
        sample = samples[(epoch, 5, 0)]
        shown = sample.image[0].numpy() > 127
        union = sample.instances.masks.numpy().any(0)
        dropped = len(sample.instances.masks) < 3
        assert (union & shown).sum() > 0.93 * (union.sum() if dropped else (union | shown).sum())
        for box, mask in zip(sample.instances.boxes, sample.instances.masks.numpy(), strict=True):
            rows, columns = np.nonzero(mask)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert len(rows) >= 8
        seen.append(sample.image_aug)
    assert len({tuple(matrix.flatten().tolist()) for matrix in seen}) == 12
    assert {bool(matrix[0, 0] < 0) for matrix in seen} == {True, False}  # mirrored or not


def test_a_sample_depends_on_seed_and_key_only(root: Path) -> None:
    first, again = dataset(root, train=True), dataset(root, train=True)
    again[(0, 1, 2)]
    for part, other in zip(first[(2, 7, 0)].instances, again[(2, 7, 0)].instances, strict=True):
        assert torch.equal(part, other)
    assert torch.equal(first[(2, 7, 0)].image, again[(2, 7, 0)].image)
    assert not torch.equal(first[(2, 7, 0)].image_aug, dataset(root, train=True, seed=4)[(2, 7, 0)].image_aug)
    assert torch.equal(dataset(root)[(2, 7, 0)].image_aug, dataset(root, seed=4)[0].image_aug)


def check_batch(batch: ImageBatch, samples: CocoInstances) -> None:
    assert batch.tokens == ["cam/1.jpg", "cam/3.jpg", "cam/1.jpg"]
    assert batch.image_ids == [10, 30, 10]
    assert (len(batch), batch.raw_sizes) == (3, [RAW] * 3)
    assert (batch.images.dtype, list(batch.images.shape)) == (torch.uint8, [3, 3, 48, 80])
    for k, key in enumerate([(0, 0, 0), (0, 1, 2), (0, 2, 0)]):
        expected = samples[key]
        assert torch.equal(batch.images[k], expected.image)
        assert torch.equal(batch.image_aug[k], expected.image_aug)
        assert all(map(torch.equal, batch.instances[k], expected.instances))


@pytest.mark.parametrize("workers", [0, 1])
def test_batches(root: Path, workers: int) -> None:
    samples = dataset(root, train=True)
    keys = [(0, 0, 0), (0, 1, 2), (0, 2, 0)]
    loader: Any = torch.utils.data.DataLoader(samples, 3, sampler=keys, collate_fn=collate_images, num_workers=workers)  # type: ignore[arg-type]
    batch = next(iter(loader))
    check_batch(batch, samples)
    check_batch(batch.to("cpu"), samples)
    away = batch.to("meta")
    assert {part.device.type for image in away.instances for part in image} == {away.images.device.type} == {"meta"}


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda c: c.pop(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("annotations"), "no COCO JSON of instances: it lacks 'annotations'"),
        (lambda c: c["images"][0].pop("file_name"), "it lacks 'file_name'"),
        (lambda c: c["images"].clear(), "it has no images"),
        (lambda c: c["images"][0].update(file_name="../../secret.jpg"), "leaves the folder"),
        (lambda c: c["images"][0].update(file_name="/secret.jpg"), "leaves the folder"),
        (lambda c: c["annotations"][0].update(image_id=99), "annotation 0 is of image 99"),
        (lambda c: c["annotations"][0]["segmentation"].update(size=[100, 60]), r"annotation 0 of cam/1.jpg: a mask of"),
        (lambda c: c["annotations"][0]["segmentation"].update(counts="3"), "annotation 0 .* does not cover 60 x 100"),
        (lambda c: c["annotations"][0]["segmentation"].update(counts="P"), "annotation 0 .* no run-length encoding"),
        (lambda c: c["annotations"][1]["segmentation"].update(counts=[1, 2]), "annotation 1 .* does not cover"),
        (lambda c: c["annotations"][1]["segmentation"].update(counts=[6001, -1]), "annotation 1 .* does not cover"),
        (lambda c: c["annotations"][2].update(segmentation=[]), "annotation 2 .* no polygon"),
        (lambda c: c["annotations"][2].update(segmentation=[[0, 0, 1, 1]]), "fewer than three corners"),
        (lambda c: c["annotations"][2].pop("segmentation"), "it lacks 'segmentation'"),
        (lambda c: c["annotations"][2].update(segmentation=7), "instances.json: .*'int'"),
    ],
)
def test_what_cannot_be_used_is_named(root: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    changed = content()
    change(changed)
    (root / "instances.json").write_text(json.dumps(changed))
    with pytest.raises(CocoError, match=message) as raised:
        dataset(root)
    assert "instances.json" in str(raised.value)


def test_missing_or_broken_files_are_named(root: Path) -> None:
    with pytest.raises(CocoError, match=r"none\.json cannot be read .* data\.instances"):
        CocoInstances(root / "none.json", root, CONFIG, CLASSES, train=False)
    (root / "broken.json").write_text("{")
    with pytest.raises(CocoError, match=r"broken\.json"):
        CocoInstances(root / "broken.json", root, CONFIG, CLASSES, train=False)
    (root / "cam/2.jpg").unlink()
    with pytest.raises(BlobError, match=r"2\.jpg is missing"):
        dataset(root)[1]
    cv2.imwrite(str(root / "cam/3.jpg"), np.zeros((30, 50), np.uint8))
    with pytest.raises(BlobError, match="is not the 100x60 image"):
        dataset(root)[2]
