from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nuscenes.eval.common.config import config_factory
from nuscenes.eval.detection.evaluate import DetectionEval

from data.preparing.build import build_index
from data.reading.index import Index
from data.scoring.devkit import evaluate_submission, open_tables
from data.scoring.evaluation import MetricsError
from data.scoring.submission import SampleDetections, SubmissionError, build_submission, write_submission


def truth(index: Index, split: str) -> dict[str, SampleDetections]:
    """The annotations that the devkit scores, as if detected. A velocity that is unknown is not scored."""
    detections = {}
    for row in index.rows(split):
        record = index.sample(int(row))
        valid = record.annotations.valid
        boxes = np.nan_to_num(record.annotations.boxes[valid], nan=0.0)
        detections[record.token] = SampleDetections(boxes, np.ones(len(boxes)), record.annotations.labels[valid])
    return detections


def evaluate(nusc: Any, split: str, submission: dict[str, Any], folder: Path) -> Any:
    write_submission(submission, folder / "submission.json")
    config = config_factory("detection_cvpr_2019")
    judge = DetectionEval(nusc, config, str(folder / "submission.json"), split, str(folder / "out"), verbose=False)
    return judge, judge.evaluate()[0]


def check_truth(index: Index, nusc: Any, split: str, folder: Path, *, angle: float) -> None:
    judge, metrics = evaluate(nusc, split, build_submission(truth(index, split), index, split, ["lidar"]), folder)
    present = {box.detection_name for box in judge.gt_boxes.all}
    assert present
    for name in present:
        assert metrics.mean_dist_aps[name] == pytest.approx(1.0, abs=1e-9), name
        errors = {key: metrics.get_label_tp(name, key) for key in ("trans_err", "scale_err", "orient_err", "vel_err")}
        assert errors["trans_err"] < 1e-6
        assert errors["scale_err"] < 1e-6
        assert np.isnan(errors["orient_err"]) or errors["orient_err"] < angle
    known = [box for box in judge.gt_boxes.all if not np.isnan(box.velocity).any()]
    for box in known:
        error = min(
            np.linalg.norm(np.subtract(box.velocity, other.velocity))
            for other in judge.pred_boxes[box.sample_token]
            if np.allclose(other.translation, box.translation, atol=1e-6)
        )
        assert error < 1e-6


def test_ground_truth_scores_perfectly(made_index: Index, devkit: Any, tmp_path: Path) -> None:
    for split in ("mini_train", "mini_val"):
        check_truth(made_index, devkit, split, tmp_path, angle=1e-6)


def test_ground_truth_of_the_city_scores_perfectly(city_index: Index, city_devkit: Any, tmp_path: Path) -> None:
    check_truth(city_index, city_devkit, "val", tmp_path, angle=1e-6)


def test_real_ground_truth_scores_perfectly(real_index: Index, real_devkit: Any, tmp_path: Path) -> None:
    # The real keyframes were published with boxes upright in the LiDAR frame; nuScenes has them upright in the global
    # frame, which is what a submission assumes. The tilt of 2 degrees makes the angle differ in the second order.
    for split in ("mini_train", "mini_val"):
        check_truth(real_index, real_devkit, split, tmp_path, angle=1e-3)


def test_a_skipped_sample_is_submitted_empty(
    made_dataroot: Path, made_index: Index, devkit: Any, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(made_dataroot, tmp_path / "dataroot"))
    record = made_index.sample(1)
    (copy / record.cameras.files[0]).unlink()
    build_index(copy, "v1.0-mini", ["mini_train"], tmp_path / "index", skip_broken=1)
    index = Index.open(tmp_path / "index")
    submission = build_submission(truth(index, "mini_train"), index, "mini_train", ["camera"])
    assert submission["results"][record.token] == []
    assert set(submission["results"]) == set(made_index.tokens("mini_train"))
    _, metrics = evaluate(devkit, "mini_train", submission, tmp_path)
    assert 0 < metrics.mean_ap < 1


def noisy(index: Index, split: str) -> dict[str, SampleDetections]:
    """The truth three times over, moved, with made-up scores."""
    rng = np.random.default_rng(0)
    detections = {}
    for token, found in truth(index, split).items():
        boxes, labels = np.repeat(found.boxes, 3, axis=0), np.repeat(found.labels, 3)
        boxes[:, :2] += rng.normal(0, 1, (len(boxes), 2))
        boxes[:, 6:] += rng.normal(0, 0.5, (len(boxes), 3))
        detections[token] = SampleDetections(boxes, rng.uniform(size=len(boxes)), labels)
    return detections


@pytest.mark.parametrize(("split", "scene"), [("val[:1]", 0), ("val[-1:]", 1)])
def test_a_part_scores_as_the_devkits_custom_split_of_its_scenes(
    city: Path, city_index: Index, split: str, scene: int, tmp_path: Path
) -> None:
    for folder in ("v1.0-trainval", "maps"):
        shutil.copytree(city / folder, tmp_path / folder)
    custom = {"some_scenes": [city_index.scenes("val")[scene]]}
    (tmp_path / "v1.0-trainval/splits.json").write_text(json.dumps(custom))
    nusc = open_tables(tmp_path, "v1.0-trainval")
    submission = build_submission(noisy(city_index, split), city_index, split, ["camera"])
    judge, expected = evaluate(nusc, "some_scenes", submission, tmp_path)
    evaluation = evaluate_submission(nusc, tmp_path / "submission.json", split)
    assert 0 < evaluation.metrics["mean_ap"] < 0.9
    assert {**evaluation.metrics, "eval_time": 0} == {**expected.serialize(), "eval_time": 0}
    assert evaluation.samples == len(judge.sample_tokens) == 2
    whole = build_submission(noisy(city_index, "val"), city_index, "val", ["camera"])
    write_submission(whole, tmp_path / "whole.json")
    with pytest.raises(MetricsError, match=r"split 'val\[.*\]' of 2 keyframes: 0 missing, 2 of other splits"):
        evaluate_submission(nusc, tmp_path / "whole.json", split)
    with pytest.raises(MetricsError, match=r"'val\[2:\]' has no scene: 'val' has 2"):
        evaluate_submission(nusc, tmp_path / "whole.json", "val[2:]")


def test_the_best_500_are_kept_and_tensors_are_taken(made_index: Index) -> None:
    detections = truth(made_index, "mini_val")
    token = made_index.tokens("mini_val")[0]
    rng = np.random.default_rng(0)
    boxes = torch.from_numpy(rng.uniform(1, 5, (700, 9))).float()
    scores = torch.from_numpy(rng.permutation(700) / 700)
    detections[token] = SampleDetections(boxes, scores, torch.zeros(700, dtype=torch.int64))
    submission = build_submission(detections, made_index, "mini_val", ["camera", "radar"])
    kept = [entry["detection_score"] for entry in submission["results"][token]]
    assert kept == sorted(scores.tolist(), reverse=True)[:500]
    assert submission["meta"] == {
        "use_camera": True,
        "use_lidar": False,
        "use_radar": True,
        "use_map": False,
        "use_external": False,
    }
    json.dumps(submission, allow_nan=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": np.full((1, 9), np.nan)}, "1 of 1 detections are not finite"),
        ({"scores": np.array([np.inf])}, "not finite"),
        ({"boxes": np.ones((1, 7))}, r"boxes \(1, 7\)"),
        ({"boxes": -np.ones((1, 9))}, "sizes must be positive"),
        ({"labels": np.array([10])}, "labels 10 to 10"),
        ({"scores": np.ones(2)}, r"scores \(2,\)"),
    ],
)
def test_what_the_devkit_would_refuse_is_named(made_index: Index, change: dict[str, Any], message: str) -> None:
    detections = truth(made_index, "mini_val")
    token = made_index.tokens("mini_val")[1]
    fine = SampleDetections(np.ones((1, 9)), np.ones(1), np.zeros(1, np.int64))
    with pytest.raises(SubmissionError, match=rf"{token}: .*{message}"):
        build_submission(detections | {token: replace(fine, **change)}, made_index, "mini_val", ["camera"])


def test_missing_and_foreign_samples_are_named(made_index: Index) -> None:
    detections = truth(made_index, "mini_val")
    token = made_index.tokens("mini_val")[0]
    with pytest.raises(SubmissionError, match=f"2 samples: 1 have none, 0 .*{token}"):
        build_submission(
            {key: detections[key] for key in detections if key != token}, made_index, "mini_val", ["lidar"]
        )
    with pytest.raises(SubmissionError, match="0 have none, 1 belong elsewhere, such as other"):
        build_submission(detections | {"other": detections[token]}, made_index, "mini_val", ["lidar"])
    with pytest.raises(SubmissionError, match=r"\['sonar'\]"):
        build_submission(detections, made_index, "mini_val", ["sonar"])
