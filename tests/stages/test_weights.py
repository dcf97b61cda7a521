"""A student can start from published weights, and from no others than those that were meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from models.detector import build_detector
from pipeline.params import load_params
from pipeline.stage import StageError
from stages.weights import WEIGHTS, save_detector, start_from

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return load_params(ROOT / "params.yaml").students["camera"].model


@pytest.fixture
def published(tmp_path: Path, config: dict[str, Any]) -> tuple[Path, str]:
    torch.manual_seed(1)
    save_detector(tmp_path / "start", config, build_detector(config).state_dict())
    return tmp_path / "start", xxhash.xxh3_128_hexdigest((tmp_path / "start" / WEIGHTS).read_bytes())


def test_all_weights_are_taken_over(published: tuple[Path, str], config: dict[str, Any]) -> None:
    torch.manual_seed(2)
    detector, other = build_detector(config), build_detector(config)
    start_from(detector, *published)
    start_from(other, *published)
    pairs = zip(detector.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


def test_another_file_is_refused(published: tuple[Path, str], config: dict[str, Any]) -> None:
    folder, checksum = published
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    detector = build_detector(config)
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    with pytest.raises(StageError, match=f"has checksum [0-9a-f]+, params.yaml says {checksum}"):
        start_from(detector, folder, checksum)
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())


def test_a_missing_file_and_another_model_are_refused(published: tuple[Path, str], config: dict[str, Any]) -> None:
    folder, checksum = published
    wider = {**config, "depth_net": {**config["depth_net"], "context_channels": 40}}
    with pytest.raises(StageError, match="does not fit the model"):
        start_from(build_detector(wider), folder, checksum)
    with pytest.raises(StageError, match="has no readable weights"):
        start_from(build_detector(config), folder / "nowhere", checksum)
