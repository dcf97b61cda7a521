"""Resumable training state on disk: safetensors files that are either whole or absent.

A checkpoint is `step-00000042.safetensors`: named tensors, and in the file's own JSON metadata everything else. It is
written under a temporary name, flushed to the disk and renamed, so a kill at any point leaves the previous one intact.
safetensors validates lengths but has no checksum; a digest of the tensors in the metadata finds flipped bits.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from base.errors import PipelineError

logger = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{8})\.safetensors")
_TEMPORARY = ".tmp-"


class CheckpointError(PipelineError):
    """A checkpoint cannot be used; the message says which, why, and what to do."""


class Checkpoint(NamedTuple):
    """What `save` was given."""

    step: int
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]


def digest(tensors: Mapping[str, Tensor]) -> str:
    """xxh3-128 of names, types, shapes and bytes, in name order."""
    state = xxhash.xxh3_128()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write; on success flush it to the disk and rename it to `path`.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f"{path.name}{_TEMPORARY}{os.getpid()}")
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(_explain(path, error)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _explain(path: Path, error: Exception) -> str:
    code = re.search(r"os error (\d+)", str(error))  # safetensors has the number in its message only
    number = int(code[1]) if code else getattr(error, "errno", None)
    full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    what = "the disk is full; free space" if full else f"{error}; make the folder writable"
    return f"cannot write {path}: {what} and run again, earlier files are intact"


def _flush(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Checkpoints:
    """The checkpoints of one run in one folder; the newest `keep` stay."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def prepare(self) -> None:
        """Make the folder and remove what killed writes have left. For the one process that writes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f"*{_TEMPORARY}*"):
            leftover.unlink(missing_ok=True)

    def steps(self) -> list[int]:
        """Steps that have a file, oldest first."""
        names = (_NAME.fullmatch(path.name) for path in self.folder.glob("step-*"))
        return sorted(int(name[1]) for name in names if name)

    def path(self, step: int) -> Path:
        """File of a step."""
        return self.folder / f"step-{step:08d}.safetensors"

    def save(self, step: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Path:
        """Write a checkpoint, then remove all but the newest `keep`.

        Files of later steps come from a run that was abandoned (they were damaged, or this run would have continued
        from them), so they go too.
        """
        host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        text = json.dumps({**metadata, "step": step, "digest": digest(host)}, sort_keys=True)
        path = self.path(step)
        with replacing(path) as temporary:
            save_file(host, temporary, {"checkpoint": text})
        older = [s for s in self.steps() if s <= step]
        for stale in set(self.steps()) - set(older[-self.keep :]):
            self.path(stale).unlink(missing_ok=True)
        return path

    def load(self, step: int) -> Checkpoint:
        """Read one checkpoint whole.

        Raises:
            CheckpointError: the file is truncated, changed or not a checkpoint.
        """
        path = self.path(step)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = json.loads((file.metadata() or {})["checkpoint"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CheckpointError(f"checkpoint {path} is damaged ({type(error).__name__}: {error})") from error
        if metadata.pop("digest", None) != digest(tensors):
            raise CheckpointError(f"checkpoint {path} is damaged (its bytes changed after it was written)")
        return Checkpoint(metadata.pop("step"), tensors, metadata)

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint; damaged ones are passed over with a warning. None when there is none."""
        for step in reversed(self.steps()):
            try:
                return self.load(step)
            except CheckpointError as error:
                logger.warning("%s: going back to the one before it", error)
        return None
