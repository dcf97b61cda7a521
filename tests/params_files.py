"""Parameters in the files from which dvc.yaml reads them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from config.composing import composed, gathered
from config.files import FOLDER, PARAMS, lay, parse_yaml, read_texts
from config.profiles import lay_over

ROOT = Path(__file__).resolve().parents[1]
HOMES = {
    "teachers": "detectors",
    "students": "detectors",
    "segmenters": "segmenters",
    "stores": "stores",
    "terms": "arms/all",
    "variants": "arms/all",
}


def read_params(root: Path = ROOT) -> dict[str, Any]:
    """The parameters of a project as one mapping of sections, in which nothing is named any more."""
    whole, wrong = gathered({file: parse_yaml(text, file) for file, text in read_texts(root).items()})
    assert wrong + composed(whole) == []
    return whole


def copy_params(root: Path) -> None:
    """Give a project the files of the repository."""
    shutil.copy(ROOT / PARAMS, root)
    shutil.copytree(ROOT / FOLDER, root / FOLDER)


def write_params(root: Path, values: Mapping[str, Any]) -> None:
    """Write all sections, each into the file where it belongs, plain, and instead of what was there."""
    shutil.rmtree(root / FOLDER, ignore_errors=True)
    files: dict[str, dict[str, Any]] = {}
    for section, content in json.loads(json.dumps(values)).items():
        if section in ("teachers", "students"):
            for entry in content.values():
                entry["model"].pop("grid", None)  # it is that of the section `grid`
        file = f"{FOLDER}/{HOMES[section]}.yaml" if section in HOMES else PARAMS
        files.setdefault(file, {})[section] = content
    for file, sections in files.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(json.dumps(sections, indent=1) + "\n")  # JSON is YAML, and written at once


def lay_text(root: Path, overlay: str) -> None:
    """Lay values over the files, as a profile is laid."""
    lay(lay_over(read_texts(root), overlay, "test"), root)


def edit_params(root: Path, edits: Iterable[tuple[str, str]]) -> None:
    """Replace what patterns match, each at least once in one of the files."""
    texts = read_texts(root)
    for pattern, replacement in edits:
        found = 0
        for file, text in texts.items():
            texts[file], count = re.subn(pattern, replacement, text)
            found += count
        assert found, pattern
    lay(texts, root)


def contents(root: Path) -> dict[str, bytes]:
    """The bytes of all files."""
    return {file: (root / file).read_bytes() for file in read_texts(root)}
