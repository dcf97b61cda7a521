"""Slurm: a stage as a batch job, which sees the same files.

The batch script becomes the stage (`exec`), so that a signal to the batch step reaches it alone, and not the loader's
workers or the ranks: the stage itself says who has to know. The first of several nodes runs the stage in the batch
step, the others in a step beside it, which ends with the job.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from base.errors import PipelineError
from base.stopping import GRACE_SECONDS, PREEMPTED
from pipeline.launchers.job import FAR_SECONDS, NODE_RANK, RENDEZVOUS, Job, Stopping

logger = logging.getLogger(__name__)

OPTIONS = "PIPELINE_SLURM_OPTIONS"
FOLDER = Path("logs") / "slurm"  # what jobs print; of jobs that ended well it is removed
LOOK_SECONDS = 0.5  # between looks at what a job prints
ASK_SECONDS = (0.5, 10.0)  # between questions to Slurm, at first and at most: one controller serves many
CANCEL_SECONDS = 5.0  # between requests to a job that is to end
PORTS = range(20000, 30000)  # in which the processes of several nodes meet
ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}


class SlurmError(PipelineError):
    """Slurm refused a job, lost it, or ended it."""


@dataclass(frozen=True)
class Report:
    """What Slurm says of a job."""

    state: str  # RUNNING
    reason: str  # why it waits or ended; "None" if there is nothing to say
    code: str  # exit code and signal: 1:0
    nodes: str

    def __str__(self) -> str:
        reason = f" ({self.reason})" if self.reason not in ("None", "") else ""
        return f"{self.state}{reason}, exit code {self.code}, nodes {self.nodes or 'none'}"


def run(job: Job) -> int:
    """Run the stage as a batch job and wait for it; returns its exit code, or PREEMPTED where Slurm stopped it.

    Raises:
        SlurmError: Slurm refused the job, or it ended for a reason that the stage itself could not tell.
    """
    _end_earlier(job)
    with Stopping() as stopping:
        number = _submit(job)
        output = job.root / FOLDER / f"{job.label}-{number}.log"
        logger.info("%s is Slurm job %s", job.address, number)
        with _cancelled_on_error(number):
            report = _wait(number, job, output, stopping)
    if stopping.asked and report.state != "COMPLETED":
        logger.warning("%s was stopped: Slurm job %s has ended", job.address, number)
        return PREEMPTED
    code = _exit_code(job, number, report, output)
    if code == 0:
        output.unlink(missing_ok=True)
    return code


def script(job: Job) -> str:
    """The batch script."""
    command = shlex.join(job.argv)
    if job.nodes == 1:
        return f"#!/bin/sh\nexec {command}\n"
    others = [f"--nodes={job.nodes - 1}", f"--ntasks={job.nodes - 1}", "--relative=1", "--ntasks-per-node=1"]
    others += [f"--cpus-per-task={job.cpus}"] if job.cpus else []
    rank = f"export {NODE_RANK}=$((SLURM_PROCID + 1)); exec {command}"
    return (
        f"#!/bin/sh\nexport {RENDEZVOUS}=$(hostname):$(({PORTS.start} + SLURM_JOB_ID % {len(PORTS)}))\n"
        f"srun {shlex.join(others)} sh -c {shlex.quote(rank)} &\nexec {command}\n"
    )


def options(job: Job, *, gpus: bool) -> list[str]:
    """What sbatch is asked for, with or without GPUs; what PIPELINE_SLURM_OPTIONS says comes last and counts."""
    wanted = [f"--job-name={_name(job)}", f"--comment={job.fingerprint}", f"--chdir={job.root}", "--open-mode=append"]
    wanted += [f"--output={job.root / FOLDER / job.label}-%j.log", "--export=ALL", "--no-requeue"]
    wanted += [f"--nodes={job.nodes}", "--ntasks-per-node=1"]
    wanted += [f"--cpus-per-task={job.cpus}"] if job.cpus else []
    wanted += [f"--gres=gpu:{job.gpus}"] if gpus else []
    if job.timeout_h:
        minutes = max(1, math.ceil(60 * job.timeout_h))
        wanted += [f"--time={minutes}", f"--signal=B:TERM@{min(int(GRACE_SECONDS), 15 * minutes)}"]
    try:
        return wanted + shlex.split(os.environ.get(OPTIONS, ""))
    except ValueError as error:
        raise SlurmError(f"{OPTIONS}={os.environ[OPTIONS]!r}: {error}") from None


def _submit(job: Job) -> str:
    """Hand the job to Slurm; returns its number."""
    (job.root / FOLDER).mkdir(parents=True, exist_ok=True)
    # Nothing of a job that this process may run in itself; what concerns sbatch stays.
    ours = {k: v for k, v in os.environ.items() if k.startswith("SBATCH_") or k == "SLURM_CONF"}
    gpus = _gives_gpus(job)
    environment = ours | job.far_environment("slurm", gpus_given=gpus)
    arguments = options(job, gpus=gpus)
    done = _slurm("sbatch", "--parsable", *arguments, text=script(job), environment=environment)
    if done.returncode:
        raise SlurmError(
            f"Slurm did not take {job.address}: {done.stderr.strip()}\n"
            f"It was asked with: sbatch {shlex.join(arguments)} (the last ones are from {OPTIONS})"
        )
    return done.stdout.strip().partition(";")[0]  # behind it the cluster, where there are several


def _wait(number: str, job: Job, output: Path, stopping: Stopping) -> Report:
    """Pass on what the job prints until it has ended, and end it when this process is asked to."""
    lines, ask, pause, told = _Lines(output), 0.0, ASK_SECONDS[0], ""
    report: Report | None = None
    ending = _Ending(number)
    while True:
        lines.pass_on()
        if report and report.state in ENDED:
            return report
        if stopping.asked:
            pause = ASK_SECONDS[0]
            ending.press(report, hard=stopping.insisted)
        if time.monotonic() >= ask:
            report = look(number) or report
            ask, pause = time.monotonic() + pause, min(1.2 * pause, ASK_SECONDS[1])
        if report and report.state == "PENDING" and report.reason not in ("None", told):
            told = report.reason
            logger.info("%s waits in Slurm's queue: %s", job.address, told)
        time.sleep(LOOK_SECONDS)


def look(number: str) -> Report | None:
    """What Slurm says of a job; None while its controller does not answer. Raises SlurmError: it knows no such job."""
    done = _slurm("scontrol", "--oneliner", "show", "job", number)
    if done.returncode == 0 and "JobState=" in done.stdout:
        said = {key: _value(key, done.stdout) for key in ("JobState", "Reason", "ExitCode", "NodeList")}
        return Report(said["JobState"], said["Reason"], said["ExitCode"], said["NodeList"].replace("(null)", ""))
    if "Invalid job id" not in done.stderr:
        return None
    kept = _slurm("sacct", "--jobs", number, "--allocations", "--noheader", "--parsable2", "--format=State,ExitCode")
    if kept.returncode or "|" not in kept.stdout:
        raise SlurmError(
            f"Slurm no longer knows job {number}, and keeps no accounts (sacct) that say how it ended: start it again"
        )
    state, code = kept.stdout.splitlines()[0].split("|")
    return Report(state.partition(" ")[0], "None", code, "")


def _exit_code(job: Job, number: str, report: Report, output: Path) -> int:
    """The stage's exit code, of a job that was not stopped from here."""
    if report.state == "COMPLETED":
        return 0
    if report.state in ("PREEMPTED", "TIMEOUT") or (report.state, report.code) == ("FAILED", f"{PREEMPTED}:0"):
        logger.warning("Slurm job %s of %s was stopped: %s", number, job.address, report)
        return PREEMPTED
    if report.state == "FAILED" and report.code == "1:0":  # the stage has said why
        return 1
    raise SlurmError(f"Slurm job {number} of {job.address}: {report}; it printed {output.relative_to(job.root)}")


class _Lines:
    """What a growing file has said since the last time; opened anew each time, as NFS looks at a file when it opens."""

    def __init__(self, path: Path) -> None:
        self._path, self._position = path, 0

    def pass_on(self) -> None:
        """Print what is new."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                fresh = file.read()
        except FileNotFoundError:
            return
        self._position += len(fresh)
        if fresh:
            print(fresh.decode(errors="replace"), end="", flush=True)


class _Ending:
    """Ends a job: the stage is told, and given time to save; then Slurm ends it."""

    def __init__(self, number: str) -> None:
        self._number, self._next, self._deadline = number, 0.0, math.inf

    def press(self, report: Report | None, *, hard: bool) -> None:
        """To be called again and again; a job that does not run yet is simply taken out of the queue."""
        now = time.monotonic()
        self._deadline = min(self._deadline, now + FAR_SECONDS)
        if now < self._next and not hard:
            return
        self._next = now + CANCEL_SECONDS
        soft = report is not None and report.state == "RUNNING" and not hard and now < self._deadline
        _slurm("scancel", *(["--batch", "--signal=TERM"] if soft else []), self._number)


@contextmanager
def _cancelled_on_error(number: str) -> Iterator[None]:
    """No job is left behind by an error here."""
    try:
        yield
    except BaseException:
        _slurm("scancel", number)
        raise


def _end_earlier(job: Job) -> None:
    """End the jobs of this stage that a killed process of this workspace left: two must not write one scratch."""
    left = _jobs(_name(job))
    if left:
        logger.info("%s: ending Slurm jobs %s, which an earlier run left", job.address, ", ".join(left))
        endings = {number: _Ending(number) for number in left}
        deadline = time.monotonic() + GRACE_SECONDS
        while left := _jobs(_name(job)):
            if time.monotonic() > deadline:
                raise SlurmError(f"Slurm does not end jobs {', '.join(left)} of an earlier run of {job.address}")
            for number in left:
                endings[number].press(look(number), hard=False)
            time.sleep(LOOK_SECONDS)


def _jobs(name: str) -> list[str]:
    """Numbers of one's own jobs of that name that have not ended."""
    done = _slurm("squeue", "--me", "--noheader", f"--name={name}", "--format=%i")
    if done.returncode:
        raise SlurmError(f"Slurm does not answer: {done.stderr.strip()}")
    return done.stdout.split()


def _name(job: Job) -> str:
    """Name of the stage's job, of this workspace alone."""
    workspace = sha256(f"{socket.gethostname()}:{job.root}".encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9@._-]', '_', job.address)}.{workspace}"


def _gives_gpus(job: Job) -> bool:
    """Whether to ask for GPUs: a cluster without any runs the stage on CPUs, as a host without any does."""
    return job.gpus > 0 and "gpu" in _slurm("sinfo", "--noheader", "--format=%G").stdout


def _value(key: str, text: str) -> str:
    found = re.search(rf"\b{key}=(\S*)", text)
    return found[1] if found else ""


def _slurm(
    command: str, *arguments: str, text: str | None = None, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm, in a session of its own: what stops this process must not cut a submission in two."""
    try:
        return subprocess.run(
            [command, *arguments],
            input=text,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            start_new_session=True,
        )
    except FileNotFoundError:
        if command == "sacct":
            return subprocess.CompletedProcess([command], 1, "", "")
        raise SlurmError(f"PIPELINE_LAUNCHER=slurm needs Slurm's command {command!r}, which is not on PATH") from None
