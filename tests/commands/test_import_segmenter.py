"""Imported segmenters: mmdet as the oracle, pickles only for those who ask for them, and what the parameters get."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from ruamel.yaml import YAML
from safetensors.torch import save_file
from torch import nn

from base.errors import PipelineError
from config.nested import merge
from config.params import Params
from models.detectors.segmenter import build_segmenter
from pipeline.commands.import_segmenter import run
from stages.inputs.segmenters import InstanceFinder
from stages.inputs.weights import CONFIG, WEIGHTS
from tests.models.test_segmenter import small_model
from tests.stages.segmenters import values

NUIMAGES = ["car", "truck", "trailer", "bus", "construction_vehicle", "bicycle", "motorcycle", "pedestrian",
            "traffic_cone", "barrier"]  # fmt: skip
IMAGENET = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "bgr_to_rgb": True}
CAFFE = {"mean": [103.53, 116.28, 123.675], "std": [1.0, 1.0, 1.0], "bgr_to_rgb": False}
BGR_SCALED = {"mean": [103.53, 116.28, 123.675], "std": [60.0, 50.0, 40.0], "bgr_to_rgb": False}
HEIGHT, WIDTH = 64, 96


def mmdet_model(preprocessor: dict[str, Any] | None = None, classes: list[str] = NUIMAGES) -> dict[str, Any]:
    """A whole config of mmdet, with what ours does without."""
    model = small_model()
    for part in ("bbox_head", "mask_head"):
        model["roi_head"][part]["num_classes"] = len(classes)
    model["backbone"]["init_cfg"] = {"type": "Pretrained", "checkpoint": "torchvision://resnet18"}
    if preprocessor is not None:
        model["data_preprocessor"] = {"type": "mmdet.DetDataPreprocessor", "pad_size_divisor": 32, **preprocessor}
    return model


def built(model: dict[str, Any]) -> nn.Module:
    """mmdet's detector with loud random weights, in evaluation mode."""
    plain = ConfigDict(copy.deepcopy(model))
    del plain["backbone"]["init_cfg"]
    torch.manual_seed(3)
    detector = MODELS.build(plain)
    detector.init_weights()
    nn.init.normal_(detector.roi_head.bbox_head.fc_cls.weight, std=1.0)
    if "data_preprocessor" in model:  # as if it had been trained on such images
        detector.backbone.conv1.weight.data /= 60.0 / np.mean(model["data_preprocessor"]["std"])
    return detector.eval()


def found_by_mmdet(detector: nn.Module, rgb: torch.Tensor) -> Any:
    """mmdet's own way from the BGR image that it reads from a file to instances."""
    sample = DetDataSample(metainfo={"img_shape": (HEIGHT, WIDTH), "ori_shape": (HEIGHT, WIDTH),
                                     "scale_factor": (1.0, 1.0)})  # fmt: skip
    with torch.no_grad():
        return detector.test_step({"inputs": [rgb.flip(0)], "data_samples": [sample]})[0].pred_instances


def write(folder: Path, model: dict[str, Any], weights: str = "a.pth", **others: Any) -> tuple[Path, Path]:
    """Checkpoint and config."""
    config = folder / "config.yaml"
    config.write_text(json.dumps({"model": model, **others}))
    state = built(model).state_dict()
    if weights.endswith(".safetensors"):
        save_file(state, folder / weights)
    else:
        torch.save({"state_dict": state, "meta": {"dataset_meta": {"classes": tuple(NUIMAGES)}}}, folder / weights)
    return folder / weights, config


def import_it(root: Path, file: Path, config: Path, name: str = "one", trust: bool = True) -> Path:
    assert run(root, file=file, name=name, config=config, trust_pickle=trust) == 0
    return root / "imported" / name


@pytest.mark.parametrize("preprocessor", [IMAGENET, CAFFE, BGR_SCALED])
def test_it_finds_what_mmdet_finds(tmp_path: Path, preprocessor: dict[str, Any]) -> None:
    """Whatever the normalisation of images that the checkpoint was trained with."""
    model = mmdet_model(preprocessor)
    folder = import_it(tmp_path, *write(tmp_path, model))
    finder = InstanceFinder.load(folder, torch.device("cpu"))
    rgb = torch.randint(0, 256, (3, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    theirs = found_by_mmdet(built(model), rgb)
    ours = finder.segmenter.predict(rgb[None])[0]
    assert len(theirs.scores) >= 3
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=0, atol=2e-4)
    torch.testing.assert_close(ours.boxes, theirs.bboxes, rtol=0, atol=2e-2)
    assert torch.equal(ours.labels, theirs.labels)
    assert (ours.masks == theirs.masks).float().mean() > 0.999


def test_what_is_printed_fits_params_and_the_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, config = write(tmp_path, mmdet_model(IMAGENET), "a.safetensors", classes=NUIMAGES, image=[32, 64])
    folder = import_it(tmp_path, file, config, trust=False)
    head, _, text = capsys.readouterr().out.partition("For params/segmenters.yaml and params/stores.yaml:")
    given = YAML(typ="safe").load(text)
    entry = given["segmenters"]["one"]
    assert entry["start"]["checksum"] in head
    assert entry["start"]["folder"] == "imported/one"
    assert "num_classes" not in text or build_segmenter(entry)
    assert "data_preprocessor" not in text
    assert "torchvision" not in text + (folder / CONFIG).read_text()
    raw = merge(values(), {"study": {"segmenters": ["one"], "stores": ["one"]}}) | given
    params = Params.model_validate(raw)
    assert params.segmenters["one"].train is None
    assert list(params.segmenters["one"].image) == [32, 64]


def test_names_of_coco_are_mapped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = ["person", "car", "kite"]
    file, config = write(tmp_path, mmdet_model(IMAGENET, classes), "a.safetensors", classes=classes)
    folder = import_it(tmp_path, file, config)
    described = json.loads((folder / CONFIG).read_text())
    assert described["class_map"] == {"person": "pedestrian"}
    assert described["image"] == [896, 1600]  # of 900 x 1600, what a backbone takes


def test_an_mmdet_config_in_python(tmp_path: Path) -> None:
    file, _ = write(tmp_path, mmdet_model(CAFFE))
    pipeline = [{"type": "LoadImageFromFile"}, {"type": "Resize", "scale": (1333, 800), "keep_ratio": True}]
    config = tmp_path / "config.py"
    lines = {"model": mmdet_model(CAFFE), "test_pipeline": pipeline, "class_names": NUIMAGES}
    config.write_text("".join(f"{name} = {value!r}\n" for name, value in lines.items()))
    described = json.loads((import_it(tmp_path, file, config) / CONFIG).read_text())
    assert described["image"] == [736, 1312]  # 900 x 1600 at 1333 / 1600
    assert described["classes"] == NUIMAGES
    with pytest.raises(PipelineError, match=r"config\.py: a config in Python runs when it is read: .* --trust-pickle"):
        run(tmp_path, file=file, name="two", config=config, trust_pickle=False)


class Trap:
    """What a pickle can do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_is_not_read_without_being_asked_for(tmp_path: Path) -> None:
    _, config = write(tmp_path, mmdet_model(IMAGENET))
    trap = tmp_path / "trap.pth"
    torch.save({"state_dict": {}, "meta": Trap(tmp_path / "sprung")}, trap)
    with pytest.raises(PipelineError, match=r"trap\.pth: a pickle runs code .* give \.safetensors"):
        run(tmp_path, file=trap, name="one", config=config, trust_pickle=False)
    assert not (tmp_path / "sprung").exists()
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    ("preprocessor", "others", "message"),
    [
        ({"mean": [0.0, 0.0, 0.0], "std": [255.0] * 3, "bgr_to_rgb": True}, {}, "cannot be imported; it must be"),
        (None, {"style": "caffe"}, "a backbone of style caffe, and no data_preprocessor"),
        (IMAGENET, {"base_channels": 16}, "does not fit the model: .* is \\[8, 3, 7, 7\\], the model has \\[16, 3"),
        (IMAGENET, {"depth": 34}, "does not fit the model: missing detector.backbone"),
        (IMAGENET, {"depth": 19}, "cannot be built"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, preprocessor: dict[str, Any] | None, others: dict[str, Any], message: str
) -> None:
    model = mmdet_model(preprocessor)
    file, config = write(tmp_path, model)
    model["backbone"] |= others
    model["neck"]["in_channels"] = [channels * others.get("base_channels", 8) // 8 for channels in (8, 16, 32, 64)]
    config.write_text(json.dumps({"model": model}))
    with pytest.raises(PipelineError, match=message):
        run(tmp_path, file=file, name="one", config=config, trust_pickle=True)
    assert not (tmp_path / "imported").exists()


def test_what_is_missing_or_there_already_is_named(tmp_path: Path) -> None:
    file, config = write(tmp_path, mmdet_model(IMAGENET), "a.safetensors")
    cases = [
        ({}, "neither it nor the checkpoint names the classes"),
        ({"name": "../one"}, "letters, digits, _ and - are allowed"),
        ({"file": tmp_path / "b.safetensors"}, r"b\.safetensors cannot be read"),
        ({"config": tmp_path / "b.yaml"}, r"b\.yaml does not exist"),
        ({"config": tmp_path / "b.toml"}, r"\.yaml, \.json or a \.py of mmdet is allowed"),
    ]
    for changes, message in cases:
        given = {"file": file, "config": config, "name": "one"} | changes
        with pytest.raises(PipelineError, match=message):
            run(tmp_path, trust_pickle=False, **given)
    config.write_text(json.dumps({"classes": NUIMAGES}))
    with pytest.raises(PipelineError, match="has no model"):
        run(tmp_path, file=file, name="one", config=config, trust_pickle=False)
    (tmp_path / "imported/one").mkdir(parents=True)
    with pytest.raises(PipelineError, match="imported/one exists"):
        run(tmp_path, file=file, name="one", config=config, trust_pickle=False)


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    file, config = write(tmp_path, mmdet_model(CAFFE))
    one, two = (import_it(tmp_path, file, config, name) for name in ("one", "two"))
    assert (one / WEIGHTS).read_bytes() == (two / WEIGHTS).read_bytes()
    again = import_it(tmp_path, one / WEIGHTS, one / CONFIG, "three")
    assert (again / WEIGHTS).read_bytes() == (one / WEIGHTS).read_bytes()
