"""COCO's metrics of instances: pycocotools on the untouched JSON, and mmdet's metric, as oracles."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmdet.evaluation.metrics import CocoMetric
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data.reading.classes import CLASSES
from data.reading.coco_json import CocoError, InstanceArrays, as_results, encode_masks
from data.scoring.coco_metrics import SUMMARY, InstanceTruth


@pytest.fixture
def file(city: Path) -> Path:
    return city / "instances/val.json"


def noisy(truth: InstanceArrays, rng: np.random.Generator) -> InstanceArrays:
    """The truth with scores, some of it lost, doubled, moved by a few pixels, or of another class."""
    rows = np.flatnonzero(rng.uniform(size=len(truth.boxes)) < 0.8)
    rows = np.concatenate([rows, rows[rng.uniform(size=len(rows)) < 0.3]])
    moved = rng.integers(-2, 3, (len(rows), 2))
    masks = [np.roll(truth.masks[row], move, (1, 0)) for row, move in zip(rows, moved, strict=True)]
    others = rng.integers(0, len(CLASSES), len(rows))
    labels = np.where(rng.uniform(size=len(rows)) < 0.2, others, truth.labels[rows])
    boxes = (truth.boxes[rows] + np.tile(moved, 2)).astype(np.float32)
    scores = rng.uniform(0.05, 1.0, len(rows)).astype(np.float32)
    return InstanceArrays(boxes, labels, scores, np.stack(masks) if masks else truth.masks[:0])


def guesses(truth: InstanceTruth, seed: int = 0) -> dict[int, InstanceArrays]:
    rng = np.random.default_rng(seed)
    return {image: noisy(truth.of(image), rng) for image in truth.coco.imgs}


def results_of(found: dict[int, InstanceArrays]) -> list[dict[str, Any]]:
    return [result for image, instances in found.items() for result in as_results(image, instances)]


def oracle(file: Path, results: list[dict[str, Any]], kind: str) -> np.ndarray:
    """COCOeval.stats on the file as it is; the city numbers the ten classes as we do."""
    unread = {"bbox": "segmentation", "segm": "bbox"}[kind]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(file))
        assert [coco.cats[n]["name"] for n in sorted(coco.cats)] == list(CLASSES)
        given = [{name: value for name, value in result.items() if name != unread} for result in results]
        evaluation = COCOeval(coco, coco.loadRes(given), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def test_every_number_is_cocos(file: Path) -> None:
    truth = InstanceTruth(file)
    results = results_of(guesses(truth))
    scores = truth.score(results)
    assert 0.05 < scores["mask"]["AP"] < scores["bbox"]["AP"] < 0.9
    for ours, theirs in (("bbox", "bbox"), ("mask", "segm")):
        stats = oracle(file, results, theirs)
        assert scores[ours].keys() == SUMMARY.keys()
        for name, position in SUMMARY.items():
            assert scores[ours][name] == (pytest.approx(stats[position], abs=1e-12) if stats[position] >= 0 else None)
        per_class = [values[ours]["AP"] for values in scores["classes"].values() if values["truth"]]
        assert np.mean(per_class) == pytest.approx(scores[ours]["AP"], abs=1e-12)


def test_mmdet_scores_the_same(file: Path) -> None:
    truth = InstanceTruth(file)
    found = guesses(truth, 1)
    metric = CocoMetric(ann_file=str(file), metric=["bbox", "segm"], format_only=False)
    metric.dataset_meta = {"classes": CLASSES}
    for image, instances in found.items():
        size = list(instances.masks.shape[1:])
        masks = [{"size": size, "counts": rle} for rle in encode_masks(instances.masks)]
        boxes, labels, scores = map(torch.from_numpy, instances[:3])
        predicted = {"bboxes": boxes, "labels": labels, "scores": scores, "masks": masks}
        metric.process({}, [{"img_id": image, "pred_instances": predicted, "ori_shape": size}])
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = metric.evaluate(len(found))
    ours = truth.score(results_of(found))
    for kind, word in (("bbox", "bbox"), ("mask", "segm")):
        for name, suffix in (("AP", "mAP"), ("AP50", "mAP_50"), ("AP75", "mAP_75"), ("AP_small", "mAP_s")):
            assert ours[kind][name] == pytest.approx(theirs[f"coco/{word}_{suffix}"], abs=1e-3)  # it rounds


def test_the_truth_scores_one_and_nothing_scores_zero(file: Path) -> None:
    truth = InstanceTruth(file)
    scores = truth.score(results_of({image: truth.of(image) for image in truth.coco.imgs}))
    assert [scores[kind]["AP"] for kind in ("bbox", "mask")] == pytest.approx([1.0, 1.0], abs=1e-9)
    absent = [name for name, values in scores["classes"].items() if not values["truth"]]
    assert all(scores["classes"][name]["mask"] == {"AP": None, "AP50": None} for name in absent)
    assert json.dumps(scores, allow_nan=False)
    nothing = truth.score([])
    assert (nothing["bbox"]["AP"], nothing["mask"]["AP50"]) == (0.0, 0.0)


def test_nuscenes_categories_count_as_their_classes(file: Path, tmp_path: Path) -> None:
    """As nuImages writes them: in another order, two kinds of people, and what is no detection class."""
    truth = InstanceTruth(file)
    results = results_of(guesses(truth))
    content = json.loads(file.read_text())
    names = {"car": "vehicle.car", "traffic_cone": "movable_object.trafficcone", "pedestrian": "human.pedestrian.adult"}
    for entry in content["categories"]:
        entry["name"] = names.get(entry["name"], entry["name"])
        entry["id"] = 50 - entry["id"]
    content["categories"] += [{"id": 90, "name": "human.pedestrian.child"}, {"id": 91, "name": "animal"}]
    for number, entry in enumerate(content["annotations"]):
        entry["category_id"] = 50 - entry["category_id"]
        if entry["category_id"] == 41 and number % 2:
            entry["category_id"] = 90
    content["annotations"].append(content["annotations"][0] | {"id": 10**6, "category_id": 91})
    (tmp_path / "other.json").write_text(json.dumps(content))
    assert InstanceTruth(tmp_path / "other.json").score(results) == truth.score(results)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "Expecting property name"),
        ("{}", "it lacks 'categories'"),
        ('{"categories": [{"id": 1, "name": "tree"}], "annotations": []}', "none of its categories"),
    ],
)
def test_what_is_no_coco_json_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    with pytest.raises(CocoError, match=message):
        InstanceTruth(tmp_path / "a.json")
