"""What a stage is given, and how it publishes what it made."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final, TypeVar

from base.environment import sync_file_system
from base.errors import PipelineError
from base.stopping import GRACE_SECONDS, PREEMPTED
from config.graph import StageSpec
from config.params import Params
from results.tracking.runs import Tracker
from training.run import Run

if TYPE_CHECKING:
    import torch

INDEX: Final = "outputs/index"  # what `prepare` publishes, and most stages read

Entry = TypeVar("Entry")


class StageError(PipelineError):
    """A stage cannot run, or broke its contract."""


class Stop:
    """Set by SIGTERM and Ctrl-C: a stage that polls it saves and ends within GRACE_SECONDS; any other is ended at once.

    Ending, here, is SystemExit with the code PREEMPTED.
    """

    def __init__(self) -> None:
        self._set = self._polled = False

    def is_set(self) -> bool:
        """Whether to save and raise Preempted now."""
        self._polled = True
        return self._set

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler of SIGTERM and SIGINT."""
        if self._set and number != signal.SIGINT:  # the parent's death repeats the signal; a second Ctrl-C is meant
            return
        first, self._set = not self._set, True
        if not self._polled or not first:
            raise SystemExit(PREEMPTED)
        timer = threading.Timer(GRACE_SECONDS, os._exit, (PREEMPTED,))
        timer.daemon = True
        timer.start()


@dataclass
class StageContext:
    """What a stage is given."""

    name: str  # distill
    key: str | None  # baseline-0
    params: Params  # all parameters; a stage reads only what dvc.yaml lists for it
    spec: StageSpec
    root: Path
    scratch: Path  # resumable state; empty unless the stage was interrupted with the same fingerprint
    tracker: Tracker
    stop: Stop
    seed: int
    rank: int = 0
    world_size: int = 1

    @property
    def device(self) -> torch.device:
        """This process's device."""
        import torch

        return (
            torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            if torch.cuda.is_available()
            else torch.device("cpu")
        )

    @property
    def item(self) -> str:
        """The key; raises StageError where the stage was started without one."""
        if self.key is None:
            raise StageError(f"stage {self.name} needs --key")
        return self.key

    def entry(self, kind: str, entries: Mapping[str, Entry], name: str | None = None) -> Entry:
        """What the parameters say of the stage's key.

        Args:
            kind: what the entries are, for the message.
            entries: a section of the parameters.
            name: of the entry where it is not the key.

        Raises:
            StageError: there is no such entry; names those that are there.
        """
        name = self.item if name is None else name
        if name not in entries:
            raise StageError(f"{kind} {name!r}: the parameters have {', '.join(entries)}")
        return entries[name]

    def training(self, seed: int) -> Run:
        """What a training here is given: it keeps its state in scratch, and stops when the stage is asked to."""
        return Run(seed, self.scratch, self.tracker, self.stop.is_set, self.spec.address)

    def publish(self, made: Path, out: str | Path) -> None:
        """Rename what was made (a file or a whole folder) to one of the stage's outs; ranks other than 0 return."""
        if str(out) not in self.spec.outs:
            raise StageError(
                f"{self.spec.address} publishes {str(out)!r}; dvc.yaml allows: {', '.join(self.spec.outs)}"
            )
        if self.rank == 0:
            publish(made, self.root / out)


def publish(made: Path, target: Path) -> None:
    """Put a finished file or folder in place: on the disk before it is visible; what was there is replaced.

    Raises:
        StageError: nothing was made.
    """
    if not made.exists():
        raise StageError(f"{made} cannot be published as {target}: it does not exist")
    target.parent.mkdir(parents=True, exist_ok=True)
    if made.stat().st_dev != target.parent.stat().st_dev:  # outputs/ on another disk: a rename must not cross
        near = target.with_name(f".{target.name}.publishing")
        _remove(near)
        shutil.copytree(made, near) if made.is_dir() else shutil.copyfile(made, near)
        made = near
    _flush(made)
    if target.is_dir() or made.is_dir():  # a rename replaces a file, but not a folder
        _remove(target)
    os.replace(made, target)
    _flush(target.parent)


def _flush(path: Path) -> None:
    """Bring a file to the disk, or the file system that holds a folder (one call, however many files it has)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        sync_file_system(handle) if path.is_dir() else os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
