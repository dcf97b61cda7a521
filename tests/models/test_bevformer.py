"""BEVFormer: its attentions against loops and mmcv's, what it may read, and what it makes of the previous frame."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmcv.ops import MultiScaleDeformableAttention
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import models.layers.bev_attention
from models.detectors.bevformer import BEVEmbeddings, BEVFormer
from models.detectors.build import build_detector
from models.layers.bev_attention import (
    EncoderLayer,
    Samples,
    Sight,
    SpatialCrossAttention,
    TemporalSelfAttention,
    look,
    pick,
    seen_first,
)
from models.layers.grid import Grid
from models.layers.registry import MODELS
from tests.models.factory import bevformer_config, random_batch, read_by, trained

CHANNELS, SIDE, HEADS, POINTS, HEIGHTS = 12, 6, 3, 2, [-1.5, -0.5]
GEOMETRY = ("images", "intrinsics", "image_aug", "lidar_SE3_cam", "bev_aug", "has_previous")


def detector(**changes: Any) -> BEVFormer:
    """A detector at evaluation whose queries choose what they read."""
    torch.manual_seed(0)
    built = build_detector(bevformer_config(**changes))
    assert isinstance(built, BEVFormer)
    trained(built.encoder, 0.1)
    return built.eval()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scene() -> tuple[Any, Sight]:
    """A batch, turned and scaled, and what its cameras see of 6 x 6 pillars."""
    batch = random_batch()
    cos, sin = torch.tensor(0.3).cos(), torch.tensor(0.3).sin()
    batch.bev_aug[1, :2, :2] = torch.stack([torch.stack([cos, -sin]), torch.stack([sin, cos])])
    batch.bev_aug[1, :3] *= 1.1
    return batch, look(Grid(12.8, 25.6 / SIDE).centers(), HEIGHTS, batch, 0)


def bilinear(image: Tensor, x: float, y: float) -> Tensor:
    """A map [C, h, w] at continuous cell coordinates, whole numbers at centres; zeros beyond its edges."""
    height, width = image.shape[1:]
    rows = torch.tensor([max(0.0, 1 - abs(y - row)) for row in range(height)])
    columns = torch.tensor([max(0.0, 1 - abs(x - column)) for column in range(width)])
    return torch.einsum("chw,h,w->c", image, rows, columns)


def pinhole(batch: Any, sample: int, camera: int, point: Tensor) -> tuple[float, float, float]:
    """Pixel and depth of a point of the augmented frame, step by step."""
    lidar = torch.linalg.inv(batch.bev_aug[sample]) @ torch.cat([point, torch.ones(1)])
    ahead = (torch.linalg.inv(batch.lidar_SE3_cam[sample, 0, camera]) @ lidar)[:3]
    pixel = batch.image_aug[sample, 0, camera] @ batch.intrinsics[sample, 0, camera] @ ahead
    return float(pixel[0] / pixel[2]), float(pixel[1] / pixel[2]), float(ahead[2])


def read_pillar(
    attention: SpatialCrossAttention, batch: Any, sample: int, camera: int, value: Tensor, query: Tensor, center: Tensor
) -> tuple[Tensor, bool]:
    """What one query reads in one camera whose values are [C, h, w], point by point; whether it sees the pillar."""
    height, width = value.shape[1:]
    offsets, logits = attention.samples(query)
    weights = logits.flatten(1).softmax(-1).view_as(logits)
    image_height, image_width = batch.images.shape[-2:]
    read, visible, size = torch.zeros(CHANNELS), False, CHANNELS // HEADS
    for place, z in enumerate(HEIGHTS):
        u, v, depth = pinhole(batch, sample, camera, torch.cat([center, torch.tensor([z])]))
        if depth <= 0.1 or not (-0.5 <= u <= image_width - 0.5 and -0.5 <= v <= image_height - 0.5):
            continue
        visible = True
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            for point in range(POINTS):
                x = (u + 0.5) / image_width * width - 0.5 + float(offsets[head, place, point, 0])
                y = (v + 0.5) / image_height * height - 0.5 + float(offsets[head, place, point, 1])
                read[part] += weights[head, place, point] * bilinear(value[part], x, y)
    return read, visible


@torch.no_grad()
def test_cross_attention_is_a_loop_over_cameras_queries_heights_and_points() -> None:
    torch.manual_seed(0)
    attention = trained(SpatialCrossAttention(CHANNELS, HEADS, len(HEIGHTS), POINTS))
    batch, sight = scene()
    query, position, features = draw(2, SIDE**2, CHANNELS), draw(SIDE**2, CHANNELS, seed=1), draw(2, 3, CHANNELS, 4, 8)
    given, views = attention(query, position, features, sight)

    centers = Grid(12.8, 25.6 / SIDE).centers().flatten(0, 1)
    expected, counts = torch.zeros(2, 3, SIDE**2, CHANNELS), torch.zeros(2, SIDE**2)
    for sample in range(2):
        for camera in range(3):
            value = F.linear(features[sample, camera].permute(1, 2, 0), attention.value.weight, attention.value.bias)
            for number in range(SIDE**2):
                chooser = query[sample, number] + position[number]
                read, visible = read_pillar(
                    attention, batch, sample, camera, value.permute(2, 0, 1), chooser, centers[number]
                )
                expected[sample, camera, number] = read
                counts[sample, number] += visible
    assert torch.equal(counts, sight.cameras.float())
    assert {0.0, 1.0} <= set(counts.unique().tolist()), "some pillars are seen and some are not"
    torch.testing.assert_close(views, expected, rtol=1e-4, atol=1e-4)
    mean = expected.sum(1) / counts.clamp(min=1)[..., None]
    torch.testing.assert_close(
        given, F.linear(mean, attention.output.weight, attention.output.bias), rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_self_attention_is_the_mean_of_mmcvs_on_both_maps() -> None:
    torch.manual_seed(0)
    attention = trained(TemporalSelfAttention(CHANNELS, HEADS, POINTS))
    query, position, previous = (
        draw(2, SIDE**2, CHANNELS),
        draw(SIDE**2, CHANNELS, seed=1),
        draw(2, SIDE**2, CHANNELS, seed=2),
    )
    read = []
    for number, value in enumerate((previous, query)):
        theirs = mmcvs(attention, number)
        cells = [[(column + 0.5) / SIDE, (row + 0.5) / SIDE] for row in range(SIDE) for column in range(SIDE)]
        # mmcv's module has one width for queries and values: the values stand in the first half of its channels.
        read.append(
            theirs(
                torch.cat([previous, query + position], dim=-1),
                identity=torch.zeros(1),
                value=torch.cat([value, torch.zeros_like(value)], dim=-1),
                reference_points=torch.tensor(cells).view(1, -1, 1, 2).expand(2, -1, -1, -1),
                spatial_shapes=torch.tensor([[SIDE, SIDE]]),
                level_start_index=torch.tensor([0]),
            )
        )
    mean = torch.stack(read).mean(0)[..., :CHANNELS]
    expected = F.linear(mean, attention.output.weight, attention.output.bias)
    torch.testing.assert_close(attention(query, position, previous), expected, rtol=1e-4, atol=1e-5)


def mmcvs(attention: TemporalSelfAttention, number: int) -> MultiScaleDeformableAttention:
    """mmcv's attention on one of both maps, whose outputs are in the first half of its channels."""
    double = 2 * CHANNELS
    theirs = MultiScaleDeformableAttention(double, HEADS, num_levels=1, num_points=POINTS, dropout=0, batch_first=True)
    samples, size = attention.samples, CHANNELS // HEADS
    theirs.sampling_offsets.weight.data = of_map(samples.offsets.weight, number, 2)
    theirs.sampling_offsets.bias.data = of_map(samples.offsets.bias, number, 2)
    theirs.attention_weights.weight.data = of_map(samples.weights.weight, number, 1)
    theirs.attention_weights.bias.data = of_map(samples.weights.bias, number, 1)
    # A head of theirs has twice our width: ours, then zeros.
    theirs.value_proj.weight.data.zero_()
    theirs.value_proj.bias.data.zero_()
    theirs.output_proj.weight.data.zero_()
    theirs.output_proj.bias.data.zero_()
    for head in range(HEADS):
        ours, there = slice(head * size, (head + 1) * size), slice(2 * head * size, (2 * head + 1) * size)
        theirs.value_proj.weight.data[there, :CHANNELS] = attention.value.weight[ours]
        theirs.value_proj.bias.data[there] = attention.value.bias[ours]
        theirs.output_proj.weight.data[ours, there] = torch.eye(size)
    return theirs


def of_map(weights: Tensor, number: int, width: int) -> Tensor:
    """The rows that belong to one of both maps."""
    return weights.data.unflatten(0, (HEADS, 2, POINTS * width))[:, number].flatten(0, 1)


@torch.no_grad()
def test_only_computing_what_is_seen_changes_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = detector(), random_batch(frames=2)
    taps = ["bev_lift", "bev_prev", "bev_view", "head"]
    sparse = model(batch, taps).taps
    sight = look(model.cells.centers(), model.pillar, batch, 0)
    assert sight.queries.shape[-1] < 0.7 * model.cells.size**2
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert look(model.cells.centers(), model.pillar, batch, 0).positions.shape[2] == model.cells.size**2
    for name, dense in model(batch, taps).taps.items():
        torch.testing.assert_close(dense, sparse[name], rtol=1e-5, atol=1e-5)


def test_all_that_a_camera_sees_is_among_its_queries() -> None:
    visible = torch.rand(2, 3, 40, generator=torch.Generator().manual_seed(0)) < 0.2
    visible[0, 1] = False
    queries = seen_first(visible)
    assert queries.shape == (2, 3, int(visible.sum(-1).max()))
    assert torch.equal(pick(visible, queries).sum(-1), visible.sum(-1))
    assert all(len(set(row.tolist())) == len(row) for row in queries.flatten(0, 1))
    assert seen_first(torch.zeros(1, 1, 5, dtype=torch.bool)).shape == (1, 1, 1)


@torch.no_grad()
def test_the_order_of_the_cameras_changes_nothing() -> None:
    model, batch = detector(), random_batch(frames=2)
    whole = model(batch, ["bev_lift", "bev_view"]).taps
    order = [2, 0, 1]
    for name in ("images", "intrinsics", "image_aug", "lidar_SE3_cam"):
        setattr(batch, name, getattr(batch, name)[:, :, order])
    alike = copy.deepcopy(model)
    alike.embeddings.camera[:3] = model.embeddings.camera[order]
    turned = alike(batch, ["bev_lift", "bev_view"]).taps
    torch.testing.assert_close(turned["bev_lift"], whole["bev_lift"], rtol=1e-5, atol=1e-5)
    views = whole["bev_view"].unflatten(1, (3, -1))[:, order].flatten(1, 2)
    torch.testing.assert_close(turned["bev_view"], views, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(batch, ["bev_lift"]).taps["bev_lift"], whole["bev_lift"], atol=1e-3)


@torch.no_grad()
def test_the_views_average_to_what_the_last_layer_projects() -> None:
    model, batch = detector(), random_batch(frames=2)
    given: list[Tensor] = []
    last = model.encoder.layers[-1].spatial.output
    last.register_forward_hook(lambda module, inputs, output: given.append(inputs[0]))
    views = model(batch, ["bev_view"]).taps["bev_view"].unflatten(1, (3, -1))
    sight = look(model.cells.centers(), model.pillar, batch, 0)
    mean = views.sum(1).flatten(2).transpose(1, 2) / sight.cameras.clamp(min=1)[..., None]
    torch.testing.assert_close(given[-1], mean)
    unseen = sight.cameras == 0
    assert 0 < unseen.sum() < unseen.numel()
    assert not given[-1][unseen].any()
    assert given[-1][~unseen].any(-1).all()


def test_every_parameter_learns_and_steps_reduce_the_loss() -> None:
    torch.manual_seed(0)
    model, batch = build_detector(bevformer_config()), random_batch(frames=2)
    optimiser = torch.optim.AdamW(model.parameters(), 5e-3)
    trace = []
    for _ in range(12):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total = torch.stack(list(model.loss(model(batch), batch).values())).sum()
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        trace.append(float(total))
    assert trace[-1] < 0.8 * trace[0]
    still = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert still == []
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_every_tap_depends_on_images_and_nothing_else() -> None:
    reads = read_by(detector(frames=1), random_batch())
    assert all(read == {"images"} for read in reads.values()), reads


@pytest.mark.parametrize("frames", [1, 2])
def test_nothing_but_images_and_their_geometry_is_needed(frames: int) -> None:
    model, batch = detector(frames=frames), random_batch(frames=frames)
    alone = SimpleNamespace(**{name: getattr(batch, name) for name in GEOMETRY})  # any other attribute is an error
    with torch.no_grad():
        assert torch.equal(model(alone, ["head"]).taps["head"], model(batch, ["head"]).taps["head"])


def test_taps_have_the_declared_channels_on_the_queries_grid() -> None:
    model, batch = detector(), random_batch(frames=2)
    prediction = model(batch, [*model.tap_channels, "head", "boxes"])
    assert model.tap_channels == {
        "pv": 32,
        "bev_lift": 12,
        "bev_prev": 12,
        "bev_view": 72,
        "bev_fused": 12,
        "bev_neck": 32,
    }
    shapes = {name: list(tap.shape) for name, tap in prediction.taps.items()}
    assert shapes == {
        "pv": [2, 3, 32, 4, 8],
        "bev_lift": [2, 12, 8, 8],
        "bev_prev": [2, 12, 8, 8],
        "bev_view": [2, 36, 8, 8],
        "bev_fused": [2, 12, 32, 32],
        "bev_neck": [2, 32, 32, 32],
        "head": [2, 70, 32, 32],
    }, "the batch has three cameras"
    assert not prediction.taps["bev_prev"].requires_grad
    assert prediction.taps["bev_lift"].requires_grad
    assert prediction.depth == ()
    torch.testing.assert_close(
        prediction.taps["bev_fused"], F.interpolate(prediction.taps["bev_lift"], scale_factor=4, mode="bilinear")
    )


@torch.no_grad()
def test_a_sample_without_a_previous_frame_reads_its_own_queries_instead() -> None:
    model, batch = detector(), random_batch(frames=2)
    whole = model(batch, ["bev_lift"]).taps["bev_lift"]
    batch.has_previous[1] = False
    mixed = model(batch, ["bev_lift"]).taps["bev_lift"]
    alone = model_of_one_frame(model)(batch, ["bev_lift"]).taps["bev_lift"]
    torch.testing.assert_close(mixed[0], whole[0])
    torch.testing.assert_close(mixed[1], alone[1])
    assert (mixed[1] - whole[1]).norm() > 0.01 * whole[1].norm()
    batch.images[1, 1] = 255 - batch.images[1, 1]
    torch.testing.assert_close(model(batch, ["bev_lift"]).taps["bev_lift"][1], mixed[1])
    batch.images[0, 1] = 255 - batch.images[0, 1]
    assert not torch.allclose(model(batch, ["bev_lift"]).taps["bev_lift"][0], mixed[0])


def model_of_one_frame(model: BEVFormer) -> BEVFormer:
    """The same weights in a detector that reads the current frame only."""
    single = detector(frames=1)
    single.load_state_dict(model.state_dict())
    return single


@torch.no_grad()
def test_the_previous_map_lies_where_its_cameras_stood() -> None:
    """The same images, taken from a place two cells further along x, make the same map two cells further."""
    model, batch = detector(), random_batch(frames=2)
    model.embeddings.queries.copy_(model.embeddings.queries[:, :1, :1].expand_as(model.embeddings.queries))
    model.embeddings.row.zero_()
    model.embeddings.column.zero_()
    for layer in model.encoder.layers:  # each cell reads itself, so that edges do not matter
        nn.init.zeros_(layer.temporal.samples.offsets.weight)
        nn.init.zeros_(layer.temporal.samples.offsets.bias)
    batch.images[:, 1] = batch.images[:, 0]
    here = model(batch, ["bev_prev"]).taps["bev_prev"]
    batch.lidar_SE3_cam[:, 1, :, 0, 3] += 2 * model.cells.cell
    there = model(batch, ["bev_prev"]).taps["bev_prev"]
    torch.testing.assert_close(there[..., 2:], here[..., :-2], rtol=1e-4, atol=1e-4)
    assert (there - here).norm() > 0.1 * here.norm()


def test_queries_start_on_rays_with_equal_weights() -> None:
    samples = Samples(CHANNELS, heads=4, places=3, points=2)
    offsets, logits = samples(draw(5, CHANNELS))
    assert not logits.any()
    directions = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    for head, direction in enumerate(directions):
        for point in range(2):
            torch.testing.assert_close(
                offsets[:, head, :, point], ((point + 1) * direction).expand(5, 3, 2), rtol=0, atol=1e-6
            )


def test_embeddings_are_named_as_those_who_inherit_them_expect() -> None:
    embeddings = BEVEmbeddings(7, 5)
    assert {name: list(one.shape) for name, one in embeddings.named_parameters()} == {
        "queries": [7, 5, 5],
        "row": [3, 5],
        "column": [4, 5],
        "camera": [6, 7],
    }
    position = embeddings.position().unflatten(0, (5, 5))
    assert position.shape == (5, 5, 7)
    torch.testing.assert_close(position[2, 4], torch.cat([embeddings.row[:, 2], embeddings.column[:, 4]]))


def test_places_are_not_rounded_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """What deformable attention is told and given is float32 under autocast, and the output changes little."""
    plain, dtypes = models.layers.bev_attention.deformable_attention, set()

    def watched(value: Tensor, shape: tuple[int, int], locations: Tensor, weights: Tensor) -> Tensor:
        dtypes.update({value.dtype, locations.dtype, weights.dtype})
        return plain(value, shape, locations, weights)

    monkeypatch.setattr(models.layers.bev_attention, "deformable_attention", watched)
    model, batch = detector(), random_batch(frames=2)
    with torch.no_grad():
        exact = model(batch, ["bev_lift"]).taps["bev_lift"]
        with torch.autocast("cpu", torch.bfloat16):
            half = model(batch, ["bev_lift"]).taps["bev_lift"]
    assert dtypes == {torch.float32}
    assert (half - exact).norm() < 0.05 * exact.norm()


@torch.no_grad()
def test_an_exported_graph_gives_the_same() -> None:
    model, batch = detector(), random_batch(batch_size=1, frames=2)
    names = GEOMETRY

    class Exported(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: Tensor) -> Tensor:
            given = SimpleNamespace(**dict(zip(names, tensors, strict=True)))
            return self.model(given, ["head"]).taps["head"]  # type: ignore[arg-type]

    tensors = tuple(getattr(batch, name) for name in names)
    program = torch.export.export(Exported(), tensors, strict=False)
    used = {str(node.target).partition(".")[2] for node in program.graph.nodes}
    assert used.isdisjoint({"gather.default", "scatter.src"}), "where all queries are computed none is looked up"
    other = random_batch(batch_size=1, frames=2, seed=5)
    other.lidar_SE3_cam[..., 0, 3] += 1.0  # another rig sees other pillars
    given = tuple(getattr(other, name) for name in names)
    torch.testing.assert_close(program.module()(*given), Exported()(*given), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_smaller_images_are_what_it_asked_for() -> None:
    model = detector(image=[32, 64])
    large = random_batch(frames=2, image=(64, 128))
    prediction = model(large, ["pv", "head"])
    assert prediction.taps["pv"].shape == (2, 3, 32, 4, 8)
    assert prediction.taps["head"].shape == (2, 70, 32, 32)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="5 heads do not divide 12 channels: set heads"):
        MODELS.build(bevformer_config(heads=5))
    with pytest.raises(ValueError, match="frames 3 must be 1"):
        MODELS.build(bevformer_config(frames=3))
    with pytest.raises(ValueError, match="built for 2 frames, the batch has 1"):
        detector()(random_batch())


def test_a_layer_keeps_the_width_of_its_queries() -> None:
    layer = EncoderLayer(CHANNELS, HEADS, len(HEIGHTS), POINTS, 20)
    _, sight = scene()
    query, views = layer(
        draw(2, SIDE**2, CHANNELS),
        draw(SIDE**2, CHANNELS),
        draw(2, SIDE**2, CHANNELS),
        draw(2, 3, CHANNELS, 4, 8),
        sight,
    )
    assert query.shape == (2, SIDE**2, CHANNELS)
    assert views.shape == (2, 3, SIDE**2, CHANNELS)


@torch.no_grad()
def test_its_multiply_adds_can_be_counted() -> None:
    model = detector()
    with FlopCounterMode(display=False) as counter:
        model(random_batch(batch_size=1, frames=2))
    value = 2 * CHANNELS**2 * 3 * 4 * 8  # of a layer's cross-attention: three cameras of 4 x 8 cells
    counted = counter.get_flop_counts()["BEVFormer.encoder.layers.0.spatial.value"]
    assert sum(counted.values()) == 2 * value, "in two keyframes"


def test_it_has_no_depth_to_give() -> None:
    former = detector()
    assert "depth" not in former.tap_channels
    with pytest.raises(ValueError, match=r"BEVFormer has no tap 'depth': it has .*bev_lift"):
        former(random_batch(frames=2), ["depth"])
