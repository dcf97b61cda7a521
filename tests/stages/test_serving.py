"""Stored maps on their way to a student: nothing but the encoding and the warp comes in between."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from config.sections import TAP_KINDS
from data.reading.augment import bev_matrix
from data.store import Calibration, Encoding, TapSpec
from models.head.targets import TargetEncoder
from models.layers.grid import Grid
from models.layers.warp import warp_bev
from models.ports import Detections
from stages.teaching import kinds
from stages.teaching.serving import box_rows, serve_head, serve_maps

CHANNELS, SIZE, EXTENT, HALO = 6, 24, 12.0, 4.0
INNER = EXTENT - HALO
ENCODINGS = [
    Encoding("float32"),
    Encoding("float16"),
    Encoding("int8"),
    Encoding("float8_e4m3"),
    Encoding("int8", channels=3),
    Encoding("float16", channels=4, cells="occupied"),
    Encoding("int8", channels=5, cells="foreground", compression="zstd"),
]


def matrices(*given: dict[str, float | bool]) -> Tensor:
    return torch.from_numpy(np.stack([bev_matrix(**kinds) for kinds in given])).float()  # type: ignore[arg-type]


def stored(encoding: Encoding, seed: int = 0) -> tuple[Tensor, Tensor | None, Calibration, np.ndarray]:
    """Two samples as a batch holds them, the calibration, and the teacher's maps [2, C, H, W]; none is around zero."""
    rng = np.random.default_rng(seed)
    maps = (rng.normal(1.5, 1, (2, CHANNELS, SIZE, SIZE)) * (rng.random((2, 1, SIZE, SIZE)) < 0.7)).astype(np.float32)
    keeps = rng.random((2, SIZE, SIZE)) < 0.6
    calibration = Calibration.fit(encoding, list(maps), list(keeps))
    spec = TapSpec.dense(maps[0].shape, encoding, EXTENT)
    read = []
    for value, keep in zip(maps, keeps, strict=True):
        chunk = spec.encode({"tap": value, "tap.keep": keep}, "tap", "token", calibration)
        read.append(spec.decode(chunk, "tap", calibration))
    present = torch.from_numpy(keeps) if "tap.present" in read[0] else None
    return torch.from_numpy(np.stack([arrays["tap"] for arrays in read])), present, calibration, maps


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_without_augmentation_a_student_gets_what_is_stored(encoding: Encoding) -> None:
    values, present, calibration, maps = stored(encoding)
    served, valid = serve_maps(values, present, calibration, EXTENT, matrices({}, {}), EXTENT)
    expected = calibration.expand(values).permute(0, 3, 1, 2)
    if present is None:
        assert valid.all()
    else:
        assert torch.equal(valid[:, 0], present)
        expected = expected * valid
    assert served.dtype == torch.float32
    assert torch.equal(served, expected)
    if encoding.dtype.startswith("float") and encoding.channels is None:
        tolerance = {"float32": 0, "float16": 1e-3, "float8_e4m3": 0.07}[encoding.dtype]
        torch.testing.assert_close(served, torch.from_numpy(maps), rtol=tolerance, atol=0.01 * (tolerance > 0))


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_flips_are_exact_and_each_sample_has_its_own(encoding: Encoding) -> None:
    values, present, calibration, _ = stored(encoding)
    plain, there = serve_maps(values, present, calibration, EXTENT, matrices({}, {}), INNER)
    aug = matrices({"flip_x": True}, {"flip_y": True})
    served, valid = serve_maps(values, present, calibration, EXTENT, aug, INNER)
    assert served.shape == (2, CHANNELS, 16, 16)
    for i, dim in enumerate((-1, -2)):
        assert torch.equal(served[i], plain[i].flip(dim))
        assert torch.equal(valid[i], there[i].flip(dim))


@given(st.integers(0, len(ENCODINGS) - 1), st.floats(-180, 180), st.floats(0.8, 1.2), st.booleans())
@settings(max_examples=60, deadline=None)
def test_expanding_after_the_warp_is_expanding_before_it(which: int, degrees: float, scale: float, flip: bool) -> None:
    values, present, calibration, _ = stored(ENCODINGS[which])
    aug = matrices({"degrees": degrees, "scale": scale}, {"degrees": degrees / 2, "flip_x": flip})
    served, valid = serve_maps(values, present, calibration, EXTENT, aug, INNER)
    first = calibration.expand(values).permute(0, 3, 1, 2)
    expected, inside = warp_bev(first, aug, EXTENT, INNER, present)
    assert torch.equal(valid, inside)
    torch.testing.assert_close(served, expected * valid, rtol=1e-4, atol=1e-4)
    assert (served.permute(0, 2, 3, 1)[~valid[:, 0]] == 0).all()


def test_what_is_stored_is_not_changed() -> None:
    values, present, calibration, _ = stored(Encoding("float32"))
    before = values.clone()
    serve_maps(values, present, calibration, EXTENT, matrices({"degrees": 20.0}, {}), EXTENT)
    assert torch.equal(values, before)


def test_autocast_does_not_reach_what_is_served() -> None:
    values, present, calibration, _ = stored(Encoding("int8", channels=3))
    aug = matrices({"degrees": 10.0}, {"scale": 1.05})
    plain, _ = serve_maps(values, present, calibration, EXTENT, aug, INNER)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = serve_maps(values, present, calibration, EXTENT, aug, INNER)
    assert torch.equal(plain, cast)


def test_boxes_above_the_threshold_become_rows() -> None:
    boxes = torch.arange(27.0).view(3, 9)
    rows = box_rows(Detections(boxes, torch.tensor([0.9, 0.5, 0.1]), torch.tensor([4, 0, 7])), 0.5)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, torch.cat([boxes[:2], torch.tensor([[0.9, 4.0], [0.5, 0.0]])], 1))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_head_map_keeps_its_halo_out_and_its_values(dtype: str) -> None:
    targets = TargetEncoder(Grid(INNER, 1.0), (1, 2), (1,) * 3)
    maps = np.random.default_rng(0).normal(0, 2, (2, 23, SIZE, SIZE)).astype(np.float32)
    calibration = Calibration.fit(Encoding(dtype), list(maps), [None, None])
    spec = TapSpec.dense(maps[0].shape, Encoding(dtype), EXTENT)
    chunks = [spec.encode({"head": sample}, "head", "token", calibration) for sample in maps]
    values = torch.from_numpy(np.stack([spec.decode(chunk, "head", calibration)["head"] for chunk in chunks]))
    aug = matrices({}, {"degrees": 22.5})
    served, valid = serve_head(values, calibration, EXTENT, aug, targets)
    assert served.dtype == torch.float32
    assert served.shape == (2, 23, 16, 16)
    assert valid.all()
    expected = torch.from_numpy(maps[0, :, 4:-4, 4:-4].astype(dtype).astype(np.float32))
    torch.testing.assert_close(served[0], expected, rtol=0, atol=1e-6)
    assert not torch.isclose(served[1], expected).any(0).all()


def test_every_kind_of_tap_that_can_be_asked_for_is_served() -> None:
    assert kinds.KINDS.keys() == TAP_KINDS.keys()
    assert all(TAP_KINDS[name].exact == isinstance(kind, kinds.Exact) for name, kind in kinds.KINDS.items())
