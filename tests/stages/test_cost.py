"""The cost of models: counts and memory against closed forms, medians over turns, one measurement per config."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmcv.ops import DeformConv2dPack
from torch import nn

from config.graph import StageSpec
from config.params import Params
from data.reading.batch import collate
from models.detectors.build import build_detector
from results.tracking.runs import NullTracker
from stages import cost
from stages.context import StageContext, Stop
from stages.cost import (
    MultiplyAdds,
    Turns,
    device_name,
    measure,
    multiply_adds,
    parameters_of,
    pass_seconds,
    peak_memory,
)
from stages.synthetic import RADAR_RETURNS, random_samples
from tests.models.factory import COMPENSATION, GRID, IMAGE, camera_config, fusion_config, lidar_config, simulated_config
from tests.params_files import read_params

ROOT = Path(__file__).resolve().parents[2]


FUSIONS = {"fusion": {"lidar": "lidar", "camera": "start"}}


@pytest.fixture(scope="module")
def params() -> Params:
    """The parameters with small models on a small grid; two variants share one student."""
    raw = read_params(ROOT)
    raw["grid"] = GRID
    raw["input"]["image"]["size"] = list(IMAGE)
    start = raw["teachers"]["start"]
    raw["teachers"] = {
        "lidar": {**start, "model": lidar_config()},
        "start": {**start, "model": camera_config()},
        "fusion": {**start, "model": fusion_config()},
        "large": {**start, "model": camera_config(frames=2)},
    }
    models = {"camera": camera_config(), "simulated": simulated_config()}
    raw["students"] = {name: {"start": None, "model": model, "train": start["train"]} for name, model in models.items()}
    raw["variants"] = {
        "baseline": {"student": "camera", "terms": {}},
        "again": {"student": "camera", "terms": {}, "train": {"epochs": 3}},
        "compensated": {"student": "simulated", "terms": {}, "model": COMPENSATION},
    }
    raw["study"] |= {"teachers": ["lidar", "start"], "fusions": FUSIONS, "variants": list(raw["variants"])}
    raw["study"] |= {
        "large": {"large": {"camera": "start"}},
        "stores": [],
        "segmenters": [],
        "featured": [],
        "baselines": [],
    }
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


class Holding(nn.Module):
    """Holds 1000 numbers, then these and 3000, then the latter and 500, returns the last; 1 << 20 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1 << 20))

    def forward(self, batch: Any) -> torch.Tensor:
        first = torch.empty(1000)
        second = torch.empty(3000)
        del first
        return torch.empty(500) if len(second) else second


def test_memory_is_what_a_pass_holds_at_once_beside_weights_and_input() -> None:
    batch = SimpleNamespace(images=torch.empty(1 << 20))
    for _ in range(2):
        assert peak_memory(Holding(), batch) == 4 * 4000  # type: ignore[arg-type]


def test_memory_is_measured_without_a_word_on_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    peak_memory(Holding(), SimpleNamespace(images=torch.empty(0)))  # type: ignore[arg-type]
    assert capfd.readouterr() == ("", "")


def test_a_pass_takes_the_median_of_what_follows_the_warm_up_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    clock = {"fast": iter([9.0] * 3 + [float(i) for i in range(15)]), "slow": iter([90.0] * 3 + [0.02] * 8 + [5.0] * 7)}

    def seconds(detector: str, batch: object) -> float:
        order.append(detector)
        return next(clock[detector])

    monkeypatch.setattr(cost, "_seconds", seconds)
    assert pass_seconds(["fast", "slow"], None, Turns(3, 15)) == [7.0, 0.02]  # type: ignore[list-item, arg-type]
    assert order == ["fast", "slow"] * 18


class Timed(nn.Linear):
    """A product that says in which precision it was made."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.seen: set[torch.dtype] = set()

    def forward(self, batch: Any) -> torch.Tensor:
        made = super().forward(batch.images)
        self.seen.add(made.dtype)
        return made


def test_speed_is_measured_in_every_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: Any = {size: SimpleNamespace(images=torch.rand(size, 4)) for size in (1, 8)}

    def seconds(detector: nn.Module, batch: Any) -> float:
        half = detector(batch).dtype == torch.bfloat16
        return {1: 0.004, 8: 0.016}[len(batch.images)] / (2 if half else 1)

    monkeypatch.setattr(cost, "_seconds", seconds)
    model: Any = Timed()
    (found,) = measure([model], batches, [torch.float32, torch.bfloat16])
    assert model.seen == {torch.float32, torch.bfloat16}
    assert found.numbers() == {
        "parameters": 20, "multiply_adds": 16, "latency_ms": 4.0, "throughput_1": 250.0, "throughput_8": 500.0,
        "peak_memory": 16, "latency_ms_bfloat16": 2.0, "throughput_1_bfloat16": 500.0, "throughput_8_bfloat16": 1000.0,
        "peak_memory_bfloat16": found.speeds["bfloat16"].peak_memory,
    }  # fmt: skip


def test_the_stage_measures_every_model_once(params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[dict[str, Any]] = []
    monkeypatch.setattr(cost, "build_detector", lambda config: built.append(config) or build_detector(config))
    monkeypatch.setattr(cost, "TURNS", {1: Turns(0, 1), 8: Turns(0, 1)})
    context = StageContext(
        "cost", None, params, StageSpec("cost", None, "", {}, {}, ("reports/cost.json",)), tmp_path, tmp_path,
        NullTracker(), Stop(), 0,
    )  # fmt: skip
    cost.run(context)
    content = json.loads((tmp_path / "reports/cost.json").read_text())
    assert {name: list(content[name]) for name in ("teachers", "variants")} == {
        "teachers": ["lidar", "start", "fusion", "large"],
        "variants": ["baseline", "again", "compensated"],
    }
    assert len(built) == 5
    # The previous frame's images are there for all models, and only the one that reads them pays for them.
    assert content["teachers"]["large"]["multiply_adds"] > 1.2 * content["teachers"]["start"]["multiply_adds"]
    assert content["teachers"]["start"] == content["variants"]["baseline"] == content["variants"]["again"]
    assert (content["image"], content["frames"], content["precisions"]) == ([32, 64], 2, ["float32"])
    assert content["repeats"] == {"1": 1, "8": 1}
    assert content["threads"] == torch.get_num_threads()
    student = build_detector(simulated_config(**COMPENSATION))
    numbers = content["variants"]["compensated"]
    assert numbers["parameters"] == parameters_of(student)
    assert numbers["multiply_adds"] == multiply_adds(student.eval(), collate(random_samples(params, 1)))
    assert numbers["multiply_adds"] > content["variants"]["baseline"]["multiply_adds"]
    keys = ("parameters", "multiply_adds", "latency_ms", "throughput_1", "throughput_8", "peak_memory")
    for entry in [*content["teachers"].values(), *content["variants"].values()]:
        assert tuple(entry) == keys
        assert min(entry.values()) > 0
        assert entry["throughput_1"] == pytest.approx(1e3 / entry["latency_ms"], rel=1e-2)
    assert str(tmp_path) not in json.dumps(content)


def test_made_up_samples_hold_what_the_parameters_say(params: Params) -> None:
    (sample,) = random_samples(params, 1)
    assert sample.images.shape == (2, 6, 3, *IMAGE)
    assert len(sample.radar) == 5 * 6 * RADAR_RETURNS
    assert sample.points[:, :2].abs().max() < GRID["range"]
    bare = params.model_copy(update={"input": params.input.model_copy(update={"radar": False, "frames": 1})})
    (sample,) = random_samples(bare, 1)
    assert (len(sample.images), len(sample.radar)) == (1, 0)


def test_a_cpu_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_name(torch.device("cpu"))
    text = "processor : 0\nmodel name\t: Some CPU\n"
    monkeypatch.setattr(cost, "Path", lambda path: SimpleNamespace(read_text=lambda: text))
    assert device_name(torch.device("cpu")) == "Some CPU"
