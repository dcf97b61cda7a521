"""The stage `features`: strengths and correlations against numpy, the keyframes of `evaluate`, named faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from config.graph import StageSpec
from config.nested import merge
from config.params import Params
from data.preparing.build import build_index
from data.reading.batch import collate
from data.reading.index import Index
from models.detectors.build import build_detector
from results.tracking.runs import NullTracker
from stages import evaluate, features, predict
from stages.context import StageContext, StageError, Stop
from stages.featured import fusion_teacher
from stages.features import correlation
from stages.inputs.datasets import plain_dataset
from stages.inputs.weights import load_detector, save_detector
from tests.models.factory import COMPENSATION, GRID, camera_config, fusion_config, simulated_config
from tests.params_files import read_params

ROOT = Path(__file__).resolve().parents[2]
MODELS = {
    "teachers/fusion": fusion_config(),
    "students/simdistill-0": simulated_config(**COMPENSATION),
    "students/sim-uncompensated-0": simulated_config(),
    "students/baseline-0": camera_config(),
}


def parse(city: Path, **changes: Any) -> Params:
    overlay = {
        "data": {"worlds": [], "dataroot": str(city), "version": "v1.0-trainval", "splits": {"train": "train"}},
        "grid": GRID,
        "input": {"sweeps": 1, "image": {"size": [32, 64]}},
        "evaluate": {"pictures": 3, "batch_size": 2},
    }
    return Params.model_validate(merge(merge(read_params(ROOT), overlay), changes))


@pytest.fixture(scope="module")
def project(city: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with an index of the city and models that nobody trained; a compensation that does something."""
    root = tmp_path_factory.mktemp("project")
    build_index(city, "v1.0-trainval", ["train", "val"], root / "outputs/index")
    torch.manual_seed(0)
    for folder, config in MODELS.items():
        weights = build_detector(config).state_dict()
        for name in weights:
            if name.startswith("bev_compensation") and "output_proj.weight" in name:
                weights[name] = 0.5 * torch.randn_like(weights[name])
        save_detector(root / "outputs" / folder, config, weights)
    return root


def context_of(project: Path, params: Params, name: str, key: str) -> StageContext:
    outs = (f"outputs/evaluations/features/{key}", f"outputs/predictions/{key}", f"outputs/evaluations/{key}",
            f"reports/metrics/{key}.json")  # fmt: skip
    scratch = project / ".scratch" / f"{name}-{key}"
    scratch.mkdir(parents=True, exist_ok=True)
    return StageContext(
        name, key, params, StageSpec(name, key, "", {}, {}, outs), project, scratch, NullTracker(), Stop(), 0
    )


def run(project: Path, params: Params, key: str) -> tuple[Path, dict[str, Any]]:
    features.run(context_of(project, params, "features", key))
    folder = project / "outputs/evaluations/features" / key
    return folder, json.loads((folder / "features.json").read_text())


def test_correlation_is_numpys() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 9, 7)).astype(np.float32)
    expected = np.corrcoef(first.astype(np.float64).ravel(), second.astype(np.float64).ravel())[0, 1]
    assert correlation(first, second) == pytest.approx(expected, abs=1e-6)
    assert correlation(first, 3 * first + 1) == 1.0
    assert correlation(first, -first) == -1.0
    assert correlation(first, np.ones_like(first)) is None


def test_the_numbers_are_those_of_the_models(project: Path, city: Path) -> None:
    params = parse(city)
    folder, content = run(project, params, "simdistill-0")
    assert (content["variant"], content["seed"], content["teacher"], content["split"]) == (
        "simdistill", 0, "fusion", "val",
    )  # fmt: skip
    teacher, student = (load_detector(project / "outputs" / name) for name in list(MODELS)[:2])
    dataset = plain_dataset(project, params, "val", teacher)
    entry = content["keyframes"][1]
    batch = collate([dataset[dataset.tokens.index(entry["token"])]])
    with torch.no_grad():
        lidar = teacher(batch, ["bev_lift_lidar"]).taps["bev_lift_lidar"][0]
        batch.points = [torch.empty(0, 5)]  # the student's features come from images
        taps = student(batch, ["bev_lift_uncompensated", "bev_lift_simulated"]).taps
    for when, tap in (("before", "bev_lift_uncompensated"), ("after", "bev_lift_simulated")):
        strengths = [np.abs(features.numpy().astype(np.float64)).mean(0).ravel() for features in (lidar, taps[tap][0])]
        assert entry[when] == pytest.approx(np.corrcoef(*strengths)[0, 1], abs=1e-5)
        values = [keyframe[when] for keyframe in content["keyframes"]]
        assert content["mean"][when] == pytest.approx(np.mean(values), abs=1e-6)
    assert entry["before"] != entry["after"]
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert first.keys() == {"features.json", "00.png", "01.png", "02.png"}
    folder, _ = run(project, params, "simdistill-0")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_the_keyframes_are_those_of_evaluate(project: Path, city: Path) -> None:
    params = parse(city)
    _, content = run(project, params, "simdistill-0")
    predict.run(context_of(project, params, "predict", "simdistill-0"))
    evaluate.run(context_of(project, params, "evaluate", "simdistill-0"))
    drawn = json.loads((project / "outputs/evaluations/simdistill-0/pictures.json").read_text())["scenes"]
    assert [entry["token"] for entry in content["keyframes"]] == [scene["token"] for scene in drawn]
    assert [entry["caption"] for entry in content["keyframes"]] == [scene["caption"] for scene in drawn]
    tokens = Index.open(project / "outputs/index").tokens("val")
    assert [drawn[0]["token"], drawn[-1]["token"]] == [tokens[0], tokens[-1]]


def test_a_student_without_compensation_is_shown_once(project: Path, city: Path) -> None:
    params = parse(
        city, study={"variants": ["baseline", "sim-uncompensated"], "featured": ["sim-uncompensated"], "baselines": []}
    )
    folder, content = run(project, params, "sim-uncompensated-0")
    assert content["mean"]["before"] is None
    assert {entry["before"] for entry in content["keyframes"]} == {None}
    assert content["mean"]["after"] is not None
    two, (other, _) = Image.open(folder / "00.png").width, run(project, parse(city), "simdistill-0")
    assert two < 0.7 * Image.open(other / "00.png").width


def test_the_weights_stay_as_they_are(project: Path, city: Path) -> None:
    files = [project / "outputs" / name / "model.safetensors" for name in MODELS]
    before = [file.read_bytes() for file in files]
    run(project, parse(city), "simdistill-0")
    assert [file.read_bytes() for file in files] == before


def test_no_pictures_is_no_fault(project: Path, city: Path) -> None:
    _, content = run(project, parse(city, evaluate={"pictures": 0}), "simdistill-0")
    assert (content["keyframes"], content["mean"]) == ([], {"before": None, "after": None})


def test_the_teacher_is_the_one_that_the_terms_read(city: Path) -> None:
    params = parse(city)
    assert fusion_teacher(params, "simdistill") == fusion_teacher(params, "cmd") == "fusion"
    for variant in ("simulated", "x3kd"):
        with pytest.raises(StageError, match=rf"'{variant}' read none of the fusion teachers in study.fusions"):
            fusion_teacher(params, variant)


def test_what_does_not_fit_is_named(project: Path, city: Path, tmp_path: Path) -> None:
    params = parse(city)
    with pytest.raises(StageError, match="variant 'nobody'"):
        run(project, params, "nobody-0")
    with pytest.raises(StageError, match=r"students/simdistill-1 does not hold a whole model"):
        run(project, params, "simdistill-1")
    config = camera_config()
    save_detector(project / "outputs/students/simdistill-7", config, build_detector(config).state_dict())
    with pytest.raises(StageError, match=r"CameraBEVDepth, which has no tap bev_lift_uncompensated"):
        run(project, params, "simdistill-7")
