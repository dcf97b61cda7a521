"""RADAR: what its map holds, what its detectors read, and that it may be empty."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.detectors.build import build_detector
from models.detectors.detector import Detector
from models.detectors.radar import RadarMap, scaled
from models.layers.grid import Grid
from tests.models.factory import GRID, RADAR_MAP, camera_config, radar_config, random_batch, random_radar

DETECTORS: dict[str, dict[str, Any]] = {"radar": radar_config(), "camera and radar": camera_config(radar=RADAR_MAP)}
SCALE = np.array([1, 1, 1, 20, 10, 10, 0.5])  # m, m, m, dBsm, m/s, m/s, s


@pytest.fixture(params=list(DETECTORS))
def detector(request: pytest.FixtureRequest) -> Detector:
    torch.manual_seed(0)
    return build_detector(DETECTORS[request.param])


def head(detector: Detector, batch: Any) -> Tensor:
    with torch.no_grad():
        return detector.eval()(batch, ["head"]).taps["head"]


def only(batch: Any, *names: str) -> Any:
    """The batch with some attributes; reading another is an error."""
    return SimpleNamespace(**{name: getattr(batch, name) for name in names})


def test_values_are_scaled_and_the_batch_is_left_alone() -> None:
    radar = [torch.tensor([[30.0, -40.0, -1.0, 20.0, 10.0, -5.0, 0.5]]), torch.zeros(0, 7)]
    given = radar[0].clone()
    full, empty = scaled(radar)
    torch.testing.assert_close(full, torch.tensor([[30.0, -40.0, -1.0, 1.0, 1.0, -0.5, 1.0]]))
    assert empty.shape == (0, 7)
    assert torch.equal(radar[0], given)


def by_hand(module: RadarMap, radar: np.ndarray, cell: float) -> np.ndarray:
    """The map [C, H, W] pillar by pillar in float64: decorate, linear, norm with its averages, ReLU, maximum."""
    weight = module.encoder.linear.weight.detach().double().numpy()
    norm = module.encoder.norm
    gain, bias, mean, variance = (
        v.detach().double().numpy() for v in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    )
    size = round(2 * 12.8 / cell)
    made = np.zeros((len(weight), size, size))
    column, row = np.floor((radar[:, :2] + 12.8) / cell).astype(int).T
    for y, x in set(zip(row.tolist(), column.tolist(), strict=True)):
        points = radar[(row == y) & (column == x)]
        center = np.array([(x + 0.5) * cell - 12.8, (y + 0.5) * cell - 12.8, -1.0])
        half_pillar = np.array([cell / 2, cell / 2, 4.0])
        decorated = np.concatenate(
            [
                points[:, :3] / [12.8, 12.8, 4.0],
                points[:, 3:] / SCALE[3:],
                (points[:, :3] - points[:, :3].mean(0)) / half_pillar,
                (points[:, :3] - center) / half_pillar,
            ],
            axis=1,
        )
        values = (decorated @ weight.T - mean) / np.sqrt(variance + norm.eps) * gain + bias
        made[:, y, x] = np.maximum(values, 0).max(0)
    return made


@pytest.mark.parametrize("cell", [0.8, 0.4])
def test_the_map_is_that_of_pillars_by_hand(cell: float) -> None:
    """Also of pillars finer than the grid, of which a cell takes the maximum."""
    torch.manual_seed(0)
    voxel = {"size": [cell, cell], "max_points": 40, "max_voxels": 2000}
    module = RadarMap(Grid(**GRID), voxel, {"type": "PointwisePillarNet", "feat_channels": [6]}).eval()
    for name, value in module.encoder.norm.state_dict().items():
        if value.is_floating_point():
            module.encoder.norm.state_dict()[name].copy_(torch.rand_like(value) + 0.5)
    radar = [random_radar(150, seed=1), random_radar(40, seed=2)]
    made = module(radar)
    assert made.shape == (2, 6, 32, 32)
    factor = round(0.8 / cell)
    for sample, returns in zip(made, radar, strict=True):
        expected = by_hand(module, returns.double().numpy(), cell)
        expected = expected.reshape(6, 32, factor, 32, factor).max((2, 4))
        assert (expected > 0).any()
        torch.testing.assert_close(sample, torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-5)


def test_it_reads_its_sensors_and_nothing_else(detector: Detector) -> None:
    batch = random_batch()
    cameras = ("images", "intrinsics", "image_aug", "lidar_SE3_cam", "bev_aug") if "images" in detector.sensors else ()
    seen = only(batch, "radar", *cameras)
    assert torch.equal(head(detector, seen), head(detector, batch))
    assert detector.sensors == (("images", "radar") if cameras else ("radar",))


@pytest.mark.parametrize("value", range(7))
def test_every_value_of_a_return_matters(detector: Detector, value: int) -> None:
    batch = random_batch()
    before = head(detector, batch)
    batch.radar[0][:, value] *= 0.5
    after = head(detector, batch)
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])


def test_images_matter_beside_radar() -> None:
    detector, batch = build_detector(DETECTORS["camera and radar"]), random_batch()
    before = head(detector, batch)
    batch.images = 255 - batch.images
    assert not torch.equal(head(detector, batch), before)


@pytest.mark.parametrize("counts", [(30, 0), (1, 0), (0, 0)])
def test_few_returns_or_none_train_and_detect(detector: Detector, counts: tuple[int, int]) -> None:
    batch = random_batch()
    batch.radar = [random_radar(count) for count in counts]
    losses = detector.train().loss(detector(batch), batch)
    sum(losses.values()).backward()  # type: ignore[union-attr]
    # On several GPUs a parameter without a gradient would be one that other ranks wait for.
    assert [name for name, p in detector.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert all(value.isfinite().all() for value in detector.state_dict().values())
    with torch.no_grad():
        found = detector.eval().decode(detector(batch))
    assert [sample.boxes.isfinite().all().item() for sample in found] == [True, True]


def test_a_sample_without_returns_has_an_empty_map_and_leaves_the_averages() -> None:
    module = RadarMap(Grid(**GRID), **RADAR_MAP)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert (module([torch.zeros(0, 7), torch.zeros(0, 7)]) == 0).all()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    some = module([random_radar(50), torch.zeros(0, 7)])
    assert (some[0] != 0).any()
    assert (some[1] == 0).all()


def test_a_camera_detector_whose_radar_weights_are_zero_is_the_camera_detector() -> None:
    """RADAR adds its map after the lifted one and changes nothing else: names, sizes or sums."""
    camera, both = build_detector(camera_config()).eval(), build_detector(camera_config(radar=RADAR_MAP)).eval()
    state = camera.state_dict()
    wider = both.state_dict()
    assert [name for name in wider if not name.startswith("radar.")] == list(state)
    changed = [name for name in state if state[name].shape != wider[name].shape]
    assert len(changed) == 1  # the first convolution of the BEV backbone
    padding = wider[changed[0]].shape[1] - state[changed[0]].shape[1]
    assert padding == 6
    state[changed[0]] = nn.functional.pad(state[changed[0]], (0, 0, 0, 0, 0, padding))
    both.load_state_dict({**wider, **state})
    batch = random_batch()
    torch.testing.assert_close(head(both, batch), head(camera, batch))


def test_pillars_that_do_not_fit_the_grid_are_named() -> None:
    batch = random_batch()
    config = camera_config(radar=RADAR_MAP | {"voxel": {"size": [1.6, 1.6], "max_points": 8, "max_voxels": 500}})
    with pytest.raises(ValueError, match="RadarMap: the middle encoder's map has 16 cells a side, the grid 32"):
        build_detector(config)(batch)
