"""Hashes of files on disk. Without torch: what only hashes starts at once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import xxhash

from base.errors import PipelineError


class MissingFileError(PipelineError, RuntimeError):
    """Something that is to be hashed does not exist; the message says what."""


def hash_files(root: Path, paths: Iterable[str]) -> str:
    """xxh3-128 of names and bytes of files, or of all files in folders, named relative to `root`.

    Raises:
        MissingFileError: naming a path that does not exist.
    """
    state = xxhash.xxh3_128()
    for name in sorted(paths):
        top = root / name
        if not top.exists():
            raise MissingFileError(f"{top} does not exist: run the stage that makes it")
        files = [top] if top.is_file() else sorted(p for p in top.rglob("*") if p.is_file() and p.suffix != ".pyc")
        for path in files:
            state.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    state.update(block)
    return state.hexdigest()
