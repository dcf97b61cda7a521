"""The walks of docs/walks.md, and what a process really calls."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LINE = re.compile(r"\d+\. `([\w.]+)` in `([\w@-]+)`: ")


def walks() -> dict[str, list[tuple[str, str]]]:
    """Title -> (function, stage) in order."""
    found: dict[str, list[tuple[str, str]]] = {}
    for section in (ROOT / "docs/walks.md").read_text().split("\n## ")[1:]:
        title, _, text = section.partition("\n")
        found[title] = [match.groups() for match in map(LINE.match, text.splitlines()) if match]
    return found


def functions() -> dict[str, set[str]]:
    """Stage -> the functions that walks meet there."""
    found: dict[str, set[str]] = {}
    for walk in walks().values():
        for function, stage in walk:
            found.setdefault(stage, set()).add(function)
    return found


def write_calls(names: Collection[str], path: Path) -> None:
    """Append the name of each of these functions to a file when it is first called, here or in a fork of this one."""
    # By identity, since a code object is hashed by all that it holds; kept, so that no other one gets its identity.
    seen: dict[int, CodeType] = {}

    def see(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and id(code) not in seen:
            seen[id(code)] = code
            name = f"{frame.f_globals.get('__name__')}.{code.co_qualname}"
            if name in names:
                with path.open("a") as file:
                    file.write(f"{name}\n")

    sys.setprofile(see)


def misled(called: dict[str, list[str]]) -> list[str]:
    """Lines of walks that are wrong: a function that the stage does not call, or calls before the one above it."""
    wrong = []
    for title, walk in walks().items():
        places = [(stage, called[stage].index(name) if name in called[stage] else None) for name, stage in walk]
        for (name, stage), (_, place), above in zip(walk, places, [(None, -1), *places], strict=False):
            if place is None or (above[0] == stage and above[1] is not None and place < above[1]):
                wrong.append(f"{title}: {name} in {stage}")
    return wrong
