"""MLflow, behind a journal: every record goes to a local append-only file first, and a thread sends it from there.

A tracking server that is away, slow or locked stops nothing and loses nothing: what was not sent stays in the journal
(`logs/tracking/<id>.jsonl`, beside it a cursor of what was), and goes out when the next stage starts or with
`python -m pipeline track replay`. Sending twice changes nothing: a run is found again by its journal's id, and MLflow
keeps one of equal (metric, step, time, value) records.

A flow sends for all its stages: importing MLflow and sending costs a stage two seconds of CPU, and one writer waits for
no lock of the database.
"""

from __future__ import annotations

import fcntl
import functools
import json
import logging
import os
import re
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from filelock import FileLock

from base import redaction
from base.errors import PipelineError
from config.nested import flatten
from results.tracking import sending

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from sqlalchemy.engine import Engine

logger = logging.getLogger(__name__)

JOURNALS = Path("logs") / "tracking"
PARENT = "PIPELINE_PARENT_RUN"  # environment: the journal id of the flow's run
LATER = "PIPELINE_TRACK_LATER"  # environment: set where no server can be reached; only the journal is written
BY_FLOW = "flow"  # value of LATER in the stages of a flow: its process sends what they write
SQLITE = "sqlite:///"
SEND_SECONDS = 2.0
SAMPLE_SECONDS = 20.0
BATCH = {"metrics": 900, "params": 90, "tags": 90}  # MLflow's limits per request are 1000, 100 and 100


class Tracker(Protocol):
    """What a stage tells about itself. No method raises because of tracking."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record nested parameters under dotted names."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics at a global optimiser step; a step that was recorded before (resume) is left as it is."""

    def log_file(self, path: Path, name: str) -> None:
        """Record a copy of a file as the artifact `name` (figures/pr.png)."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Record a copy of a file under its own name."""

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags of the run."""


class NullTracker:
    """Records nothing: for ranks other than 0, and for tests."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Nothing."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Nothing."""

    def log_file(self, path: Path, name: str) -> None:
        """Nothing."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Nothing."""

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Nothing."""


class Recorder:
    """One run, written into its journal; `replay`, or the thread of a MlflowTracker, brings it to the server."""

    def __init__(
        self,
        name: str,
        root: Path,
        tags: Mapping[str, Any],
        identity: str,
        parent: str | None = None,
        *,
        shared: bool = False,
    ) -> None:
        """Open the journal `identity`, and go on with it if it is there.

        `shared`: others may make the same run, so that it is as old as it is on the server.
        """
        redaction.start()
        folder = root / JOURNALS
        folder.mkdir(parents=True, exist_ok=True)
        self.id = identity
        self._journal = Journal(folder / f"{identity}.jsonl")
        self._moment: dict[str, Any] = {"time": None} if shared else {}
        self._write_lock = threading.Lock()
        known = self._journal.path.exists()
        self._fd = os.open(self._journal.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        fcntl.flock(self._fd, fcntl.LOCK_EX)  # tells replays that this journal has a writer
        if known:
            os.write(self._fd, b"\n")  # behind a line that a kill -9 tore
        self._last_step = self._journal.last_steps()
        self._write("resume" if known else "start", name=name, parent=parent, tags=_strings(tags), **self._moment)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record nested parameters under dotted names, without secrets and absolute paths."""
        self._write_values("params", {_name(key): _scrub(key, value) for key, value in flatten(params).items()})

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics at a global optimiser step; a step that was recorded before (resume) is left as it is."""
        fresh = {
            _name(key): float(value) for key, value in metrics.items() if step > self._last_step.get(_name(key), -1)
        }
        if fresh:
            self._last_step |= dict.fromkeys(fresh, step)
            self._write_values("metrics", fresh, step=step, **self._moment)

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Record a copy of a file under its own name."""
        self.log_file(path, f"{folder}/{path.name}" if folder else path.name)

    def log_file(self, path: Path, name: str) -> None:
        """Record a copy of a file as the artifact `name`."""
        self.log_made(name, lambda kept: shutil.copyfile(path, kept))

    def log_text(self, text: str, name: str) -> None:
        """Record a text as the artifact `name`."""
        self.log_made(name, lambda kept: kept.write_text(redaction.redact(text)))

    def log_made(self, name: str, make: Callable[[Path], Any]) -> None:
        """Record the artifact `name` that `make` writes to a path; it is lost where that fails (a full disk)."""
        kept = self._journal.files / name
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            make(kept)
        except (OSError, ValueError) as error:
            logger.warning("tracking: artifact %s is lost: %s", name, error)
            return
        self._write("artifact", path=name)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags of the run."""
        self._write_values("tags", _strings(tags))

    def log_operation(self, op: str, record: Mapping[str, Any]) -> None:
        """Record something else that the server is asked to do: one of results.tracking.sending.OPERATIONS."""
        self._write(op, **record)

    def close(self, state: str = "FINISHED") -> None:
        """End the run (FINISHED, FAILED or KILLED)."""
        self._write("end", state=state, **self._moment)
        self._release()

    def _release(self) -> None:
        with self._write_lock:
            os.close(self._fd)
            self._fd = -1

    def _write_values(self, op: str, values: Mapping[str, Any], **record: Any) -> None:
        """Write records that fit into one request each."""
        items = list(values.items())
        for i in range(0, len(items), BATCH[op]):
            self._write(op, values=dict(items[i : i + BATCH[op]]), **record)

    def _write(self, op: str, **record: Any) -> None:
        """The gate of all records: behind it there are no secrets."""
        line = json.dumps({"op": op, "time": int(time.time() * 1000), **redaction.redact_all(record)}) + "\n"
        with self._write_lock:
            if self._fd < 0:
                return
            try:
                os.write(self._fd, line.encode())
            except OSError as error:  # a full disk must not end a training run
                logger.warning("tracking: a record is lost: %s", error)


class MlflowTracker(Recorder):
    """A run that is sent while it is written: owns the thread that does so and samples the machine."""

    def __init__(
        self,
        name: str,
        root: Path,
        tags: Mapping[str, Any],
        parent: str | None = None,
        resume: str | None = None,
        *,
        for_others: bool = False,
    ) -> None:
        """Open the journal `resume` of an unfinished run if it is still there, else a new one.

        `for_others`: send what other processes write beside it, too.
        """
        known = resume is not None and (root / JOURNALS / f"{resume}.jsonl").exists()
        identity = resume if known and resume else f"{datetime.now():%Y%m%d-%H%M%S-%f}-{uuid.uuid4().hex[:4]}"
        super().__init__(name, root, tags, identity, parent)
        self._for_others = for_others
        self._run_id: str | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        if os.environ.get(LATER, "") in ("", BY_FLOW):
            # Here, because SQLAlchemy breaks when two threads import it at once, and Prefect does so in the flow's.
            import sqlalchemy.orm  # noqa: F401

            self._thread.start()

    def close(self, state: str = "FINISHED", seconds: float = 20.0) -> None:
        """End the run and send what is left, for so many seconds at most."""
        self._write("end", state=state)
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(seconds)
        self._release()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, also when it has ended; None while the server does not know it."""
        return self._run_id or self._journal.cursor()["run_id"]

    def _work(self) -> None:
        """Send every few seconds, less often while the server is away; at the end once more, then what others left."""
        delay, sampled, warned, samples = SEND_SECONDS / 4, time.monotonic(), False, 0
        machine: list[Any] | None = None
        while True:
            last = self._closing.wait(delay)
            try:
                if os.environ.get(LATER) != BY_FLOW:
                    self._send(last=last)
                delay, warned = SEND_SECONDS, False
            except Exception as error:
                delay = min(delay * 2, 60.0)
                if not warned:
                    logger.warning(
                        "tracking: the server does not answer, records are kept in %s: %s", JOURNALS, _short(error)
                    )
                warned = True
            if last:
                return
            if time.monotonic() - sampled > SAMPLE_SECONDS:
                machine = _monitors() if machine is None else machine
                self.log_metrics(_sample(machine), samples)
                sampled, samples = time.monotonic(), samples + 1

    def _send(self, *, last: bool) -> None:
        """Send what is new; when it is the last time, what others left as well. Raises what MLflow raises."""
        folder, sent = self._journal.path.parent, self._journal.send()
        if last and sent:
            if self._journal.finished():
                self._run_id = self.run_id  # the journal knew it
                self._journal.discard()
            replay(folder)
        elif self._for_others:
            replay(folder, living=True)


class Journal:
    """A journal file, its cursor, and how it is sent."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = path.with_suffix(".files")
        self._cursor = path.with_suffix(".cursor")
        self._lock = path.with_suffix(".lock")
        self._root = path.parent.parent.parent

    def cursor(self) -> dict[str, Any]:
        """What was sent: {offset, run_id, ended}."""
        try:
            return json.loads(self._cursor.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {"offset": 0, "run_id": None, "ended": False}

    def last_steps(self) -> dict[str, int]:
        """Highest step recorded per metric."""
        steps: dict[str, int] = {}
        for _, record in self._records(0):
            if record["op"] == "metrics":
                steps |= {key: max(record["step"], steps.get(key, -1)) for key in record["values"]}
        return steps

    def send(self, dead: bool = False) -> bool:
        """Send all records behind the cursor. `dead`: the writer is gone, so a run without an end was killed.

        Returns False when the run's parent is not on the server yet. Raises what MLflow raises when the server is away.
        """
        with FileLock(self._lock, mode=0o666):  # two senders at once would make two runs
            return self._send(dead)

    def _send(self, dead: bool) -> bool:
        if not self.path.exists():  # another process has sent it whole
            self._lock.unlink(missing_ok=True)
            return True
        cursor = self.cursor()
        pending = list(self._records(cursor["offset"]))
        if not pending and (not dead or cursor["ended"]):
            return True
        client = open_store(self._root)
        if cursor["run_id"] is None:
            run_id = self._create(client)
            if run_id is None:
                return False
            cursor |= {"run_id": run_id}
            self._save(cursor)
        for offset, batch in _batches(pending):
            try:
                cursor |= sending.send(client, cursor["run_id"], batch, self.files)
            except Exception as error:
                code = getattr(error, "error_code", "")
                if (
                    code == "RESOURCE_DOES_NOT_EXIST"
                ):  # another store, or a new one: the next call starts from the beginning
                    self._save({"offset": 0, "run_id": None, "ended": False})
                if code != "INVALID_PARAMETER_VALUE":
                    raise
                logger.warning(
                    "tracking: the server refuses a record, it stays in %s.refused: %s", self.path, _short(error)
                )
                with self.path.with_suffix(".refused").open("a") as refused:
                    refused.writelines(json.dumps(record) + "\n" for record in batch)
            cursor |= {"offset": offset}
            self._save(cursor)
        if dead and not cursor["ended"]:
            client.set_terminated(cursor["run_id"], "KILLED")
            self._save(cursor | {"ended": True})
        return True

    def discard(self) -> None:
        """Remove a journal whose run has finished and was sent whole."""
        for path in (self.path, self._cursor, self._lock):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.files, ignore_errors=True)

    def finished(self) -> bool:
        """Whether the run ended well, so that nothing will be added."""
        records = [record for _, record in self._records(0)]
        return bool(records) and records[-1]["op"] == "end" and records[-1]["state"] == "FINISHED"

    def _records(self, offset: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """(offset behind it, record) of every whole line from `offset` on."""
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            file.seek(offset)
            for line in file:
                offset += len(line)
                if line.endswith(b"\n"):
                    with suppress(json.JSONDecodeError):  # a line that a kill -9 tore, and the next one behind it
                        yield offset, json.loads(line)

    def _create(self, client: MlflowClient) -> str | None:
        """Find or create the run; None when its parent is not there yet."""
        _, start = next(self._records(0))
        experiment = experiment_id(client, self._root)
        found = sending.find(client, experiment, self.path.stem)
        if found:
            return found
        tags = start.get("tags", {}) | {sending.JOURNAL: self.path.stem}
        if start.get("parent"):
            other = Journal(self.path.with_name(f"{start['parent']}.jsonl"))
            parent = other.cursor()["run_id"] or sending.find(client, experiment, start["parent"])
            if parent is None and other.path.exists():
                return None
            if parent:
                tags["mlflow.parentRunId"] = parent
        name = start.get("name", self.path.stem)
        made: str = client.create_run(experiment, start["time"], tags, name).info.run_id
        return made if start["time"] else sending.settle(client, experiment, self.path.stem, made)

    def _save(self, cursor: Mapping[str, Any]) -> None:
        draft = self._cursor.with_suffix(".cursor.tmp")
        draft.write_text(json.dumps(cursor))
        draft.replace(self._cursor)


def replay(folder: Path, *, living: bool = False) -> tuple[int, int]:
    """Send every journal without a living writer, oldest first; returns how many were sent whole, and how many wait.

    `living`: also send what the others have written so far, and say nothing of failures, as there is a next time.
    """
    sent = waiting = 0
    for path in sorted(folder.glob("*.jsonl")):
        with suppress(FileNotFoundError), path.open("rb") as file:  # gone: another process has sent it whole
            dead = _claim(file.fileno())
            if not (dead or living):
                continue
            try:
                whole = Journal(path).send(dead)
            except Exception as error:
                level = logging.DEBUG if living else logging.WARNING
                logger.log(level, "tracking: %s cannot be sent now: %s", path.name, _short(error))
                whole = False
            sent, waiting = sent + whole, waiting + (not whole)
            if whole and dead and Journal(path).finished():
                Journal(path).discard()
        if waiting >= 3 and not sent:  # the server is away
            break
    return sent, waiting


def _claim(handle: int) -> bool:
    """Lock an open journal; False where it has a living writer, which holds the lock."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def init_store(uri: str) -> None:
    """Create or migrate the tables of a database, once; several processes may ask."""
    from mlflow.store.db import utils as database

    engine = database.create_sqlalchemy_engine_with_retry(uri)
    with _alone_in(uri, engine):
        missing = not database._all_tables_exist(engine)
        database._initialize_tables(engine) if missing else database._upgrade_db(engine)
    engine.dispose()


def artifact_root(uri: str, root: Path) -> str:
    """Where runs of a store that is not behind a server keep their files: beside a sqlite file, else in the project.

    MLFLOW_DEFAULT_ARTIFACT_ROOT says otherwise; writers on several hosts need a place that all of them see.

    Raises:
        PipelineError: it holds a secret, which MLflow would write into its tables and show on its pages.
    """
    if chosen := os.environ.get("MLFLOW_DEFAULT_ARTIFACT_ROOT"):
        if redaction.holds_secret(chosen):
            raise PipelineError(
                f"MLFLOW_DEFAULT_ARTIFACT_ROOT={redaction.redact(chosen)} holds a secret, which MLflow would show: "
                "leave it out, and give it to the storage's client (of s3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
            )
        return chosen
    beside = Path(uri.removeprefix(SQLITE)).parent if uri.startswith(SQLITE) else root
    return (beside / "mlartifacts").absolute().as_uri()


def scores(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation of boxes under the names that all runs have them: `val/mAP`, `val/AP/car`.

    Undefined ones are left out; errors of single classes are too many for charts.
    """
    split = metrics["split"].partition("[")[0]
    named = {name: metrics[name] for name in ("mAP", "NDS", "mATE", "mASE", "mAOE", "mAVE", "mAAE", "mAP_present")}
    named |= {f"AP/{name}": values["AP"] for name, values in metrics["classes"].items()}
    return {f"{split}/{name}": value for name, value in named.items() if value is not None}


def run_link(run_id: str | None) -> str:
    """Where a person finds the run; who follows a link to a server gives the password there."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if run_id is None:
        return "not sent yet (python -m pipeline track replay)"
    server = redaction.public(uri).rstrip("/")
    return f"{server}/#/runs/{run_id}" if uri.startswith("http") else f"run {run_id} (make ui)"


def git_tags(root: Path) -> dict[str, str]:
    """Revision of the code, and whether it has changes that are not committed."""
    try:
        git = ["git", "-C", str(root)]
        revision = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"git.rev": revision.stdout.strip(), "git.dirty": str(bool(dirty.stdout.strip())).lower()}


def open_store(root: Path) -> MlflowClient:
    """A client of the tracking store; tables of a database are made where they are missing."""
    from mlflow import MlflowClient

    redaction.start()
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{root / 'mlflow.db'}"
    if not uri.startswith("http"):
        _ensure_tables(uri)
    return MlflowClient(uri)


def experiment_id(client: MlflowClient, root: Path) -> str:
    """Id of the project's experiment, which is made where it is missing."""
    from mlflow.exceptions import MlflowException

    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "bev-distillery")
    if (found := client.get_experiment_by_name(name)) is None:
        uri = client.tracking_uri
        try:
            return client.create_experiment(name, None if uri.startswith("http") else artifact_root(uri, root))
        except MlflowException:  # another process was first
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return found.experiment_id


@functools.cache
def _ensure_tables(uri: str) -> None:
    """Make the tables of a database that has none."""
    from sqlalchemy import create_engine, inspect

    engine = create_engine(uri)
    with _alone_in(uri, engine):
        ready = inspect(engine).has_table("alembic_version")
    engine.dispose()
    if not ready:
        init_store(uri)


@contextmanager
def _alone_in(uri: str, engine: Engine) -> Iterator[None]:
    """Keep other processes from the tables: with a file beside sqlite's, with a lock of PostgreSQL's own."""
    if uri.startswith(SQLITE):
        with FileLock(f"{uri.removeprefix(SQLITE)}.lock"):
            yield
        return
    from sqlalchemy import text

    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_lock(hashtext('bev-distillery'))"))
        yield  # the lock ends with the connection


def _batches(records: list[tuple[int, dict[str, Any]]]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Group neighbours of one kind into requests; yields (offset behind the batch, records)."""
    batch: list[dict[str, Any]] = []
    size = end = 0
    for offset, record in records:
        op, weight = record["op"], len(record.get("values", ()))
        if batch and (op != batch[0]["op"] or op not in BATCH or size + weight > BATCH[op]):
            yield end, batch
            batch, size = [], 0
        batch.append(record)
        size, end = size + weight, offset
    if batch:
        yield end, batch


def _monitors() -> list[Any]:
    """MLflow's own samplers of CPU, memory, disk, network, and GPU where there is one."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors = []
    for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
        with suppress(Exception):  # no GPU, or no library that reads it
            monitors.append(kind())
    return monitors


def _sample(monitors: list[Any]) -> dict[str, float]:
    values: dict[str, float] = {}
    for monitor in monitors:
        with suppress(Exception):
            monitor.collect_metrics()
            values |= {f"system/{key}": value for key, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
    return values


def _strings(tags: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in tags.items() if value is not None}


def _name(key: str) -> str:
    """A key in the characters that MLflow allows."""
    return re.sub(r"[^\w\-. /]", "_", key)[:250]


def _scrub(key: str, value: Any) -> str:
    """A parameter as text, without secrets and absolute paths."""
    if redaction.is_secret(key):
        return redaction.HIDDEN
    text = Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else str(value)
    return redaction.redact(text)[:5000]


def _short(error: Exception) -> str:
    """The first words of an error; half a secret would not be found any more, so they are cut from the clean text."""
    return redaction.redact(str(error)).splitlines()[0][:200] if str(error) else type(error).__name__
