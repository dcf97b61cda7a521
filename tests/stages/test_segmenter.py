"""Stage `segmenter`: what is trained or taken over is published, equal bytes for equal input, and can be loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from base.errors import PipelineError
from data.reading.classes import CLASSES
from data.reading.coco import CocoInstances
from models.detectors.segmenter import build_segmenter
from stages import segmenter
from stages.context import StageError
from stages.inputs.segmenters import InstanceFinder, detection_names, make_segmenter, segmenter_config
from stages.inputs.weights import CONFIG, WEIGHTS, checksum_of, load_detector, save_detector, start_from
from tests.stages.segmenters import SIZE, context_of, parse
from tests.stages.untrained import make_root

CPU = torch.device("cpu")
OWN = ["person", "tree", "car"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tmp_path_factory.mktemp("made"), train_keyframes=1)


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "project"))


def run(root: Path, fingerprint: str = "f", **changes: Any) -> Path:
    segmenter.run(context_of(root, parse(**changes), "segmenter", fingerprint))
    return root / "outputs/teachers/instance"


def published_start(root: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Weights that nobody trained, as `start` of the parameters names them."""
    params = parse(segmenters={"instance": settings})
    torch.manual_seed(5)
    config = segmenter_config(params.segmenters["instance"])
    save_detector(root / "imported/one", config, build_segmenter(config).state_dict())
    content = (root / "imported/one" / WEIGHTS).read_bytes()
    return {"folder": "imported/one", "checksum": checksum_of(content)}


def test_it_is_trained_and_published(root: Path) -> None:
    folder = run(root)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert first.keys() == {WEIGHTS, CONFIG}
    config = json.loads(first[CONFIG])
    assert (config["type"], config["classes"], config["image"]) == ("Segmenter", list(CLASSES), list(SIZE))
    finder = InstanceFinder.load(folder, CPU)
    assert finder.size == SIZE
    assert not finder.segmenter.training
    trace = (root / ".scratch/segmenter-instance/f/trace.jsonl").read_text().splitlines()
    assert len(trace) == 12 // 4  # images of two keyframes, four to a step
    assert {"loss_rpn_cls", "loss_cls", "loss_mask"} <= json.loads(trace[0]).keys()
    again = run(root, "g")
    assert {path.name: path.read_bytes() for path in again.iterdir()} == first


def test_training_starts_from_the_start_and_without_training_it_is_published_as_it_is(root: Path) -> None:
    start = published_start(root, {})
    slow = {"epochs": 1, "batch_size": 4, "lr": 1e-12, "weight_decay": 0.0, "workers": 0}
    before = InstanceFinder.load(root / "imported/one", CPU).segmenter.state_dict()
    for settings in ({"start": start, "train": None}, {"start": start, "train": slow}):
        finder = InstanceFinder.load(run(root, segmenters={"instance": settings}), CPU)
        weights = {name: value for name, value in finder.segmenter.state_dict().items() if "running" not in name}
        for name, value in weights.items():
            if value.is_floating_point():
                torch.testing.assert_close(value, before[name], rtol=0, atol=1e-9)
    assert (run(root, segmenters={"instance": {"start": start, "train": None}}) / WEIGHTS).read_bytes() == (
        root / "imported/one" / WEIGHTS
    ).read_bytes()


def test_another_start_than_was_meant_is_refused(root: Path) -> None:
    start = published_start(root, {}) | {"checksum": "0" * 32}
    with pytest.raises(StageError, match=f"has checksum [0-9a-f]+, the parameters say {'0' * 32}"):
        run(root, segmenters={"instance": {"start": start, "train": None}})


def test_a_start_of_a_stage_needs_no_checksum(root: Path) -> None:
    published_start(root, {})
    settings = parse().segmenters["instance"]
    one, other = (make_segmenter(segmenter_config(settings)) for _ in range(2))
    start_from(one, root / "imported/one", None)
    start_from(other, root / "imported/one", None)
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_labels_are_those_of_the_detection_classes(root: Path) -> None:
    """A segmenter with other names learns and finds by them; what is no detection class is dropped."""
    names = detection_names(OWN, {"person": "pedestrian"})
    assert names == ["pedestrian", None, "car"]
    settings = {"classes": OWN, "class_map": {"person": "pedestrian"}}
    params = parse(segmenters={"instance": settings})
    context = context_of(root, params, "segmenter")
    images = segmenter.training_images(context, params.segmenters["instance"])
    by_name = CocoInstances(images.file, images.root, images.config, CLASSES, train=True, seed=context.seed)
    of_city = [by_name[i].instances.labels for i in range(len(by_name))]
    wanted = {CLASSES.index("pedestrian"): 0, CLASSES.index("car"): 2}
    for i, labels in enumerate(of_city):
        assert images[i].instances.labels.tolist() == [wanted[n] for n in labels.tolist() if n in wanted]
    assert sum(len(images[i].instances.labels) for i in range(len(images))) > 0
    finder = InstanceFinder.load(run(root, segmenters={"instance": settings}), CPU)
    assert finder.labels.tolist() == [CLASSES.index("pedestrian"), -1, CLASSES.index("car")]


@pytest.mark.parametrize(
    ("classes", "class_map", "message"),
    [
        (["car"], {"car": "vehicle"}, "class_map: vehicle: allowed are car, truck"),
        (["car"], {"bike": "bicycle"}, "class_map: bike: the segmenter has the classes car"),
        (["tree"], {}, "none of the classes tree is a detection class"),
    ],
)
def test_a_wrong_class_map_is_refused(classes: list[str], class_map: dict[str, str], message: str) -> None:
    with pytest.raises(StageError, match=message):
        detection_names(classes, class_map)


def test_what_is_not_there_or_is_something_else_is_named(root: Path) -> None:
    shutil.move(root / "outputs/city/instances/train.json", root / "away.json")
    with pytest.raises(PipelineError, match=r"train\.json cannot be read .* see data\.instances in params\.yaml"):
        run(root)
    with pytest.raises(PipelineError, match="expected 'Segmenter', a folder of a segmenter"):
        InstanceFinder.load(root / "outputs/teachers/lidar", CPU)
    with pytest.raises(PipelineError, match="does not hold a whole model"):
        InstanceFinder.load(root / "outputs/teachers/none", CPU)
    assert load_detector(root / "outputs/teachers/lidar").sensors == ("points",)
