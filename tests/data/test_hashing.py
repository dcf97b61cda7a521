"""Hashes of files, and that what only hashes does not wait for torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from data.hashing import MissingFileError, hash_files

ROOT = Path(__file__).resolve().parents[2]


def test_hash_of_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.py").write_text("1")
    (tmp_path / "b.py").write_text("2")
    first = hash_files(tmp_path, ["a", "b.py"])
    assert first == hash_files(tmp_path, ["b.py", "a"])
    (tmp_path / "a/x.py").rename(tmp_path / "a/y.py")
    assert first != hash_files(tmp_path, ["a", "b.py"])
    with pytest.raises(MissingFileError, match=r"c\.py does not exist"):
        hash_files(tmp_path, ["c.py"])


def test_stage_needs_starts_without_torch() -> None:
    """There is one for each variant of a study."""
    code = "import sys, stages.needs; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
