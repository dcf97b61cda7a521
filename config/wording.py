"""What is wrong with parameters, in words: a line for each problem."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from config.sections import TAGS

NO_NAME: Final = "no name: it is made of letters, digits, _ and -, with a letter in it"


def problems(error: ValidationError, model: type[BaseModel]) -> Iterator[str]:
    """One line per problem of a ValidationError: dotted key, value, what is allowed."""
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"] if part not in TAGS)
        if item["type"] == "extra_forbidden":
            known = _fields(model, item["loc"][:-1])
            known += ["like"] if item["loc"][:1] == ("variants",) and len(item["loc"]) == 3 else []
            yield f"{where}: unknown key{suggest(str(item['loc'][-1]), known)}"
        elif item["type"] == "missing":
            yield f"{where}: missing"
        elif item["type"] == "literal_error":
            yield f"{where}: {item['input']!r} is unknown{suggest(str(item['input']), _allowed(item))}"
        elif item["loc"][-1:] == ("[key]",):
            yield f"{where.removesuffix('.[key]')}: {NO_NAME}"
        elif item["type"] == "value_error":
            for line in str(item["ctx"]["error"]).splitlines():
                yield f"{where}: {line}" if where else line
        else:
            yield f"{where}: {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _allowed(item: Any) -> list[str]:
    """The values that an entry may have, out of pydantic's words: 'a', 'b' or 'c'."""
    return re.findall(r"(?:^|, | or )'?(.+?)'?(?=, | or |$)", item["ctx"]["expected"])


def _fields(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the section at `location`."""
    kind: Any = model
    for part in location:
        if part in TAGS:
            kind = TAGS[str(part)]
        elif isinstance(kind, type) and issubclass(kind, BaseModel) and not isinstance(part, int):
            kind = _section(kind.model_fields[str(part)].annotation)
        elif isinstance(kind, types.GenericAlias) or typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[-1]
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def _section(annotation: Any) -> Any:
    """A field's type; of a section that may be left out the section."""
    alternatives = [one for one in typing.get_args(annotation) if isinstance(one, type) and issubclass(one, BaseModel)]
    union = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
    return alternatives[0] if union and alternatives else annotation


def suggest(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...? allowed: ...` for a name that is not among the known ones."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint}; allowed: {', '.join(known) or 'nothing'}"
