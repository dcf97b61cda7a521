"""The film on a tiny city, from submissions that were scored by the devkit: who is in it, what is drawn, faults."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageSequence

from base.errors import PipelineError
from config.graph import StageSpec
from config.nested import merge
from config.params import Params
from data.drawing.pictures import Boxes, draw_columns, load_view, save_film
from data.preparing.build import build_index
from data.reading.index import Index
from data.scoring.evaluation import summary
from data.scoring.nuscenes import evaluate_submission
from data.scoring.submission import SampleDetections, build_submission, write_submission
from data.scoring.submitted import detections_of, read_submission
from results.report.film import read_film
from results.report.lineage import results
from results.report.results import METRICS, ReportError
from results.tracking.runs import NullTracker
from stages import film
from stages.context import StageContext, StageError, Stop
from tests.params_files import read_params

ROOT = Path(__file__).resolve().parents[2]
VERSION = "v1.0-trainval"
NOISE = {"lidar": 0.0, "baseline-0": 1.6, "xod-0": 1.0, "xfd-0": 0.3}  # metres, of the boxes in the plane


def params_of(dataroot: Path, **study: Any) -> Params:
    raw = read_params(ROOT)
    for student in raw["students"].values():
        student["start"] = None
    overlay = {
        "data": {"worlds": [], "dataroot": str(dataroot), "version": VERSION},
        "study": {
            "teachers": ["lidar"], "fusions": {}, "large": {}, "stores": ["lidar"], "segmenters": [], "featured": [],
            "variants": ["baseline", "xod", "xfd"], "baselines": [], "seeds": [0],
            **study,
        },
    }  # fmt: skip
    raw["study"] |= {"fusions": {}, "large": {}}  # merged, those of the repository would stay
    return Params.model_validate(merge(raw, overlay))


def moved_truth(index: Index, noise: float) -> dict[str, SampleDetections]:
    """The truth of every keyframe, moved; every other box scores below the threshold of what is drawn."""
    rng, found = np.random.default_rng(0), {}
    for row in index.rows("val").tolist():
        truth = index.annotations(row)
        boxes = np.nan_to_num(truth.boxes[truth.valid])
        boxes[:, :2] += rng.normal(0, noise, boxes[:, :2].shape)
        found[index.sample(row).token] = SampleDetections(
            boxes, np.where(np.arange(len(boxes)) % 2, 0.9, 0.1), truth.labels[truth.valid]
        )
    return found


@pytest.fixture(scope="module")
def evaluated(city: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with an index, submissions and their metrics."""
    root = tmp_path_factory.mktemp("film")
    index = build(root, city)
    (root / "reports/metrics").mkdir(parents=True)
    for key, noise in NOISE.items():
        path = root / f"outputs/predictions/{key}/results_nusc.json"
        path.parent.mkdir(parents=True)
        write_submission(build_submission(moved_truth(index, noise), index, "val", {"camera"}), path)
        scores = summary(evaluate_submission(index, read_submission(path), "val"))
        metrics = {"parameters": 1, **{name: scores[name] for name in METRICS if name in scores}}
        (root / f"reports/metrics/{key}.json").write_text(json.dumps(metrics))
        evaluation = {"kind": "student", "split": "val", "official": "vectorised", "classes": scores["classes"]}
        evaluation |= {"scenes": scores["scenes"]}
        rest = root / f"outputs/evaluations/{key}/evaluation.json"
        rest.parent.mkdir(parents=True)
        rest.write_text(json.dumps(evaluation))
    return root


def build(root: Path, city: Path) -> Index:
    build_index(city, VERSION, ["train", "val"], root / "outputs/index")
    return Index.open(root / "outputs/index")


@pytest.fixture
def project(evaluated: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(evaluated, tmp_path / "project"))


def run(root: Path, params: Params) -> dict[str, Any]:
    scratch = root / ".scratch/film"
    scratch.mkdir(parents=True, exist_ok=True)
    spec = StageSpec("film", None, "", {}, {}, ("outputs/film",))
    film.run(StageContext("film", None, params, spec, root, scratch, NullTracker(), Stop(), 0))
    content: dict[str, Any] = json.loads((root / "outputs/film/film.json").read_text())
    return content


def frames_of(film_file: Image.Image) -> int:
    return sum(1 for _ in ImageSequence.Iterator(film_file))


def test_the_stage_draws_every_keyframe_of_the_fullest_scene(project: Path, city: Path) -> None:
    content = run(project, params_of(city))
    folder, index = project / "outputs/film", Index.open(project / "outputs/index")
    rows = film.rows_of_scenes(index, "val")
    scores = json.loads((project / "outputs/evaluations/lidar/evaluation.json").read_text())["scenes"]
    assert {entry["scene"] for entry in scores} == set(rows)
    assert content["keys"] == ["lidar", "baseline-0", "xfd-0"]
    assert content["scene"] == max(scores, key=lambda entry: entry["boxes"])["scene"]
    with Image.open(folder / content["file"]) as moving:
        assert (frames_of(moving), content["keyframes"]) == (2, 2)
        frames = []
        for number in range(2):
            moving.seek(number)
            frames.append(np.asarray(moving.convert("RGB")))
    assert (frames[0] != frames[1]).any()
    assert {entry["scene"] for entry in content["scenes"]} == set(rows)  # of two scenes one gains more, one less
    tokens = {index.sample(row).token for row in index.rows("val").tolist()}
    assert {entry["token"] for entry in content["scenes"]} < tokens
    shown = read_film(folder, results(params_of(city), project))
    assert (shown.keys, list(shown.stills)) == (content["keys"], [entry["scene"] for entry in content["scenes"]])


def test_equal_predictions_are_equal_bytes(project: Path, city: Path) -> None:
    digests = []
    for _ in range(2):
        run(project, params_of(city))
        files = sorted((project / "outputs/film").iterdir())
        digests.append({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files})
    assert digests[0] == digests[1]
    assert str(project) not in (project / "outputs/film/film.json").read_text()


def test_boxes_come_back_into_the_frame_that_they_left(evaluated: Path) -> None:
    index = Index.open(evaluated / "outputs/index")
    rows = index.rows("val").tolist()
    seen = detections_of(read_submission(evaluated / "outputs/predictions/lidar/results_nusc.json"), index, rows)
    for row in rows:
        truth, token = index.annotations(row), index.sample(row).token
        found = film.drawable(seen[token], 0.0)
        order, expected = np.lexsort(found.boxes[:, :2].T.round(4)), truth.boxes[truth.valid]
        best = np.lexsort(expected[:, :2].T.round(4))
        np.testing.assert_allclose(found.boxes[order, :6], expected[best, :6], atol=1e-6)
        np.testing.assert_allclose(np.cos(found.boxes[order, 6] - expected[best, 6]), 1.0, atol=1e-9)
        np.testing.assert_array_equal(found.labels[order], truth.labels[truth.valid][best])
        assert len(film.drawable(seen[token], 0.5).boxes) == len(expected) // 2


def test_the_film_shows_the_students_own_teacher(project: Path, city: Path) -> None:
    for key, like in (("start", "lidar"), ("fusion", "lidar"), ("simdistill-0", "xfd-0")):
        shutil.copy(project / f"reports/metrics/{like}.json", project / f"reports/metrics/{key}.json")
        for made in ("predictions", "evaluations"):
            shutil.copytree(project / f"outputs/{made}/{like}", project / f"outputs/{made}/{key}")
    lists = {"teachers": ["start", "lidar"], "fusions": {"fusion": {"lidar": "lidar", "camera": "start"}}}
    for names, stores, expected in (
        (["baseline", "xfd"], ["fusion", "lidar"], ["lidar", "baseline", "xfd"]),
        (["baseline", "simdistill"], ["fusion", "lidar"], ["fusion", "baseline", "simdistill"]),
        (["baseline"], ["fusion", "lidar"], ["lidar", "baseline"]),
    ):
        params = params_of(city, **lists, variants=names, stores=stores)
        cast = film.cast(params, results(params, project))
        assert [arm.name for arm in cast] == expected
    lists |= {"teachers": [], "fusions": {}, "stores": []}
    params = params_of(city, **lists, variants=["baseline"])
    assert [arm.name for arm in film.cast(params, results(params, project))] == ["baseline"]


def test_without_a_variant_there_is_no_scene_to_compare(project: Path, city: Path) -> None:
    content = run(project, params_of(city, variants=["baseline"], stores=[]))
    assert (content["keys"], content["scenes"]) == (["lidar", "baseline-0"], [])


@pytest.mark.parametrize(
    ("file", "content", "error", "message"),
    [
        ("outputs/predictions/xfd-0/results_nusc.json", None, StageError, "is missing: run `dvc repro predict@xfd-0`"),
        ("reports/metrics/xfd-0.json", None, ReportError, "is missing: run `dvc repro evaluate@xfd-0`"),
        (
            "outputs/evaluations/xfd-0/evaluation.json",
            "scenes",
            ReportError,
            r"xfd-0/evaluation.json lacks scenes.*run `dvc repro evaluate@xfd-0`",
        ),
    ],
)
def test_what_is_missing_is_named(
    project: Path, city: Path, file: str, content: str | None, error: type[Exception], message: str
) -> None:
    old = json.loads((project / file).read_text())
    (project / file).unlink()
    if content:
        (project / file).write_text(json.dumps({key: value for key, value in old.items() if key != content}))
    with pytest.raises(error, match=message):
        run(project, params_of(city))


def test_a_missing_image_is_named(project: Path, city: Path, tmp_path: Path) -> None:
    index = Index.open(project / "outputs/index")
    half = shutil.copytree(city, tmp_path / "half")
    for row in index.rows("val").tolist():
        (half / index.sample(row).cameras.files[0]).unlink()
    with pytest.raises(PipelineError, match=r"CAM_FRONT.*cannot be read"):
        run(project, params_of(half))


def test_a_film_has_no_more_bytes_than_it_may(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (120, 200, 3), dtype=np.uint8) for _ in range(4)]
    sizes = []
    for limit in (10**9, 60_000, 20_000):
        save_film(frames, tmp_path / "film.webp", 500, limit)
        assert (tmp_path / "film.webp").stat().st_size <= limit
        with Image.open(tmp_path / "film.webp") as moving:
            assert frames_of(moving) == 4
            moving.load()
            assert moving.info["duration"] == 500
            sizes.append(moving.size)
    assert sizes[0] == (200, 120) > sizes[2]


def test_a_single_real_keyframe_is_a_film_of_one_frame(real_dataroot: Path, tmp_path: Path) -> None:
    build_index(real_dataroot, "v1.0-mini", ["mini_val"], tmp_path / "index")
    view = load_view(Index.open(tmp_path / "index"), 0, real_dataroot)
    nothing = Boxes(np.empty((0, 9)), np.empty(0, np.int64))
    columns = [("truth", view.truth), ("nothing", nothing)]
    frame = draw_columns(view, columns, "scene", view.truth.labels)
    save_film([frame], tmp_path / "film.webp", 500, 10**6)
    with Image.open(tmp_path / "film.webp") as still:
        assert still.size == frame.shape[1::-1]
    left, right = frame[60:, : frame.shape[1] // 2 - 8], frame[60:, frame.shape[1] // 2 + 8 :]
    assert (left != right).any()  # boxes stand in one of them only
