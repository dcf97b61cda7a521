"""Encodings of dense maps: what each keeps exactly, what it loses at most, and that equal maps give equal bytes."""

from __future__ import annotations

import itertools
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data.store import Calibration, Encoded, Encoding, StoreError, TapSpec
from data.store.encoding import CELLS, CODECS, DTYPES, check_filled
from tests.data.store_builder import ROOT

Map = NDArray[np.float32]
EVERY = [Encoding(*combination) for combination in itertools.product(DTYPES, (None, 3), CELLS, CODECS)]
SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.tuples(st.integers(3, 6), st.integers(1, 9), st.integers(1, 9))  # C, H, W; bits that fill no whole bytes too


def make_map(seed: int, shape: tuple[int, ...] = (6, 7, 9)) -> Map:
    """Values of very different sizes per channel; about half of the cells are empty."""
    rng = np.random.default_rng(seed)
    values = rng.normal(rng.normal(size=(shape[0], 1, 1)), 1, shape) * 10 ** rng.uniform(-3, 2, (shape[0], 1, 1))
    return (values * (rng.random(shape[1:]) < 0.5)).astype(np.float32)


def make_keep(seed: int, shape: tuple[int, ...] = (6, 7, 9)) -> NDArray[np.bool_]:
    return np.random.default_rng([seed, 1]).random(shape[1:]) < 0.4


def served(value: Map, encoding: Encoding, calibration: Calibration, keep: Any = None) -> tuple[Map, Any]:
    """What a student gets [C, H, W], and the cells that are present."""
    spec = TapSpec.dense(value.shape, encoding, 25.6)
    read = spec.decode(spec.encode({"map": value, "map.keep": keep}, "map", "a", calibration), "map", calibration)
    stored = read["map"]
    assert stored.shape == spec.shape
    assert stored.dtype == encoding.array_dtype
    assert stored.flags.writeable
    return calibration.expand(spec.tensor(stored)).permute(2, 0, 1).numpy(), read.get("map.present")


def stored(value: Map, encoding: Encoding, calibration: Calibration, keep: Any = None) -> Encoded:
    spec = TapSpec.dense(value.shape, encoding, 25.6)
    return spec.encode({"map": value, "map.keep": keep}, "map", "a", calibration)


# --- what is exact


@given(SEEDS, SIZES)
def test_float32_is_exact(seed: int, shape: tuple[int, ...]) -> None:
    value, encoding = make_map(seed, shape), Encoding("float32")
    result, present = served(value, encoding, Calibration.fit(encoding, [value]))
    np.testing.assert_array_equal(result, value)
    assert present is None


@given(SEEDS, SIZES, st.sampled_from(list(CODECS)))
def test_float16_is_numpys(seed: int, shape: tuple[int, ...], compression: str) -> None:
    value, encoding = make_map(seed, shape), Encoding("float16", compression=compression)
    result, _ = served(value, encoding, Calibration.fit(encoding, [value]))
    np.testing.assert_array_equal(result, value.astype(np.float16).astype(np.float32))


@given(SEEDS, SIZES, st.sampled_from(list(DTYPES)), st.sampled_from([None, 3]), st.sampled_from(list(CODECS)))
def test_occupied_loses_nothing_more(
    seed: int, shape: tuple[int, ...], dtype: str, channels: int | None, compression: str
) -> None:
    value, every = make_map(seed, shape), Encoding(dtype, channels)
    occupied = replace(every, cells="occupied", compression=compression)
    calibration = Calibration.fit(every, [value])
    expected, _ = served(value, every, calibration)
    result, present = served(value, occupied, calibration)
    np.testing.assert_array_equal(result, expected)
    assert present is None
    empty = ~value.any(0)
    assert (result[:, empty] == 0).all()
    kept = stored(value, replace(occupied, compression="none"), calibration).size - -(-empty.size // 8)
    assert kept == np.count_nonzero(~empty) * TapSpec.dense(shape, every, 1.0).bytes(0) // empty.size


@given(SEEDS, SIZES, st.sampled_from(list(DTYPES)), st.sampled_from([None, 3]), st.sampled_from(list(CODECS)))
def test_foreground_is_what_was_kept(
    seed: int, shape: tuple[int, ...], dtype: str, channels: int | None, compression: str
) -> None:
    value, keep, every = make_map(seed, shape), make_keep(seed, shape), Encoding(dtype, channels)
    foreground = replace(every, cells="foreground", compression=compression)
    calibration = Calibration.fit(foreground, [value], [keep])
    expected, _ = served(value, every, calibration)
    result, present = served(value, foreground, calibration, keep)
    np.testing.assert_array_equal(present, keep)
    np.testing.assert_array_equal(result, expected * keep)


@pytest.mark.parametrize("encoding", EVERY, ids=str)
def test_zero_stays_zero(encoding: Encoding) -> None:
    value, keep = make_map(0), make_keep(0)
    value[2] = 0  # a dead channel
    value[3] = np.abs(value[3])  # zero is the lowest value
    value[4] = -np.abs(value[4])  # the highest
    calibration = Calibration.fit(encoding, [value], [keep])
    result, _ = served(value, encoding, calibration, keep)
    assert (result[:, ~value.any(0)] == 0).all()
    assert not served(np.zeros_like(value), encoding, calibration, keep)[0].any()
    if encoding.channels is None:
        assert (result[value == 0] == 0).all()


@pytest.mark.parametrize("encoding", EVERY, ids=str)
def test_compression_changes_bytes_not_values(encoding: Encoding) -> None:
    value, keep = make_map(1, (6, 40, 40)), make_keep(1, (6, 40, 40))
    calibration = Calibration.fit(encoding, [value], [keep])
    plain = replace(encoding, compression="none")
    np.testing.assert_array_equal(
        served(value, encoding, calibration, keep)[0], served(value, plain, calibration, keep)[0]
    )
    chunks = [bytes(stored(value, e, calibration, keep).data) for e in (encoding, plain)]
    assert (chunks[0] == chunks[1]) == (encoding == plain)


# --- what is lost


@given(SEEDS)
def test_int8_is_within_half_a_step(seed: int) -> None:
    values, encoding = [make_map(seed), make_map(seed + 1)], Encoding("int8")
    calibration = Calibration.fit(encoding, values)
    assert set(np.unique(calibration.zero)) <= set(range(-128, 128))
    for value in values:
        error = np.abs(served(value, encoding, calibration)[0] - value)
        assert (error <= 0.50001 * calibration.scale[:, None, None]).all()


@given(SEEDS)
def test_float8_is_within_half_a_step(seed: int) -> None:
    value, encoding = make_map(seed), Encoding("float8_e4m3")
    calibration = Calibration.fit(encoding, [value])
    error = np.abs(served(value, encoding, calibration)[0] - value)
    # Three bits behind the point; below 2^-6 steps of 2^-9.
    step = np.maximum(np.abs(value) / 16, calibration.scale[:, None, None] * 2.0**-10)
    assert (error <= step * 1.00001).all()
    bits = stored(value, encoding, calibration)
    held = torch.frombuffer(bytearray(bits.data), dtype=torch.float8_e4m3fn).float().abs().view(-1, 6).amax(0)
    assert held[torch.from_numpy(value.any((1, 2)))].eq(448).all()


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3"])
def test_what_lies_outside_the_range_is_clipped(dtype: str) -> None:
    value, encoding = np.abs(make_map(0)), Encoding(dtype)
    calibration = Calibration.fit(encoding, [value])
    result, _ = served(value * 100, encoding, calibration)
    top = value.max((1, 2))
    np.testing.assert_allclose(result.max((1, 2)), top, rtol=1e-5)
    assert np.isfinite(result).all()


@given(SEEDS, st.integers(1, 6))
@settings(max_examples=40)
def test_components_lose_the_discarded_eigenvalues(seed: int, channels: int) -> None:
    spread = np.array([1, 3, 0.3, 2, 1, 0.1])[:, None, None]
    values = [np.random.default_rng([seed, i]).normal(1, spread, (6, 8, 8)).astype(np.float32) for i in (0, 1)]
    encoding = Encoding("float32", channels)
    calibration = Calibration.fit(encoding, values)
    assert calibration.basis is not None
    np.testing.assert_allclose(calibration.basis @ calibration.basis.T, np.eye(channels), atol=1e-6)
    assert (calibration.basis[np.arange(channels), np.abs(calibration.basis).argmax(1)] > 0).all()
    cells = np.concatenate([value.reshape(6, -1).T for value in values]).astype(np.float64)
    eigenvalues = np.linalg.eigvalsh(cells.T @ cells)  # ascending
    results = [served(value, encoding, calibration)[0].astype(np.float64) for value in values]
    lost = sum(float(((result - value) ** 2).sum()) for result, value in zip(results, values, strict=True))
    share = eigenvalues[: 6 - channels].sum() / eigenvalues.sum()
    assert lost / float((cells**2).sum()) == pytest.approx(share, abs=1e-9, rel=1e-4)
    if channels == 6:
        np.testing.assert_allclose(results, values, atol=1e-5)


# --- calibration


def test_calibration_sees_the_kept_cells_only() -> None:
    value, keep = make_map(0), make_keep(0)
    wild = value.copy()
    wild[:, ~keep] = 1e4
    for dtype in ("int8", "float8_e4m3"):
        for channels in (None, 3):
            fits = [Calibration.fit(Encoding(dtype, channels, "foreground"), [v], [keep]) for v in (value, wild)]
            np.testing.assert_array_equal(fits[0].scale, fits[1].scale)
    none = Calibration.fit(Encoding("int8", 3, "foreground"), [value], [np.zeros_like(keep)])
    assert (none.scale == 1).all()


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(StoreError, match="at least one map"):
        Calibration.fit(Encoding(), [])
    with pytest.raises(StoreError, match="channels 7 of a tap: the teacher's map has 6"):
        Calibration.fit(Encoding(channels=7), [make_map(0)])
    with pytest.raises(StoreError, match="channels 7 of a tap: the teacher's map has 6"):
        TapSpec.dense((6, 8, 8), Encoding(channels=7), 25.6)
    value = make_map(0)
    value[0, 0, 0] = np.nan
    with pytest.raises(StoreError, match="not finite"):
        Calibration.fit(Encoding("int8", 2), [value])
    one = np.ones(3, np.float32)
    with pytest.raises(StoreError, match=r"expected scale \[K\]"):
        Calibration(one, one[:2])
    with pytest.raises(StoreError, match="not positive"):
        Calibration(one * 0, one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float64"}, "dtype 'float64' of a tap: allowed are float32, float16, int8, float8_e4m3"),
        ({"channels": 0}, "channels 0 of a tap"),
        ({"cells": "some"}, "cells 'some' of a tap: allowed are all, occupied, foreground"),
        ({"compression": "gzip"}, "compression 'gzip' of a tap: allowed are none, lz4, zstd"),
    ],
)
def test_encodings_that_do_not_exist_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(StoreError, match=message):
        Encoding(**change)


def test_float8_without_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "float8_e4m3fn")
    with pytest.raises(StoreError, match=r"dtype float8_e4m3 of a tap: torch .* lacks it"):
        Encoding("float8_e4m3")
    Encoding("int8")


def test_encodings_in_words() -> None:
    assert str(Encoding()) == "float16, all channels, all cells"
    assert str(Encoding("int8", 48, "occupied", "zstd")) == "int8, 48 channels, occupied cells, zstd"


def test_expand_takes_bits_and_floats_and_ignores_autocast() -> None:
    value, encoding = make_map(0), Encoding("float8_e4m3", 3)
    spec, calibration = TapSpec.dense(value.shape, encoding, 1.0), Calibration.fit(encoding, [value])
    bits = torch.from_numpy(spec.decode(stored(value, encoding, calibration), "map", calibration)["map"])
    expected = calibration.expand(bits)
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(calibration.expand(bits.view(torch.float8_e4m3fn).float()), expected, rtol=0, atol=0)
    again = pickle.loads(pickle.dumps(calibration))
    assert again._constants == {}
    torch.testing.assert_close(again.expand(bits[None]), expected[None], rtol=0, atol=0)


# --- equal input, equal bytes

PRINT_HASH = """
import numpy as np, xxhash
from data.store import Calibration, Encoding, TapSpec
from data.store.layout import CalibrationFile, StoreIdentity
rng = np.random.default_rng(0)
maps = [np.maximum(rng.normal(size=(256, 128, 128)) + rng.normal(size=(256, 1, 1)), 0).astype("f4") for _ in range(3)]
encoding = Encoding("int8", 48, "occupied", "zstd")
taps = {"map": TapSpec.dense((256, 128, 128), encoding, 1.0)}
fits = {"map": Calibration.fit(encoding, maps)}
state = xxhash.xxh3_64(CalibrationFile(StoreIdentity("w", "p", "i", "c", "e"), taps, fits).dump())
for value in maps:
    state.update(taps["map"].encode({"map": value}, "map", "a", fits["map"]).data)
print(state.hexdigest())
"""


def test_bytes_do_not_depend_on_process_or_threads() -> None:
    hashes = set()
    for threads in ("1", "2"):
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        environment = os.environ | dict.fromkeys(names, threads)
        command = [sys.executable, "-c", PRINT_HASH]
        done = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        hashes.add(done.stdout)
    assert len(hashes) == 1


@pytest.mark.parametrize("encoding", EVERY, ids=str)
def test_equal_maps_give_equal_bytes(encoding: Encoding) -> None:
    value, keep = make_map(2), make_keep(2)
    transposed = np.asfortranarray(value)  # the same values, laid out otherwise
    calibrations = [Calibration.fit(encoding, [v], [keep]) for v in (value, transposed)]
    chunks = [stored(v, encoding, c, keep) for v, c in zip((value, transposed), calibrations, strict=True)]
    assert bytes(chunks[0].data) == bytes(chunks[1].data)
    assert chunks[0].size == chunks[1].size


# --- chunks that lie


COMPRESSED = [e for e in EVERY if e.compression != "none" and e.channels is None and e.dtype in ("float16", "int8")]


def decode(chunk: Encoded, encoding: Encoding) -> None:
    """As a reader does on its first read."""
    value = make_map(3)
    calibration = Calibration.fit(encoding, [value], [make_keep(3)])
    spec = TapSpec.dense(value.shape, encoding, 1.0)
    spec.decode(chunk, "map", calibration)
    check_filled(chunk, encoding)


@pytest.mark.parametrize("encoding", COMPRESSED, ids=str)
def test_a_chunk_of_another_size_is_refused(encoding: Encoding) -> None:
    value, keep = make_map(3), make_keep(3)
    chunk = stored(value, encoding, Calibration.fit(encoding, [value], [keep]), keep)
    decode(chunk, encoding)
    for size in (chunk.size - 1, chunk.size + 1, chunk.size // 2, 0, -1, 10**15):
        with pytest.raises(ValueError, match=r"decompress|declares|bytes"):
            decode(chunk._replace(size=size), encoding)
    for data in (b"", bytes(chunk.data)[:-5], b"nonsense" * 9):
        with pytest.raises(ValueError, match=r"decompress|bytes"):
            decode(chunk._replace(data=data), encoding)


@pytest.mark.parametrize("cells", ["occupied", "foreground"])
def test_a_bitmap_must_agree_with_the_rows(cells: str) -> None:
    value, keep = make_map(3), make_keep(3)
    encoding = Encoding("int8", cells=cells)
    chunk = stored(value, encoding, Calibration.fit(encoding, [value], [keep]), keep)
    data = bytearray(chunk.data)
    data[0] ^= 0x80
    with pytest.raises(ValueError, match=r"its bitmap has \d+ cells, and \d+ bytes follow it"):
        decode(chunk._replace(data=bytes(data)), encoding)
    with pytest.raises(ValueError, match="its bitmap has"):
        decode(Encoded(bytes(data[:3]), 3), encoding)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "float8_e4m3"])
@pytest.mark.parametrize("cells", ["all", "occupied"])
@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
def test_what_is_decoded_can_be_changed(dtype: str, cells: str, compression: str) -> None:
    """Batches are made of it without a copy, which torch wants to be able to write to."""
    value = np.random.default_rng(0).random((4, 8, 8), np.float32)
    spec = TapSpec.dense((4, 8, 8), Encoding(dtype, None, cells, compression), 1.0)
    calibration = Calibration.fit(Encoding(dtype, None, cells, compression), [value])
    chunk = spec.encode({"tap": value}, "tap", "token", calibration)
    kept = type(chunk)(np.frombuffer(bytearray(chunk.data), np.uint8), chunk.size)  # as the reader gives it
    assert spec.decode(kept, "tap", calibration)["tap"].flags.writeable
