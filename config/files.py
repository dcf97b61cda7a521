"""The files of the parameters: params.yaml, and what lies in params/; read as one, and replaced as one."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from base import redaction
from config.composing import attributed, composed, gathered
from config.params import Params, ParamsError
from config.wording import problems, suggest

logger = logging.getLogger(__name__)

PARAMS: Final = "params.yaml"
FOLDER: Final = "params"
LAID: Final = ".params-laid"  # folder of whole files that are about to take their places
BEFORE: Final = "before.json"  # in it: file -> digest of what it replaces
LOCK: Final = ".scratch/params.lock"
TRIES: Final = 20  # readings, while somebody else replaces files


def load_params(root: Path | str = ".") -> Params:
    """Read and check the parameters of a project.

    Raises:
        ParamsError: with one line per problem: file, key, value, what is allowed.
    """
    root = Path(root)
    return parse(read_texts(root), sorted(path.stem for path in (root / "profiles").glob("*.yaml")))


def read_texts(root: Path) -> dict[str, str]:
    """The texts of the files by path relative to the root, params.yaml first: all from before or from after a profile.

    Raises:
        ParamsError: there is no params.yaml, or a file cannot be read.
    """
    for _ in range(TRIES):
        put_in_place(root)
        before = _stamps(root)
        texts = {name: read_text(root / name) for name in before}
        if _stamps(root) == before and not (root / LAID).exists():
            break
    for text in texts.values():
        redaction.learn(text)  # before any message repeats a part of it
    if PARAMS not in texts:
        raise ParamsError(f"{root / PARAMS} does not exist")
    if other := sorted(glob.glob(f"{FOLDER}/**/*.yml", root_dir=root, recursive=True)):
        raise ParamsError(f"{', '.join(other)}: files of {FOLDER} end in .yaml: rename")
    return texts


def parse(texts: Mapping[str, str], profiles: Iterable[str] = ()) -> Params:
    """The parameters that files hold, checked.

    Args:
        texts: of the files, by path.
        profiles: names that `profile` may have; none: any.

    Raises:
        ParamsError: see `load_params`.
    """
    contents = {file: parse_yaml(text, file) for file, text in texts.items()}
    whole, wrong = gathered(contents)
    if wrong:  # what follows from it would hide it
        raise ParamsError(_listed(_located(wrong, contents)))
    wrong = composed(whole)
    try:
        params = Params.model_validate(whole)
    except ValidationError as error:
        wrong += problems(error, Params)
    else:
        if (known := list(profiles)) and params.profile not in known:
            wrong.append(f"profile: {params.profile!r} is unknown{suggest(params.profile, known)}")
    if wrong:
        raise ParamsError(_listed(_located(attributed(wrong, whole), contents)))
    return params


def located(lines: Iterable[str], texts: Mapping[str, str]) -> list[str]:
    """Problems of parameters that are right in form, which begin with a dotted key: once, with the file in front."""
    contents = {file: parse_yaml(text, file) for file, text in texts.items()}
    whole, _ = gathered(contents)
    composed(whole)
    return _located(attributed(lines, whole), contents)


def put_in_place(root: Path) -> None:
    """Finish what a killed `lay` has begun: its files take their places, but where a person has edited one since.

    Raises:
        ParamsError: they cannot.
    """
    if not (root / LAID).exists():
        return
    try:
        with _alone(root):
            moved, edited = _move(root) if (root / LAID).exists() else ([], [])
    except OSError as error:
        raise ParamsError(
            f"a command that laid a profile or study was killed; what it left in {root / LAID} cannot take its places: "
            f"{error.filename or root}: {error.strerror}"
        ) from error
    if moved or edited:
        names = ", ".join(moved) or "nothing"
        logger.warning("a command that laid a profile or study was killed; put in place: %s", names)
    if edited:
        logger.warning("edited since, and left as they are: %s: lay it again", ", ".join(edited))


def lay(texts: Mapping[str, str], root: Path) -> None:
    """Write files of the parameters: all of them or, when this process is killed, none.

    They are written beside their places, in a folder whose rename decides; `put_in_place` does the rest in the next
    process that reads the parameters.

    Raises:
        ParamsError: a file cannot be written.
    """
    if not texts:
        return
    put_in_place(root)
    draft = root / f"{LAID}.{os.getpid()}"
    try:
        with _alone(root):
            before = {name: _digest(root / name) for name in texts}
            for name, text in texts.items():
                _write(draft / name, text, root / name)
            _write(draft / BEFORE, json.dumps(before), root / PARAMS)
            os.rename(draft, root / LAID)
            _move(root)
    except OSError as error:
        raise ParamsError(f"{error.filename or root} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        ParamsError: it is not there, cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text()
    except FileNotFoundError:
        raise ParamsError(f"{path} does not exist") from None
    except OSError as error:
        raise ParamsError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Parse a YAML 1.2 file as DVC does (`1e-3` is a number); duplicate keys are errors."""
    return parse_yaml(read_text(path), str(path))


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """What a file holds, see `read_yaml`; `name` is for messages."""
    from ruamel.yaml import YAML, YAMLError

    redaction.learn(text)
    try:
        loaded = YAML(typ="safe").load(text)
    except YAMLError as error:
        raise ParamsError(f"{name} is not valid YAML: {error}") from None
    if loaded is None:
        raise ParamsError(f"{name} is empty: it must be a mapping of sections")
    if not isinstance(loaded, dict):
        raise ParamsError(f"{name} must be a mapping of sections, not {type(loaded).__name__}")
    return loaded


def _files(root: Path) -> list[str]:
    """The files, relative to the root; not those whose name begins with a dot, as an editor makes them."""
    found = sorted(glob.glob(f"{FOLDER}/**/*.yaml", root_dir=root, recursive=True))
    return [PARAMS, *found] if (root / PARAMS).exists() else found


def _stamps(root: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of the files: both change when one is replaced."""
    stamps = {}
    for name in _files(root):
        try:
            status = (root / name).stat()
        except OSError as error:
            raise ParamsError(f"{root / name} cannot be read: {error.strerror}") from None
        stamps[name] = (status.st_ino, status.st_mtime_ns)
    return stamps


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def _write(path: Path, text: str, like: Path) -> None:
    """Write a file to the disk, with the mode and the ends of lines of another one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    there = like.exists()
    ends = "\r\n" if there and b"\r\n" in like.read_bytes() else "\n"
    with path.open("w", newline=ends) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    if there:
        shutil.copymode(like, path)


def _move(root: Path) -> tuple[list[str], list[str]]:
    """Bring files to their places; returns those that moved, and those whose places hold something new."""
    laid = root / LAID
    before = json.loads((laid / BEFORE).read_text())
    waiting = [name for name in before if (laid / name).exists()]
    edited = [name for name in waiting if _digest(root / name) != before[name]]
    moved = [name for name in waiting if name not in edited]
    for name in moved:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(laid / name, (root / name).resolve())  # a link stays one
    shutil.rmtree(laid)
    return moved, edited


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """While inside, no other process moves files of the parameters here."""
    (root / LOCK).parent.mkdir(exist_ok=True)
    with (root / LOCK).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _listed(wrong: Iterable[str]) -> str:
    return "the parameters are not valid:\n" + "\n".join(f"  {line}" for line in wrong)


def _located(lines: Iterable[str], contents: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [" ".join(filter(None, [_home(line, contents), line])) for line in lines]


def _home(line: str, contents: Mapping[str, Mapping[str, Any]]) -> str:
    """The file that a problem is about, with a colon; nothing where none has the key."""
    section, _, rest = line.partition(".")
    section = section.partition(":")[0]
    having = [file for file, content in contents.items() if section in content]
    for file in having[:-1]:
        names = sorted(map(str, contents[file][section] or ()), key=len, reverse=True)
        if any(rest == name or rest.startswith((f"{name}.", f"{name}:")) for name in names):
            return f"{file}:"
    return f"{having[-1]}:" if having else ""
