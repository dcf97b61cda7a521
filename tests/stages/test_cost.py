"""The cost of models: counts against closed forms, latency as a median over turns, one measurement per config."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmcv.ops import DeformConv2dPack
from torch import nn

from data.batch import collate
from models.detector import build_detector
from pipeline.graph import StageSpec
from pipeline.params import Params, read_yaml
from pipeline.stage import StageContext, Stop
from pipeline.tracking import NullTracker
from stages import cost
from stages.cost import Cost, MultiplyAdds, device_name, latencies_ms, multiply_adds, parameters_of
from stages.synthetic import RADAR_RETURNS, random_samples
from tests.models.factory import COMPENSATION, GRID, IMAGE, camera_config, fusion_config, lidar_config, simulated_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def params() -> Params:
    """params.yaml with small models on a small grid; two variants share one student."""
    raw = read_yaml(ROOT / "params.yaml")
    raw["grid"] = GRID
    raw["input"]["image"]["size"] = list(IMAGE)
    start = raw["teachers"]["start"]
    raw["teachers"] = {
        "lidar": {**start, "model": lidar_config()},
        "start": {**start, "model": camera_config()},
        "fusion": {**start, "model": fusion_config()},
    }
    models = {"camera": camera_config(), "simulated": simulated_config()}
    raw["students"] = {name: {"start": None, "model": model, "train": start["train"]} for name, model in models.items()}
    raw["variants"] = {
        "baseline": {"student": "camera", "terms": {}},
        "again": {"student": "camera", "terms": {}, "train": {"epochs": 3}},
        "compensated": {"student": "simulated", "terms": {}, "model": COMPENSATION},
    }
    raw["study"] |= {"teachers": ["lidar", "start"], "fusions": ["fusion"], "variants": list(raw["variants"])}
    raw["study"] |= {"stores": [], "segmenters": [], "featured": []}
    raw["stores"] = {}
    return Params.model_validate(raw)


class Small(nn.Module):
    """A convolution of 3x3 and a product, at two names."""

    def __init__(self, convolution: type[nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(convolution(4, 6, 3, padding=1, bias=False))
        self.product = nn.Linear(6, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(self.body(x).mean((2, 3)))


def test_convolutions_and_products_are_counted_by_module() -> None:
    model, x = Small(nn.Conv2d), torch.rand(2, 4, 7, 9)
    with torch.inference_mode(), MultiplyAdds(model) as counted:
        model(x)
    assert counted.of(["Small.body"]) == 2 * 7 * 9 * 6 * 4 * 9
    assert counted.of(["Small.product"]) == 2 * 6 * 5
    assert counted.of() == counted.of(["Small"]) == counted.of(["Small.body", "Small.product"])
    assert parameters_of(model) == 6 * 4 * 9 + 6 * 5


def test_a_deformable_convolution_counts_as_a_plain_one_and_its_offsets() -> None:
    model, x = Small(DeformConv2dPack), torch.rand(2, 4, 7, 9)
    for _ in range(2):  # a counter that has ended counts nothing of the next
        with torch.inference_mode(), MultiplyAdds(model) as counted:
            model(x)
        assert counted.of(["Small.body"]) == 2 * 7 * 9 * 9 * 4 * (6 + 18)
    assert not any(module._forward_hooks for module in model.modules())


def test_products_within_attention_are_counted_without_gradients() -> None:
    """Whatever torch fuses in inference mode, the count is that of training."""
    layer, x = nn.Linear(8, 4), torch.rand(3, 5, 8)
    with torch.inference_mode(), MultiplyAdds(layer) as counted:
        layer(x)
    assert counted.of() == 3 * 5 * 8 * 4


def test_latency_is_the_median_of_what_follows_the_warm_up_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    clock = {"fast": iter([9.0] * 3 + [float(i) for i in range(15)]), "slow": iter([90.0] * 3 + [0.02] * 8 + [5.0] * 7)}

    def seconds(detector: str, batch: object) -> float:
        order.append(detector)
        return next(clock[detector])

    monkeypatch.setattr(cost, "_seconds", seconds)
    assert latencies_ms(["fast", "slow"], None) == [7000.0, 20.0]  # type: ignore[list-item, arg-type]
    assert order == ["fast", "slow"] * 18


def test_the_stage_measures_every_model_once(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[dict[str, Any]] = []
    monkeypatch.setattr(cost, "build_detector", lambda config: built.append(config) or build_detector(config))
    monkeypatch.setattr(cost, "REPEATS", 1)
    context = StageContext(
        "cost", None, params, StageSpec("cost", None, "", {}, {}, ("reports/cost.json",)), tmp_path, tmp_path,
        NullTracker(), Stop(), 0,
    )  # fmt: skip
    cost.run(context)
    content = json.loads((tmp_path / "reports/cost.json").read_text())
    assert {name: list(content[name]) for name in ("teachers", "variants")} == {
        "teachers": ["lidar", "start", "fusion"],
        "variants": ["baseline", "again", "compensated"],
    }
    assert len(built) == 4
    assert content["teachers"]["start"] == content["variants"]["baseline"] == content["variants"]["again"]
    assert (content["image"], content["frames"], content["precision"]) == ([32, 64], 1, "float32")
    assert content["threads"] == torch.get_num_threads()
    student = build_detector(simulated_config(**COMPENSATION))
    numbers = content["variants"]["compensated"]
    assert numbers["parameters"] == parameters_of(student)
    assert numbers["multiply_adds"] == multiply_adds(student.eval(), collate(random_samples(params, 1)))
    assert numbers["multiply_adds"] > content["variants"]["baseline"]["multiply_adds"]
    assert all(Cost(**entry).latency_ms > 0 for name in ("teachers", "variants") for entry in content[name].values())
    assert str(tmp_path) not in json.dumps(content)


def test_made_up_samples_hold_what_the_parameters_say(params: Params) -> None:
    (sample,) = random_samples(params, 1)
    assert sample.images.shape == (1, 6, 3, *IMAGE)
    assert len(sample.radar) == 5 * 6 * RADAR_RETURNS
    assert sample.points[:, :2].abs().max() < GRID["range"]
    bare = params.model_copy(update={"input": params.input.model_copy(update={"radar": False, "frames": 2})})
    (sample,) = random_samples(bare, 1)
    assert (len(sample.images), len(sample.radar)) == (2, 0)


def test_a_cpu_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_name(torch.device("cpu"))
    text = "processor : 0\nmodel name\t: Some CPU\n"
    monkeypatch.setattr(cost, "Path", lambda path: SimpleNamespace(read_text=lambda: text))
    assert device_name(torch.device("cpu")) == "Some CPU"
