"""Published weights: a folder with model.safetensors and config.json, the dict that the detector is built from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from models.detector import Detector, build_detector
from pipeline.stage import StageError

WEIGHTS: Final = "model.safetensors"
CONFIG: Final = "config.json"


def save_detector(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write weights and config; equal input gives equal bytes (no time, path or revision inside)."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_detector(folder: Path) -> Detector:
    """The published detector in evaluation mode, on the CPU.

    Raises:
        StageError: a file is missing or broken, or the weights are not exactly those of the model in config.json.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise StageError(
            f"{folder} does not hold a whole model ({error}): run the stage that trains it again"
        ) from error
    detector = build_detector(_without_checkpoints(config))
    _fill(detector, folder, weights)
    return detector.eval()


def start_from(detector: Detector, folder: Path, checksum: str) -> None:
    """Give a detector the weights of a published one of the same model.

    Args:
        detector: gets the weights.
        folder: of the published detector.
        checksum: xxh3-128 of its model.safetensors: a start is part of a result, so another file is refused.

    Raises:
        StageError: the file is missing, is another one, or does not fit.
    """
    try:
        content = (folder / WEIGHTS).read_bytes()
    except OSError as error:
        raise StageError(f"the start {folder} has no readable weights ({error}): give a published detector") from error
    found = xxhash.xxh3_128_hexdigest(content)
    if found != checksum:
        raise StageError(
            f"the start {folder / WEIGHTS} has checksum {found}, params.yaml says {checksum}: "
            "put back the file that was meant, or write the new checksum"
        )
    _fill(detector, folder, load(content))


def _without_checkpoints(config: Any) -> Any:
    """The config without `init_cfg`: every weight is about to be replaced, so no pretrained file need be there."""
    if isinstance(config, dict):
        return {key: _without_checkpoints(value) for key, value in config.items() if key != "init_cfg"}
    return [_without_checkpoints(value) for value in config] if isinstance(config, list) else config


def _fill(detector: Detector, folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Set all weights of a detector, and nothing but them."""
    expected = detector.state_dict()
    _check_names(folder, set(expected) - set(weights), set(weights) - set(expected))
    _check_shapes(folder, expected, weights)
    detector.load_state_dict(weights)


def _check_names(folder: Path, missing: set[str], unused: set[str]) -> None:
    if missing or unused:
        raise StageError(
            f"{folder / WEIGHTS} does not fit the model of {CONFIG}: missing {_some(missing)}; unused {_some(unused)}"
        )


def _check_shapes(folder: Path, expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    wrong = [
        f"{name} is {list(weights[name].shape)}, the model has {list(tensor.shape)}"
        for name, tensor in expected.items()
        if weights[name].shape != tensor.shape
    ]
    if wrong:
        raise StageError(f"{folder / WEIGHTS} does not fit the model of {CONFIG}: {'; '.join(wrong[:10])}")


def _some(names: set[str], most: int = 10) -> str:
    listed = ", ".join(sorted(names)[:most]) or "nothing"
    return f"{listed} and {len(names) - most} more" if len(names) > most else listed
