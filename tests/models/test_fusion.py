"""The fusion teacher: each branch reads its own sensor, and nothing in it is the student's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmcv.ops import DeformConv2d, MultiScaleDeformableAttention

from models.detectors.build import build_detector
from models.detectors.detector import Detector
from models.detectors.fusion import ConvFuser
from models.detectors.lidar import LidarMap
from models.layers.deformable import GeometryCompensation
from models.layers.grid import Grid
from tests.models.factory import (
    COMPENSATION,
    GRID,
    fusion_config,
    let_in,
    lidar_config,
    random_batch,
    read_by,
    simulated_config,
)

CAMERA, LIDAR = {"images"}, {"points"}
READS = {
    "pv": CAMERA,
    "depth": CAMERA,
    "bev_lift_camera": CAMERA,
    "bev_view": CAMERA,
    "bev_lift_lidar": LIDAR,
    "bev_fused": CAMERA | LIDAR,
    "bev_neck": CAMERA | LIDAR,
    "head": CAMERA | LIDAR,
}
PILLARS = {key: lidar_config()[key] for key in ("voxel", "encoder")}
COMPENSATING = (GeometryCompensation, MultiScaleDeformableAttention, DeformConv2d)


def teacher(**changes: Any) -> Detector:
    torch.manual_seed(0)
    return build_detector(fusion_config(**changes))


@pytest.mark.parametrize("training", [False, True])
def test_each_branch_reads_its_own_sensor_and_the_head_both(training: bool) -> None:
    assert read_by(teacher().train(training), random_batch()) == READS


@pytest.mark.parametrize("sensed", ["points", "depth"])
def test_lidar_in_the_camera_branch_would_be_seen(sensed: str) -> None:
    """The release's lift, which looks at LiDAR depth."""
    leaky = teacher().eval()
    let_in(leaky.lift, sensed)  # type: ignore[arg-type]
    assert read_by(leaky, random_batch())["bev_lift_camera"] == {"images", sensed}


def test_the_fuser_is_a_convolution_of_both_maps() -> None:
    torch.manual_seed(0)
    fuser = ConvFuser(5, 4).eval()
    mean, variance = torch.rand(4), torch.rand(4) + 0.5
    fuser.norm.load_state_dict({**fuser.norm.state_dict(), "running_mean": mean, "running_var": variance})
    first, second = torch.randn(2, 2, 8, 8), torch.randn(2, 3, 8, 8)
    weight = fuser.conv.weight
    summed = F.conv2d(first, weight[:, :2], padding=1) + F.conv2d(second, weight[:, 2:], padding=1)
    expected = ((summed - mean.view(-1, 1, 1)) / (variance + fuser.norm.eps).sqrt().view(-1, 1, 1)).clamp(min=0)
    torch.testing.assert_close(fuser(first, second), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("staged", [False, True])
def test_the_lidar_branch_is_the_beginning_of_the_lidar_detector(staged: bool) -> None:
    """Its middle encoder's map, or that after the first stage of the backbone."""
    torch.manual_seed(0)
    detector = build_detector(lidar_config()).eval()
    lidar = fusion_config()["lidar"] if staged else {**PILLARS, "channels": 12}
    branch = LidarMap(Grid(**GRID), **lidar).eval()  # type: ignore[arg-type]
    branch.encoder.load_state_dict(detector.encoder.state_dict())  # type: ignore[union-attr]
    batch = random_batch()
    with torch.no_grad():
        expected = detector(batch, ["bev_lift"]).taps["bev_lift"]
        if staged:
            branch.stage.blocks[0].load_state_dict(detector.backbone.blocks[0].state_dict())  # type: ignore
            expected = detector.backbone(detector.lift(batch.points))[0]  # type: ignore[operator]
        assert torch.equal(branch(batch.points), expected)
    assert expected.shape[1] == branch.channels
    assert expected.ne(0).any()


def test_an_empty_point_cloud_is_an_empty_map_beside_the_images() -> None:
    detector = teacher(lidar={**PILLARS, "channels": 12}).eval()
    batch = random_batch()
    batch.points[1] = batch.points[1][:0]
    with torch.no_grad():
        prediction = detector(batch, ["bev_lift_lidar", "head"])
    lidar = prediction.taps["bev_lift_lidar"]
    assert lidar[0].ne(0).any()
    assert not lidar[1].any()
    assert prediction.taps["head"].isfinite().all()


def compensations(detector: Detector) -> list[str]:
    """Modules that compensate, whatever they are called."""
    return [name for name, module in detector.named_modules() if isinstance(module, COMPENSATING)]


def test_the_teacher_compensates_nothing() -> None:
    """The release builds the image plane's into the lift, so that its teacher has it too, untrained."""
    assert compensations(teacher()) == []
    parts = {name.partition(".")[0] for name in teacher().state_dict()}
    assert parts == {"images", "lift", "lidar", "fuser", "bev_backbone", "bev_neck", "head"}
    for plane in COMPENSATION:
        with pytest.raises(TypeError, match=plane):
            teacher(**{plane: COMPENSATION[plane]})
    like_the_release = teacher()
    like_the_release.lift.compensation = GeometryCompensation(8)  # type: ignore[union-attr]
    assert compensations(like_the_release)
    assert compensations(build_detector(simulated_config(**COMPENSATION)))


def test_a_lidar_branch_that_misses_the_grid_is_named() -> None:
    coarse = {**PILLARS, "voxel": {**PILLARS["voxel"], "size": [1.6, 1.6]}, "channels": 12}
    with pytest.raises(ValueError, match="LidarMap: the middle encoder's map has 16 cells a side, the grid 32"):
        teacher(lidar=coarse)(random_batch())


def test_a_tap_that_it_lacks_is_named() -> None:
    with pytest.raises(ValueError, match="BEVFusion has no tap 'bev_lift': it has pv, bev_lift_camera, bev_lift_lidar"):
        teacher()(random_batch(), ["bev_lift"])
