"""Recording one stage in dvc.lock: pipeline.lockfile beside DVC, on a file with all stages of the workspace's dvc.yaml.

python benchmarks/dvc_lock.py      (in a clone after `python -m pipeline study structured --profile smoke`: 108 stages)

Hashes in the file are made up, its parameters are those of the project. CPU seconds of this process, once each.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dvc.utils.serialize import modify_yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config.graph import graph, resolve
from pipeline.lockfile import HEAD, updated, written


def entry(name: str) -> dict[str, Any]:
    """What DVC records of a stage, with hashes of nothing."""
    spec = resolve(name)
    hashes = {"hash": "md5", "md5": "d41d8cd98f00b204e9800998ecf8427e", "size": 12345}
    deps, outs = ([{"path": path, **hashes} for path in paths] for paths in (spec.deps, spec.outs))
    nested: dict[str, Any] = {"params.yaml": spec.params}
    return {"cmd": spec.cmd, "deps": deps, "params": nested, "outs": outs}


def main() -> None:
    """Print the size of the file and both times."""
    entries = {name: entry(name) for name in graph()}
    text = HEAD + "".join(written(name, value) for name, value in entries.items())
    name, changed = next(reversed(entries.items()))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dvc.lock"
        path.write_text(text)
        began = time.process_time()
        with modify_yaml(str(path)) as data:
            data["stages"].update({name: changed})
        theirs, began = time.process_time() - began, time.process_time()
        path.write_text(updated(text, {name: changed}) or "")
        ours = time.process_time() - began
    print(f"{len(entries)} stages, {len(text) / 1000:.0f} kB: DVC {theirs:.2f} s, pipeline.lockfile {ours:.3f} s")


if __name__ == "__main__":
    main()
