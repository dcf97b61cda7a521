"""RoIAlign against mmcv's operator, whatever the memory layout of the map."""

from __future__ import annotations

import pytest
import torch
from mmcv.ops import RoIAlign as MmcvRoIAlign
from torch import Tensor

from models.layers.roi_align import RoIAlign


def maps(channels_last: bool = False) -> Tensor:
    x = torch.randn(3, 5, 16, 22, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def rois(count: int = 40) -> Tensor:
    """Boxes of images of 128 x 176 pixels, some of them partly outside."""
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * torch.tensor([190.0, 140.0]) - 10
    side = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 90
    image = torch.randint(0, 3, (count, 1), generator=generator)
    return torch.cat([image, corner, corner + side], dim=1)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("samples", [0, 1, 2])
@pytest.mark.parametrize("shape", [7, (4, 6)])
def test_it_is_mmcvs_operator(samples: int, shape: int | tuple[int, int], channels_last: bool) -> None:
    reference, ours = maps().requires_grad_(), maps(channels_last).requires_grad_()
    expected = MmcvRoIAlign(shape, 0.125, samples)(reference, rois())
    given = RoIAlign(shape, 0.125, samples)(ours, rois())
    torch.testing.assert_close(given, expected)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (given * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(ours.grad, reference.grad)


def test_linear_maps_are_read_exactly() -> None:
    """Of a map that says where its cells lie in pixels, a box's cells say where they lie themselves."""
    centre = [(torch.arange(n) + 0.5) * 8 for n in (16, 22)]
    where = torch.stack(torch.meshgrid(*centre, indexing="ij"))[None]
    read = RoIAlign((2, 4), 0.125, 1)(where, torch.tensor([[0.0, 20.0, 30.0, 60.0, 70.0]]))[0]
    assert read[0, :, 0].tolist() == pytest.approx([40.0, 60.0])
    assert read[1, 0].tolist() == pytest.approx([25.0, 35.0, 45.0, 55.0])


@pytest.mark.parametrize("samples", [0, 2])
def test_no_boxes_give_no_features(samples: int) -> None:
    assert RoIAlign(7, 0.125, samples)(maps(), rois(0)).shape == (0, 5, 7, 7)
