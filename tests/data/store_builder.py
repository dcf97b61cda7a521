"""Builds a small store, in a test's process or as a script: python store_builder.py FOLDER [SECONDS_PER_SAMPLE]."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data.reading.coco_json import encode_masks  # noqa: E402
from data.reading.instances import CameraInstances, StoredInstances, pack  # noqa: E402
from data.store import Calibration, Encoding, StoreIdentity, StoreWriter, TapSpec  # noqa: E402

IDENTITY = StoreIdentity(weights="w1", preprocessing="p1", index="i1", code="c1", encoding="bev_lift: float16; boxes")
COMPACT = Encoding("int8", channels=2, cells="foreground", compression="lz4")
TAPS = {
    "bev_lift": TapSpec.dense((4, 8, 8), Encoding(), extent=25.6),
    "bev_neck": TapSpec.dense((4, 8, 8), COMPACT, extent=25.6),
    "boxes": TapSpec.boxes(),
    "inst2d": TapSpec.instances(),
}
TOKENS = [f"token-{i:02d}" for i in range(22)]
SHARD = 4


def arrays(token: str) -> dict[str, NDArray[Any]]:
    """Outputs of a sample: two maps, the cells that the second keeps, 0 to 4 boxes, and 0 to 2 instances."""
    number = int(token[-2:])
    rng = np.random.default_rng(number)
    return {
        "bev_lift": rng.normal(3, 2, (4, 8, 8)).astype(np.float32),
        "boxes": rng.normal(size=(number % 5, 11)).astype(np.float32),
        "bev_neck": rng.normal(0, 1, (4, 8, 8)).astype(np.float32),
        "bev_neck.keep": rng.random((8, 8)) < 0.3,
        "inst2d": pack(instances(rng, number % 3)),
    }


def instances(rng: np.random.Generator, count: int) -> StoredInstances:
    """Instances with masks of noise in the second of two cameras with images of 6 x 9 pixels."""
    masks = encode_masks(rng.random((count, 6, 9)) < 0.5)
    corners = np.sort(rng.random((count, 2, 2)).astype(np.float32), 1).reshape(count, 4)
    scores = rng.random(count).astype(np.float32)
    none = CameraInstances(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32), [])
    found = CameraInstances(corners, np.arange(count), scores, masks)
    return StoredInstances([none, found], np.stack([np.eye(3)] * 2), (6, 9))


def calibrate(taps: dict[str, TapSpec], tokens: list[str]) -> dict[str, Calibration]:
    """Fit the dense taps to some samples."""
    samples = [arrays(token) for token in tokens]
    return {
        tap: Calibration.fit(spec.encoding, [s[tap] for s in samples], [s.get(f"{tap}.keep") for s in samples])
        for tap, spec in taps.items()
        if spec.encoding is not None
    }


CALIBRATION = calibrate(TAPS, TOKENS[::4])


def build(folder: Path, *, seconds: float = 0.0, tokens: list[str] = TOKENS, **changes: Any) -> list[int]:
    """Build what is missing; returns the shards that were written."""
    settings: dict[str, Any] = {"identity": IDENTITY, "taps": TAPS, "shard_samples": SHARD, "calibration": CALIBRATION}
    settings |= changes

    def outputs(tokens: list[str]) -> Iterator[tuple[str, dict[str, NDArray[Any]]]]:
        for token in tokens:
            time.sleep(seconds)
            yield token, arrays(token)

    with StoreWriter(folder, tokens=tokens, **settings) as writer:
        written = writer.missing()
        for shard in written:
            writer.write(shard, outputs(writer.shards[shard]))
            print("finished", shard, flush=True)
        if writer.world == 1:
            writer.finish()
    return written


if __name__ == "__main__":
    build(Path(sys.argv[1]), seconds=float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
