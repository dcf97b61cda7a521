"""The files of the parameters, read as one: params.yaml, and what lies in params/.

A section stands in one file, `terms` and `variants` in as many as there are: params/arms has one for each paper. What
stands in another section is named, not repeated: every model gets `grid`, and a variant names its terms.

    terms: [xod_cls, xod_reg]              # as they are in `terms`
    terms: {xod_cls: {}, xfd: {weight: 1}}  # with other values of their keys

A term that is a variant's own is written there whole. `like: simdistill` gives a variant the student, model, training
and start of another one, over which its own are laid.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from base import redaction
from config.nested import merge
from config.params import Params, ParamsError
from config.wording import problems, suggest

PARAMS: Final = "params.yaml"
FOLDER: Final = "params"
SPREAD: Final = ("terms", "variants")  # sections that several files may have a part of
SHARED: Final = ("student", "model", "train", "start")  # what a variant that is like another one has of it
LAID: Final = ".params-laid"  # whole files that are about to take their places


def load_params(root: Path | str = ".") -> Params:
    """Read and check the parameters of a project.

    Raises:
        ParamsError: with one line per problem: file, key, value, what is allowed.
    """
    root = Path(root)
    return parse(read_texts(root), sorted(path.stem for path in (root / "profiles").glob("*.yaml")))


def read_params(root: Path | str = ".") -> dict[str, Any]:
    """The parameters of a project as one mapping of sections, in which nothing is named any more; not checked.

    Raises:
        ParamsError: a file cannot be read, a section stands in two files, or a term that is named does not exist.
    """
    whole, wrong = _composed(read_texts(Path(root)))
    if wrong:
        raise ParamsError(_listed(wrong))
    return whole


def read_texts(root: Path) -> dict[str, str]:
    """The texts of the files by path relative to the root, params.yaml first.

    Raises:
        ParamsError: there is no params.yaml.
    """
    put_in_place(root)
    texts = {str(path.relative_to(root)): path.read_text() for path in _files(root)}
    for text in texts.values():
        redaction.learn(text)  # before any message repeats a part of it
    if PARAMS not in texts:
        raise ParamsError(f"{root / PARAMS} does not exist")
    return texts


def parse(texts: Mapping[str, str], profiles: Iterable[str] = ()) -> Params:
    """The parameters that files hold, checked.

    Args:
        texts: of the files, by path.
        profiles: names that `profile` may have; none: any.

    Raises:
        ParamsError: see `load_params`.
    """
    whole, wrong = _composed(texts)
    try:
        params = Params.model_validate(whole)
    except ValidationError as error:
        wrong += _said_once(problems(error, Params))
    else:
        if (known := list(profiles)) and params.profile not in known:
            wrong.append(f"profile: {params.profile!r} is unknown{suggest(params.profile, known)}")
    if wrong:
        raise ParamsError(_listed(located(wrong, texts)))
    return params


def located(lines: Iterable[str], texts: Mapping[str, str]) -> list[str]:
    """Problems, which begin with a dotted key, with the file that has the key in front."""
    contents = {file: parse_yaml(text, file) for file, text in texts.items()}
    return [" ".join(filter(None, [_home(line, contents), line])) for line in lines]


def put_in_place(root: Path) -> None:
    """Finish what a killed `lay` has begun: all of its files take their places, whoever comes first moves them."""
    laid = root / LAID
    found: list[Path] = []
    if laid.exists():
        with suppress(FileNotFoundError):  # another process has moved all of them, and removed the folder
            found = sorted(laid.rglob("*.yaml"))
    for path in found:
        with suppress(FileNotFoundError):  # another process has moved it
            os.replace(path, root / path.relative_to(laid))
    shutil.rmtree(laid, ignore_errors=True)


def lay(texts: Mapping[str, str], root: Path) -> None:
    """Write files of the parameters: all of them or, when this process is killed, none.

    They are written beside their places, in a folder whose rename decides; `put_in_place` does the rest, in this
    process or in the next one that reads the parameters.
    """
    draft = root / f"{LAID}.{os.getpid()}"
    try:
        for name, text in texts.items():
            path = draft / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        if texts:
            put_in_place(root)
            os.rename(draft, root / LAID)
            put_in_place(root)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def read_yaml(path: Path) -> dict[str, Any]:
    """Parse a YAML 1.2 file as DVC does (`1e-3` is a number); duplicate keys are errors."""
    try:
        return parse_yaml(path.read_text(), str(path))
    except FileNotFoundError:
        raise ParamsError(f"{path} does not exist") from None


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """What a file holds, see `read_yaml`; `name` is for messages."""
    from ruamel.yaml import YAML, YAMLError

    redaction.learn(text)
    try:
        loaded = YAML(typ="safe").load(text)
    except YAMLError as error:
        raise ParamsError(f"{name} is not valid YAML: {error}") from None
    if not isinstance(loaded, dict):
        raise ParamsError(f"{name} must be a mapping of sections, not {type(loaded).__name__}")
    return loaded


def _files(root: Path) -> Iterator[Path]:
    if (root / PARAMS).exists():
        yield root / PARAMS
    yield from sorted((root / FOLDER).rglob("*.yaml"))


def _listed(wrong: Iterable[str]) -> str:
    return "the parameters are not valid:\n" + "\n".join(f"  {line}" for line in wrong)


def _composed(texts: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """The sections of all files as one mapping, and what is wrong with how they fit together."""
    whole: dict[str, Any] = {}
    homes: dict[str, str] = {}  # section, or section.name where it is spread -> file
    wrong = []
    for file, text in texts.items():
        for section, content in parse_yaml(text, file).items():
            spread = section in SPREAD and isinstance(content, Mapping)
            for place in [f"{section}.{name}" for name in content] if spread else [section]:
                if place in homes:
                    wrong.append(f"{place}: stands in {homes[place]} and in {file}: one of them is too many")
                homes[place] = file
            known = whole.get(section)
            whole[section] = {**known, **content} if spread and isinstance(known, Mapping) else content
    return whole, wrong + _with_likes(whole) + _with_grid(whole) + _with_terms(whole)


def _with_likes(whole: dict[str, Any]) -> list[str]:
    """Give variants what they have in common with others."""
    wrong: list[str] = []
    variants = dict(_entries(whole, "variants"))
    for name, entry in variants.items():
        if "like" not in entry:
            continue
        other = variants.get(entry["like"])
        own = {key: value for key, value in entry.items() if key != "like"}
        if other is None:
            wrong.append(f"variants.{name}.like: {entry['like']!r} is unknown{suggest(str(entry['like']), variants)}")
        elif "like" in other:
            wrong.append(f"variants.{name}.like: {entry['like']!r} is like {other['like']!r} itself: name that")
        else:
            own = merge({key: other[key] for key in SHARED if key in other}, own)
        whole["variants"][name] = own
    return wrong


def _with_grid(whole: dict[str, Any]) -> list[str]:
    """Give every detector the grid, as its config.json has it."""
    wrong, grid = [], whole.get("grid")
    for section in ("teachers", "students"):
        for name, entry in _entries(whole, section):
            model = entry.get("model")
            if isinstance(model, Mapping):
                if model.get("grid", grid) != grid:
                    wrong.append(f"{section}.{name}.model.grid: every model has the grid of section grid: leave it out")
                whole[section][name] = {**entry, "model": {**model, "grid": grid}}
    for name, entry in _entries(whole, "variants"):
        if isinstance(entry.get("model"), Mapping) and "grid" in entry["model"]:
            wrong.append(f"variants.{name}.model.grid: every model has the grid of section grid: leave it out")
    return wrong


def _with_terms(whole: dict[str, Any]) -> list[str]:
    """Put the terms that variants name in the places of their names."""
    wrong: list[str] = []
    terms = dict(_entries(whole, "terms"))
    for variant, entry in _entries(whole, "variants"):
        written = entry.get("terms")
        if isinstance(written, list) and all(isinstance(name, str) for name in written):
            twice = sorted({name for name in written if written.count(name) > 1})
            wrong += [f"variants.{variant}.terms: {name!r} is listed more than once" for name in twice]
            written = dict.fromkeys(written)
        if not isinstance(written, Mapping):
            continue
        found: dict[str, Mapping[str, Any]] = {}
        for name, changes in written.items():
            if name in terms and (changes is None or isinstance(changes, Mapping)):
                found[name] = {**terms[name], **(changes or {})}
            elif isinstance(changes, Mapping) and changes.keys() & {"student", "teacher", "distance"}:
                found[name] = changes
            else:
                wrong.append(f"variants.{variant}.terms: {name!r} is unknown{suggest(str(name), map(str, terms))}")
        whole["variants"][variant] = {**entry, "terms": found}
    return wrong


def _entries(whole: Mapping[str, Any], section: str) -> list[tuple[Any, Mapping[str, Any]]]:
    """Name and content of the entries of a section, of those that have the right form: the schema names the others."""
    content = whole.get(section)
    entries = content.items() if isinstance(content, Mapping) else ()
    return [(name, entry) for name, entry in entries if isinstance(entry, Mapping)]


def _said_once(lines: Iterable[str]) -> list[str]:
    """The problems without those of a term that are said of `terms`, too: every variant that names it has them."""
    lines = list(lines)
    own = [line.removeprefix("terms.") for line in lines if line.startswith("terms.")]
    return [line for line in lines if re.sub(r"^variants\.[^.]*\.terms\.", "", line) not in own]


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
