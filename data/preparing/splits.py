"""The official lists of scenes of nuScenes' splits."""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path


@cache
def official_splits() -> dict[str, list[str]]:
    """Split -> names of its scenes, as the devkit's `create_splits_scenes` returns them.

    The lists are read from the devkit's source, because importing it brings matplotlib, sklearn and OpenCV: more than a
    second of CPU time for seven lists. A devkit that keeps them in a file of data would end this.

    Raises:
        ModuleNotFoundError: the devkit is not installed.
        ValueError: the devkit's source has other lists than it used to have.
    """
    spec = find_spec("nuscenes")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("nuscenes-devkit is not installed: run `make setup`")
    path = Path(spec.submodule_search_locations[0]) / "utils/splits.py"
    lists: dict[str, list[str]] = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.List)
    }
    written = ("val", "test", "mini_train", "mini_val", "train_detect", "train_track")
    if missing := [name for name in written if name not in lists]:
        raise ValueError(f"{path} has no list {', '.join(missing)}: use the version of setup/requirements.txt")
    train = sorted({*lists["train_detect"], *lists["train_track"]})
    return {"train": train, **{name: lists[name] for name in written}}
