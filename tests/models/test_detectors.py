"""All detectors: shapes, training signal, and what they may look at."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from models.detectors.build import build_detector
from models.detectors.detector import Detector
from models.layers.bev_pool import bev_pool_reference
from models.layers.depth_net import DepthBins, camera_parameters, depth_loss
from models.layers.images import resized
from models.ports import head_map
from tests.models.factory import (
    CAMERAS,
    COMPENSATION,
    IMAGE,
    RADAR_MAP,
    camera_config,
    fusion_config,
    head_config,
    lidar_config,
    radar_config,
    random_batch,
    second,
    second_fpn,
    simulated_config,
)

CONFIGS: dict[str, tuple[dict[str, Any], int]] = {
    "lidar": (lidar_config(), 1),
    "camera": (camera_config(), 1),
    "camera, two frames": (camera_config(frames=2), 2),
    "radar": (radar_config(), 1),
    "camera and radar": (camera_config(radar=RADAR_MAP), 1),
    "camera and radar, two frames": (camera_config(radar=RADAR_MAP, frames=2), 2),
    "camera, finer cells": (camera_config(downsample=2), 1),
    "fusion": (fusion_config(), 1),
    "simulated fusion": (simulated_config(), 1),
    "simulated fusion, compensated": (simulated_config(**COMPENSATION), 1),
}


@pytest.fixture(params=list(CONFIGS))
def case(request: pytest.FixtureRequest) -> tuple[Detector, Any]:
    torch.manual_seed(0)
    config, frames = CONFIGS[request.param]
    return build_detector(config), random_batch(frames=frames)


def test_every_tap_has_the_declared_channels(case: tuple[Detector, Any]) -> None:
    detector, batch = case
    prediction = detector(batch, [*detector.tap_channels, "head", "boxes"])
    for name, channels in detector.tap_channels.items():
        views = name in ("pv", "depth")
        expected = channels * CAMERAS // 6 if name == "bev_view" else channels  # nuScenes has six
        assert prediction.taps[name].shape[2 if views else 1] == expected
        assert views or prediction.taps[name].shape[-2:] == (32, 32)
    assert prediction.taps["head"].shape == (2, 70, 32, 32)


def test_every_parameter_learns_and_losses_are_finite(case: tuple[Detector, Any]) -> None:
    detector, batch = case
    losses = detector.loss(detector(batch), batch)
    assert all(torch.isfinite(value) for value in losses.values())
    sum(losses.values()).backward()  # type: ignore[union-attr]
    without = [name for name, p in detector.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


def test_losses_are_finite_without_boxes(case: tuple[Detector, Any]) -> None:
    detector, batch = case
    batch.boxes = [boxes[:0] for boxes in batch.boxes]
    batch.labels = [labels[:0] for labels in batch.labels]
    losses = detector.loss(detector(batch), batch)
    assert losses["box"] == 0
    assert torch.isfinite(losses["heatmap"])


def test_a_few_steps_reduce_the_loss(case: tuple[Detector, Any]) -> None:
    detector, batch = case
    optimiser = torch.optim.AdamW(detector.parameters(), 5e-3)
    trace = []
    for _ in range(12):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total = sum(detector.loss(detector(batch), batch).values())
        optimiser.zero_grad()
        total.backward()  # type: ignore[union-attr]
        optimiser.step()
        trace.append(float(total))
    assert trace[-1] < 0.8 * trace[0]


def test_decoded_boxes_are_finite_sorted_and_bounded(case: tuple[Detector, Any]) -> None:
    detector, batch = case
    with torch.no_grad():
        for found in detector.eval().decode(detector(batch)):
            assert found.boxes.shape == (len(found.scores), 9)
            assert len(found.scores) <= 500
            assert found.boxes.isfinite().all()
            assert (found.scores.diff() <= 0).all()
            assert found.labels.dtype == torch.int64


class CameraOnly:
    """What a camera detector may read at evaluation; any other attribute is an error."""

    def __init__(self, batch: Any) -> None:
        for name in ("images", "intrinsics", "image_aug", "lidar_SE3_cam", "bev_aug", "has_previous"):
            setattr(self, name, getattr(batch, name))


@pytest.mark.parametrize("frames", [1, 2])
def test_the_camera_detector_sees_no_lidar_depth_or_box_at_evaluation(frames: int) -> None:
    detector = build_detector(camera_config(frames=frames)).eval()
    batch = random_batch(frames=frames)
    with torch.no_grad():
        whole = detector(batch, ["head"]).taps["head"]
        batch.points = [torch.randn(50, 5) for _ in batch.points]
        batch.depth = torch.rand_like(batch.depth)
        assert torch.equal(detector(batch, ["head"]).taps["head"], whole)
        assert torch.equal(detector(CameraOnly(batch), ["head"]).taps["head"], whole)


def test_the_previous_frame_matters_and_gives_no_gradient() -> None:
    detector = build_detector(camera_config(frames=2)).eval()
    batch = random_batch(frames=2)
    prediction = detector(batch, ["head", "bev_prev", "bev_lift"])
    assert not prediction.taps["bev_prev"].requires_grad
    assert prediction.taps["bev_lift"].requires_grad
    batch.images[:, 1] = 255 - batch.images[:, 1]
    assert not torch.equal(detector(batch, ["head"]).taps["head"], prediction.taps["head"])


def test_a_previous_frame_at_the_same_place_lifts_to_the_same_map() -> None:
    detector = build_detector(camera_config(frames=2)).eval()
    batch = random_batch(frames=2)
    batch.images[:, 1] = batch.images[:, 0]
    taps = detector(batch, ["bev_prev", "bev_lift"]).taps
    assert torch.equal(taps["bev_prev"], taps["bev_lift"])


@pytest.mark.parametrize(("axis", "dim"), [(0, -1), (1, -2)])
def test_the_lift_follows_a_flip_of_the_bev(axis: int, dim: int) -> None:
    detector = build_detector(camera_config()).eval()
    batch = random_batch()
    plain = detector(batch, ["bev_lift"]).taps["bev_lift"]
    batch.bev_aug[:, axis, axis] = -1
    flipped = detector(batch, ["bev_lift"]).taps["bev_lift"]
    # Points on a border between cells may fall to either side.
    different = (flipped - plain.flip(dim)).abs().amax((0, 1)) > 1e-4
    assert different.float().mean() < 0.02
    assert plain.abs().sum() > 0


def test_the_lift_puts_a_pixel_where_its_ray_goes() -> None:
    """Every cell of an image row must land where the pinhole model puts its centre, at every depth.

    Whole numbers are the centres of pixels, so the centre of eight pixels is at 3.5: half a pixel more would move a
    third of the far points to a neighbouring BEV cell.
    """
    detector = build_detector(camera_config())
    batch = random_batch(batch_size=1)
    cells = detector.lift._cells(batch, 0, torch.Size((4, 8))).view(3, 4, 8, 20)[0, 2]  # type: ignore[operator, union-attr]
    depth = torch.arange(20) + 1.5  # centres of the bins; camera 0 looks along +y from (0, 0.5)
    u = torch.arange(8)[:, None] * 8 + 3.5
    column = ((u - 32) / 40 * depth + 12.8).div(0.8, rounding_mode="floor").long()
    row = (0.5 + depth + 12.8).div(0.8, rounding_mode="floor").long().expand_as(column)
    inside = (column >= 0) & (column < 32) & (row < 32)
    seen = cells >= 0  # a ray also leaves the grid through its floor
    assert seen.sum() > 40
    assert torch.equal(cells[seen], (row * 32 + column)[seen])
    assert inside[seen].all()


def test_lidar_flips_with_its_points() -> None:
    """Pillar occupancy of mirrored points is the mirrored occupancy."""
    detector = build_detector(lidar_config()).eval()
    batch = random_batch()
    plain = detector(batch, ["bev_lift"]).taps["bev_lift"] != 0
    batch.points = [points * torch.tensor([-1.0, 1, 1, 1, 1]) for points in batch.points]
    flipped = detector(batch, ["bev_lift"]).taps["bev_lift"] != 0
    assert torch.equal(flipped.any(1), plain.any(1).flip(-1))


def test_an_empty_point_cloud_is_an_empty_map() -> None:
    detector = build_detector(lidar_config()).eval()
    batch = random_batch()
    batch.points = [batch.points[0], batch.points[1][:0]]
    lifted = detector(batch, ["bev_lift"]).taps["bev_lift"]
    assert (lifted[1] == 0).all()
    assert (lifted[0] != 0).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "Nothing"}, "model type 'Nothing' is unknown"),
        ({"grid": {"range": 12.8, "cell": 0.7}}, "whole number of cells"),
        ({"frames": 3}, "frames 3 must be 1"),
        ({"depth_loss_kind": "mse"}, "'bce' or 'ce'"),
        ({"head": head_config(min_radius=[1, 2])}, "min_radius has 2 entries for 10 classes"),
    ],
)
def test_wrong_configs_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_detector(camera_config(**change))


def test_wrong_sizes_are_named() -> None:
    batch = random_batch()
    with pytest.raises(ValueError, match="stride 16 does not describe it"):
        build_detector(camera_config(stride=16))(batch)
    with pytest.raises(ValueError, match="16 cells a side, the grid 32"):
        build_detector(camera_config(bev_neck=second_fpn([16, 16], [0.5, 1])))(batch)
    with pytest.raises(ValueError, match="built for 2 frames, the batch has 1"):
        build_detector(camera_config(frames=2))(batch)
    with pytest.raises(ValueError, match="has no tap 'bev_prev'"):
        build_detector(camera_config())(batch, ["bev_prev"])
    batch.depth = batch.depth[..., :2, :2]
    detector = build_detector(camera_config())
    with pytest.raises(ValueError, match=r"input\.depth_stride"):
        detector.loss(detector(batch), batch)


def test_depth_loss_by_hand() -> None:
    bins = DepthBins(1.0, 5.0, 1.0)
    logits = torch.zeros(1, 1, 4, 1, 3)
    depth = torch.tensor([[[[2.5, 0.0, 9.0]]]])  # bin 1, unknown, beyond the bins
    p = torch.tensor(0.25)
    torch.testing.assert_close(depth_loss(logits, depth, bins, "ce"), -p.log())
    torch.testing.assert_close(depth_loss(logits, depth, bins, "bce"), -p.log() - 3 * (1 - p).log())
    assert depth_loss(logits, torch.zeros_like(depth), bins) == 0


VOXELS = lidar_config(
    voxel={"size": [0.1, 0.1, 0.2], "max_points": 10, "max_voxels": [9000, 12000]},
    encoder={"type": "HardSimpleVFE"},
    middle={
        "type": "SparseEncoder",
        "output_channels": 128,
        "order": ["conv", "norm", "act"],
        "encoder_channels": [[16, 16, 32], [32, 32, 64], [64, 64, 128], [128, 128]],
        "encoder_paddings": [[0, 0, 1], [0, 0, 1], [0, 0, [0, 1, 1]], [0, 0]],
        "block_type": "basicblock",
    },
    backbone=second(256, [1, 2]),
)


def test_voxels_without_spconv_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    importlib.import_module("mmdet3d.models")  # it looks for spconv once, when it is imported
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "spconv" else find(name))
    with pytest.raises(ModuleNotFoundError, match="needs sparse convolutions: run `make setup`"):
        build_detector(VOXELS)


def test_sparse_convolutions_are_the_dense_ones_with_two_threads() -> None:
    build_detector(VOXELS)  # as every model with voxels does, before it computes
    spconv = importlib.import_module("spconv.pytorch")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for seed in range(20):  # nearly all of them are wrong where two threads add them up
            torch.manual_seed(seed)
            cells = (torch.rand(2, 8, 16, 16) < 0.3).nonzero().contiguous()
            features = torch.randn(len(cells), 4)
            layer = spconv.SparseConv3d(4, 8, 3, padding=1, bias=False)
            found = layer(spconv.SparseConvTensor(features, cells.int(), [8, 16, 16], batch_size=2)).dense()
            grid = torch.zeros(2, 8, 16, 16, 4).index_put(tuple(cells.T), features).movedim(-1, 1)
            expected = F.conv3d(grid, layer.weight.movedim(-1, 1), padding=1)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    finally:
        torch.set_num_threads(threads)


def test_voxels_with_spconv_detect_on_the_same_grid() -> None:
    detector = build_detector(VOXELS).eval()
    batch = random_batch()
    with torch.no_grad():
        prediction = detector(batch, ["bev_lift"])
    assert prediction.taps["bev_lift"].shape == (2, 256, 32, 32)
    assert len(detector.decode(prediction)) == 2


def test_the_parts_of_the_cameras_are_what_each_is_lifted_to_alone() -> None:
    """`bev_view` against the pooling by definition, with the depth of all other cameras set to zero; they add up."""
    torch.manual_seed(0)
    detector, batch = build_detector(camera_config()).eval(), random_batch(batch_size=2)
    with torch.no_grad():
        taps = detector(batch, ["bev_lift", "bev_view", "pv"]).taps
        parts = taps["bev_view"].unflatten(1, (CAMERAS, -1))
        lift = detector.lift
        camera = camera_parameters(
            batch.intrinsics[:, 0].flatten(0, 1),
            batch.image_aug[:, 0].flatten(0, 1),
            batch.lidar_SE3_cam[:, 0].flatten(0, 1),
            IMAGE,
        )
        logits, context = lift.depth_net(taps["pv"].flatten(0, 1), camera)
        cells = lift._cells(batch, 0, taps["pv"].shape[-2:], views=False)
        features, depth = (x.permute(0, 2, 3, 1) for x in (context, logits.softmax(1)))
        for number in range(CAMERAS):
            alone = torch.zeros_like(depth)
            alone[number::CAMERAS] = depth[number::CAMERAS]
            count = 2 * lift.cells.size**2
            pooled = bev_pool_reference(features.flatten(0, 2), alone.flatten(0, 2), cells, count)
            expected = pooled.view(2, lift.cells.size, lift.cells.size, -1).permute(0, 3, 1, 2)
            assert expected.abs().sum() > 0
            assert torch.allclose(parts[:, number], expected, atol=1e-5)
    assert torch.allclose(parts.sum(1), taps["bev_lift"], atol=1e-5)


def test_parts_of_the_cameras_need_a_lift_without_convolutions() -> None:
    detector = build_detector(camera_config(downsample=2))
    assert "bev_view" not in detector.tap_channels
    with pytest.raises(ValueError, match="bev_view: the parts of the cameras do not add up behind convolutions"):
        detector(random_batch(), ["bev_view"])


def test_a_detector_with_a_size_of_its_own_sees_the_batch_brought_to_it() -> None:
    torch.manual_seed(0)
    small = build_detector(camera_config(image=[16, 32])).eval()
    plain = build_detector(camera_config()).eval()
    plain.load_state_dict(small.state_dict())
    batch = random_batch()
    at_size = resized(batch, (16, 32), 8)
    with torch.no_grad():
        found, expected = small(batch), plain(at_size)
        assert torch.equal(head_map(found.head), head_map(expected.head))
        assert small.loss(found, batch) == plain.loss(expected, at_size)
