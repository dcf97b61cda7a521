"""Stages `predict_segmenter` and `evaluate_segmenter`: numbers and pictures, in the pixels of the raw images."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from base.errors import PipelineError
from data.reading.classes import CLASSES
from data.reading.coco import CocoInstances
from data.reading.config import ImageConfig
from data.reading.instances import ImageInstances
from models.detectors.segmenter import Found
from stages import evaluate_segmenter, predict_segmenter
from stages.evaluate_segmenter import flat_metrics, spread
from stages.inputs.segmenters import InstanceFinder
from tests.stages.segmenters import SIZE, context_of, parse, root_with_segmenter

KEEP = {"images", "parameters", "bbox", "mask", "classes", "kind", "key"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return root_with_segmenter(tmp_path_factory.mktemp("made"), train_keyframes=1)


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "project"))


class Knowing(torch.nn.Module):
    """Says what the JSON says of the validation images in their order, as a segmenter of images of a size would."""

    def __init__(self, root: Path, size: tuple[int, int]) -> None:
        super().__init__()
        folder = root / "outputs/city"
        config = ImageConfig(size=size, resize=(1.0, 1.0), rotate=0.0, flip=0.0)
        images = CocoInstances(folder / "instances/val.json", folder, config, CLASSES, train=False)
        self.known: Iterator[ImageInstances] = iter([images[i].instances for i in range(len(images))])

    def predict(self, images: Tensor) -> list[Found]:
        return [Found(*next(self.known)) for _ in images]


def run(root: Path) -> dict:
    predict_segmenter.run(context_of(root, parse(), "predict_segmenter"))
    evaluate_segmenter.run(context_of(root, parse(), "evaluate_segmenter"))
    return json.loads((root / "reports/metrics/instance.json").read_text())


def test_metrics_and_pictures_are_published(root: Path) -> None:
    metrics = run(root)
    assert metrics.keys() == KEEP
    assert (metrics["kind"], metrics["key"], metrics["images"]) == ("segmenter", "instance", 6)
    segmenter = InstanceFinder.load(root / "outputs/teachers/instance", torch.device("cpu")).segmenter
    assert metrics["parameters"] == sum(parameter.numel() for parameter in segmenter.parameters())
    folder = root / "outputs/evaluations/instance"
    manifest = json.loads((folder / "pictures.json").read_text())
    assert manifest["threshold"] == parse().evaluate.score_threshold
    content = json.loads((root / "outputs/city/instances/val.json").read_text())
    names = [entry["file_name"] for entry in content["images"]]
    assert [entry["image"] for entry in manifest["images"]] == [names[0], names[-1]]
    for entry in manifest["images"]:
        assert Image.open(folder / entry["file"]).width > 1000
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert run(root) == metrics
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
    flat = flat_metrics(metrics)
    assert flat["bbox/AP"] == metrics["bbox"]["AP"]
    assert all(isinstance(value, float) for value in flat.values())


@pytest.mark.parametrize(("size", "least"), [(SIZE, 0.999), ((96, 192), 0.99), ((64, 64), 0.85)])
def test_what_is_found_in_network_pixels_is_scored_in_raw_ones(
    root: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], least: float
) -> None:
    """In equal images, larger ones, and ones with a border: AP50 is the whole of what the network could be shown."""
    labels = torch.arange(len(CLASSES))
    finder = InstanceFinder(Knowing(root, size), size, labels)  # type: ignore[arg-type]
    monkeypatch.setattr(InstanceFinder, "load", classmethod(lambda cls, folder, device: finder))
    metrics = run(root)
    shown = {name for name, values in metrics["classes"].items() if values["truth"]}
    assert len(shown) >= 3
    assert metrics["mask"]["AP50"] > least * recall(root, size)
    assert metrics["bbox"]["AP50"] > least * recall(root, size)


def recall(root: Path, size: tuple[int, int]) -> float:
    """Mean over the classes of the share of the instances that are large enough to be told apart in a size."""
    known = Knowing(root, size).known
    seen = np.concatenate([instances.labels.numpy() for instances in known])
    content = json.loads((root / "outputs/city/instances/val.json").read_text())
    truth = np.array([entry["category_id"] - 1 for entry in content["annotations"]])
    return float(np.mean([(seen == label).sum() / (truth == label).sum() for label in np.unique(truth)]))


def test_positions_are_spread_from_the_first_to_the_last() -> None:
    assert spread(3, 9) == [0, 4, 8]
    assert spread(5, 2) == [0, 1]
    assert spread(0, 4) == []
    assert spread(2, 1) == [0]


def test_what_is_missing_is_named(root: Path) -> None:
    with pytest.raises(PipelineError, match=r"instance/model\.json.*`dvc repro predict_segmenter@instance`"):
        evaluate_segmenter.run(context_of(root, parse(), "evaluate_segmenter"))
    (root / "outputs/city/instances/val.json").unlink()
    for stage in (predict_segmenter, evaluate_segmenter):
        with pytest.raises(PipelineError, match=r"val\.json cannot be read"):
            stage.run(context_of(root, parse(), stage.__name__.removeprefix("stages.")))
    shutil.rmtree(root / "outputs/teachers/instance")
    with pytest.raises(PipelineError, match="does not hold a whole model"):
        run(root)
