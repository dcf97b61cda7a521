"""The evaluation stage on the real keyframes: the devkit as the oracle, ground truth, faults, equal bytes."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nuscenes import NuScenes
from nuscenes.eval.common.config import config_factory
from nuscenes.eval.detection.evaluate import DetectionEval

from config.graph import StageSpec
from config.nested import merge
from config.params import Params
from data.city.config import CityConfig
from data.city.generate import generate
from data.preparing.build import build_index
from data.reading.dataset import NuScenesDataset
from data.scoring.devkit import evaluate_submission, open_tables, split_tokens
from data.scoring.evaluation import MetricsError, summary, write_devkit_files
from data.scoring.submission import SampleDetections, build_submission, write_submission
from models.detectors.build import build_detector
from results.report.results import METRICS
from results.tracking.runs import NullTracker
from stages import evaluate, predict
from stages.context import StageContext, StageError, Stop
from stages.inputs.datasets import plain_dataset
from stages.inputs.weights import load_detector, save_detector
from tests.models.factory import camera_config, lidar_config
from tests.params_files import read_params

ROOT = Path(__file__).resolve().parents[2]
SPLITS = ("mini_train", "mini_val")


@pytest.fixture(scope="module")
def params(real_dataroot: Path) -> Params:
    """The parameters of the project on the real keyframes; one picture."""
    overlay = {
        "data": {
            "worlds": [],
            "dataroot": str(real_dataroot),
            "version": "v1.0-mini",
            "splits": dict(zip(("train", "val"), SPLITS, strict=True)),
        },
        "input": {"sweeps": 1, "image": {"size": [32, 64]}},
        "evaluate": {"pictures": 1, "batch_size": 1},
    }
    return Params.model_validate(merge(read_params(ROOT), overlay))


@pytest.fixture(scope="module")
def project(real_dataroot: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with an index, an untrained teacher and an untrained student of a variant with hyphens in its name."""
    root = tmp_path_factory.mktemp("project")
    build_index(real_dataroot, "v1.0-mini", SPLITS, root / "outputs/index")
    torch.manual_seed(0)
    for folder, config in {"teachers/lidar": lidar_config(), "students/two-words-3": camera_config()}.items():
        save_detector(root / "outputs" / folder, config, build_detector(config).state_dict())
    return root


@pytest.fixture(scope="module")
def nusc(real_dataroot: Path) -> NuScenes:
    return open_tables(real_dataroot, "v1.0-mini")


def dataset_of(project: Path, params: Params, split: str, modalities: set[str]) -> NuScenesDataset:
    like = load_detector(project / "outputs/teachers/lidar")
    like.sensors = tuple(modalities)
    return plain_dataset(project, params, split, like)


def context_of(project: Path, params: Params, name: str, key: str) -> StageContext:
    outs = (f"outputs/predictions/{key}", f"outputs/evaluations/{key}", f"reports/metrics/{key}.json")
    spec = StageSpec(name, key, "", {}, {}, outs)
    scratch = project / ".scratch" / f"{name}-{key}"
    scratch.mkdir(parents=True, exist_ok=True)
    return StageContext(name, key, params, spec, project, scratch, NullTracker(), Stop(), 0)


def truth_as_detections(dataset: NuScenesDataset, noise: float = 0.0) -> dict[str, SampleDetections]:
    """What the data loader calls the truth, moved by noise, with made-up boxes among it when there is noise."""
    rng = np.random.default_rng(0)
    detections = {}
    for sample in (dataset[i] for i in range(len(dataset))):
        boxes, labels = sample.boxes.numpy().astype(np.float64), sample.labels.numpy()
        if noise:
            boxes, labels = np.repeat(boxes, 3, axis=0), np.repeat(labels, 3)
            boxes[:, :2] += rng.normal(0, noise, boxes[:, :2].shape)
            boxes[:, 3:6] *= np.exp(rng.normal(0, 0.2, (len(boxes), 3)))
            boxes[:, 6] += rng.normal(0, 0.5, len(boxes))
        boxes[:, 7:9] = np.nan_to_num(boxes[:, 7:9]) + rng.normal(0, noise, boxes[:, 7:9].shape)
        scores = rng.uniform(0.05, 1.0, len(boxes))
        detections[sample.token] = SampleDetections(boxes, scores, labels)
    return detections


def submit(project: Path, params: Params, split: str, path: Path, noise: float = 0.0) -> Path:
    dataset = dataset_of(project, params, split, {"boxes"})
    write_submission(build_submission(truth_as_detections(dataset, noise), dataset.index, split, {"camera"}), path)
    return path


@pytest.mark.parametrize("split", SPLITS)
def test_the_truth_scores_one_and_has_no_error(
    project: Path, params: Params, nusc: NuScenes, split: str, tmp_path: Path
) -> None:
    scores = summary(evaluate_submission(nusc, submit(project, params, split, tmp_path / "truth.json"), split))
    assert scores["mAP_present"] == pytest.approx(1.0, abs=1e-9)
    assert [scores[f"{name}_present"] for name in ("mATE", "mASE")] == pytest.approx([0, 0], abs=1e-5)
    assert scores["mAOE_present"] == pytest.approx(0, abs=1e-3)  # boxes of these keyframes lean by up to 2.2 degrees
    present = [values["truth"] > 0 for values in scores["classes"].values()]
    assert scores["mAP"] == pytest.approx(sum(present) / 10, abs=1e-6)


def test_the_truth_of_a_city_scores_one_in_all_ten_classes(params: Params, project: Path, tmp_path: Path) -> None:
    size = {"train_scenes": 0, "train_keyframes": 1, "val_scenes": 6, "val_keyframes": 2}
    config = CityConfig(**size, seed=0, image=(64, 176), sweeps=1, azimuths=360)
    dataroot, index = tmp_path / "city", tmp_path / "outputs/index"
    generate(config, dataroot, "v1.0-trainval", workers=2)
    build_index(dataroot, "v1.0-trainval", ["val"], index)
    there = params.model_copy(update={"data": params.data.model_copy(update={"dataroot": str(dataroot)})})
    dataset = plain_dataset(tmp_path, there, "val", load_detector(project / "outputs/teachers/lidar"))
    dataset.modalities = frozenset({"boxes"})
    submission = build_submission(truth_as_detections(dataset), dataset.index, "val", {"camera"})
    write_submission(submission, tmp_path / "truth.json")
    scores = summary(evaluate_submission(open_tables(dataroot, "v1.0-trainval"), tmp_path / "truth.json", "val"))
    assert all(values["truth"] for values in scores["classes"].values())
    assert scores["mAP"] == 1.0
    assert [scores[name] for name in ("mATE", "mASE", "mAOE", "mAVE")] == pytest.approx([0, 0, 0, 0], abs=1e-5)
    assert {entry["mAP"] for entry in scores["scenes"]} == {1.0}


def test_a_scenes_score_is_the_devkits_on_that_scene_alone(
    city: Path, params: Params, project: Path, tmp_path: Path
) -> None:
    """The devkit is run again on a split of one scene, with the boxes of that scene."""
    build_index(city, "v1.0-trainval", ["val"], tmp_path / "outputs/index")
    there = params.model_copy(update={"data": params.data.model_copy(update={"dataroot": str(city)})})
    dataset = plain_dataset(tmp_path, there, "val", load_detector(project / "outputs/teachers/lidar"))
    dataset.modalities = frozenset({"boxes"})
    noisy, tables = truth_as_detections(dataset, noise=1.0), open_tables(city, "v1.0-trainval")
    write_submission(build_submission(noisy, dataset.index, "val", {"camera"}), tmp_path / "all.json")
    scenes = summary(evaluate_submission(tables, tmp_path / "all.json", "val"))["scenes"]
    assert [entry["scene"] for entry in scenes] == dataset.index.scenes("val")
    for number, entry in enumerate(scenes):
        part = f"val[{number}:{number + 1}]"
        own = {token: noisy[token] for token in dataset.index.tokens(part)}
        write_submission(build_submission(own, dataset.index, part, {"camera"}), tmp_path / "one.json")
        alone = summary(evaluate_submission(tables, tmp_path / "one.json", part))
        assert entry["mAP"] == pytest.approx(alone["mAP_present"], abs=2e-6)
        assert 0 < entry["mAP"] < 1
        assert (entry["boxes"], entry["samples"]) == (alone["boxes"]["truth"], alone["samples"])


def test_a_scene_without_truth_has_no_score(city: Path, tmp_path: Path) -> None:
    """All annotations of a scene become ones that no point has seen, which the devkit drops."""
    half = Path(shutil.copytree(city, tmp_path / "half", symlinks=True))
    tables = half / "v1.0-trainval"
    scene = next(record for record in json.loads((tables / "scene.json").read_text()) if record["name"] == "scene-0003")
    tokens = {
        record["token"]
        for record in json.loads((tables / "sample.json").read_text())
        if record["scene_token"] == scene["token"]
    }
    annotations = json.loads((tables / "sample_annotation.json").read_text())
    for record in annotations:
        if record["sample_token"] in tokens:
            record |= {"num_lidar_pts": 0, "num_radar_pts": 0}
    (tables / "sample_annotation.json").write_text(json.dumps(annotations))
    nusc, path = open_tables(half, "v1.0-trainval"), tmp_path / "empty.json"
    path.write_text(json.dumps({"meta": {}, "results": {token: [] for token in split_tokens(nusc, "val")}}))
    first, second = summary(evaluate_submission(nusc, path, "val"))["scenes"]
    assert (first["scene"], first["mAP"], first["boxes"], first["samples"]) == ("scene-0003", None, 0, len(tokens))
    assert (second["mAP"], second["boxes"] > 0) == (0.0, True)


@pytest.mark.parametrize("split", SPLITS)
def test_every_number_is_the_devkits(project: Path, params: Params, nusc: NuScenes, split: str, tmp_path: Path) -> None:
    submission = submit(project, params, split, tmp_path / "noisy.json", noise=1.0)
    evaluation = evaluate_submission(nusc, submission, split)
    scores = summary(evaluation)
    config = config_factory("detection_cvpr_2019")
    with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        devkit = DetectionEval(nusc, config, str(submission), split, str(tmp_path / "devkit"), verbose=False)
        official = devkit.main(render_curves=False)
    assert 0 < scores["mAP"] < 0.9
    assert scores["mAP"] == pytest.approx(official["mean_ap"], abs=5e-7)
    assert scores["NDS"] == pytest.approx(official["nd_score"], abs=5e-7)
    for name, key in {"mATE": "trans_err", "mASE": "scale_err", "mAOE": "orient_err", "mAVE": "vel_err"}.items():
        assert scores[name] == pytest.approx(official["tp_errors"][key], abs=5e-7)
    for name, values in scores["classes"].items():
        assert values["AP"] == pytest.approx(official["mean_dist_aps"][name], abs=5e-7)
        error = official["label_tp_errors"][name]["orient_err"]
        assert values["AOE"] == (None if np.isnan(error) else pytest.approx(error, abs=5e-7))
        assert values["truth"] == sum(box.detection_name == name for box in devkit.gt_boxes.all)
    write_devkit_files(evaluation, tmp_path)
    assert json.loads((tmp_path / "metrics_summary.json").read_text())["mean_ap"] == official["mean_ap"]
    details = json.loads((tmp_path / "metrics_details.json").read_text())
    expected = json.loads((tmp_path / "devkit/metrics_details.json").read_text())
    assert details["car:2.0"]["precision"] == expected["car:2.0"]["precision"]


def test_an_empty_submission_scores_nothing(nusc: NuScenes, tmp_path: Path) -> None:
    path = tmp_path / "empty.json"
    path.write_text(json.dumps({"meta": {}, "results": {token: [] for token in split_tokens(nusc, "mini_val")}}))
    scores = summary(evaluate_submission(nusc, path, "mini_val"))
    assert (scores["mAP"], scores["NDS"], scores["mATE"], scores["boxes"]["predicted"]) == (0.0, 0.0, 1.0, 0)


def test_of_more_than_500_boxes_the_best_are_kept(
    project: Path, params: Params, nusc: NuScenes, tmp_path: Path
) -> None:
    dataset = dataset_of(project, params, "mini_val", {"boxes"})
    (token, found), *_ = truth_as_detections(dataset).items()
    boxes = np.tile(np.asarray(found.boxes), (40, 1))
    many = SampleDetections(boxes, np.linspace(1, 0.1, len(boxes)), np.tile(np.asarray(found.labels), 40))
    submission = build_submission({token: many}, dataset.index, "mini_val", {"camera"})
    write_submission(submission, tmp_path / "many.json")
    assert evaluate_submission(nusc, tmp_path / "many.json", "mini_val").samples == 1
    submission["results"][token] *= 2
    write_submission(submission, tmp_path / "many.json")
    with pytest.raises(MetricsError, match="500 boxes per sample"):
        evaluate_submission(nusc, tmp_path / "many.json", "mini_val")


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("mini_train", "1 missing, 1 of other splits; first missing ca9a"),
        ("val", "devkit refuses the submission for split 'val'"),
        ("half", "unknown split 'half'"),
    ],
)
def test_a_wrong_split_is_named(nusc: NuScenes, tmp_path: Path, split: str, message: str) -> None:
    path = tmp_path / "empty.json"
    path.write_text(json.dumps({"meta": {}, "results": {token: [] for token in split_tokens(nusc, "mini_val")}}))
    with pytest.raises(MetricsError, match=message):
        evaluate_submission(nusc, path, split)


def test_a_wrong_version_is_named(real_dataroot: Path) -> None:
    with pytest.raises(MetricsError, match=r"version 'v1.0-trainval'.*data\.dataroot and data\.version"):
        open_tables(real_dataroot, "v1.0-trainval")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(("name", "key"), [("evaluate_teacher", "lidar"), ("evaluate", "two-words-3")])
def test_the_stage_publishes_equal_bytes_twice(
    project: Path, params: Params, nusc: NuScenes, name: str, key: str
) -> None:
    runs: list[tuple[Any, ...]] = []
    for _ in range(2):
        predict.run(context_of(project, params, name.replace("evaluate", "predict"), key))
        evaluate.run(context_of(project, params, name, key))
        folder, metrics = project / "outputs/evaluations" / key, project / "reports/metrics" / f"{key}.json"
        predictions = project / "outputs/predictions" / key
        runs.append((digests(folder), metrics.read_bytes(), digests(predictions)))
    assert runs[0] == runs[1]
    assert {"metrics_summary.json", "metrics_details.json", "curves.png", "pictures.json"} < set(runs[0][0])
    assert set(runs[0][2]) == {"results_nusc.json", "model.json"}
    headlines = json.loads(runs[0][1])
    content = json.loads((folder / "evaluation.json").read_text())
    assert headlines.keys().isdisjoint(content)
    evaluation = evaluate_submission(nusc, predictions / "results_nusc.json", "mini_val")
    assert {**headlines, **content}.items() >= summary(evaluation).items()  # every number is in one of the two files
    flat = [value for entry in headlines.values() for value in (entry.values() if isinstance(entry, dict) else [entry])]
    assert len(flat) == 12
    assert not any(isinstance(value, str) for value in flat)
    assert content["kind"] == ("teacher" if name == "evaluate_teacher" else "student")
    assert (content["variant"], content["seed"]) == (("lidar", None) if key == "lidar" else ("two-words", 3))
    assert headlines["parameters"] > 0
    assert not [path for path in (*folder.glob("*.json"), metrics) if str(project) in path.read_text()]
    (scene,) = json.loads((folder / "pictures.json").read_text())["scenes"]
    assert all((folder / file).exists() for file in scene["files"].values())
    confusion = json.loads((folder / "confusion.json").read_text())
    truth = dict(zip(confusion["truth"], np.sum(confusion["counts"], axis=1).tolist(), strict=True))
    del truth["nothing"]
    assert truth == {label: values["truth"] for label, values in content["classes"].items()}


def test_a_student_is_given_images_only(project: Path, params: Params) -> None:
    dataset = plain_dataset(project, params, "mini_val", load_detector(project / "outputs/students/two-words-3"))
    sample = dataset[0]
    assert sample.images.numel() > 0
    assert (sample.points.numel(), sample.boxes.numel(), sample.depth.numel()) == (0, 0, 0)


def test_weights_that_do_not_fit_are_refused(project: Path, tmp_path: Path) -> None:
    config = lidar_config()
    weights = build_detector(config).state_dict()
    first = next(iter(weights))
    save_detector(tmp_path, config, {("other" if name == first else name): value for name, value in weights.items()})
    with pytest.raises(StageError, match=rf"missing {first}; unused other"):
        load_detector(tmp_path)
    save_detector(tmp_path, config, {**weights, first: weights[first][:1]})
    with pytest.raises(StageError, match=rf"{first} is \[1"):
        load_detector(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(StageError, match="does not hold a whole model"):
        load_detector(tmp_path)
    with pytest.raises(StageError, match="does not hold a whole model"):
        load_detector(tmp_path / "nowhere")


def test_keys_are_split_at_the_last_hyphen() -> None:
    assert predict.subject("predict", "a-b-12") == predict.Subject("student", "a-b-12", "a-b", 12)
    assert predict.subject("predict_teacher", "lidar").weights == "outputs/teachers/lidar"


def test_evaluation_needs_predictions_of_its_split(project: Path, params: Params) -> None:
    with pytest.raises(StageError, match="stage predict needs --key"):
        predict.run(replace(context_of(project, params, "predict", "nobody-0"), key=None))
    context = context_of(project, params, "evaluate_teacher", "nobody")
    with pytest.raises(StageError, match=r"nobody/model\.json.*run `dvc repro predict_teacher@nobody`"):
        evaluate.run(context)
    predict.run(context_of(project, params, "predict_teacher", "lidar"))
    settings = params.evaluate.model_copy(update={"split": "train"})
    other = params.model_copy(update={"evaluate": settings})
    with pytest.raises(StageError, match=r"is of split 'mini_val', not of 'mini_train': run `dvc repro predict_"):
        evaluate.run(context_of(project, other, "evaluate_teacher", "lidar"))


def test_the_devkit_is_asked_where_params_say_so(
    project: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives the same numbers, and the evaluation says whose they are."""
    predict.run(context_of(project, params, "predict_teacher", "lidar"))
    found = []
    for official in ("vectorised", "devkit"):
        settings = params.evaluate.model_copy(update={"official": official})
        there = params.model_copy(update={"evaluate": settings})
        with monkeypatch.context() as patch:
            if official == "devkit":
                patch.setattr(evaluate, "evaluate_submission", None)
            evaluate.run(context_of(project, there, "evaluate_teacher", "lidar"))
        folder = project / "outputs/evaluations/lidar"
        content = json.loads((folder / "evaluation.json").read_text())
        assert content.pop("official") == official
        found.append(
            (content, (project / "reports/metrics/lidar.json").read_bytes(), (folder / "curves.png").read_bytes())
        )
    assert found[0] == found[1]


def test_evaluation_brings_neither_torch_nor_the_devkit() -> None:
    names = ("evaluate", "evaluate_segmenter", "film")
    heavy = "{'torch', 'nuscenes', 'sklearn'}"
    script = f"import sys; from stages import {', '.join(names)}; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


def test_the_report_reads_the_metrics_that_evaluation_writes() -> None:
    """Two lists, since an edit of the report must make no evaluation stale."""
    assert evaluate.HEADLINES == METRICS
