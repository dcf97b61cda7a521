"""Our pillar encoder against mmdet3d's, where no slot is empty."""

from __future__ import annotations

import torch
from mmdet3d.models.voxel_encoders import PillarFeatureNet

from models.layers.pillars import PointwisePillarNet

SIZE, LIMITS = [0.8, 0.8, 8.0], [-51.2, -51.2, -5.0, 51.2, 51.2, 3.0]


def pillars(count: int, slots: int, full: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    counts = torch.full((count,), slots) if full else torch.randint(1, slots + 1, (count,), generator=generator)
    cells = torch.randint(0, 128, (count, 2), generator=generator)
    coordinates = torch.cat([torch.zeros(count, 2, dtype=torch.long), cells], dim=1).int()
    corner = torch.cat([cells.flip(1) * 0.8 - 51.2, torch.full((count, 1), -5.0), torch.zeros(count, 2)], dim=1)
    voxels = corner[:, None] + torch.rand(count, slots, 5, generator=generator) * torch.tensor([0.8, 0.8, 8, 1, 0.5])
    voxels[torch.arange(slots) >= counts[:, None]] = 0
    return voxels, counts, coordinates


def pair() -> tuple[PointwisePillarNet, PillarFeatureNet]:
    """Both with the same weights; ours take coordinates that are scaled."""
    torch.manual_seed(0)
    ours = PointwisePillarNet(5, [16], SIZE, LIMITS).eval()
    theirs = PillarFeatureNet(5, (16,), voxel_size=SIZE, point_cloud_range=LIMITS, legacy=False).eval()
    layer = theirs.pfn_layers[0]
    layer.linear.weight.data = ours.linear.weight.data / ours.scale
    layer.norm.load_state_dict(ours.norm.state_dict())
    return ours, theirs


def test_full_pillars_have_the_same_features() -> None:
    ours, theirs = pair()
    given = pillars(200, 8, full=True)
    torch.testing.assert_close(ours(*given), theirs(*given), rtol=1e-4, atol=1e-4)


def test_empty_slots_have_no_effect() -> None:
    ours, _ = pair()
    voxels, counts, coordinates = pillars(200, 8, full=False)
    wider = torch.nn.functional.pad(voxels, (0, 0, 0, 5))
    torch.testing.assert_close(ours(wider, counts, coordinates), ours(voxels, counts, coordinates))
    # In training too, where mmdet3d counts them in the batch statistics.
    ours.train()
    torch.testing.assert_close(ours(wider, counts, coordinates), ours(voxels, counts, coordinates))
