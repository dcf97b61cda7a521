"""The teacher-output store: a teacher's taps on disk, by sample token. Format and guarantees: docs/store.md."""

from data.store.layout import DamagedShardError, StaleStoreError, StoreError, StoreIdentity, TapSpec, hash_files
from data.store.reader import Store
from data.store.writer import Plan, StoreWriter, plan

__all__ = [
    "DamagedShardError",
    "Plan",
    "StaleStoreError",
    "Store",
    "StoreError",
    "StoreIdentity",
    "StoreWriter",
    "TapSpec",
    "hash_files",
    "plan",
]
