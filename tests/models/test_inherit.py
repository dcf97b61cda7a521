"""Weight inheriting: what a smaller student's weights are, by closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.bevformer import BEVEmbeddings
from models.inherit import embedding, inherited, narrowed, placed, projected


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


def test_fewer_channels_are_the_strongest_directions_at_the_norm_of_all() -> None:
    """Every place lies in a plane of channel space, so two channels hold all distances between places."""
    torch.manual_seed(0)
    flat = torch.linalg.qr(torch.randn(7, 2))[0] @ torch.randn(2, 40)
    small = projected(flat, 2)
    assert float(small.norm()) == pytest.approx(float(flat.norm()), rel=1e-5)
    assert torch.allclose(torch.cdist(small.T, small.T), torch.cdist(flat.T, flat.T), atol=2e-3)
    # A third direction that is weak is what is lost.
    noisy = flat + 1e-3 * torch.randn(7, 40)
    assert torch.allclose(torch.cdist(projected(noisy, 2).T, projected(noisy, 2).T),
                          torch.cdist(flat.T, flat.T), atol=0.02)


def test_projection_does_not_hang_on_signs_and_fills_up_with_zeros() -> None:
    weight = torch.randn(6, 3)
    assert torch.allclose(projected(weight, 4), projected(weight.clone(), 4))
    wide = projected(weight, 9)
    assert wide.shape == (9, 3)
    assert torch.equal(wide[6:], torch.zeros(3, 3))


def test_cameras_stay_and_lose_channels() -> None:
    torch.manual_seed(1)
    cameras = torch.randn(6, 12)
    small = embedding(cameras, torch.Size([6, 8]), of_places=False)
    # Six points need five axes.
    assert torch.allclose(torch.cdist(small, small), torch.cdist(cameras, cameras), atol=2e-3)
    with pytest.raises(ValueError, match="the teacher has 6 of them, the student 5"):
        embedding(cameras, torch.Size([5, 8]), of_places=False)


def test_the_embeddings_of_a_smaller_student() -> None:
    torch.manual_seed(2)
    teacher, student = Student(8, 6), Student(4, 3)
    weights = teacher.state_dict()
    found = {name: inherited(student, name, weights[name]) for name in student.state_dict()}
    assert all(found[name].shape == own.shape for name, own in student.state_dict().items())
    expected = projected(placed(weights["embeddings.queries"], [3, 3]).flatten(1), 4).view(4, 3, 3)
    assert torch.equal(found["embeddings.queries"], expected)
    assert torch.equal(found["embeddings.row"], projected(placed(weights["embeddings.row"], [3]), 2))


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
    [([9, 4, 3, 3], "inherits from one that is not narrower"),
     ([4, 4, 1, 1], r"kernel is \[3, 3\], the student's \[1, 1\]")],
)
def test_what_cannot_be_inherited_is_named(shape: list[int], message: str) -> None:
    student = nn.Module()
    student.conv = nn.Conv2d(shape[1], shape[0], shape[2])
    with pytest.raises(ValueError, match=rf"conv.weight cannot be inherited: .*{message}"):
        inherited(student, "conv.weight", torch.randn(8, 4, 3, 3))
