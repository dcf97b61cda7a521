"""`cache gc`: remove what no current parameter needs, and nothing that a lock says is in use."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from config import graph
from config.files import load_params
from config.params import Params
from data.store.layout import MANIFEST
from data.store.writer import readable
from pipeline.commands.cache.builds import (
    ASIDE,
    STORES,
    actionable,
    builds,
    folder_bytes,
    held,
    lock_file,
    locked,
    published,
    resumed_in,
    state,
    taken_over,
)
from pipeline.commands.cache.table import table
from pipeline.stage import SCRATCH
from stages.teaching.builds import BUILD

REMOVED: Final = "removed"
LISTED: Final = "can go"


@dataclass(frozen=True)
class Item:
    """A file or folder that can go."""

    path: Path  # relative to the root
    store: str
    why: str
    if_stale: bool = False  # goes with --stale only: a person may still compare with it


@actionable()
def run(root: Path, *, yes: bool, stale: bool) -> int:
    """List what can go, with `yes` remove it; stale stores only with `stale`."""
    params = load_params(root)
    rows: list[list[str]] = []
    going = shared = 0
    for item in [*_published(root, params), *_scratch(root, params)]:
        length, linked = folder_bytes(root / item.path)
        with _unused(root, item, yes) as user:
            fate = _fate(item, user, yes, stale)
            if fate == REMOVED:
                _remove(root / item.path)
        if fate in (REMOVED, LISTED):
            going, shared = going + length, shared + linked
        rows.append([str(item.path), readable(length), fate, item.why])
    if rows:
        print(table(["path", "bytes", "fate", "why"], rows, right={"bytes"}))
    print("\n".join([*_links(root), _total(going, shared, yes)]))
    return 0


def _fate(item: Item, user: str | None, yes: bool, stale: bool) -> str:
    if user:
        return f"skipped: {user} is running"
    if item.if_stale and not stale:
        return "kept without --stale"
    return REMOVED if yes else LISTED


def _total(going: int, shared: int, yes: bool) -> str:
    if not going:
        return "nothing was removed" if yes else "nothing to remove"
    text = f"{readable(going)} removed" if yes else f"{readable(going)} can go: python -m pipeline cache gc --yes"
    note = f"\n{readable(shared)} of it has other links, such as DVC's cache (dvc gc): that part frees no space"
    return text + note if shared else text


def _published(root: Path, params: Params) -> Iterator[Item]:
    """Stores that the parameters do not name, stale ones, and what killed writers left among the others."""
    for name in published(root):
        path, found = STORES / name, state(root, params, name)
        if found.kind == "unnamed":
            yield Item(path, name, found.detail)
        elif found.kind in ("stale", "online"):
            yield Item(path, name, str(found), if_stale=True)
        else:
            yield from _temporary(root, path, name)
    for path in _inside(root, STORES, ".*.publishing"):
        yield Item(path, path.name[1:].removesuffix(".publishing"), "left by a publication that was killed")


def _scratch(root: Path, params: Params) -> Iterator[Item]:
    """Builds that no stage will resume, and what killed writers left in those that one will."""
    wanted: dict[str, str | None] = {}
    for build in builds(root):
        if build.path.name == ASIDE:
            yield Item(build.path, build.store, "damaged files that verify took out")
            continue
        if build.store not in wanted:
            wanted[build.store] = resumed_in(root, params, build.store)
        fingerprint = wanted[build.store]
        if fingerprint is None:  # what it depends on is not here, so nobody knows
            continue
        if not fingerprint:
            yield Item(build.path, build.store, f"study.stores does not name {build.store}")
        elif build.path.name == fingerprint or taken_over(root, params, build):
            yield from _temporary(root, build.path / BUILD, build.store)
        else:
            yield Item(build.path, build.store, "of other parameters, data, weights or code")


def _temporary(root: Path, folder: Path, store: str) -> Iterator[Item]:
    for path in _inside(root, folder, "*.tmp-*"):
        yield Item(path, store, "a write that was killed")


def _inside(root: Path, folder: Path, pattern: str) -> list[Path]:
    """Entries of a folder, relative to the root; none where a link leads there."""
    if any((root / part).is_symlink() for part in (folder, *folder.parents)):
        return []
    return sorted(path.relative_to(root) for path in (root / folder).glob(pattern))


@contextmanager
def _unused(root: Path, item: Item, keep: bool) -> Iterator[str | None]:
    """The stage that is at work on an item, if there is one; with `keep`, builders are kept away until the end."""
    builder, path = lock_file(root, item.store), root / item.path
    near = path if path.is_dir() else path.parent
    locks = [builder, *sorted(near.glob(".lock-*")), *sorted(near.glob(f"{BUILD}/.lock-*"))]
    reader = _reader(root) if STORES in item.path.parents else None
    if not keep or reader:
        yield reader or (graph.address("extract", item.store) if locked(*locks) else None)
        return
    if builder.parent.is_dir():
        builder.touch()  # without a file to lock, a builder could start now
    with held(*locks) as mine:
        yield None if mine else graph.address("extract", item.store)


def _reader(root: Path) -> str | None:
    """A student's stage that is running, and may read any store."""
    for lock in sorted((root / SCRATCH).glob("distill-*/lock")):
        if locked(lock):
            return graph.address("distill", lock.parent.name.removeprefix("distill-"))
    return None


def _remove(path: Path) -> None:
    """Remove a file or a folder; of links the link. A store stops being one before its shards go."""
    if path.is_dir() and not path.is_symlink():
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _links(root: Path) -> list[str]:
    """Tops that are links, which nothing here follows."""
    tops = [top for top in (STORES.parent, STORES, SCRATCH) if (root / top).is_symlink()]
    return [f"{top} is a link to {os.readlink(root / top)}: links are not followed, nothing goes there" for top in tops]
