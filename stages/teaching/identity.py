"""What a store must be now: the identity that extraction gives it and that students ask for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import xxhash

from config.params import EXACT_TAPS, Params, StoreParams, TapParams
from data.hashing import MissingFileError, hash_files
from data.store import Encoding, StoreError, StoreIdentity
from stages.inputs.datasets import INDEX

# The code that the contents of a store depend on, beside models and data/store.
CODE: Final = (
    "stages/calibration.py",
    "stages/extract.py",
    "stages/teaching/frozen.py",
    "stages/inputs/datasets.py",
    "stages/inputs/segmenters.py",
    "stages/teaching/serving.py",
    "stages/inputs/weights.py",
    "data/reading/augment.py",
    "data/reading/batch.py",
    "data/reading/blobs.py",
    "data/reading/boxes.py",
    "data/reading/classes.py",
    "data/reading/dataset.py",
    "data/reading/geometry.py",
    "data/reading/index.py",
    "data/reading/coco_json.py",
    "data/reading/instances.py",
    "data/reading/sensors.py",
)


def store_identity(root: Path, params: Params, store: str, weights: str | None = None) -> StoreIdentity:
    """The identity that a store must have now; `weights` stands in for a teacher that is not here.

    Raises:
        StoreError: something that it depends on is missing.
    """
    settings = params.stores[store]
    described = {
        "split": params.data.splits.train,
        "taps": {name: tap.halo for name, tap in settings.cached.items()},
        "score_threshold": settings.score_threshold if settings.cached.keys() & EXACT_TAPS else None,
    }
    if settings.teacher not in params.segmenters:  # a segmenter's images are described beside its weights
        # At evaluation nothing else of `input` has an effect: a student's augmentation may change, its store stays.
        input_ = {"frames", "sweeps", "radar"}
        described |= {
            "input": params.input.model_dump(include=input_) | {"size": params.input.image.size},
            "grid": params.grid.model_dump(),
            "calibration_samples": params.store.calibration_samples,
        }
    sources = [*(root / "models").glob("*.py"), *(root / "data/store").glob("*.py")]
    try:
        return StoreIdentity(
            weights=weights or hash_files(root, [f"outputs/teachers/{settings.teacher}"]),
            preprocessing=xxhash.xxh3_128_hexdigest(json.dumps(described, sort_keys=True).encode()),
            index=hash_files(root, [INDEX]),
            code=hash_files(root, [*CODE, *(str(path.relative_to(root)) for path in sources)]),
            encoding=describe(settings),
        )
    except MissingFileError as error:
        raise StoreError(f"{error}; a store's identity depends on it") from error


def describe(store: StoreParams) -> str:
    """The encodings of the cached taps in words."""
    taps = store.cached.items()
    return "; ".join(name if name in EXACT_TAPS else f"{name}: {encoding(tap)}" for name, tap in taps)


def encoding(tap: TapParams) -> Encoding:
    """The encoding that params.yaml asks for."""
    return Encoding(tap.dtype, tap.channels, tap.cells, tap.compression)
