"""What a store must be now: the identity that extraction gives it and that students ask for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import xxhash

from config.params import Params
from config.sections import StoreParams, tap_kind
from data.hashing import MissingFileError, hash_files
from data.store import StoreError, StoreIdentity
from stages.context import INDEX
from stages.teaching.kinds import kind_of

# The code that the contents of a store depend on: what dvc.yaml lists for `extract`, but for what says what it cost.
CODE: Final = (
    "data/reading",
    "data/store",
    "models",
    "stages/calibration.py",
    "stages/extract.py",
    "stages/inputs",
    "stages/teaching",
    "training/loading.py",
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
        "score_threshold": settings.score_threshold if any(tap_kind(name).exact for name in settings.cached) else None,
    }
    if settings.teacher not in params.segmenters:  # a segmenter's images are described beside its weights
        # At evaluation nothing else of `input` has an effect: a student's augmentation may change, its store stays.
        input_ = {"frames", "sweeps", "radar"}
        described |= {
            "input": params.input.model_dump(include=input_) | {"size": params.input.image.size},
            "grid": params.grid.model_dump(),
            "calibration_samples": params.store.calibration_samples,
        }
    sources = [file for path in CODE for file in sorted((root / path).rglob("*.py")) or [root / path]]
    try:
        return StoreIdentity(
            weights=weights or hash_files(root, [f"outputs/teachers/{settings.teacher}"]),
            preprocessing=xxhash.xxh3_128_hexdigest(json.dumps(described, sort_keys=True).encode()),
            index=hash_files(root, [INDEX]),
            code=hash_files(root, [str(path.relative_to(root)) for path in sources]),
            encoding=describe(settings),
        )
    except MissingFileError as error:
        raise StoreError(f"{error}; a store's identity depends on it") from error


def describe(store: StoreParams) -> str:
    """The encodings of the cached taps in words."""
    return "; ".join(kind_of(name).words(name, tap) for name, tap in store.cached.items())
