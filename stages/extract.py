"""Stage `extract`: run a frozen teacher once over the training split, publish its taps as a store with a card.

Rank 0 fits the calibration and writes it first; the ranks then share the shards. What finished builds hold of the same
store is taken over after a check of every byte: the published store, and hard links to it that stay in the scratch
folder, because DVC deletes the store before a rerun. So a damaged shard costs that shard.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed

from base.progress import ProgressBar
from base.stopping import Preempted
from data.store import (
    Calibration,
    StaleStoreError,
    Store,
    StoreError,
    StoreIdentity,
    StoreWriter,
    TapSpec,
    mean_bytes,
    plan,
    read_calibration,
)
from stages.calibration import calibrate, errors, tap_specs
from stages.card import make_card, measure_gaps, metrics, table
from stages.context import StageContext, StageError
from stages.teaching.builds import BUILD, KEPT
from stages.teaching.frozen import Outputs, evenly, freeze
from stages.teaching.identity import store_identity

logger = logging.getLogger(__name__)

UNSEEN: Final = 8  # samples that the calibration has not seen, on which its errors are measured


def run(context: StageContext) -> None:
    """Extract one entry of `stores`."""
    if not context.entry("store", context.params.stores).cached:
        raise StageError(f"store {context.key!r}: all its taps are online, there is nothing to extract")
    with _together(context) as wait:
        Extraction(context, context.item).run(wait)


@dataclass(frozen=True)
class Prepared:
    """What rank 0 finds out before anything is written."""

    specs: dict[str, TapSpec]
    calibrations: dict[str, Calibration]
    errors: dict[str, Any]


class Extraction:
    """One run of the stage in one process."""

    def __init__(self, context: StageContext, name: str) -> None:
        # Equal bytes on every run: deterministic kernels where torch has them, and on a CPU one thread, because the
        # sums of a convolution depend on how many share them.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
        if context.device.type == "cpu":
            torch.set_num_threads(1)
        self.context, self.name = context, name
        self.root, self.params = context.root, context.params
        self.settings = self.params.stores[name]
        folder = self.root / f"outputs/teachers/{self.settings.teacher}"
        self.teacher = freeze(self.root, self.params, self.settings, folder, context.device)
        self.tokens = self.teacher.tokens
        self.identity = store_identity(self.root, self.params, name)
        self.made, self.kept = context.scratch / BUILD, context.scratch / KEPT
        self.finished = finished_build(context, name, self.identity)

    def run(self, wait: Callable[[], None]) -> None:
        """Build the store with the other ranks; rank 0 publishes it with its card."""
        prepared = None
        if self.context.rank == 0:
            prepared = self._prepare()
            with self._writer(prepared.specs, prepared.calibrations) as writer:
                wait()  # the calibration is written
                self._fill(writer)
                wait()
                writer.finish()
            self._publish(prepared)
            return
        wait()
        file, _ = read_calibration(self.made, self.identity)
        with self._writer(file.taps, file.calibrations) as writer:
            self._fill(writer)
            wait()

    def _prepare(self) -> Prepared:
        """Calibrate on evenly spaced samples, refuse what cannot fit, and measure errors on samples in between."""
        rows = evenly(self.params.store.calibration_samples, len(self.tokens))
        others = sorted(set(range(len(self.tokens))) - set(rows))
        unseen = [others[i] for i in evenly(UNSEEN, len(others))] or rows
        samples, held_out = (dict(self.teacher.stream([group])) for group in (rows, unseen))
        specs = tap_specs(self.teacher, self.settings, next(iter(samples.values())))
        calibrations = self._known_calibrations() or calibrate(specs, samples)
        planned = plan(
            self.made,
            specs,
            len(self.tokens),
            mean_bytes(specs, calibrations, samples.items()),
            finished_from=self.finished,
        )
        logger.info("plan: %s", planned)
        planned.check()
        found = {tap: errors(specs[tap], calibration, tap, held_out) for tap, calibration in calibrations.items()}
        return Prepared(specs, calibrations, found)

    def _known_calibrations(self) -> dict[str, Calibration] | None:
        """Those of a build that goes on or is taken over: another GPU might fit slightly different ones."""
        for folder in (self.made, self.finished):
            if folder is not None:
                try:
                    return read_calibration(folder, self.identity)[0].calibrations
                except StoreError as error:
                    logger.debug("calibrating again: %s", error)
        return None

    def _writer(self, specs: Mapping[str, TapSpec], calibrations: Mapping[str, Calibration]) -> StoreWriter:
        return StoreWriter(
            self.made,
            self.identity,
            specs,
            self.tokens,
            self.params.store.shard_samples,
            calibrations,
            rank=self.context.rank,
            world=self.context.world_size,
            finished_from=self.finished,
        )

    def _fill(self, writer: StoreWriter) -> None:
        """Write the shards that are missing; a stop loses the unfinished one."""
        missing = writer.missing()
        rows = {token: row for row, token in enumerate(self.tokens)}
        groups = [[rows[token] for token in writer.shards[shard]] for shard in missing]
        logger.info("rank %d writes %d of %d shards", self.context.rank, len(missing), len(writer.shards))
        total, shown = sum(map(len, groups)), self.context.rank == 0
        with ProgressBar(self.context.spec.address, total, shown=shown) as bar:
            stream = self._counted(self.teacher.stream(groups), bar)
            for shard in missing:
                writer.write(shard, islice(stream, len(writer.shards[shard])))

    def _counted(self, stream: Iterator[tuple[str, Outputs]], bar: ProgressBar) -> Iterator[tuple[str, Outputs]]:
        for number, output in enumerate(stream):
            if self.context.stop.is_set():
                raise Preempted(number)
            bar.advance()
            yield output

    def _publish(self, prepared: Prepared) -> None:
        """The store and its card."""
        store = Store.open(self.made, self.identity)
        gaps = measure_gaps(self.root, self.params, self.teacher, store)
        card = make_card(self.name, self.params, store, prepared.errors, gaps)
        logger.info("%s", table(self.name, card))
        self.context.tracker.log_metrics(metrics(card), step=0)
        path = self.context.scratch / "card.json"
        path.write_text(json.dumps(card, indent=2) + "\n")
        keep(self.made, self.kept)
        self.context.publish(self.made, f"outputs/stores/{self.name}")
        self.context.publish(path, f"reports/stores/{self.name}.json")


def finished_build(context: StageContext, name: str, identity: StoreIdentity) -> Path | None:
    """A folder with shards of this very store: the published one, or what builds of any parameters left in scratch."""
    near = context.scratch.parent
    builds = [near / context.scratch.name / KEPT, *sorted(near.glob(f"*/{KEPT}")), *sorted(near.glob(f"*/{BUILD}"))]
    for folder in [context.root / f"outputs/stores/{name}", *builds]:
        if folder == context.scratch / BUILD or not any(folder.glob("shard-*.bin")):
            continue
        try:
            read_calibration(folder, identity)
        except StaleStoreError:
            continue
        except StoreError as error:  # its shards may be whole, and the calibration comes out the same
            logger.warning("%s", error)
        return folder
    return None


def keep(made: Path, kept: Path) -> None:
    """Hard links of a finished store; without them, where the file system has none, a rerun computes it all again."""
    shutil.rmtree(kept, ignore_errors=True)
    try:
        shutil.copytree(made, kept, copy_function=os.link)
    except (OSError, shutil.Error) as error:
        logger.warning("%s is not kept: %s", made, error)
        shutil.rmtree(kept, ignore_errors=True)


@contextmanager
def _together(context: StageContext) -> Iterator[Callable[[], None]]:
    """The ranks as a group; yields what waits until all of them are there."""
    if context.world_size == 1:
        yield lambda: None
        return
    # A rank may have to wait for as long as the stage may take; the death of another ends the wait at once.
    hours = float(context.spec.meta.get("timeout_h", 24))
    torch.distributed.init_process_group("gloo", timeout=timedelta(hours=hours))
    try:
        yield lambda: _wait(context)
    finally:
        torch.distributed.destroy_process_group()


def _wait(context: StageContext) -> None:
    try:
        torch.distributed.barrier()
    except RuntimeError as error:
        if context.stop.is_set():
            raise Preempted(0) from None
        raise StageError(f"rank {context.rank}: another rank ended, its log says why ({error})") from error
