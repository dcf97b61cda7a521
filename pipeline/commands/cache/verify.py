"""`cache verify`: read stores whole, name damage per file; with --repair let DVC build just that again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from base.environment import die_with_parent
from base.errors import PipelineError
from config import graph
from config.files import load_params
from config.params import Params
from data.store import DamagedShardError, Store, StoreError, find_damage
from data.store.layout import MANIFEST, read_contents
from data.store.writer import check_chunks, readable
from pipeline.commands.cache.builds import ASIDE, STORES, actionable, chosen, folder_bytes, held, lock_file, published
from pipeline.stage import rerun_command


@dataclass(frozen=True)
class Damage:
    """A file of a store that is not as it was written."""

    file: Path  # relative to the root
    problem: str


@actionable()
def run(root: Path, *, names: Sequence[str], repair: bool) -> int:
    """Examine stores (default: all that are published), repair them if asked to; 1 if damage is left."""
    params = load_params(root)
    there = published(root)
    names = chosen(params, names, there) if names else there
    if not names:
        print(f"no store is in {STORES}: run `dvc repro`")
    whole = True
    for name in names:
        damage = report(root, name)
        if damage and repair:
            _repair(root, params, name, damage)
            damage = report(root, name)
            if not damage:
                shutil.rmtree(_aside(root, name), ignore_errors=True)
        whole &= not damage
    return 0 if whole else 1


def report(root: Path, name: str) -> list[Damage]:
    """Read a store whole and print what was found: a line, or one per damaged file."""
    started = time.monotonic()
    damage = examine(root, name)
    seconds = time.monotonic() - started
    length, _ = folder_bytes(root / STORES / name)
    if not damage:
        samples = len(Store.open(root / STORES / name))
        speed = readable(length / seconds)
        print(f"{name}: whole, {samples:,} samples, {readable(length)} read at {speed}/s", flush=True)
    for found in damage:
        print(f"{name}: {found.problem.replace(f'{root}/', '')}", flush=True)
    return damage


def examine(root: Path, name: str) -> list[Damage]:
    """Read everything: each shard, the calibration and the manifest, each by its checksums."""
    folder = STORES / name
    try:
        return [Damage(folder / file, problem) for file, problem in find_damage(root / folder).items()]
    except StoreError as error:  # nobody knows what should be there, but every shard knows itself
        shards = sorted((root / folder).glob("shard-*.bin"))
        return [Damage(folder / MANIFEST, str(error)), *(d for shard in shards for d in _shard(root, shard))]


def _shard(root: Path, path: Path) -> Iterator[Damage]:
    try:
        check_chunks(path, read_contents(path)[0])
    except DamagedShardError as error:
        yield Damage(path.relative_to(root), str(error))


def _repair(root: Path, params: Params, name: str, damage: Sequence[Damage]) -> None:
    """Put damaged files aside and have DVC restore or build them again."""
    stage = graph.address("extract", name)
    if name not in params.study.stores:
        raise PipelineError(f"store {name!r} cannot be repaired: study.stores {params.study.stores} does not name it")
    with held(lock_file(root, name)) as mine:
        if not mine:
            raise PipelineError(f"{stage} is running: wait for it, it may repair the store itself")
        aside = _aside(root, name)
        _put_aside(root, [found.file for found in damage], aside)
    print(
        f"{name}: damaged files are in {aside.relative_to(root)}; running: {rerun_command('extract', name)}", flush=True
    )
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", stage]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    done = subprocess.run(command, cwd=root, env={**os.environ, "PATH": path}, preexec_fn=die_with_parent, check=False)
    if done.returncode:
        raise PipelineError(f"{stage} failed, the store is not whole: see above, then {rerun_command('extract', name)}")


def _aside(root: Path, name: str) -> Path:
    """Where damaged files are kept until the store is whole again."""
    return lock_file(root, name).with_name(ASIDE)


def _put_aside(root: Path, files: Sequence[Path], aside: Path) -> None:
    """Move files out of a store; where DVC's cache has the same bytes by a link, out of there, too.

    DVC links its cache into the workspace and trusts what is in it without reading: it would put the damage back.
    """
    aside.mkdir(parents=True, exist_ok=True)
    there = [root / file for file in files if (root / file).exists()]
    twins = _twins(root, there)
    for path in there:
        bytes_at = twins.get(_inode(path), [])
        source = bytes_at[0] if path.is_symlink() and bytes_at else path
        shutil.move(source, aside / path.name)
        for other in [path, *bytes_at]:
            other.unlink(missing_ok=True)


def _twins(root: Path, files: Sequence[Path]) -> dict[tuple[int, int], list[Path]]:
    """The files in DVC's cache that are links to the same bytes as `files`, by device and inode."""
    inodes = {_inode(path) for path in files if path.is_symlink() or path.stat().st_nlink > 1}
    found: dict[tuple[int, int], list[Path]] = {inode: [] for inode in inodes}
    if inodes:
        command = [sys.executable, "-m", "dvc", "cache", "dir"]
        cache = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
        for top, _, names in os.walk(root / cache):
            for path in (Path(top) / name for name in names):
                if (inode := _inode(path)) in found:
                    found[inode].append(path)
    return found


def _inode(path: Path) -> tuple[int, int]:
    """Device and inode of a file, through links."""
    found = path.stat()
    return found.st_dev, found.st_ino
