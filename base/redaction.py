"""The one place that knows secrets, and takes them out of every text that leaves a process.

A secret is what stands before the @ of an address, what a setting or a query parameter whose name says so holds
(`MLFLOW_TRACKING_TOKEN`, `?token=`), and the Authorization header that a user and a password make. They are read from
the environment, the parameters, and the settings of DVC, git. A secret is found however it is spelled: an error repeats
an address percent-encoded, in JSON or in HTML, whole or in parts. What stands before the @ of any address is taken
out too, whether it is known or not.

Text leaves through logging (`start` cleans the records of all loggers, tracebacks too), through stdout and stderr
(`guard_streams`), and through what others keep: the journal of MLflow's records and Prefect's states and artifacts,
whose writers call `redact`.
"""

from __future__ import annotations

import base64
import html
import io
import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote

from base.errors import PipelineError

HIDDEN = "***"
LEAST = 3  # characters; a shorter word would be found in everything, and protects nothing
LONG = 8  # characters from which on a secret is also found inside of a word

_NAME = re.compile(
    r"password|passwd|passphrase|secret|token|credential|(?:api|access|account|private)_?key|auth_string"
    r"|connection_string",
    re.IGNORECASE,
)
_NOT_A_SECRET = re.compile(r"tokens|tokeniz", re.IGNORECASE)  # settings that count the tokens of a text
_USER_NAME = re.compile(r"user(?:_?name)?$", re.IGNORECASE)
# Words that every log is full of. As a user or a password they tell nothing, and `***` in their places would tell them.
_COMMON = {
    *("admin", "demo", "disabled", "dvc", "enabled", "false", "git", "main", "mlflow", "none", "null", "pipeline"),
    *("postgres", "postgresql", "prefect", "python", "ray", "root", "slurm", "test", "true", "user"),
}
_ADDRESS = re.compile(r"(?<![\w+.-])[A-Za-z][A-Za-z0-9+.-]*:/{1,2}[^\s'\"<>]+")
_USERINFO = re.compile(r"(?<=:/)(/?)[^\s/?#'\"<>]+@(?!sha256:)")  # pathlib makes one slash of two
_QUERY = re.compile(rf"([?&;][\w-]{{0,40}}(?:{_NAME.pattern})(?!s\b|iz)[\w-]{{0,40}}=)[^&;#\s'\"<>]+", re.IGNORECASE)
_SETTING = re.compile(r"^\s*(\w+)\s*[=:]\s*(\S.*?)\s*$", re.MULTILINE)
_SETTINGS = (Path(".dvc") / "config", Path(".dvc") / "config.local", Path(".git") / "config")

_from_environment: dict[str, str] = {}  # secret -> pattern
_from_files: dict[str, str] = {}
_pattern: re.Pattern[str] | None = None
_cleans_records = False


def start() -> None:
    """Learn the secrets of the environment, and clean what loggers say from now on."""
    global _from_environment, _make_record, _cleans_records
    _from_environment = dict(_of_environment(os.environ))
    _compile()
    if not _cleans_records:  # once: others (Ray) wrap the factory that they find, and must not be wrapped again
        _cleans_records, _make_record = True, logging.getLogRecordFactory()
        logging.setLogRecordFactory(_clean_record)


def learn(text: str) -> None:
    """Learn the secrets in the addresses of a text."""
    _from_files.update(_of_text(text))
    _compile()


def learn_settings(root: Path) -> None:
    """Learn the secrets in DVC's and git's settings of a project, as of the remotes."""
    for path in (root / name for name in _SETTINGS):
        if path.is_file():  # in a worktree .git is no folder
            text = path.read_text(errors="replace")
            for name, value in _SETTING.findall(text):
                _from_files.update(_of_user(value) if name == "user" else _of_setting(name, value))
            learn(text)


def is_secret(name: str) -> bool:
    """Whether the name of a setting says that its value is a secret."""
    return _NAME.search(name) is not None


def redact(text: str) -> str:
    """The text without secrets."""
    if _pattern:  # first, because a password may hold what ends one in an address
        text = _pattern.sub(HIDDEN, text)
    return _QUERY.sub(rf"\1{HIDDEN}", _USERINFO.sub(rf"\1{HIDDEN}@", text))


def redact_all(value: Any) -> Any:
    """The same for all texts of a value that JSON can hold, but for the keys of mappings, which are this project's."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: redact_all(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_all(item) for item in value]
    return value


def public(address: str) -> str:
    """An address as a person may see it: without user, password and query, so that a link still leads there."""
    userinfo = r"[^/?#]*@" if address.startswith("http") else r".*@"  # SQLAlchemy takes a password with slashes
    bare = re.split(r"[?#]", re.sub(rf"^([^:]*:/{{1,2}}){userinfo}", r"\1", address))[0]
    host, path = re.fullmatch(r"([^:]*:/{0,2}[^/]*|)(.*)", bare, re.DOTALL).groups()  # type: ignore[union-attr]
    return f"{host}{redact(path)}"  # a user may be called like a part of the host, which is no secret


def holds_secret(address: str) -> bool:
    """Whether an address has a user, a password or a token in it."""
    return bool(_USERINFO.search(address) or _QUERY.search(address))


@contextmanager
def clean_errors() -> Iterator[None]:
    """An error whose message holds a secret leaves as one that says the same without it: Prefect keeps messages."""
    try:
        yield
    except Exception as error:
        if (said := redact(str(error))) == str(error):
            raise
        raise PipelineError(f"{type(error).__name__}: {said}").with_traceback(error.__traceback__) from None


def guard_streams() -> None:
    """Take secrets out of all that this process prints, tracebacks and warnings among it."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and not isinstance(stream, _CleanStream):
            setattr(sys, name, _CleanStream.over(stream))


class _CleanStream(io.TextIOWrapper):
    """A text stream without secrets. Writers hand over whole lines, or whole words of them."""

    replaced: io.TextIOWrapper

    @classmethod
    def over(cls, stream: io.TextIOWrapper) -> _CleanStream:
        """The same stream, cleaned."""
        stream.flush()
        clean = cls(
            stream.buffer,
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        clean.replaced = stream  # which closes the buffer of both when nothing refers to it any more
        return clean

    def write(self, text: str) -> int:
        super().write(redact(text))
        return len(text)


_make_record = logging.getLogRecordFactory()


def _clean_record(*arguments: Any, **options: Any) -> logging.LogRecord:
    """A log record without secrets: cleaned here, it is clean for the handlers of all libraries."""
    record = _make_record(*arguments, **options)
    try:
        said = record.getMessage()
    except Exception:  # its arguments do not fit: the handler will complain, on stderr
        return record
    if (clean := redact(said)) != said:
        record.msg, record.args = clean, None
    if record.exc_info and record.exc_info[0]:
        told = logging.Formatter().formatException(record.exc_info)
        if (clean := redact(told)) != told:
            record.exc_text, record.exc_info = clean, None  # formatters take the text where it is there
    return record


def _of_environment(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name, value in environment.items():
        yield from _of_text(value)
        yield from _of_setting(name, value)
    for prefix in {name.rpartition("_")[0] for name in environment if name.endswith("_PASSWORD")}:
        users = (environment.get(f"{prefix}_{word}") for word in ("USERNAME", "USER"))
        yield from _of_pair(next(filter(None, users), ""), environment[f"{prefix}_PASSWORD"])


def _of_setting(name: str, value: str) -> Iterator[tuple[str, str]]:
    """The secrets in a named value."""
    if not is_secret(name) or _NOT_A_SECRET.search(name) or os.path.exists(value):
        return
    user, colon, password = value.partition(":")
    if name.lower().endswith("auth_string") and colon:
        yield from _of_pair(user, password)
    yield from _of_word(value)


def _of_text(text: str) -> Iterator[tuple[str, str]]:
    """The secrets in the addresses of a text, which may be an address with blanks in its password."""
    if ":/" not in text:
        return
    for address in {*_ADDRESS.findall(text), *([text] if _ADDRESS.match(text) and "\n" not in text else [])}:
        scheme, _, rest = address.partition(":/")
        rest = rest.removeprefix("/")
        userinfo = re.split(r"[/?#]", rest, maxsplit=1)[0].rpartition("@")[0]
        if not scheme.startswith("http") and (whole := re.match(r"[^:/@]*:[^@]*(?=@)", rest)):
            userinfo = userinfo or whole[0]  # SQLAlchemy takes a password with slashes
        user, colon, password = userinfo.partition(":")
        if colon:
            yield from _of_pair(user, password)
        elif scheme.startswith("http"):
            yield from _of_word(user)  # a token, as code hosts have it
        for name, value in parse_qsl(rest.partition("?")[2].partition("#")[0]):
            if is_secret(name):
                yield from _of_word(value)
            elif _USER_NAME.search(name):
                yield from _of_user(value)


def _of_pair(user: str, password: str) -> Iterator[tuple[str, str]]:
    """A user, a password, and the header that they make."""
    yield from _of_user(user)
    yield from _of_word(password)
    for encoding in ("utf-8", "latin-1"):  # of httpx, of requests
        header = f"{unquote(user)}:{unquote(password)}".encode(encoding, errors="replace")
        yield from _of_word(base64.b64encode(header).decode())


def _of_word(secret: str) -> Iterator[tuple[str, str]]:
    """A secret, and what it means where it is percent-encoded."""
    for word in {secret, unquote(secret)}:
        if len(word) >= LONG:
            yield word, _spelled(word)
        elif len(word) >= LEAST and word.lower() not in _COMMON:
            yield word, rf"(?:(?<![\w-])|(?<=%[0-9A-Fa-f]{{2}})){_spelled(word)}(?![\w-])"


def _of_user(name: str) -> Iterator[tuple[str, str]]:
    """A user's name: a word of its own, and no part of a path (/home/alice) or of a longer name."""
    for word in {name, unquote(name)}:
        if len(word) >= LEAST and word.lower() not in _COMMON:
            yield word, rf"(?:(?<![\w./-])|(?<=%[0-9A-Fa-f]{{2}})|(?<=//)){_spelled(word)}(?![\w/-])"


def _spelled(word: str) -> str:
    """A pattern of a word in which each character may be written in any way."""
    return "".join(f"(?:{'|'.join(_spellings(character))})" for character in word)


def _spellings(character: str) -> Iterable[str]:
    """A character as it is, in a URL (once or twice encoded), in JSON, in Python, in HTML."""
    encoded = character.encode(errors="surrogateescape")
    percent = "".join(f"%{byte:02x}" for byte in encoded)
    exact = {character, json.dumps(character)[1:-1], repr(character)[1:-1], html.escape(character)}
    exact |= {f"\\{character}"} if character in "'\"\\" else set()
    exact |= {"+"} if character == " " else set()
    return [*map(re.escape, sorted(exact, key=len, reverse=True)), f"(?i:{percent})", f"(?i:{quote(percent)})"]


def _compile() -> None:
    global _pattern
    known = _from_environment | _from_files
    longest_first = sorted(known, key=len, reverse=True)
    _pattern = re.compile("|".join(known[word] for word in longest_first)) if known else None
