"""`import-segmenter`: an mmdet instance segmenter that was trained elsewhere becomes imported/<name>."""

from __future__ import annotations

import io
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import ValidationError
from ruamel.yaml import YAML
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from base.errors import PipelineError
from config.files import read_yaml
from config.sections import COARSEST_STRIDE, ImportParams, SegmenterParams
from data.reading.classes import CATEGORY_TO_CLASS, CLASSES
from models.layers.images import IMAGE_MEAN, IMAGE_STD
from stages.context import publish
from stages.inputs.segmenters import PREFIX, detection_names, make_segmenter, segmenter_config
from stages.inputs.weights import WEIGHTS, checksum_of, fill, save_detector

IMPORTED: Final = Path("imported")
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
RAW: Final = (900, 1600)  # height, width of nuScenes' and nuImages' images
# Of a config, what only a training or a download needs.
DROPPED: Final = ("data_preprocessor", "init_cfg", "pretrained", "_scope_")
OTHER_NAMES: Final = {"person": "pedestrian"}  # of COCO


def run(root: Path, *, file: Path, name: str, config: Path, trust_pickle: bool) -> int:
    """Write imported/<name>, print its checksum and what the parameters need."""
    folder = IMPORTED / name
    if not NAME.fullmatch(name):
        raise PipelineError(f"--name {name!r}: letters, digits, _ and - are allowed, a letter or digit first")
    if (root / folder).exists():
        raise PipelineError(f"{folder} exists: remove it, or choose another --name")
    described = read_config(config, trust_pickle)
    weights, meta = read_weights(file, trust_pickle)
    settings = settings_of(described, meta, config)
    model = make_segmenter(segmenter_config(settings))
    fill(model, adapted(weights, described["model"], config), file)
    with tempfile.TemporaryDirectory() as made:
        save_detector(Path(made) / name, segmenter_config(settings), model.state_dict())
        publish(Path(made) / name, root / folder)
    checksum = checksum_of((root / folder / WEIGHTS).read_bytes())
    print(f"{folder / WEIGHTS}: checksum {checksum}\n\nFor params/segmenters.yaml and params/stores.yaml:\n")
    print(lines(name, folder, checksum, settings))
    return 0


def read_weights(file: Path, trust_pickle: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights by name and the notes beside them, of a checkpoint of mmdet or a safetensors file.

    Raises:
        PipelineError: it cannot be read, or is a pickle that nobody vouched for.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file), {}
        _check_trust(file, trust_pickle, "a pickle runs code when it is read")
        content = torch.load(file, map_location="cpu", weights_only=False)
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, AttributeError, ImportError) as error:
        raise PipelineError(f"{file} cannot be read: {error}") from error
    weights = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise PipelineError(f"{file} holds no weights: expected a dict of tensors, or one under 'state_dict'")
    return dict(weights), dict(content.get("meta") or {})


def read_config(file: Path, trust_pickle: bool) -> dict[str, Any]:
    """A config with `model`, and where it has them `classes`, `class_map` and `image`: YAML, JSON, or one of mmdet.

    Raises:
        PipelineError: it cannot be read, has no model, or is Python that nobody vouched for.
    """
    if file.suffix == ".py":
        _check_trust(file, trust_pickle, "a config in Python runs when it is read")
        found = _python_config(file)
    elif file.suffix in (".yaml", ".yml", ".json"):  # JSON is YAML
        found = read_yaml(file)
    else:
        raise PipelineError(f"--config {file}: .yaml, .json or a .py of mmdet is allowed")
    if not isinstance(found.get("model"), dict):
        raise PipelineError(f"--config {file} has no model: expected the dict of an mmdet detector under 'model'")
    return found


def settings_of(config: Mapping[str, Any], meta: Mapping[str, Any], file: Path) -> SegmenterParams:
    """The entry of `segmenters` for a config and the notes of its checkpoint, without its start.

    Raises:
        PipelineError: nothing says the names of the classes, they hold no detection class, or a value is not allowed.
    """
    noted = meta.get("dataset_meta") or {}
    classes = config.get("classes") or noted.get("classes") or noted.get("CLASSES") or meta.get("CLASSES")
    if not classes:
        raise PipelineError(
            f"--config {file}: neither it nor the checkpoint names the classes: write them as 'classes'"
        )
    given = config.get("class_map")
    class_map = guessed_map(classes) if given is None else dict(given)
    detection_names(list(classes), class_map)
    image = config.get("image") or fitting_size(RAW)
    start = ImportParams(folder="", checksum="")  # known when it is written
    model = plain(config["model"])
    try:
        return SegmenterParams(image=image, classes=list(classes), class_map=class_map, model=model, start=start)
    except ValidationError as error:
        raise PipelineError(f"--config {file}: {error}") from error


def guessed_map(classes: list[str]) -> dict[str, str]:
    """Detection classes of names that are not theirs but are known: nuScenes' categories, COCO's person."""
    known = CATEGORY_TO_CLASS | OTHER_NAMES
    return {name: known[name] for name in classes if name not in CLASSES and name in known}


def fitting_size(size: tuple[int, int]) -> tuple[int, int]:
    """The largest size that a backbone takes within a height and width."""
    height, width = (length - length % COARSEST_STRIDE for length in size)
    return height, width


def plain(value: Any) -> Any:
    """A part of a config as JSON has it, without what only a training or a download needs."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items() if key not in DROPPED}
    return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def adapted(weights: Mapping[str, Tensor], model: Mapping[str, Any], file: Path) -> dict[str, Tensor]:
    """Weights of an mmdet detector under the names, and for the normalisation of images, that segmenters have.

    A checkpoint may want other images than ours, RGB normalised by ImageNet's mean and standard deviation. With the
    same mean, another scale or order of the colours is a factor and an order of the first kernel's channels; padding
    is zero before and after.

    Raises:
        PipelineError: another mean, or no way to tell.
    """
    if all(name.startswith(PREFIX) for name in weights):
        return dict(weights)
    result = {PREFIX + name: weight for name, weight in weights.items() if not name.startswith("data_preprocessor.")}
    scale, order = _images_of(model, file)
    if scale == [1.0, 1.0, 1.0] and order == [0, 1, 2]:
        return result
    first = [name for name, weight in result.items() if weight.ndim == 4 and weight.shape[1] == 3]
    if len(first) != 1:
        raise PipelineError(f"{file}: no single kernel reads the three colours: {', '.join(first) or 'none'}")
    kernel = result[first[0]].float()
    result[first[0]] = (kernel * torch.tensor(scale).view(1, 3, 1, 1))[:, order].contiguous()
    return result


def _images_of(model: Mapping[str, Any], file: Path) -> tuple[list[float], list[int]]:
    """Our scale over a model's by its channels, and which of its channels is our red, green and blue."""
    given = model.get("data_preprocessor")
    if given is None:
        if (model.get("backbone") or {}).get("style") == "caffe":
            raise PipelineError(
                f"--config {file}: a backbone of style caffe, and no data_preprocessor: add it with mean, std and "
                "bgr_to_rgb (usually [103.53, 116.28, 123.675], [1, 1, 1], false)"
            )
        return [1.0, 1.0, 1.0], [0, 1, 2]
    order = [0, 1, 2] if given.get("bgr_to_rgb") or given.get("rgb_to_bgr") else [2, 1, 0]
    mean, std = (given.get(key) or [default] * 3 for key, default in (("mean", 0.0), ("std", 1.0)))
    if any(abs(mean[order[k]] - IMAGE_MEAN[k]) > 0.01 for k in range(3)):
        raise PipelineError(
            f"--config {file}: data_preprocessor.mean {mean} cannot be imported; it must be {list(IMAGE_MEAN)} in RGB"
        )
    return [IMAGE_STD[order[k]] / std[k] for k in range(3)], order


def lines(name: str, folder: Path, checksum: str, settings: SegmenterParams) -> str:
    """The entry of `segmenters`, and of a store that reads it."""
    start = {"folder": str(folder), "checksum": checksum}
    entry = settings.model_dump(mode="json") | {"start": start, "train": None}
    store = {"teacher": name, "score_threshold": 0.3, "taps": {"inst2d": {"serve": "cached-exact"}}}
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.width = None, 120
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    stream = io.StringIO()
    yaml.dump({"segmenters": {name: json.loads(json.dumps(entry))}, "stores": {name: store}}, stream)
    return stream.getvalue()


def _check_trust(file: Path, trust_pickle: bool, why: str) -> None:
    if not trust_pickle:
        raise PipelineError(f"{file}: {why}: give .safetensors and .yaml, or, if you trust it, add --trust-pickle")


def _python_config(file: Path) -> dict[str, Any]:
    """mmdet's config in Python: its model, classes and the size of its test images."""
    from mmengine.config import Config

    try:
        config = Config.fromfile(str(file), import_custom_modules=False)
    except Exception as error:  # it is a program and may fail in any way
        raise PipelineError(f"--config {file} cannot be read: {error}") from error
    model = config.get("model")
    found: dict[str, Any] = {"model": None if model is None else model.to_dict()}
    found["classes"] = (
        (config.get("metainfo") or {}).get("classes") or config.get("classes") or config.get("class_names")
    )
    scale = next(_scales(config.get("test_pipeline") or []), None)
    if scale:
        factor = min(max(scale) / max(RAW), min(scale) / min(RAW))
        found["image"] = fitting_size((round(RAW[0] * factor), round(RAW[1] * factor)))
    return found


def _scales(steps: Any) -> Iterator[tuple[int, int]]:
    """What the steps of an mmdet pipeline scale images to."""
    for step in steps if isinstance(steps, (list, tuple)) else []:
        for key in ("scale", "img_scale"):
            if isinstance(given := step.get(key), (list, tuple)) and len(given) == 2:
                yield given[0], given[1]
        yield from _scales(step.get("transforms"))
