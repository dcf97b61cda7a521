"""Where stores and unfinished builds lie, what they must be now, and who is at work on them."""

from __future__ import annotations

import difflib
import fcntl
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final, Literal

from base.errors import PipelineError
from config import graph
from config.params import Params
from data.reading.blobs import BlobError
from data.reading.index import IndexFormatError
from data.store import Store, StoreError, StoreIdentity, read_calibration
from data.store.layout import MANIFEST
from pipeline.stage import SCRATCH
from stages.teaching.builds import BUILD, KEPT
from stages.teaching.identity import store_identity

STORES: Final = Path("outputs/stores")
ASIDE: Final = "damaged"  # beside the builds of a store: the damaged files that verify took out of it
_PREFIX: Final = "extract-"


@dataclass(frozen=True)
class Build:
    """A scratch folder of stage `extract`; paths are relative to the root."""

    store: str
    path: Path

    @property
    def folder(self) -> Path:
        """Where the shards are."""
        return self.path / BUILD


@contextmanager
def actionable() -> Iterator[None]:
    """Errors of the data room become ones that the command line prints without a traceback."""
    try:
        yield
    except IndexFormatError as error:
        raise PipelineError(f"{error} That is: dvc repro prepare") from error
    except (StoreError, BlobError) as error:
        raise PipelineError(str(error)) from error


def chosen(params: Params, names: Sequence[str], known: Collection[str] = ()) -> list[str]:
    """The stores that are asked for; without names those of the study. `known`: beside those of the parameters."""
    allowed = list(dict.fromkeys([*params.stores, *known]))
    for name in names:
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise PipelineError(f"store {name!r} is unknown{hint}; there are: {', '.join(allowed) or 'none'}")
    return list(dict.fromkeys(names)) or list(params.study.stores)


def published(root: Path) -> list[str]:
    """Names of the folders in outputs/stores; links are none of ours."""
    return [path.name for path in _folders(root / STORES) if not path.name.startswith(".")]


def builds(root: Path) -> Iterator[Build]:
    """Every scratch folder of stage `extract`."""
    for group in _folders(root / SCRATCH):
        if group.name.startswith(_PREFIX):
            for folder in _folders(group):
                yield Build(group.name.removeprefix(_PREFIX), folder.relative_to(root))


def lock_file(root: Path, store: str) -> Path:
    """What the builder of a store holds."""
    return root / SCRATCH / f"{_PREFIX}{store}" / "lock"


@contextmanager
def held(*files: Path) -> Iterator[bool]:
    """Hold lock files that exist; yields whether all could be had: False where a living process holds one."""
    with ExitStack() as stack:
        yield all(_lock(stack, file) for file in files if file.is_file())


def locked(*files: Path) -> bool:
    """Whether a living process holds one of the lock files that exist."""
    with held(*files) as mine:
        return not mine


def _lock(stack: ExitStack, file: Path) -> bool:
    handle = os.open(file, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    stack.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@dataclass(frozen=True)
class State:
    """What a folder in outputs/stores is worth now."""

    kind: Literal["current", "stale", "online", "unnamed", "unfinished", "damaged", "unchecked"]
    detail: str = ""
    store: Store | None = None  # when it could be opened

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else self.kind


def state(root: Path, params: Params, name: str) -> State:
    """Look at a published store; its chunks are not read (`cache verify` does that)."""
    folder = root / STORES / name
    try:
        store = Store.open(folder)
    except StoreError as error:
        store = None
        unreadable = State("damaged" if (folder / MANIFEST).exists() else "unfinished", str(error))
    if name not in params.stores:
        return State("unnamed", "the parameters have no such store", store)
    if store is None:
        return unreadable
    if not params.stores[name].cached:
        return State("online", "all its taps are online now", store)
    try:
        changed = stale_fields(root, params, name, store.identity)
    except StoreError as error:
        return State("unchecked", str(error), store)
    return State("stale", ", ".join(changed), store) if changed else State("current", "", store)


def stale_fields(root: Path, params: Params, store: str, found: StoreIdentity) -> list[str]:
    """Fields in which a store differs from what extraction would make now.

    Weights that are not here are not compared: a store may outlive its teacher's folder.

    Raises:
        StoreError: something else that the identity depends on is missing.
    """
    here = (root / "outputs/teachers" / params.stores[store].teacher).exists()
    expected = store_identity(root, params, store, None if here else found.weights)
    return [field.name for field in fields(found) if getattr(found, field.name) != getattr(expected, field.name)]


def resumed_in(root: Path, params: Params, store: str) -> str | None:
    """Name of the scratch folder that the stage would use now: empty when there is no stage, None when unknown."""
    if store not in params.study.stores:
        return ""
    spec = graph.resolve(graph.address("extract", store), root)
    return None if None in spec.deps.values() else spec.fingerprint[:16]


def taken_over(root: Path, params: Params, build: Build) -> bool:
    """Whether a build of other parameters holds shards of what its store must be now: the stage takes them over."""
    for folder in (root / build.path / BUILD, root / build.path / KEPT):
        try:
            if not stale_fields(root, params, build.store, read_calibration(folder)[0].identity):
                return True
        except StoreError:
            continue
    return False


def folder_bytes(path: Path) -> tuple[int, int]:
    """Bytes of a file or of all files below a folder, and of them those with more than one link."""
    files = [path] if not path.is_dir() else [Path(top) / name for top, _, names in os.walk(path) for name in names]
    found = [file.lstat() for file in files]
    return sum(s.st_size for s in found), sum(s.st_size for s in found if s.st_nlink > 1)


def _folders(top: Path) -> list[Path]:
    """Folders in a folder, by name; links are not followed, neither to the top nor inside it."""
    if not top.is_dir() or top.is_symlink() or top.parent.is_symlink():
        return []
    return sorted(path for path in top.iterdir() if path.is_dir() and not path.is_symlink())
