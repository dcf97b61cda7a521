"""Shared fixtures: the real keyframes, one thread per test process, Ctrl-C for all."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# Tests end what they start with Ctrl-C's signal, which the children of a background job (`make test &`) would ignore.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # the processes that tests start would compile all modules anew
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import pytest  # noqa: E402 (threads are set first)

from tests.cpu_times import CpuTimes  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "real" / "nuscenes"


def pytest_configure(config: pytest.Config) -> None:
    """Show CPU times where durations are asked for."""
    if config.getoption("durations"):
        config.pluginmanager.register(CpuTimes())


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run a file's tests in one process, where its fixtures are made once, and the longest tests first.

    A file that says which groups its tests belong to (pytest.mark.xdist_group) is split as it says.
    """
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(str(item.path.relative_to(ROOT))))
    items.sort(key=lambda item: item.get_closest_marker("whole") is None)


def pytest_collection_finish(session: pytest.Session) -> None:
    """See that pytest-xdist knows the groups: with other versions of pytest it may not, and makes fixtures twice."""
    if getattr(session.config.option, "loadgroup", False):
        loose = [item.nodeid for item in session.items if "@" not in item.nodeid]
        if loose:
            raise pytest.UsageError(f"pytest-xdist groups no tests with pytest {pytest.__version__}: {loose[0]}")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_dataroot() -> Path:
    """Dataroot of the two real nuScenes keyframes, read in place."""
    if not REAL.is_dir():
        pytest.skip("the real nuScenes keyframes are absent: ../shared/real/nuscenes")
    return REAL


@pytest.fixture(scope="session")
def city(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dataroot of a tiny synthetic city, v1.0-trainval: a training scene of 3 keyframes, two validation scenes of 2."""
    from data.city.config import CityConfig
    from data.city.generate import generate

    dataroot = tmp_path_factory.mktemp("city") / "city"
    config = CityConfig(
        seed=3,
        train_scenes=1,
        val_scenes=2,
        train_keyframes=3,
        val_keyframes=2,
        image=(64, 176),
        azimuths=540,
    )
    generate(config, dataroot, "v1.0-trainval")
    return dataroot
