"""Profiles: `profiles/NAME.yaml` laid over params.yaml and the files of params/, in place.

Only the values that the profile sets change; comments, anchors and order stay. A profile mirrors the nesting of the
parameters, whichever file they are in: dicts merge, and every key must exist there. A dict that is tagged `!replace` in
the profile replaces the whole dict instead, and so do the dicts of WHOLE in any case.
A comment beside a changed value starts at column 30, or two spaces behind a longer line, so that laying another profile
over it and then the first one again gives the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.nodes import MappingNode, Node

from base.errors import PipelineError
from config.composing import SPREAD
from config.files import lay, parse, parse_yaml, read_text, read_texts
from config.nested import flatten, merge
from config.params import Params, ParamsError

COMMENT_COLUMN = 30
_REPLACE = "!replace"
_TAG = re.compile(rf"\s*{_REPLACE}[ \t]*")
_COMMENT = re.compile(r"""((?:[^#"']|"[^"]*"|'[^']*'|(?<!\s)#)*?)[ \t]+(#.*)""")
GROUND = "demo"  # the profile that holds every value that another profile or a study sets
WHOLE = ("study.fusions", "study.large", "memory")  # names with what belongs to each: all of them, or others


class ProfileError(PipelineError):
    """A profile does not fit the parameters."""


def available(root: Path) -> list[str]:
    """Names of the profiles of a project."""
    return sorted(path.stem for path in (root / "profiles").glob("*.yaml"))


def apply_profile(name: str, root: Path) -> Params:
    """Lay a profile over the parameters; returns the checked result. The files are untouched when it fails.

    Profile `demo` is laid first, which resets what any other profile has set: the result does not depend on that.
    """
    ground = [GROUND] if name != GROUND and GROUND in available(root) else []
    return apply_overlays([profile_overlay(part, root) for part in (*ground, name)], root, f"profile {name}")


def profile_overlay(name: str, root: Path) -> tuple[str, str]:
    """What a profile sets, its own name among it, as text; and the file's name for messages."""
    path = root / "profiles" / f"{name}.yaml"
    if not path.is_file():
        raise ProfileError(f"profile {name!r} is unknown; allowed: {', '.join(available(root)) or 'nothing'}")
    return f"profile: {name}\n{read_text(path)}", f"profiles/{name}.yaml"


def apply_overlays(overlays: Sequence[tuple[str, str]], root: Path, what: str) -> Params:
    """Lay overlays (text, name) over the parameters one after another; returns the checked result.

    The files are untouched when it fails, or when it is killed; `what` begins the message then.
    """
    try:
        before = read_texts(root)
        texts = before
        for overlay, name in overlays:
            texts = lay_over(texts, overlay, name)
        params = parse(texts, available(root))
    except ParamsError as error:
        raise ProfileError(f"{what}: {error}") from None
    lay({file: text for file, text in texts.items() if text != before[file]}, root)
    return params


def section(text: str, name: str) -> str:
    """What stands behind the colon of a section of a YAML file, tags and comments kept."""
    key, value = next((key, value) for key, value in YAML(typ="safe").compose(text).value if key.value == name)
    return text[key.end_mark.index + 1 : _end(value, key, text)]


def lay_over(texts: Mapping[str, str], overlay: str, name: str) -> dict[str, str]:
    """The texts of files by path, with the values that `overlay` sets.

    Raises:
        ProfileError: naming the overlay and the key that does not fit.
    """
    try:
        for text, file in [*((text, file) for file, text in texts.items()), (overlay, name)]:
            _mapping(text, file)
    except ParamsError as error:
        raise ProfileError(str(error)) from None
    bases, overlay_node = {file: _node(text) for file, text in texts.items()}, _node(overlay)
    result = dict(texts)
    for file, part in _parts(bases, overlay_node, name).items():
        edits = list(_edits(bases[file], part, "", (texts[file], overlay, (name, file))))
        for start, end, value in sorted(edits, reverse=True):
            result[file] = _put(result[file], start, end, value)
    _check(result, overlay, name)
    return result


# An overlay changes few of the files, and several are laid one after another, so that most texts are read again.
@lru_cache(maxsize=64)
def _node(text: str) -> MappingNode:
    return YAML(typ="safe").compose(text)


@lru_cache(maxsize=64)
def _mapping(text: str, name: str) -> dict[str, Any]:
    """What a text holds, not to be changed; an overlay's tags are left out."""
    return parse_yaml(_TAG.sub(" ", text) if _REPLACE in text else text, name)


def _parts(bases: Mapping[str, MappingNode], overlay: MappingNode, name: str) -> dict[str, MappingNode]:
    """What of an overlay belongs to each file: sections, and of those that are spread over files single entries."""
    parts: dict[str, MappingNode] = {}
    for key, value in overlay.value if isinstance(overlay, MappingNode) else ():
        homes = {file: content for file, base in bases.items() if (content := _content(base, key.value)) is not None}
        if not homes:
            known = ", ".join(each.value for base in bases.values() for each, _ in base.value)
            raise ProfileError(f"{name}: {key.value} is not in {' or '.join(bases)}; keys there: {known}")
        if key.value not in SPREAD or not isinstance(value, MappingNode):
            _add(parts, next(iter(homes)), key, value)
            continue
        homes = {file: content for file, content in homes.items() if isinstance(content, MappingNode)}
        for entry in value.value:
            own = [file for file, content in homes.items() if _content(content, entry[0].value) is not None]
            if not own:
                known = ", ".join(each.value for content in homes.values() for each, _ in content.value)
                path = f"{key.value}.{entry[0].value}"
                raise ProfileError(f"{name}: {path} is not in {' or '.join(homes)}; keys there: {known}")
            _add(parts, own[0], key, MappingNode(value.tag, [entry]))
    return parts


def _add(parts: dict[str, MappingNode], file: str, key: Node, value: Node) -> None:
    """Give a file one more section, or entry of a section."""
    part = parts.setdefault(file, MappingNode("", []))
    for known, content in part.value:
        if known is key:
            content.value += value.value
            return
    part.value.append((key, value))


def _content(base: Node, name: str) -> Node | None:
    """What a mapping has under a key."""
    return next((value for key, value in base.value if key.value == name), None)


def _edits(
    base: MappingNode, overlay: MappingNode, where: str, texts: tuple[str, str, tuple[str, str]]
) -> Iterator[tuple[int, int, str]]:
    """(start, end, new text) of every value that changes, from behind the key's colon to the value's end.

    `texts` are of the file and of the overlay, with the names of overlay and file.
    """
    base_text, overlay_text, (name, file) = texts
    known = {key.value: (key, value) for key, value in base.value}
    for key, value in overlay.value:
        path = f"{where}{key.value}"
        if key.value not in known:
            raise ProfileError(f"{name}: {path} is not in {file}; keys there: {', '.join(known)}")
        old_key, old = known[key.value]
        anchor = _anchor(old_key, base_text)
        both_dicts = isinstance(old, MappingNode) and isinstance(value, MappingNode)
        if both_dicts and value.tag != _REPLACE and path not in WHOLE:
            if old.start_mark.index < old_key.start_mark.index:
                raise ProfileError(f"{name}: {path} is an alias (*{anchor}) in {file}: set it where &{anchor} is")
            yield from _edits(old, value, f"{path}.", texts)
            continue
        new = overlay_text[key.end_mark.index + 1 : _end(value, key, overlay_text)]
        if tag := _TAG.match(new):
            new = new[tag.end() :] if new[tag.end()] == "\n" else f" {new[tag.end() :]}"
        if anchor and not _anchor(key, overlay_text) and old.start_mark.index > old_key.start_mark.index:
            new = re.sub(r"^\s*", rf"\g<0>&{anchor} ", new, count=1)
        yield old_key.end_mark.index + 1, _end(old, old_key, base_text), new


def _anchor(key: Node, text: str) -> str | None:
    """Anchor or alias behind a key: the C parser, nine times as fast as Python's, keeps none in its nodes."""
    found = re.compile(r"\s*(?:!\w+\s+)?[&*]([\w-]+)").match(text, key.end_mark.index + 1)
    return found[1] if found else None


def _end(value: Node, key: Node, text: str) -> int:
    """Index behind the last character of a value (a block's own mark lies behind the comments that follow it)."""
    if value.start_mark.index < key.start_mark.index:  # an alias: its node is where the anchor is
        return re.compile(r"\s*\*[\w-]+").match(text, key.end_mark.index + 1).end()  # type: ignore[union-attr]
    if getattr(value, "flow_style", True) is not False or not value.value:
        return value.end_mark.index
    last = value.value[-1]
    return _end(last[1], last[0], text) if isinstance(value, MappingNode) else _end(last, key, text)


def _put(text: str, start: int, end: int, value: str) -> str:
    """Replace text[start:end], and move the comment behind it to its column."""
    rest, newline, tail = text[end:].partition("\n")
    head = text[:start] + value
    if comment := _COMMENT.fullmatch(rest):
        line = head.rpartition("\n")[2] + comment[1]
        rest = comment[1] + " " * (max(COMMENT_COLUMN, len(line) + 2) - len(line)) + comment[2]
    return head + rest + newline + tail


def _check(result: Mapping[str, str], overlay: str, name: str) -> None:
    """The edited texts must parse, and hold every value of the overlay."""
    loader = YAML(typ="safe")
    loader.constructor.add_constructor(_REPLACE, lambda self, node: self.construct_mapping(node, deep=True))
    try:
        wanted = flatten(loader.load(overlay))
        whole: dict[str, Any] = reduce(merge, (_mapping(text, file) for file, text in result.items()), {})
    except (YAMLError, ParamsError) as error:
        raise ProfileError(f"{name} would make the parameters unreadable: {error}") from None
    got = flatten(whole)
    if wrong := [key for key, value in wanted.items() if got.get(key, ...) != value]:
        raise ProfileError(
            f"{name}: {', '.join(wrong)} did not arrive: mirror the nesting and indentation of the parameters"
        )
