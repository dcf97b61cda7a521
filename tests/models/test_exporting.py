"""The parts of models that an exported graph holds in other operators, against what runs otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcv.ops import deform_conv2d
from torch import Tensor, nn

from models.detectors.build import build_detector
from models.detectors.detector import Detector
from models.layers import bev_pool as pooling
from models.layers.bev_pool import bev_pool_by_product, bev_pool_reference
from models.layers.deformable import FullPrecisionDCNv2, FullPrecisionDeformConv, convolve_samples
from models.layers.padded_points import earlier
from tests.models.factory import RADAR_MAP, camera_config, lidar_config, radar_config, random_batch


@contextmanager
def exporting() -> Iterator[None]:
    """As while torch.export traces."""
    with mock.patch("torch.compiler.is_exporting", return_value=True):
        yield


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 20), st.integers(1, 30), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_pooling_by_products_equals_the_definition(
    pixels: int, bins: int, channels: int, cells: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(pixels, channels, generator=generator, dtype=torch.float64)
    depth = torch.rand(pixels, bins, generator=generator, dtype=torch.float64)
    cell = torch.randint(-cells // 3, cells, (pixels, bins), generator=generator)
    expected = bev_pool_reference(features, depth, cell, cells)
    whole = bev_pool_by_product(features, depth, cell, cells)
    with mock.patch.object(pooling, "LARGEST_PRODUCT", 3 * cells):
        parts = bev_pool_by_product(features, depth, cell, cells)
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(parts, expected)


@pytest.mark.parametrize("frames", [1, 2])
def test_a_camera_detector_lifts_the_same_map(frames: int) -> None:
    detector, batch = built(camera_config(frames=frames)), random_batch(2, frames=frames)
    plain = taps(detector, batch, "bev_fused")
    with exporting():
        torch.testing.assert_close(taps(detector, batch, "bev_fused"), plain, rtol=1e-5, atol=1e-6)
    assert plain.abs().max() > 0.05


@pytest.mark.parametrize("config", [radar_config(), camera_config(radar=RADAR_MAP)], ids=["alone", "beside cameras"])
@pytest.mark.parametrize("most", [2, 8])
def test_points_of_a_fixed_number_make_the_same_map(config: dict[str, Any], most: int) -> None:
    """Full pillars leave the last points out; points outside the extent, as padding is, change nothing."""
    voxel = (config.get("radar") or config)["voxel"]
    config = config | (
        {"radar": config["radar"] | {"voxel": voxel | {"max_points": most}}}
        if "radar" in config
        else {"voxel": voxel | {"max_points": most}}
    )
    tap = "bev_fused" if "radar" in config else "bev_lift"
    detector, batch = built(config), random_batch(2)
    batch.radar = [returns * torch.tensor([0.3, 0.3, 1, 1, 1, 1, 1]) for returns in batch.radar]
    plain = taps(detector, batch, tap)
    batch.radar = [torch.cat([returns, torch.full((7, 7), 1e6), -torch.ones(1, 7) * 1e6]) for returns in batch.radar]
    with exporting():
        torch.testing.assert_close(taps(detector, batch, tap), plain, rtol=1e-5, atol=1e-5)
    other = built(config | ({"radar": RADAR_MAP} if "radar" in config else {"voxel": voxel}))
    assert (most == 8) == torch.equal(taps(other, batch, tap), plain), "pillars are full where they hold two points"


def test_no_points_make_an_empty_map() -> None:
    detector, batch = built(radar_config()), random_batch(1)
    batch.radar = [torch.full((5, 7), 1e6)]
    with exporting():
        assert not taps(detector, batch, "bev_lift").any()


def test_a_lift_that_cannot_have_fixed_shapes_says_why() -> None:
    batch = random_batch(1)
    encoder = {"type": "PillarFeatureNet", "feat_channels": [12], "norm_cfg": {"type": "BN1d"}}
    for config, message in (
        (radar_config(encoder=encoder), "PillarFeatureNet and PointPillarsScatter"),
        (radar_config(voxel=lidar_config()["voxel"] | {"max_voxels": 100}), "voxel.max_voxels 100: 120 pillars"),
    ):
        with exporting(), pytest.raises(ValueError, match=message):
            taps(built(config), batch, "bev_lift")


def test_points_before_a_point_are_counted_in_its_pillar() -> None:
    assert earlier(torch.tensor([3, 1, 3, 3, 1, 0])).tolist() == [0, 0, 1, 2, 1, 0]


def test_deformable_convolution_by_samples_equals_mmcvs() -> None:
    """Offsets that leave the map on every side, too."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 6, 5, 9, generator=generator), torch.randn(4, 6, 3, 3, generator=generator)
    offset = 4 * torch.randn(2, 18, 5, 9, generator=generator)
    expected = deform_conv2d(x, offset, weight, 1, 1, 1, 1, 1, False, 1)
    torch.testing.assert_close(convolve_samples(x, offset, weight), expected, rtol=1e-4, atol=1e-4)
    layer = FullPrecisionDeformConv(6)
    nn.init.normal_(layer.conv_offset.weight)
    plain = layer(x)
    with exporting():
        torch.testing.assert_close(layer(x), plain, rtol=1e-4, atol=1e-4)


def test_a_modulated_convolution_says_that_it_stays() -> None:
    layer, x = FullPrecisionDCNv2(6, 8, 3, padding=1), torch.ones(1, 6, 5, 9)
    assert layer(x).shape == (1, 8, 5, 9)
    with exporting(), pytest.raises(ValueError, match="export of FullPrecisionDCNv2: only detectors without dcn"):
        layer(x)


def built(config: dict[str, Any]) -> Detector:
    """A detector in evaluation mode, with running statistics of its own."""
    torch.manual_seed(0)
    detector = build_detector(config)
    for module in detector.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.bias, -0.1, 0.1)
    return detector.eval()


@torch.no_grad()
def taps(detector: Detector, batch: Any, name: str) -> Tensor:
    """One tap of a detector."""
    return detector(batch, (name,)).taps[name]
