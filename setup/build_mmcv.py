"""Build mmcv's wheel with its compiled ops, fast, and keep it for the next time.

No wheel of mmcv 2.1.0 with ops is published, so it is built from its source distribution. Most of that time goes
into parsing torch's headers once per file; a precompiled header parses them once (about 7 minutes down to 2 on two
cores). The wheel is kept in a cache folder under a name that carries everything it depends on: mmcv, torch, Python,
flags and GPU architecture, so a wheel built for another torch is never picked up.

Usage: `python setup/build_mmcv.py CACHE_DIR`; prints the wheel's path as its last line.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from machine import for_cuda

MMCV = "2.1.0"
# setup.py reads CFLAGS only, and setting it replaces the compiler's defaults: -g0 keeps the library at 4 MB, not 82.
BASE_FLAGS = ["-O2", "-DNDEBUG", "-g0"]
# The flags that setup.py adds. A precompiled header is used only where these are exactly the same.
HEADER_FLAGS = ["-fPIC", "-std=c++17", "-DTORCH_API_INCLUDE_EXTENSION_H", "-DTORCH_EXTENSION_NAME=_ext"]


def architecture() -> str:
    """`cpu`, or the CUDA architecture list that the ops are built for; by default that of the machine's GPU."""
    import torch

    if not for_cuda():
        return "cpu"
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if not architectures and torch.cuda.is_available():
        architectures = ".".join(map(str, torch.cuda.get_device_capability()))
    return "cuda" + architectures.replace(" ", "-").replace(";", "-")


def wheel_folder(cache: Path) -> Path:
    """Cache folder of the wheel for this interpreter, torch and set of flags."""
    import torch

    flags = hashlib.sha256(" ".join(BASE_FLAGS + HEADER_FLAGS).encode()).hexdigest()[:8]
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    tag = f"mmcv-{MMCV}+torch{torch.__version__}-{python}-{platform.machine()}-{architecture()}-{flags}"
    return cache / tag.replace("+", "_")


def require_toolchain() -> None:
    """Fail with the package to install when the compiler or Python's headers are missing."""
    if shutil.which("g++") is None and shutil.which("c++") is None:
        sys.exit("setup: no C++ compiler found: install one (Debian/Ubuntu: apt-get install g++) and run again")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        sys.exit(
            f"setup: {header} is missing: install Python's headers "
            f"(Debian/Ubuntu: apt-get install python{version}-dev) and run again"
        )


def precompile_header(folder: Path) -> list[str]:
    """Precompile torch's headers in `folder`; returns the flags that make the build use them."""
    from torch.utils.cpp_extension import include_paths

    header = folder / "torch_pch.h"
    header.write_text("#include <torch/types.h>\n")
    includes = [flag for path in [*include_paths("cpu"), sysconfig.get_paths()["include"]] for flag in ("-I", path)]
    compiler = os.environ.get("CXX", "g++")
    command = [
        compiler,
        *BASE_FLAGS,
        *HEADER_FLAGS,
        "-w",
        *includes,
        "-x",
        "c++-header",
        str(header),
        "-o",
        f"{header}.gch",
    ]
    subprocess.run(command, check=True)
    return ["-include", str(header), "-Winvalid-pch"]


def build(target: Path) -> None:
    """Build the wheel into `target`, which appears whole or not at all."""
    require_toolchain()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # nvcc reads CFLAGS as well and cannot use a precompiled header.
        header = precompile_header(folder) if architecture() == "cpu" else []
        environment = os.environ | {
            "MMCV_WITH_OPS": "1",
            "CFLAGS": " ".join([*BASE_FLAGS, *header]),
            "MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count() or 1)),
        }
        # Without isolation, because an isolated build has no torch and then quietly leaves the ops out.
        # Without pip's cache, because pip keys a built wheel by version alone and would reuse another torch's.
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "-qq",
                "wheel",
                "--no-deps",
                "--no-build-isolation",
                "--no-cache-dir",
                "--no-binary",
                "mmcv",
                "--wheel-dir",
                str(folder / "wheel"),
                f"mmcv=={MMCV}",
            ],
            check=True,
            env=environment,
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
        shutil.copytree(folder / "wheel", partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)


def main() -> None:
    """Print the path of a wheel that fits this machine, building it if it is not in the cache yet."""
    target = wheel_folder(Path(sys.argv[1]))
    if not list(target.glob("*.whl")):
        print("setup: building mmcv with its ops (two to three minutes on two cores)", file=sys.stderr, flush=True)
        build(target)
    print(next(target.glob("*.whl")))


if __name__ == "__main__":
    main()
