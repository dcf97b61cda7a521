"""A store of a segmenter: it holds what the segmenter finds, in equal bytes, and every command deals with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from config.params import Params
from data.reading.classes import CLASSES
from data.reading.index import CAMERAS
from data.reading.instances import ImageInstances, in_image, unpack
from data.store import Store
from pipeline.commands.cache import look, ls, plan, verify
from stages import extract
from stages.context import StageError
from stages.distill import open_store
from stages.inputs.datasets import camera_dataset, plain_dataset
from stages.inputs.segmenters import InstanceFinder
from stages.inputs.weights import load_detector
from stages.teaching.frozen import FrozenSegmenter, freeze
from stages.teaching.identity import store_identity
from stages.teaching.sources import Sources
from stages.teaching.taught import TaughtDataset, collate_taught
from tests.params_files import write_params
from tests.stages.segmenters import SIZE, context_of, extracted, parse, publish_untrained, root_with_segmenter, values

CPU = torch.device("cpu")
SAMPLES = 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return root_with_segmenter(tmp_path_factory.mktemp("made"), train_keyframes=2)


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = Path(shutil.copytree(made, tmp_path / "project"))
    monkeypatch.chdir(root)
    return root


def found_in(root: Path, params: Params, row: int) -> list[ImageInstances]:
    """What the published segmenter says of a keyframe's images."""
    finder = InstanceFinder.load(root / "outputs/teachers/instance", CPU)
    sample = camera_dataset(root, params, "train", finder.size)[row]
    return finder(sample.images[0])


def test_the_store_holds_what_the_segmenter_finds(root: Path) -> None:
    params = parse()
    store = extracted(root, params)
    assert len(store) == SAMPLES
    count = 0
    for row, token in enumerate(store.tokens):
        stored = unpack(store.read(token)["inst2d"])
        assert stored.size == SIZE
        shown = in_image(stored, stored.image_aug, SIZE, least_left=0.0, least_area=1)
        for got, expected in zip(shown, found_in(root, params, row), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
            count += len(got.boxes)
    assert count > SAMPLES * len(CAMERAS)
    card = json.loads((root / "reports/stores/instance.json").read_text())
    assert card["taps"]["inst2d"].keys() == {"serve", "encoding", "bytes", "bytes_per_sample"}
    assert (card["teacher"], card["samples"]) == ("instance", SAMPLES)


def test_the_score_threshold_is_the_stores(root: Path) -> None:
    whole = found_in(root, parse(), 0)
    threshold = float(torch.cat([image.scores for image in whole]).median())
    store = extracted(root, parse(stores={"instance": {"score_threshold": threshold}}))
    for camera, image in zip(unpack(store.read(store.tokens[0])["inst2d"]).cameras, whole, strict=True):
        assert camera.scores.tolist() == image.scores[image.scores >= threshold].tolist()


def test_a_rerun_writes_the_same_bytes_and_a_student_s_images_make_no_other_store(root: Path) -> None:
    first = extracted(root, parse())
    before = {path.name: path.read_bytes() for path in first.folder.iterdir()}
    shutil.rmtree(root / ".scratch")
    shutil.rmtree(first.folder)
    other = {"input": {"image": {"size": [64, 128]}, "depth_stride": 16}, "grid": {"cell": 3.2}}
    second = extracted(root, parse(**other), "g")
    assert {path.name: path.read_bytes() for path in second.folder.iterdir()} == before


def test_the_identity_is_of_what_the_instances_depend_on(root: Path) -> None:
    def of(**changes: Any) -> dict[str, str]:
        return vars(store_identity(root, parse(**changes), "instance"))

    first = of()
    for changes, field in (
        ({"data": {"splits": {"train": "train[:1]"}}}, "preprocessing"),
        ({"stores": {"instance": {"score_threshold": 0.5}}}, "preprocessing"),
    ):
        changed = of(**changes)
        assert [name for name in first if changed[name] != first[name]] == [field]
    for harmless in ({"input": {"image": {"size": [64, 128]}}}, {"store": {"calibration_samples": 2}}):
        assert of(**harmless) == first
    (root / "outputs/teachers/instance/config.json").write_text("{}")
    assert of()["weights"] != first["weights"]
    path = root / "data/reading/instances.py"
    path.write_text(path.read_text() + "\n")
    assert of()["code"] != first["code"]


def test_a_student_gets_it_in_its_own_images(root: Path) -> None:
    params = parse(stores={"instance": {"score_threshold": 0.2}}, input={"image": {"size": [64, 128]}})
    extracted(root, params)
    store = open_store(context_of(root, params, "extract"), "instance")
    like = load_detector(root / "outputs/teachers/lidar")
    like.sensors = ("images",)
    dataset = TaughtDataset(plain_dataset(root, params, "train", like), {"instance": store}, ["instance.inst2d"])
    batch = collate_taught([dataset[(0, 0, 0)], dataset[(0, 1, 1)]])
    served = Sources({"instance": store}, {}, params.grid.range)(batch)["instance.inst2d"]
    assert len(served) == 2
    for row, cameras in enumerate(served):
        assert len(cameras) == len(CAMERAS)
        for got, expected in zip(cameras, found_in(root, params, row), strict=True):
            assert got.masks.shape[1:] == (64, 128)
            # What is left of the segmenter's instances, twice as large.
            boxes = {tuple((2 * box).tolist()) for box in expected.boxes[expected.scores >= 0.2]}
            for box in got.boxes.tolist():
                assert min(np.abs(np.subtract(box, other)).max() for other in boxes) < 1e-3
    assert sum(len(camera.boxes) for sample in served for camera in sample)


def test_the_teacher_of_a_store_is_what_params_say(root: Path) -> None:
    params = parse()
    teacher = freeze(root, params, params.stores["instance"], root / "outputs/teachers/instance", CPU)
    assert isinstance(teacher, FrozenSegmenter)
    with pytest.raises(StageError, match="it has inst2d and no other"):
        teacher.extent("bev_lift")
    one, two = (dict(teacher.stream(groups)) for groups in ([[0], [1, 2]], [[0, 1, 2]]))
    assert {token: output["inst2d"].tobytes() for token, output in one.items()} == {
        token: output["inst2d"].tobytes() for token, output in two.items()
    }


def test_weights_that_are_no_segmenter_are_refused(root: Path) -> None:
    shutil.rmtree(root / "outputs/teachers/instance")
    shutil.copytree(root / "outputs/teachers/lidar", root / "outputs/teachers/instance")
    with pytest.raises(StageError, match="a folder of a segmenter"):
        extract.run(context_of(root, parse(), "extract"))


def write(root: Path) -> None:
    write_params(root, values())


def test_the_commands_of_the_cache_know_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(root)
    store = extracted(root, parse())
    measured = json.loads((root / "reports/stores/instance.json").read_text())["taps"]["inst2d"]
    capsys.readouterr()
    assert plan.run(root, names=["instance"], as_json=True) == 0
    told = json.loads(capsys.readouterr().out)["stores"][0]
    assert told["taps"][0]["bytes_per_sample"] == pytest.approx(measured["bytes_per_sample"], rel=1e-5)
    assert (told["taps"][0]["encoding"], told["to_write"]) == ("exact", 0)
    shutil.rmtree(root / "outputs/teachers/instance")
    assert plan.run(root, names=["instance"], as_json=False) == 0
    assert "teacher instance is not trained yet" in capsys.readouterr().out
    assert ls.run(root, as_json=True) == 0
    row = json.loads(capsys.readouterr().out)[0]
    assert (row["state"], row["taps"], row["samples"]) == ("current", "inst2d", SAMPLES)
    assert verify.run(root, names=["instance"], repair=False) == 0
    shard = next(store.folder.glob("shard-*.bin"))
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.unlink()
    shard.write_bytes(content)
    assert verify.run(root, names=["instance"], repair=False) == 1
    assert shard.name in capsys.readouterr().out


def test_look_draws_masks_where_they_are(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(root)
    store = extracted(root, parse())
    assert look.run(root, "instance", None, root / "a.png") == 0
    picture = np.asarray(Image.open(root / "a.png")).astype(int)
    shutil.rmtree(root / ".scratch")
    shutil.rmtree(store.folder)
    none = parse(stores={"instance": {"score_threshold": 1.0}})
    extracted(root, none, "none")
    assert look.run(root, "instance", None, root / "b.png") == 0
    empty = np.asarray(Image.open(root / "b.png")).astype(int)
    assert picture.shape == empty.shape
    changed = np.abs(picture - empty).max(axis=2) > 0
    half = len(changed) // 2
    assert changed[half:].mean() > 0.02
    assert not changed[: half - 20].any()  # the truth is drawn the same


def test_labels_in_a_store_are_detection_classes(root: Path) -> None:
    settings = {"classes": ["person", "tree", "car"], "class_map": {"person": "pedestrian"}}
    params = parse(segmenters={"instance": settings})
    publish_untrained(root, params)
    store = extracted(root, params)
    labels = {int(n) for token in store.tokens for c in unpack(store.read(token)["inst2d"]).cameras for n in c.labels}
    assert labels <= {CLASSES.index("pedestrian"), CLASSES.index("car")}
    assert labels
    assert isinstance(Store.open(store.folder, store_identity(root, params, "instance")), Store)
