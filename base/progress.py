"""Progress of a long loop: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS = 10.0  # between plain lines


class ProgressBar:
    """Counts to `total` from `start`. `shown=False` (other ranks) prints nothing."""

    def __init__(self, label: str, total: int, start: int = 0, shown: bool = True) -> None:
        self.label, self.total, self.done = label, total, start
        self.plain = shown and not sys.stdout.isatty()
        self.printed = time.monotonic() - LINE_SECONDS
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        text = TextColumn("{task.fields[text]}")
        self.bar = Progress(*columns, TimeRemainingColumn(), text, disable=not shown or self.plain)
        self.task = self.bar.add_task(label, total=total, completed=start, text="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def advance(self, text: str = "", by: int = 1) -> None:
        """Count `by` more, with a few words about the state."""
        self.done += by
        self.bar.update(self.task, completed=self.done, text=text)
        now = time.monotonic()
        if self.plain and (now - self.printed >= LINE_SECONDS or self.done == self.total):
            print(f"{self.label} {self.done}/{self.total} {text}", flush=True)
            self.printed = now
