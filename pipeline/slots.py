"""Slots of Prefect's concurrency limit `gpu`, which all flows of one server share.

A limit counts, and shows what waits for what; which device a stage gets is for its lease to say (gpus.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from base.environment import cores
from pipeline import gpus

LIMIT = "gpu"
LEASE_SECONDS = 60.0  # Prefect's least: so long after a kill -9 the slots of a flow are free again
POLL_SECONDS = 2.0
_asking = threading.Lock()  # stages of one flow ask one after the other


def of_this_machine() -> int:
    """Stages that this machine carries at once: one per GPU, without a GPU two, or one on a single core."""
    return len(gpus.visible_gpus()) or min(2, cores())


@contextmanager
def held(count: int, waiting: Callable[[str], None], stopped: Callable[[], bool]) -> Iterator[None]:
    """Hold `count` slots of the limit, or all that it has if these are fewer; nothing where the server has no limit.

    A stage that needs more slots than are free waits holding none. Raises InterruptedError when `stopped` becomes true.
    """
    with ExitStack() as stack:
        told = False
        while count and not _taken(stack, count):
            if not told:
                waiting(f"waiting for slots of the limit {LIMIT!r}: other stages hold them")
                told = True
            if stopped():
                raise InterruptedError("the run is being stopped")
            time.sleep(POLL_SECONDS)
        try:
            yield
        finally:
            with suppress(Exception):  # a server that is away must not fail a stage that is done: the lease runs out
                stack.close()


def _taken(stack: ExitStack, count: int) -> bool:
    """Take slots, all or none, to be given back by the stack; returns whether they were free, or there is no limit."""
    from httpx import HTTPStatusError, codes
    from prefect.client.orchestration import get_client
    from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
    from prefect.concurrency.sync import concurrency
    from prefect.exceptions import ObjectNotFound

    with _asking, get_client(sync_client=True) as client:
        try:
            limit = client.read_global_concurrency_limit_by_name(LIMIT)
            wanted = min(count, max(limit.limit, 1)) if limit.active else 0
            if wanted + limit.active_slots > limit.limit:  # asking in vain would put errors into the flow's log
                return False
            if wanted:
                stack.enter_context(concurrency(LIMIT, wanted, max_retries=0, lease_duration=LEASE_SECONDS))
        except ObjectNotFound:
            return True
        except ConcurrencySlotAcquisitionError as error:  # another flow was quicker?
            cause = error.__cause__
            if not isinstance(cause, HTTPStatusError) or cause.response.status_code != codes.LOCKED:
                raise
            return False
    return True
