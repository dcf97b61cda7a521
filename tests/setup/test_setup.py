"""What set-up promises: a complete lock, a wheel per torch, a sparse convolution per CUDA, words for a fault."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SETUP = Path(__file__).resolve().parents[2] / "setup"


@pytest.fixture
def build_mmcv(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SETUP)
    return importlib.import_module("build_mmcv")


@pytest.fixture
def sparse_convolution(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SETUP)
    return importlib.import_module("sparse_convolution")


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


def test_a_wheel_that_is_built_beside_a_gpu_is_not_one_for_cpus(
    build_mmcv: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mmcv's own set-up compiles for the GPU that it sees, whether or not FORCE_CUDA is set."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert build_mmcv.architecture() == "cuda8.6"


@pytest.mark.parametrize(
    ("cuda", "packages"),
    [
        (None, ["spconv==2.3.8", "cumm==0.7.11"]),
        ("11.8", ["spconv-cu118==2.3.8", "cumm-cu118==0.7.11"]),
        ("12.1", ["spconv-cu121==2.3.8", "cumm-cu121==0.7.11"]),
        ("12.3", ["spconv-cu121==2.3.8", "cumm-cu121==0.7.11"]),
        ("12.4", ["spconv-cu124==2.3.8", "cumm-cu124==0.7.11"]),
        ("12.6", ["spconv-cu126==2.3.8", "cumm-cu126==0.7.11"]),
        ("12.10", ["spconv-cu126==2.3.8", "cumm-cu126==0.7.11"]),
        ("13.0", ["spconv-triton==1.0.0"]),
        ("13.2", ["spconv-triton==1.0.0"]),
    ],
)
def test_the_sparse_convolution_fits_cuda(
    sparse_convolution: ModuleType, cuda: str | None, packages: list[str]
) -> None:
    assert sparse_convolution.requirements(cuda) == packages


@pytest.mark.parametrize("cuda", ["10.2", "11.7", "12.0"])
def test_a_cuda_without_a_sparse_convolution_names_those_with_one(sparse_convolution: ModuleType, cuda: str) -> None:
    with pytest.raises(SystemExit, match=rf"CUDA {cuda}, .* CUDA 11\.8, 12\.1, 12\.4, 12\.6, a later 12\.x, or 13"):
        sparse_convolution.requirements(cuda)


def test_a_cpu_gets_the_cpus_unless_cuda_is_forced(
    sparse_convolution: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")  # as torch's usual package has it, GPU or not
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sparse_convolution.for_this_machine() == ["spconv==2.3.8", "cumm==0.7.11"]
    monkeypatch.setenv("FORCE_CUDA", "1")
    assert sparse_convolution.for_this_machine() == ["spconv-triton==1.0.0"]


def test_a_gpu_is_noticed_by_its_stamp_and_one_machine_does_not_undo_the_others_set_up() -> None:
    """What `make` looks for with a GPU is not there after a set-up without one; the other way round it is."""
    makefile = (SETUP.parent / "Makefile").read_text()

    def stamps(device: str) -> list[str]:
        rule = makefile.replace("/dev/nvidia[0-9]*", device)
        command = ["make", "-s", "-f", "-", "--eval", "stamps:\n\t@echo $(READY) $(READY:-gpu=)", "stamps"]
        done = subprocess.run(command, input=rule, cwd=SETUP.parent, capture_output=True, text=True, check=True)
        return done.stdout.split()

    without, same = stamps("/dev/none-there")
    with_gpu, also = stamps("/dev/null")
    assert without == same == also
    assert with_gpu == f"{without}-gpu"


def test_spconv_on_triton_is_one_module_under_two_names(tmp_path: Path) -> None:
    """A package of spconv-triton's layout, since that one wants Triton."""
    package = tmp_path / "spconv_triton"
    (package / "pytorch").mkdir(parents=True)
    (package / "__init__.py").write_text("SPCONV_VERSION_NUMBERS = [2, 3, 8]\n__version__ = '1.0.0'\n")
    (package / "pytorch" / "__init__.py").write_text("from spconv_triton.pytorch import ops\n")
    (package / "pytorch" / "ops.py").write_text("")
    (tmp_path / "spconv.py").write_text((SETUP / "spconv_on_triton.py").read_text())
    code = (
        "import spconv, spconv.pytorch.ops, spconv_triton.pytorch.ops\n"
        "from spconv.pytorch import ops\n"
        "print(spconv.__version__, ops is spconv.pytorch.ops is spconv_triton.pytorch.ops)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2.3.8", "True"]
