"""Weight inheriting: what a smaller student's weights are, by closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.detectors.bevformer import BEVEmbeddings
from models.inherit import inherited, narrowed, placed
from models.layers.bev_attention import projection


class Student(nn.Module):
    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.embeddings = BEVEmbeddings(channels, size)
        self.conv = nn.Conv2d(2 * channels, channels, 3)
        self.norm = nn.BatchNorm2d(channels)
        self.up = nn.ConvTranspose2d(channels, 5, 2)


def test_equal_sizes_are_copied_bit_for_bit() -> None:
    torch.manual_seed(0)
    teacher, student = Student(8, 6), Student(8, 6)
    for name, weight in teacher.state_dict().items():
        assert torch.equal(inherited(student, name, weight), weight), name


def test_fewer_places_are_block_means_and_keep_the_mean() -> None:
    weight = torch.randn(3, 6, 6)
    pooled = placed(weight, [3, 3])
    assert torch.allclose(pooled[1, 2, 0], weight[1, 4:6, 0:2].mean())
    assert torch.allclose(pooled.mean((1, 2)), weight.mean((1, 2)), atol=1e-6)
    line = placed(weight[:, 0], [2])
    assert torch.allclose(line[2, 1], weight[2, 0, 3:].mean())


def test_more_places_are_interpolated() -> None:
    ramp = torch.arange(4.0).expand(2, 4)
    assert torch.allclose(placed(ramp, [8])[0], torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]))
    mixed = placed(torch.arange(4.0)[:, None].expand(1, 4, 4), [8, 2])  # rows grow in number, columns shrink
    assert mixed.shape == (1, 8, 2)
    assert torch.allclose(mixed[0, :, 0], placed(ramp, [8])[0])


def test_the_embeddings_of_a_smaller_student() -> None:
    torch.manual_seed(2)
    teacher, student = Student(8, 6), Student(4, 3)
    weights = teacher.state_dict()
    found = {name: inherited(student, name, weights[name]) for name in student.state_dict()}
    assert all(found[name].shape == own.shape for name, own in student.state_dict().items())
    assert torch.equal(found["embeddings.queries"], placed(weights["embeddings.queries"], [3, 3])[::2])
    assert torch.equal(found["embeddings.row"], placed(weights["embeddings.row"], [3])[::2])
    assert torch.equal(found["embeddings.camera"], weights["embeddings.camera"][:, ::2])  # not its places, the cameras


def test_attention_of_half_the_width_keeps_half_of_every_head() -> None:
    """A teacher whose dropped channels are dead: each head of the student reads what the teacher's read."""
    torch.manual_seed(4)
    teacher, student = projection(8), nn.Module()
    student.value = projection(4)
    value = inherited(student, "value.weight", teacher.weight)
    cells = torch.randn(5, 8)
    cells[:, 1::2] = 0.0
    heads = nn.functional.linear(cells, teacher.weight).unflatten(-1, (2, 4))
    ours = nn.functional.linear(cells[:, ::2], value / 2).unflatten(-1, (2, 2))
    assert torch.allclose(ours, heads[..., ::2], atol=1e-6)


def test_narrowed_layers_keep_channels_that_belong_together() -> None:
    """Two layers whose dropped channels are dead give the teacher's output exactly, but for the scale of the inputs."""
    torch.manual_seed(3)
    first, second = nn.Conv2d(3, 8, 1), nn.Conv2d(16, 5, 1)  # the second sees the first's output twice
    with torch.no_grad():
        first.weight[1::2], first.bias[1::2] = 0.0, 0.0  # type: ignore[index]
    image = torch.randn(1, 3, 4, 4)
    whole = second(torch.cat([first(image)] * 2, dim=1))
    small, bias = narrowed(first.weight, torch.Size([4, 3, 1, 1]), 1), narrowed(first.bias, torch.Size([4]), 1)
    narrow = nn.functional.conv2d(image, small, bias)
    kernel = narrowed(second.weight, torch.Size([5, 8, 1, 1]), 1)
    got = nn.functional.conv2d(torch.cat([narrow] * 2, dim=1), kernel / 2, second.bias)
    assert torch.allclose(got, whole, atol=1e-6)


def test_transposed_convolutions_sum_over_their_first_axis() -> None:
    teacher, student = nn.Module(), nn.Module()
    teacher.up, student.up = nn.ConvTranspose2d(8, 6, 2), nn.ConvTranspose2d(4, 3, 2)
    found = inherited(student, "up.weight", teacher.up.weight)
    assert torch.equal(found, teacher.up.weight[::2, ::2] * 2)
    assert torch.equal(inherited(student, "up.bias", teacher.up.bias), teacher.up.bias[::2])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([9, 4, 3, 3], "inherits from one that is not narrower"),
        ([4, 4, 1, 1], r"kernel is \[3, 3\], the student's \[1, 1\]"),
    ],
)
def test_what_cannot_be_inherited_is_named(shape: list[int], message: str) -> None:
    student = nn.Module()
    student.conv = nn.Conv2d(shape[1], shape[0], shape[2])
    with pytest.raises(ValueError, match=rf"conv.weight cannot be inherited: .*{message}"):
        inherited(student, "conv.weight", torch.randn(8, 4, 3, 3))
