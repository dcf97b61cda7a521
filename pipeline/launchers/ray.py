"""Ray: a stage in actors of a cluster (RAY_ADDRESS), one on each node that it needs, which see the same files.

An actor starts the stage command as a process of its own, because a stage wants a main thread, signals and a device of
its own. Ray ends actors when their driver (this process) dies, and the stage's processes see that their parent did.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Any

import psutil

from base.environment import die_with_parent
from base.errors import PipelineError
from base.stopping import PREEMPTED
from pipeline.launchers.job import FAR_SECONDS, NODE_RANK, RENDEZVOUS, Job, Stopping

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5  # between looks at what a stage prints
PATIENCE_SECONDS = 10.0  # for a place, before a person is told what is waited for
LAST_SECONDS = 30.0  # for the other nodes to end, when one has ended or failed


class RayError(PipelineError):
    """The cluster cannot be reached, or lost a stage."""


class Worker:
    """The stage command on one node; an actor. Its methods return at once, so that it can always be spoken to."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None
        self._lines: SimpleQueue[str] = SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)

    def meeting_point(self) -> str:
        """Address and free port of this node, where the processes of all nodes meet."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def start(self, command: Sequence[str], root: str, environment: dict[str, str]) -> None:
        """Start the stage. In this thread, the main one, with whose end the kernel would see the parent's."""
        self._child = subprocess.Popen(
            command,
            cwd=root,
            env=os.environ | environment,
            text=True,
            errors="replace",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        self._reader.start()

    def poll(self) -> tuple[list[str], int | None]:
        """The lines that are new, and the exit code, once the process has ended and all its lines were handed out."""
        assert self._child is not None
        code = None if self._reader.is_alive() else self._child.wait()
        lines: list[str] = []
        with suppress(Empty):
            while True:
                lines.append(self._lines.get_nowait())
        return lines, code

    def stop(self) -> None:
        """Ask the stage to save and end."""
        assert self._child is not None
        self._child.terminate()

    def kill(self) -> None:
        """End all of its processes at once; ranks and loaders are in groups of their own."""
        assert self._child is not None
        with suppress(psutil.NoSuchProcess):
            stage = psutil.Process(self._child.pid)
            for process in [*stage.children(recursive=True), stage]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    def _read(self) -> None:
        assert self._child is not None
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self._lines.put(line)


def run(job: Job) -> int:
    """Run the stage on the cluster and wait for it; returns its exit code, or PREEMPTED where it was stopped.

    Raises:
        RayError: there is no cluster, or it lost the stage.
    """
    with _connected() as ray, Stopping() as stopping:
        try:
            return _run(ray, job, stopping)
        except (ray.exceptions.RayActorError, ray.exceptions.RaySystemError) as error:
            if stopping.asked:
                return PREEMPTED
            if getattr(error, "preempted", False):
                logger.warning("%s was stopped: its node was preempted", job.address)
                return PREEMPTED
            raise RayError(f"Ray lost {job.address}: {error}") from error


@contextmanager
def _connected() -> Iterator[Any]:
    """A connection to the cluster; its end ends what was started through it."""
    if "RAY_ADDRESS" not in os.environ:
        raise RayError("PIPELINE_LAUNCHER=ray needs RAY_ADDRESS: host:port of the cluster, or `auto` on a node of it")
    import ray

    address = os.environ["RAY_ADDRESS"]
    try:
        _knock(address)
        ray.init(address, logging_level=logging.ERROR, configure_logging=False, log_to_driver=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise RayError(f"no Ray cluster at RAY_ADDRESS={address}: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """See whether anybody listens there; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _run(ray: Any, job: Job, stopping: Stopping) -> int:
    """Find places for the stage, start it there and see it to its end."""
    needs = _needs(ray, job)
    group = ray.util.placement_group([needs] * job.nodes, strategy="STRICT_SPREAD")
    workers: list[Any] = []
    try:
        if not _placed(ray, job, group, needs, stopping):
            return PREEMPTED
        workers += [_actor(ray, group, needs, index) for index in range(job.nodes)]
        environment = job.far_environment("ray", gpus_given=needs.get("GPU", 0) > 0)
        if job.nodes > 1:
            environment[RENDEZVOUS] = ray.get(workers[0].meeting_point.remote())
        ray.get(
            [
                worker.start.remote(job.argv, str(job.root), environment | {NODE_RANK: str(rank)})
                for rank, worker in enumerate(workers)
            ]
        )
        return _watch(ray, job, workers, stopping)
    finally:
        for worker in workers:
            ray.kill(worker)
        ray.util.remove_placement_group(group)


def _needs(ray: Any, job: Job) -> dict[str, float]:
    """Resources on each node. Where no node has that many GPUs, as many as one has, as on a single host."""
    most = max((node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
    gpus = min(job.gpus, int(most))
    if gpus < job.gpus:
        logger.info("%s asks for %d GPUs on a node, and Ray's nodes have %d at most", job.address, job.gpus, gpus)
    return {"CPU": float(job.cpus or 1), **({"GPU": float(gpus)} if gpus else {})}


def _placed(ray: Any, job: Job, group: Any, needs: dict[str, float], stopping: Stopping) -> bool:
    """Wait until Ray has reserved what the stage needs; False when this process is asked to stop before."""
    ready, told = group.ready(), time.monotonic() + PATIENCE_SECONDS
    while not ray.wait([ready], timeout=POLL_SECONDS)[0]:
        if stopping.asked:
            logger.warning("%s was stopped while it waited for Ray", job.address)
            return False
        if time.monotonic() > told:
            told = math.inf
            wanted = ", ".join(f"{amount:.0f} {kind}" for kind, amount in needs.items())
            logger.info("%s waits for Ray: %d nodes with %s free on each", job.address, job.nodes, wanted)
    return True


def _actor(ray: Any, group: Any, needs: dict[str, float], index: int) -> Any:
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
    kind = ray.remote(num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0), scheduling_strategy=place)(Worker)
    return kind.remote()


def _watch(ray: Any, job: Job, workers: Sequence[Any], stopping: Stopping) -> int:
    """Pass on what the stage prints until it has ended; how its first node ended is how it ended."""
    limit = time.monotonic() + 3600 * (job.timeout_h or math.inf)
    told = last = math.inf  # when it was asked to stop; when the nodes that are left are given up
    while True:
        said = ray.get([worker.poll.remote() for worker in workers])
        print("".join(line for lines, _ in said for line in lines), end="", flush=True)
        codes, now = [code for _, code in said], time.monotonic()
        if codes[0] is not None or any(codes):
            last = min(last, now + LAST_SECONDS)
        if None not in codes or now > last:
            return _exit_code(job, codes[0], stopped=told < now)
        if (stopping.asked or now > limit) and told == math.inf:
            told = now
            logger.info("%s is asked to stop%s", job.address, "" if stopping.asked else ": meta.timeout_h is over")
            ray.get([worker.stop.remote() for worker in workers])
        if now > told + FAR_SECONDS or stopping.insisted:
            ray.get([worker.kill.remote() for worker in workers])
            return PREEMPTED
        time.sleep(POLL_SECONDS)


def _exit_code(job: Job, code: int | None, *, stopped: bool) -> int:
    """The stage's exit code, from that of its first node (None: it went on when another one had failed)."""
    if code == 0:
        return 0
    if stopped or code == PREEMPTED:
        return PREEMPTED
    if code not in (None, 1):  # with 1 the stage has said why
        raise RayError(f"{job.address} ended with exit code {code} on its node, without a word")
    return 1
