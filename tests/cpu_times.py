"""CPU time of tests, as waiting and the load of the machine distort their durations: shown with `--durations`.

A test's time covers its process and the children that it waited for; a fixture counts for the first test that needs it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import pytest

PROPERTY = "cpu"
FOLDER_PARTS = 2  # of tests/stages/test_film.py


def used() -> float:
    """CPU seconds of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class CpuTimes:
    """Measures where tests run, adds up where their reports arrive (under xdist another process)."""

    def __init__(self) -> None:
        self.tests: Counter[str] = Counter()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Remember when the test began."""
        item.stash[BEGAN] = used()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        """Give the last report of a test what it used."""
        if call.when == "teardown":
            item.user_properties.append((PROPERTY, used() - item.stash[BEGAN]))
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Collect."""
        if report.when == "teardown":
            self.tests[report.nodeid] += dict(report.user_properties).get(PROPERTY, 0.0)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
        """Folders by CPU time, and the files and tests that used most."""
        if not self.tests:
            return
        files: Counter[str] = Counter()
        folders: Counter[str] = Counter()
        for test, seconds in self.tests.items():
            file = test.partition("::")[0]
            files[file] += seconds
            folders["/".join(file.split("/")[:FOLDER_PARTS])] += seconds
        terminalreporter.section(f"CPU seconds: {sum(folders.values()):.0f}")
        most = config.getoption("durations")
        for name, seconds in folders.most_common() + files.most_common(most) + self.tests.most_common(most):
            terminalreporter.line(f"{seconds:8.1f}  {name}")


BEGAN = pytest.StashKey[float]()
