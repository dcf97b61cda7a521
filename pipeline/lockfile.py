"""`python -m pipeline.lockfile` is `dvc`, but that it records a stage in dvc.lock however long that is already.

DVC reads the whole file with its comments and writes it again, in pure Python: 5 s of CPU for each stage of a study of
108 stages (1 MB), and while it holds its lock. Here only the lines of the stage that ended are made anew, in .1 s
(benchmarks/dvc_lock.py). They say the same; DVC itself writes where the file looks unlike one of its own. This can go
when DVC records a stage of such a study in less than a second (it does not in 3.67).

Beside `config.graph` the only module that knows DVC's insides.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dvc.dvcfile import Lockfile
from dvc.stage.serialize import to_lockfile
from ruamel.yaml import YAML
from ruamel.yaml.representer import RoundTripRepresenter

HEAD = "schema: '2.0'\nstages:\n"
STAGE = re.compile(r"^  (?=\S)", re.MULTILINE)  # where the lines of a stage begin
_LINES = re.compile(r"[\w.@\-]+:\n(?:    .*\n)+")  # of a stage, without the two spaces at its beginning
_ANCHOR = re.compile(r"(?<=\s)([&*])([\w\-]+)")  # and what looks like one in a text, which does no harm

_dump_stages = Lockfile.dump_stages


class _Representer(RoundTripRepresenter):
    """An ordered mapping is a mapping, as DVC has it."""


_Representer.add_representer(OrderedDict, RoundTripRepresenter.represent_dict)


def main() -> int:
    """Run `dvc` with the arguments of this process."""
    from dvc.cli import main as dvc

    Lockfile.dump_stages = record
    return int(dvc(sys.argv[1:]))


def record(self: Any, stages: Iterable[Any], **options: Any) -> None:
    """What `Lockfile.dump_stages` does: write what stages ran on, and what they made, into dvc.lock."""
    stages, path = list(stages), Path(self.path)
    entries: dict[str, Any] = {}
    for stage in stages:
        entries |= to_lockfile(stage, **options)
    text = path.read_text(encoding="utf-8") if path.exists() else HEAD
    changed = updated(text, entries)
    if changed is None:
        _dump_stages(self, stages, **options)
    elif changed != text:
        draft = path.with_name(f".{path.name}.draft")
        draft.write_text(changed, encoding="utf-8")
        os.replace(draft, path)  # a reader sees the old file or the new one
        self.repo.scm_context.track_file(self.relpath)


def updated(text: str, entries: Mapping[str, Any]) -> str | None:
    """The text of a dvc.lock with other entries for some stages: in their places, new ones at the end.

    None where the text is not as DVC writes it.
    """
    if not text.startswith(HEAD):
        return None
    start, *blocks = STAGE.split(text.removeprefix(HEAD))
    if start or not all(map(_LINES.fullmatch, blocks)):
        return None
    known = {block.partition(":\n")[0]: f"  {block}" for block in blocks}
    if any(map(_tangled, known.values())):
        known = {name: written(name, entry) for name, entry in YAML(typ="safe").load(text)["stages"].items()}
    return HEAD + "".join((known | {name: written(name, entry) for name, entry in entries.items()}).values())


def recorded(path: Path, name: str) -> dict[str, Any] | None:
    """What dvc.lock says of a stage, by its lines alone where that is possible; None where it says nothing."""
    text = path.read_text(encoding="utf-8") if path.exists() else HEAD
    found = re.search(rf"(?m)^  {re.escape(name)}:\n(?:    .*\n)+", text)
    lines = "stages:\n" + found[0] if found and not _tangled(found[0]) else text
    entry = (YAML(typ="safe").load(lines).get("stages") or {}).get(name)
    return dict(entry) if entry else None


def written(name: str, entry: Any) -> str:
    """The lines of a stage, as DVC writes them; anchors have its name, so that no two in the file are alike."""
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.serializer.ANCHOR_TEMPLATE = re.sub(r"[^\w\-]", "-at-", name) + "-{:03d}"
    stream = io.StringIO()
    yaml.dump({"stages": {name: entry}}, stream)
    return stream.getvalue().removeprefix("stages:\n")


def _tangled(block: str) -> bool:
    """Whether a stage's lines refer to values that stand among those of another stage."""
    found = _ANCHOR.findall(block)
    return not {name for sign, name in found if sign == "*"} <= {name for sign, name in found if sign == "&"}


if __name__ == "__main__":
    sys.exit(main())
