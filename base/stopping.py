"""How a run ends that is asked to stop."""

from __future__ import annotations

PREEMPTED = 75  # exit code (EX_TEMPFAIL): stopped by SIGTERM, what is in scratch resumes
GRACE_SECONDS = 120.0  # from SIGTERM to the end of a stage that is saving


class Preempted(SystemExit):
    """The run was asked to stop; its state is saved; uncaught, it ends the process with exit code PREEMPTED."""

    def __init__(self, step: int) -> None:
        super().__init__(PREEMPTED)
        self.step = step
