"""The stage contract: what surrounds `stages.<name>.run(context)`.

A stage keeps what it can resume from in `.scratch/<stage>-<key>/<fingerprint>/` and publishes its outs by renaming them
into place at the end. The fingerprint covers the command, the hashes of the dependencies and the parameters, so a stage
that runs on anything else starts from an empty folder: neither DVC's deletion of outs nor a stale checkpoint can hurt.
"""

from __future__ import annotations

import faulthandler
import fcntl
import gc
import importlib
import json
import logging
import os
import random
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from base.environment import ROOMS, die_with_parent, prepare
from base.errors import PipelineError
from base.stopping import GRACE_SECONDS, PREEMPTED
from config import graph
from config.files import load_params
from config.graph import StageSpec
from config.params import Params, split_key
from pipeline import launchers
from pipeline.launchers import UNDER, Job
from results.tracking.runs import PARENT, MlflowTracker, NullTracker, Tracker, git_tags, run_link
from stages.context import StageContext, StageError, Stop

logger = logging.getLogger(__name__)

STEPS = ("teacher", "fusion", "large")  # stages that train teachers of boxes; they differ in what they start from
SCRATCH = Path(".scratch")
LOGS = Path("logs")
PUBLISHED = "published.json"
# Thresholds of garbage collection, as Python has them; pipeline/__main__.py raises the first.
COLLECTION = (700, 10, 10)
LINK = "run-link"  # in scratch: where a person finds the run of the attempt that failed
VISIBLE_SECONDS = 90.0  # after which a shared file system shows what another host wrote (NFS: a minute at most)


def run_stage(name: str, key: str | None) -> int:
    """Run a stage of dvc.yaml; returns the exit code: 0, 1 (failed) or PREEMPTED."""
    die_with_parent()
    root, rank = prepare(), int(os.environ.get("RANK", "0"))
    _log_to(root / log_file(name, key), rank)
    stop = Stop()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop.handle)
    outermost = UNDER not in os.environ and rank == 0  # a process that another one started leaves the last word to it
    code, link = 1, None
    try:
        with ExitStack() as stack:
            params, spec = load_params(root), graph.resolve(graph.address(name, key), root)
            link = _scratch(root, spec) / LINK
            if outermost:
                link.unlink(missing_ok=True)
                stack.enter_context(_alone(link.parent.parent / "lock", spec.address))
            job = Job.of(spec, root, lambda: _run_here(root, params, spec, stop))
            code = job.here() if "RANK" in os.environ else launchers.run(job)
            if code == 0:
                _await(root, spec)
    except SystemExit as ending:
        code = PREEMPTED if ending.code == PREEMPTED else 1
        if code == PREEMPTED:
            logger.warning("%s was stopped; it resumes with: %s", graph.address(name, key), rerun_command(name, key))
        else:
            logger.error("%s ended with exit code %s", graph.address(name, key), ending.code)
    except PipelineError as error:
        logger.error("%s", error)
    except BaseException:
        logger.exception("%s failed", graph.address(name, key))
    if outermost and code not in (0, PREEMPTED):
        _explain(name, key, link.read_text() if link and link.exists() else None)
    return code


def rerun_command(name: str, key: str | None) -> str:
    """What a person types to run the stage again."""
    return f"dvc repro --single-item {shlex.quote(graph.address(name, key))}"


def log_file(name: str, key: str | None) -> Path:
    """Where a stage logs, relative to the root."""
    return LOGS / f"{_label(name, key)}.log"


def published_since(root: Path, spec: StageSpec, moment: float) -> bool:
    """Whether the stage ended after `moment` (time.time()) with this fingerprint and all its outs in place."""
    mark = root / SCRATCH / _label(spec.name, spec.key) / spec.fingerprint[:16] / PUBLISHED
    return mark.exists() and mark.stat().st_mtime >= moment and all((root / out).exists() for out in spec.outs)


def _run_here(root: Path, params: Params, spec: StageSpec, stop: Stop) -> int:
    """Run the stage in this process, one of WORLD_SIZE; returns 0, or raises what it raised."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    scratch, seed = _scratch(root, spec), _seed(params, spec.key)
    with ExitStack() as stack:
        tracker: Tracker = NullTracker()
        if rank == 0:
            # What an earlier command left may still be saving, on this host or another.
            stack.enter_context(_alone(scratch.parent / "work", spec.address, GRACE_SECONDS))
            tracker = stack.enter_context(_tracked(root, params, spec, scratch))
        context = StageContext(spec.name, spec.key, params, spec, root, scratch, tracker, stop, seed, rank, world_size)
        module = _module(spec.name)
        gc.freeze()  # the imported modules are no garbage; from here on collections are Python's usual ones
        gc.set_threshold(*COLLECTION)
        _seed_all(seed)
        started = time.monotonic()
        logger.info("%s starts, fingerprint %s", spec.address, spec.fingerprint[:16])
        module.run(context)
        logger.info("%s took %.1f s", spec.address, time.monotonic() - started)
        if rank == 0:
            _finish(context)
    return 0


def _finish(context: StageContext) -> None:
    """Check that everything was published, and drop what older fingerprints left."""
    missing = [out for out in context.spec.outs if not (context.root / out).exists()]
    if missing:
        raise StageError(f"{context.spec.address} ended without publishing {', '.join(missing)}")
    (context.scratch / PUBLISHED).write_text(json.dumps(list(context.spec.outs)))
    for folder in context.scratch.parent.iterdir():
        if folder.is_dir() and folder != context.scratch:
            shutil.rmtree(folder, ignore_errors=True)


def _start_tracker(root: Path, params: Params, spec: StageSpec, scratch: Path) -> MlflowTracker:
    """The stage's run; a stage that resumes goes on with the run it was interrupted in."""
    memory = scratch / "run.json"
    resume = (
        json.loads(memory.read_text())["journal"] if memory.exists() and not (scratch / PUBLISHED).exists() else None
    )
    tags = {"dvc.stage": spec.address, "dvc.fingerprint": spec.fingerprint, "key": spec.key, "profile": params.profile}
    student = _student(params, spec.key)
    if student:
        tags["variant"], tags["seed"] = student[0], str(student[1])
    tracker = MlflowTracker(spec.address, root, tags | git_tags(root), os.environ.get(PARENT), resume)
    memory.write_text(json.dumps({"journal": tracker.id}))
    (scratch / PUBLISHED).unlink(missing_ok=True)
    tracker.log_params(spec.params | _of_variant(params, student))
    return tracker


def _of_variant(params: Params, student: tuple[str, int] | None) -> dict[str, Any]:
    """A student's variant, which its stage reads out of outputs/needs."""
    return {f"variants.{student[0]}": params.variants[student[0]].model_dump(mode="json")} if student else {}


@contextmanager
def _tracked(root: Path, params: Params, spec: StageSpec, scratch: Path) -> Iterator[MlflowTracker]:
    """The stage's run, which ends as the stage does: undisturbed, and for a bounded time."""
    tracker, state = _start_tracker(root, params, spec, scratch), "FAILED"
    try:
        yield tracker
        state = "FINISHED"
    except SystemExit as ending:
        state = "KILLED" if ending.code == PREEMPTED else "FAILED"
        raise
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        tracker.close(state, 5.0 if state == "KILLED" else 20.0)
        if state != "FINISHED":
            (scratch / LINK).write_text(run_link(tracker.run_id))


def _await(root: Path, spec: StageSpec) -> None:
    """Wait until this host sees what another one published.

    Raises:
        StageError: it does not come, so that the two have no file system in common.
    """
    deadline = time.monotonic() + VISIBLE_SECONDS
    while missing := [out for out in spec.outs if not (root / out).exists()]:
        if time.monotonic() > deadline:
            raise StageError(
                f"{spec.address} ended well, and {', '.join(missing)} did not appear in {root} within "
                f"{VISIBLE_SECONDS:.0f} s: is this folder the same on all machines that stages run on?"
            )
        for folder in {(root / out).parent for out in missing if (root / out).parent.exists()}:
            os.listdir(folder)  # NFS looks again
        time.sleep(0.5)


def _scratch(root: Path, spec: StageSpec) -> Path:
    """The stage's scratch folder of this fingerprint, made where it is not there."""
    scratch = root / SCRATCH / _label(spec.name, spec.key) / spec.fingerprint[:16]
    scratch.mkdir(parents=True, exist_ok=True)
    return scratch


def _explain(name: str, key: str | None, link: str | None) -> None:
    """The last words of a failed stage."""
    rows = {
        "failed": graph.address(name, key),
        "log": log_file(name, key),
        "mlflow": link,
        "rerun": rerun_command(name, key),
    }
    print("\n".join(f"{title:>7}: {value}" for title, value in rows.items() if value), file=sys.stderr, flush=True)


@contextmanager
def _alone(path: Path, address: str, patience: float = 0.0) -> Iterator[None]:
    """Hold a lock file of the stage, so that two do not write one scratch folder; wait `patience` seconds for it."""
    deadline = time.monotonic() + patience
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise StageError(
                        f"{address} is already running here ({path} is locked): wait for it, or stop it"
                    ) from None
            time.sleep(0.2)
        yield


def _module(name: str) -> ModuleType:
    """stages/<name>.py; the steps of a teacher are trained, and detectors predict and are evaluated, in one way."""
    whole, _, kind = name.partition("_")
    code = whole if kind in STEPS else "teacher" if name in STEPS else name
    module = f"stages.{code}"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (module, "stages"):
            raise
        raise StageError(
            f"{module.replace('.', '/')}.py does not exist: stage {name!r} of dvc.yaml has no code"
        ) from None


def _seed(params: Params, key: str | None) -> int:
    """The seed of a student's stage is in its key; every other stage takes `seed`."""
    student = _student(params, key)
    return student[1] if student else params.seed


def _student(params: Params, key: str | None) -> tuple[str, int] | None:
    """Variant and seed of a student's key; None for a key of another kind, which may be a variant (`skd-alone`)."""
    if key is None or key in params.variants or key.rpartition("-")[0] not in params.variants:
        return None
    return split_key(key)


def _seed_all(seed: int) -> None:
    """Seed every generator that the stage's imports brought."""
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)


def _log_to(path: Path, rank: int) -> None:
    """Log to the terminal and to the stage's file (rank 0), other ranks to files of their own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path = path if rank == 0 else path.with_suffix(f".rank{rank}.log")
    file = logging.FileHandler(path, mode="a")
    handlers: list[logging.Handler] = [file, *([logging.StreamHandler()] if rank == 0 else [])]
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=handlers, force=True)
    for room in ROOMS:
        logging.getLogger(room).setLevel(logging.INFO)
    faulthandler.enable(path.open("a"), all_threads=False)


def _label(name: str, key: str | None) -> str:
    return f"{name}-{key}" if key else name
