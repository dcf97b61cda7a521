"""Install the sparse convolution that fits this machine: no single package runs on a CPU and with every CUDA.

torch says what fits: its own CUDA version counts, because its packages bring that CUDA's libraries.

Usage: `python setup/sparse_convolution.py`, after torch and the lock.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

from machine import for_cuda

SPCONV, CUMM, SPCONV_TRITON = "2.3.8", "0.7.11", "1.0.0"
WHEELS = [(11, 8), (12, 1), (12, 4), (12, 6)]
"""CUDA versions, ascending, that spconv and cumm of those versions have wheels for."""
FAMILY = re.compile(r"(spconv|cumm)(-cu\d+|-triton)?")
"""Names of all packages that install `spconv` or what it stands on; they overwrite one another's files."""


def requirements(cuda: str | None) -> list[str]:
    """The packages for a CUDA version such as `12.8`; None: for a CPU.

    A wheel for CUDA 12.6 runs with any later 12.x, as CUDA's minor versions are compatible. For CUDA 13 spconv has no
    wheels, and spconv-triton is a translation of it to Triton, which torch brings along.

    Raises:
        SystemExit: there is no package for it.
    """
    if cuda is None:
        return [f"spconv=={SPCONV}", f"cumm=={CUMM}"]
    major, minor = (int(part) for part in cuda.split(".")[:2])
    if major >= 13:
        return [f"spconv-triton=={SPCONV_TRITON}"]
    fitting = [wheel for wheel in WHEELS if wheel[0] == major and wheel[1] <= minor]
    if not fitting:
        known = ", ".join(f"{major}.{minor}" for major, minor in WHEELS)
        sys.exit(
            f"setup: torch is for CUDA {cuda}, and no sparse convolution is: install a torch for CUDA {known}, "
            "a later 12.x, or 13"
        )
    suffix = "cu{}{}".format(*fitting[-1])
    return [f"spconv-{suffix}=={SPCONV}", f"cumm-{suffix}=={CUMM}"]


def for_this_machine() -> list[str]:
    """The packages for this machine's torch."""
    import torch

    return requirements(torch.version.cuda if for_cuda() else None)


def install(wanted: list[str]) -> None:
    """Have exactly these packages of the family in the running environment, under the name `spconv`."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-qq"]
    names = {requirement.partition("==")[0] for requirement in wanted}
    others = [found.name for found in distributions() if FAMILY.fullmatch(found.name) and found.name not in names]
    if others:  # packages of the family share files, so removing one breaks another
        subprocess.run([*pip, "uninstall", "--yes", *others, *names], check=True)
    subprocess.run([*pip, "install", "--no-deps", *wanted], check=True)
    alias = Path(sysconfig.get_path("purelib")) / "spconv.py"
    alias.unlink(missing_ok=True)
    if "spconv-triton" in names:
        shutil.copyfile(Path(__file__).with_name("spconv_on_triton.py"), alias)


if __name__ == "__main__":
    install(for_this_machine())
