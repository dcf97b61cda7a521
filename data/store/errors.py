"""What can be wrong with a store."""

from typing import Final

from base.errors import PipelineError

REPAIR: Final = "Mend it with: python -m pipeline cache verify --repair"


class StoreError(PipelineError, RuntimeError):
    """A store cannot be built or read; the message says where, why, and what to do."""


class StaleStoreError(StoreError):
    """A store of other weights, inputs or code."""


class DamagedShardError(StoreError):
    """A shard is truncated or its bytes changed."""
