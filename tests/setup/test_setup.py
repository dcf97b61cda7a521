"""What set-up promises: a complete lock, a wheel per torch, and words for a missing toolchain."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SETUP = Path(__file__).resolve().parents[2] / "setup"


@pytest.fixture
def build_mmcv() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_mmcv", SETUP / "build_mmcv.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names(path: Path) -> set[str]:
    """Normalised names of the packages that a requirements file pins or asks for."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return {re.split(r"[=<>\[]", line)[0].lower().replace("_", "-") for line in lines if line}


def test_the_lock_pins_all_that_is_asked_for() -> None:
    assert names(SETUP / "requirements.in") <= names(SETUP / "requirements.txt")
    lines = (SETUP / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9_.\-]+==[A-Za-z0-9_.]+", line)] == []


def test_a_missing_compiler_names_the_package() -> None:
    code = f"import sys; sys.path.insert(0, {str(SETUP)!r}); import build_mmcv; build_mmcv.require_toolchain()"
    done = subprocess.run([sys.executable, "-c", code], env={"PATH": ""}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "apt-get install g++" in done.stderr


def test_missing_headers_name_the_package(
    build_mmcv: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build_mmcv.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(SystemExit, match=rf"Python\.h.*python3\.{sys.version_info.minor}-dev"):
        build_mmcv.require_toolchain()


def test_a_wheel_belongs_to_one_torch_and_architecture(
    build_mmcv: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = build_mmcv.wheel_folder(tmp_path).name
    assert torch.__version__.replace("+", "_") in folder
    monkeypatch.setenv("FORCE_CUDA", "1")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert "cuda9.0" in build_mmcv.wheel_folder(tmp_path).name
