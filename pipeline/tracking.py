"""MLflow, behind a journal: every record goes to a local append-only file first, and a thread sends it from there.

A tracking server that is away, slow or locked stops nothing and loses nothing: what was not sent stays in the journal
(`logs/tracking/<id>.jsonl`, beside it a cursor of what was), and goes out when the next stage starts or with
`python -m pipeline track replay`. Sending twice changes nothing: a run is found again by its journal's id, and MLflow
keeps one of equal (metric, step, time, value) records.
"""

from __future__ import annotations

import fcntl
import functools
import json
import logging
import os
import re
import shutil
import sqlite3
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from filelock import FileLock

from pipeline.params import flatten

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

JOURNALS = Path("logs") / "tracking"
PARENT = "PIPELINE_PARENT_RUN"  # environment: the journal id of the flow's run
LATER = "PIPELINE_TRACK_LATER"  # environment: set where no server can be reached; only the journal is written
SEND_SECONDS = 2.0
SAMPLE_SECONDS = 10.0
_JOURNAL_TAG = "pipeline.journal"
_SECRET = re.compile(r"password|passwd|secret|token|credential|api_?key", re.IGNORECASE)
_BATCH = {"metrics": 900, "params": 90, "tags": 90}  # MLflow's limits per request are 1000, 100 and 100


class Tracker(Protocol):
    """What a stage tells about itself. No method raises because of tracking."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record nested parameters under dotted names."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics at a global optimiser step; a step that was recorded before (resume) is left as it is."""

    def log_figure(self, figure: Figure, name: str) -> None:
        """Record a matplotlib figure as the artifact `name` (figures/pr.png)."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Record a copy of a file."""

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags of the run."""


class NullTracker:
    """Records nothing: for ranks other than 0, and for tests."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Nothing."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Nothing."""

    def log_figure(self, figure: Figure, name: str) -> None:
        """Nothing."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Nothing."""

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Nothing."""


class MlflowTracker:
    """One run: writes the journal, and owns the thread that sends it and samples the machine."""

    def __init__(
        self, name: str, root: Path, tags: Mapping[str, Any], parent: str | None = None, resume: str | None = None
    ) -> None:
        """Open the journal `resume` of an unfinished run if it is still there, else a new one."""
        folder = root / JOURNALS
        folder.mkdir(parents=True, exist_ok=True)
        known = resume is not None and (folder / f"{resume}.jsonl").exists()
        self.id = resume if known and resume else f"{datetime.now():%Y%m%d-%H%M%S-%f}-{uuid.uuid4().hex[:4]}"
        self._journal = Journal(folder / f"{self.id}.jsonl")
        self._write_lock = threading.Lock()
        self._fd = os.open(self._journal.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        fcntl.flock(self._fd, fcntl.LOCK_EX)  # tells replays that this journal has a sender
        if known:
            os.write(self._fd, b"\n")  # behind a line that a kill -9 tore
        self._last_step = self._journal.last_steps()
        self._write("resume" if known else "start", name=name, parent=parent, tags=_strings(tags))
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        if not os.environ.get(LATER):
            # Here, because SQLAlchemy breaks when two threads import it at once, and Prefect does so in the flow's.
            import sqlalchemy.orm  # noqa: F401

            self._thread.start()

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
            self._write_values("metrics", fresh, step=step)

    def log_figure(self, figure: Figure, name: str) -> None:
        """Record a matplotlib figure as the artifact `name` (figures/pr.png)."""
        target = self._journal.files / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(target)
        except (OSError, ValueError) as error:
            logger.warning("tracking: figure %s is lost: %s", name, error)
            return
        self._write("artifact", path=name)

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Record a copy of a file."""
        name = f"{folder}/{path.name}" if folder else path.name
        try:
            (self._journal.files / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, self._journal.files / name)
        except OSError as error:
            logger.warning("tracking: artifact %s is lost: %s", path, error)
            return
        self._write("artifact", path=name)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags of the run."""
        self._write_values("tags", _strings(tags))

    def close(self, state: str = "FINISHED", seconds: float = 20.0) -> None:
        """End the run (FINISHED, FAILED or KILLED) and send what is left, for so many seconds at most."""
        self._write("end", state=state)
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(seconds)
        with self._write_lock:
            os.close(self._fd)
            self._fd = -1

    def wait_for_run(self, seconds: float) -> bool:
        """Wait until the server has the run, so that children can name it as their parent."""
        deadline = time.monotonic() + seconds
        while self.run_id is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return self.run_id is not None

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None while the server does not know it."""
        return self._journal.cursor().get("run_id")

    def _write_values(self, op: str, values: Mapping[str, Any], **record: Any) -> None:
        """Write records that fit into one request each."""
        items = list(values.items())
        for i in range(0, len(items), _BATCH[op]):
            self._write(op, values=dict(items[i : i + _BATCH[op]]), **record)

    def _write(self, op: str, **record: Any) -> None:
        line = json.dumps({"op": op, "time": int(time.time() * 1000), **record}) + "\n"
        with self._write_lock:
            if self._fd < 0:
                return
            try:
                os.write(self._fd, line.encode())
            except OSError as error:  # a full disk must not end a training run
                logger.warning("tracking: a record is lost: %s", error)

    def _work(self) -> None:
        """Send every few seconds, less often while the server is away; at the end once more, then what others left."""
        delay, sampled, warned, samples = SEND_SECONDS / 4, time.monotonic(), False, 0
        machine: list[Any] | None = None
        while True:
            last = self._closing.wait(delay)
            try:
                sent = self._journal.send()
                delay, warned = SEND_SECONDS, False
                if last and sent:
                    if self._journal.finished():
                        self._journal.discard()
                    replay(self._journal.path.parent)
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


class Journal:
    """A journal file, its cursor, and how it is sent."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = path.with_suffix(".files")
        self._cursor = path.with_suffix(".cursor")

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
        cursor = self.cursor()
        pending = list(self._records(cursor["offset"]))
        if not pending and (not dead or cursor["ended"]):
            return True
        client = _client(self.path.parent.parent.parent)
        if cursor["run_id"] is None:
            run_id = self._create(client)
            if run_id is None:
                return False
            cursor |= {"run_id": run_id}
            self._save(cursor)
        for offset, batch in _batches(pending):
            try:
                self._send_batch(client, cursor, batch)
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
        for path in (self.path, self._cursor):
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
        experiment = _experiment(client)
        found = _find(client, experiment, self.path.stem)
        if found:
            return found
        tags = start.get("tags", {}) | {_JOURNAL_TAG: self.path.stem}
        if start.get("parent"):
            other = Journal(self.path.with_name(f"{start['parent']}.jsonl"))
            parent = other.cursor()["run_id"] or _find(client, experiment, start["parent"])
            if parent is None and other.path.exists():
                return None
            if parent:
                tags["mlflow.parentRunId"] = parent
        return client.create_run(experiment, start["time"], tags, start.get("name", self.path.stem)).info.run_id

    def _send_batch(self, client: MlflowClient, cursor: dict[str, Any], batch: list[dict[str, Any]]) -> None:
        """Send records of one kind."""
        from mlflow.entities import Metric, Param, RunTag

        run, op = cursor["run_id"], batch[0]["op"]
        if op == "metrics":
            metrics = [Metric(k, v, r["time"], r["step"]) for r in batch for k, v in r["values"].items()]
            client.log_batch(run, metrics=metrics, synchronous=True)
        elif op == "params":
            client.log_batch(run, params=[Param(k, v) for r in batch for k, v in r["values"].items()], synchronous=True)
        elif op == "tags":
            client.log_batch(run, tags=[RunTag(k, v) for r in batch for k, v in r["values"].items()], synchronous=True)
        elif op == "artifact":
            name = Path(batch[0]["path"])
            client.log_artifact(run, str(self.files / name), str(name.parent) if name.parent.name else None)
        elif op == "resume":
            client.update_run(run, status="RUNNING")
            cursor |= {"ended": False}
        elif op == "end":
            client.set_terminated(run, batch[0]["state"], batch[0]["time"])
            cursor |= {"ended": True}

    def _save(self, cursor: Mapping[str, Any]) -> None:
        draft = self._cursor.with_suffix(".cursor.tmp")
        draft.write_text(json.dumps(cursor))
        draft.replace(self._cursor)


def replay(folder: Path) -> tuple[int, int]:
    """Send every journal without a living writer, oldest first; returns how many were sent whole, and how many wait."""
    sent = waiting = 0
    for path in sorted(folder.glob("*.jsonl")):
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            try:
                whole = Journal(path).send(dead=True)
            except Exception as error:
                logger.warning("tracking: %s cannot be sent now: %s", path.name, _short(error))
                whole = False
            sent, waiting = sent + whole, waiting + (not whole)
            if whole and Journal(path).finished():
                Journal(path).discard()
        if waiting >= 3 and not sent:  # the server is away
            break
    return sent, waiting


def init_store(uri: str) -> None:
    """Create or migrate the tables of a sqlite tracking store, once, under a file lock (several processes may ask)."""
    from mlflow.store.db import utils as database

    with FileLock(f"{uri.removeprefix('sqlite:///')}.lock"):
        engine = database.create_sqlalchemy_engine_with_retry(uri)
        missing = not database._all_tables_exist(engine)
        database._initialize_tables(engine) if missing else database._upgrade_db(engine)
        engine.dispose()


def run_link(run_id: str | None) -> str:
    """Where a person finds the run."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if run_id is None:
        return "not sent yet (python -m pipeline track replay)"
    return f"{uri.rstrip('/')}/#/runs/{run_id}" if uri.startswith("http") else f"run {run_id} (make ui)"


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


def _client(root: Path) -> MlflowClient:
    """A client of the tracking store."""
    from mlflow import MlflowClient

    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}"
    if uri.startswith("sqlite:///"):
        _ensure_tables(uri)
    return MlflowClient(uri)


@functools.cache
def _ensure_tables(uri: str) -> None:
    """Make the tables of a sqlite store where they are missing."""
    database = Path(uri.removeprefix("sqlite:///"))
    with FileLock(f"{database}.lock"), closing(sqlite3.connect(database)) as connection:
        ready = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchall()
    if not ready:
        init_store(uri)


def _experiment(client: MlflowClient) -> str:
    """Id of the project's experiment."""
    from mlflow.exceptions import MlflowException

    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "bev-distillery")
    if (found := client.get_experiment_by_name(name)) is None:
        uri = client.tracking_uri
        place = (
            None if uri.startswith("http") else (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()
        )
        try:
            return client.create_experiment(name, place)
        except MlflowException:  # another process was first
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return found.experiment_id


def _find(client: MlflowClient, experiment: str, journal: str) -> str | None:
    runs = client.search_runs([experiment], f"tags.`{_JOURNAL_TAG}` = '{journal}'", max_results=1)
    return runs[0].info.run_id if runs else None


def _batches(records: list[tuple[int, dict[str, Any]]]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Group neighbours of one kind into requests; yields (offset behind the batch, records)."""
    batch: list[dict[str, Any]] = []
    size = end = 0
    for offset, record in records:
        op, weight = record["op"], len(record.get("values", ()))
        if batch and (op != batch[0]["op"] or op not in _BATCH or size + weight > _BATCH[op]):
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
    if _SECRET.search(key):
        return "***"
    text = Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else str(value)
    return re.sub(r"://[^/@\s]+@", "://***@", text)[:5000]


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
