"""The teacher-output store: a teacher's taps on disk, by sample token. Format and guarantees: docs/store.md."""

from data.store.encoding import Calibration, Encoded, Encoding
from data.store.errors import DamagedShardError, StaleStoreError, StoreError
from data.store.layout import CalibrationFile, StoreIdentity, read_calibration
from data.store.reader import Store, find_damage
from data.store.taps import TapSpec
from data.store.writer import Plan, StoreWriter, mean_bytes, plan

__all__ = [
    "Calibration",
    "CalibrationFile",
    "DamagedShardError",
    "Encoded",
    "Encoding",
    "Plan",
    "StaleStoreError",
    "Store",
    "StoreError",
    "StoreIdentity",
    "StoreWriter",
    "TapSpec",
    "find_damage",
    "mean_bytes",
    "plan",
    "read_calibration",
]
