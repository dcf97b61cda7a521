"""The stage in several processes of this host; with PIPELINE_RENDEZVOUS set, together with those of other hosts."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

from base.environment import die_with_parent
from base.errors import PipelineError
from base.stopping import GRACE_SECONDS, PREEMPTED
from pipeline import gpus
from pipeline.launchers.job import NODE_RANK, RENDEZVOUS, UNDER, Job, Stopping

logger = logging.getLogger(__name__)
JOIN_SECONDS = 300  # for which the processes of one node wait for those of the others


def run(job: Job) -> int:
    """Run the stage in as many processes as it can use, in this one if that is one; returns its exit code."""
    with gpus.lease(job.gpus, logger.info) as leased:
        count = processes(job, len(leased))
        if count == 1 and RENDEZVOUS not in os.environ:
            return job.here()
        return _supervise(command(job, count))


def processes(job: Job, leased: int) -> int:
    """Processes on this host: as many as PIPELINE_PROCESSES says, else one per GPU; 1 if the stage knows no others."""
    wanted = os.environ.get("PIPELINE_PROCESSES", str(max(leased, 1)))
    if not wanted.isdigit() or int(wanted) < 1:
        raise PipelineError(f"PIPELINE_PROCESSES={wanted!r}: a number of processes, 1 or more, is needed")
    return int(wanted) if job.distributed else 1


def command(job: Job, count: int) -> list[str]:
    """Command line of torchrun: alone, or as one of `job.nodes` agents that meet at PIPELINE_RENDEZVOUS.

    Nodes have fixed ranks, unlike in torchrun's elastic rendezvous: rank 0, which publishes, is on the first node,
    whose end is the end of the stage.
    """
    meeting = ["--standalone"]
    if rendezvous := os.environ.get(RENDEZVOUS):
        host, _, port = rendezvous.rpartition(":")
        rank = os.environ.get(NODE_RANK, "0")
        meeting = [f"--nnodes={job.nodes}", f"--node-rank={rank}", f"--master-addr={host}", f"--master-port={port}"]
        meeting += [f"--rdzv-conf=timeout={JOIN_SECONDS}"]
    options = [*meeting, f"--nproc-per-node={count}", f"--shutdown-timeout={GRACE_SECONDS:.0f}"]
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", *job.module]


def _supervise(command: list[str]) -> int:
    """Run torchrun to its end. SIGTERM and Ctrl-C are passed on, and the ranks may take their time to save."""
    with Stopping() as stopping:
        environment = os.environ | {UNDER: "torchrun"}
        # In a session of its own: Ctrl-C would reach it twice, and the second one says to save nothing.
        child = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=die_with_parent)
        stopping.pass_on_to(child.terminate)
        code = child.wait()
    if stopping.asked and code:
        return PREEMPTED
    return 1 if code else 0
