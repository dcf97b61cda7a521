"""`cache ls`: every store and every unfinished build, and what each is worth now."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from config.files import load_params
from config.params import Params
from data.store import DamagedShardError
from data.store.layout import read_contents
from data.store.writer import readable
from pipeline.commands.cache.builds import (
    STORES,
    Build,
    actionable,
    builds,
    folder_bytes,
    lock_file,
    locked,
    published,
    resumed_in,
    state,
    taken_over,
)
from pipeline.commands.cache.table import table
from stages.teaching.identity import describe


@dataclass(frozen=True)
class Row:
    """A store, or an unfinished build of one."""

    store: str
    path: str | None  # relative to the root; None: nothing is there
    teacher: str | None  # None: the parameters do not say
    samples: int
    bytes: int
    state: str
    taps: str


@actionable()
def run(root: Path, *, as_json: bool) -> int:
    """Print the rows."""
    params = load_params(root)
    there = published(root)
    names = list(dict.fromkeys([*params.stores, *there]))
    rows = [_published(root, params, name) if name in there else _absent(params, name) for name in names]
    rows += [_unfinished(root, params, build) for build in builds(root) if (root / build.folder).is_dir()]
    print(json.dumps([asdict(row) for row in rows], indent=2) if as_json else _text(rows))
    return 0


def _text(rows: list[Row]) -> str:
    if not rows:
        return "the parameters have no stores, and none is built"
    cells = [
        [row.store, row.teacher or "?", f"{row.samples:,}", readable(row.bytes), row.state, row.taps] for row in rows
    ]
    return table(["store", "teacher", "samples", "bytes", "state", "taps"], cells, right={"samples", "bytes"})


def _teacher(params: Params, name: str) -> str | None:
    return params.stores[name].teacher if name in params.stores else None


def _published(root: Path, params: Params, name: str) -> Row:
    path, found = STORES / name, state(root, params, name)
    samples, taps = (len(found.store), found.store.identity.encoding) if found.store else (0, "")
    length, _ = folder_bytes(root / path)
    return Row(name, str(path), _teacher(params, name), samples, length, str(found), _with_online(params, name, taps))


def _absent(params: Params, name: str) -> Row:
    """A store of the parameters that is not built."""
    if not params.stores[name].cached:
        return Row(name, None, _teacher(params, name), 0, 0, "online, nothing stored", _with_online(params, name, ""))
    why = "not built" if name in params.study.stores else "not built: study.stores does not name it"
    taps = _with_online(params, name, describe(params.stores[name]))
    return Row(name, None, _teacher(params, name), 0, 0, why, taps)


def _unfinished(root: Path, params: Params, build: Build) -> Row:
    """What an interrupted build has finished."""
    tokens, taps = 0, ""
    for shard in sorted((root / build.folder).glob("shard-*.bin")):
        try:
            contents, _ = read_contents(shard)
        except DamagedShardError:
            continue
        tokens, taps = tokens + len(contents.tokens), contents.identity.encoding
    length, _ = folder_bytes(root / build.path)
    worth = _prospect(root, params, build, locked(lock_file(root, build.store)))
    return Row(
        build.store, str(build.path), _teacher(params, build.store), tokens, length, f"unfinished: {worth}", taps
    )


def _prospect(root: Path, params: Params, build: Build, running: bool) -> str:
    wanted = resumed_in(root, params, build.store)
    if wanted and (wanted == build.path.name or taken_over(root, params, build)):
        return "being built" if running else "goes on when its stage runs"
    return "what it depends on is not here" if wanted is None else "of other parameters (cache gc)"


def _with_online(params: Params, name: str, taps: str) -> str:
    store = params.stores.get(name)
    online = [f"{tap}: online" for tap, settings in store.taps.items() if not settings.cached] if store else []
    return "; ".join([*([taps] if taps else []), *online])
