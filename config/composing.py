"""The sections of all files as one: what stands in another place is named there, and put in its place here.

Every model gets `grid`. A variant names its terms, and may be like another one:

    terms: [xod_cls, xod_reg]               # as they are in `terms`
    terms: {xod_cls: {}, xfd: {weight: 1}}  # with other values; a dict of another kind is replaced whole
    like: simdistill                        # all that this variant has but its terms and row, and its own over it

A term that is a variant's own is written there whole. What a student is trained with is decided here, so `needs`
depends on this file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from config.nested import overlaid
from config.wording import suggest

ARMS: Final = "params/arms/"
# Where dvc.yaml looks for a section; every other one is in params.yaml, and all are where there is no params/.
HOMES: Final = {
    "teachers": "params/detectors.yaml",
    "students": "params/detectors.yaml",
    "segmenters": "params/segmenters.yaml",
    "stores": "params/stores.yaml",
    "terms": ARMS,
    "variants": ARMS,
}
SPREAD: Final = ("terms", "variants")  # sections of which each file of ARMS has a part
TERM: Final = {"student", "teacher", "distance"}  # keys that a term which is written whole has
Whole = dict[str, Any]


def gathered(contents: Mapping[str, Mapping[str, Any]]) -> tuple[Whole, list[str]]:
    """The sections of files as one mapping, and what is wrong with where they stand.

    Args:
        contents: of the files, by path.
    """
    whole: Whole = {}
    wrong: list[str] = []
    homes: dict[str, str] = {}  # section.name of those that are spread -> file
    several = len(contents) > 1
    for file, content in contents.items():
        for section, value in content.items():
            home = HOMES.get(section, "params.yaml")
            if several and not (file.startswith(home) if home == ARMS else file == home):
                place = f"a file of {home}" if home == ARMS else home
                wrong.append(f"{section}: stands in {file}, and dvc.yaml looks for it in {place}: move it there")
                continue
            if section not in SPREAD:
                whole[section] = value
                continue
            if value is not None and not isinstance(value, Mapping):
                wrong.append(f"{section}: in {file} it must be a mapping of names, not {type(value).__name__}")
                continue
            for name in value or ():
                if (other := homes.setdefault(f"{section}.{name}", file)) != file:
                    wrong.append(f"{section}.{name}: stands in {other} and in {file}: one of them is too many")
            whole[section] = {**whole.get(section, {}), **(value or {})}
    if not several and "teachers" not in whole:
        wrong.append("params/: is not there; it has detectors.yaml, segmenters.yaml, stores.yaml and arms/")
    return whole, wrong


def composed(whole: Whole) -> list[str]:
    """Put what is named in the places of the names; returns what is wrong with the names."""
    return _with_likes(whole) + _with_grid(whole) + _with_terms(whole)


def attributed(lines: Iterable[str], whole: Whole) -> list[str]:
    """Problems, each once: those of a term that variants have as it is in `terms` are said there."""
    terms, variants = dict(_entries(whole, "terms")), dict(_entries(whole, "variants"))
    found = []
    for line in lines:
        match = re.match(r"variants\.([^.]*)\.(terms\.([^.:]*).*)", line, re.DOTALL)
        if match and " in study." not in line:  # what a study lacks is a matter of the variants that it has
            own = variants.get(match[1], {}).get("terms", {})
            if match[3] in terms and isinstance(own, Mapping) and own.get(match[3]) == terms[match[3]]:
                line = match[2]
        found.append(line)
    return list(dict.fromkeys(found))


def _with_likes(whole: Whole) -> list[str]:
    """Give variants what they have in common with others."""
    wrong: list[str] = []
    variants = dict(_entries(whole, "variants"))
    for name, entry in variants.items():
        if "like" not in entry:
            continue
        like = entry["like"]
        own = {key: value for key, value in entry.items() if key != "like"}
        other = variants.get(like) if isinstance(like, str) else None
        if other is None:
            wrong.append(f"variants.{name}.like: {like!r} is unknown{suggest(str(like), map(str, variants))}")
            own.setdefault("student", None)  # it is not missing
        elif like == name or "like" in other:
            target = "a variant" if like == name else f"{other['like']!r}, which that is like"
            wrong.append(f"variants.{name}.like: {like!r} is like another one: name {target}")
            own.setdefault("student", None)
        else:
            shared = {key: value for key, value in other.items() if key not in ("terms", "row")}
            start = {"start": own["start"]} if "start" in own else {}
            own = overlaid(shared, own) | start
        whole["variants"][name] = own
    return wrong


def _with_grid(whole: Whole) -> list[str]:
    """Give every detector the grid, as its config.json has it."""
    wrong = []
    for section in ("teachers", "students", "variants"):
        for name, entry in _entries(whole, section):
            model = entry.get("model")
            if not isinstance(model, Mapping):
                continue
            if "grid" in model:
                wrong.append(f"{section}.{name}.model.grid: every model has the section grid: leave it out")
            if section != "variants":
                whole[section][name] = {**entry, "model": {**model, "grid": whole.get("grid")}}
    return wrong


def _with_terms(whole: Whole) -> list[str]:
    """Put the terms that variants name in the places of their names."""
    wrong: list[str] = []
    terms = dict(_entries(whole, "terms"))
    for variant, entry in _entries(whole, "variants"):
        written, where = entry.get("terms"), f"variants.{variant}.terms"
        if isinstance(written, list) and all(isinstance(name, str) for name in written):
            twice = sorted({name for name in written if written.count(name) > 1})
            wrong += [f"{where}: {name!r} is listed more than once" for name in twice]
            written = dict.fromkeys(written)
        if "terms" in entry and not isinstance(written, Mapping):
            wrong.append(f"{where}: {written!r}: must be a list of names, or a mapping of names to other values")
            written = {}
        found: dict[Any, Any] = {}
        for name, changes in (written or {}).items():
            if changes is not None and not isinstance(changes, Mapping):
                wrong.append(f"{where}.{name}: {changes!r}: must be a mapping of other values, or {{}}")
            elif name in terms:
                found[name] = overlaid(terms[name], changes or {})
            elif changes and changes.keys() >= TERM:
                found[name] = changes
            else:
                wrong.append(f"{where}: {name!r} is unknown{suggest(str(name), map(str, terms))}")
        if "terms" in entry:
            whole["variants"][variant] = {**entry, "terms": found}
    return wrong


def _entries(whole: Mapping[str, Any], section: str) -> list[tuple[Any, Mapping[str, Any]]]:
    """Name and content of the entries of a section, of those that have the right form: the schema names the others."""
    content = whole.get(section)
    entries = content.items() if isinstance(content, Mapping) else ()
    return [(name, entry) for name, entry in entries if isinstance(entry, Mapping)]
