"""What the records of a journal do on the tracking server. Each may be sent twice: the second time changes nothing."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from base.errors import PipelineError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

logger = logging.getLogger(__name__)

JOURNAL = "pipeline.journal"  # tag: the id of the journal that made a run or a model's version
PARENT_RUN = "mlflow.parentRunId"
STATE = "state"  # tag of a study's runs
CURRENT, REPLACED = "current", "replaced"
BEST = "best"  # alias of a registered student
_PAGE = 1000  # runs of one answer; metrics of one request

Record = Mapping[str, Any]
Operation = Callable[["MlflowClient", str, Sequence[Record], Path], Mapping[str, Any]]


class NotYetError(PipelineError):
    """A record needs runs that the server does not have yet: it is sent again later."""


def send(client: MlflowClient, run: str, batch: Sequence[Record], files: Path) -> Mapping[str, Any]:
    """Send records of one kind; returns what the journal's cursor is to remember."""
    return OPERATIONS[batch[0]["op"]](client, run, batch, files)


def find(client: MlflowClient, experiment: str, journal: str) -> str | None:
    """Id of the run that a journal made; of several, of the oldest."""
    return next((run.info.run_id for run in _search(client, experiment, {JOURNAL: journal})), None)


def settle(client: MlflowClient, experiment: str, journal: str, made: str) -> str:
    """Where two processes made the same run at once, the older one stays; returns its id."""
    first = find(client, experiment, journal) or made
    if first != made:
        client.delete_run(made)
    return first


def whole(client: MlflowClient, experiment: str, tags: Mapping[str, str]) -> set[str]:
    """The journals whose runs, with these tags, are on the server to their end."""
    runs = _search(client, experiment, tags)
    return {run.data.tags[JOURNAL] for run in runs if run.info.status == "FINISHED" and JOURNAL in run.data.tags}


def _search(client: MlflowClient, experiment: str, tags: Mapping[str, str]) -> Iterator[Run]:
    """Runs that have all the tags, oldest first."""
    words = " AND ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    order = ["attributes.start_time ASC", "attributes.run_id ASC"]
    token = None
    while True:
        page = client.search_runs([experiment], words, max_results=_PAGE, order_by=order, page_token=token)
        yield from page
        if not (token := page.token):
            return


def _metrics(client: MlflowClient, run: str, batch: Sequence[Record], _: Path) -> Mapping[str, Any]:
    """Records without a time are of results: they carry that of their run, whenever they are sent."""
    from mlflow.entities import Metric

    start = 0 if all(record["time"] for record in batch) else client.get_run(run).info.start_time
    metrics = [
        Metric(name, value, record["time"] or start, record["step"])
        for record in batch
        for name, value in record["values"].items()
    ]
    client.log_batch(run, metrics=metrics, synchronous=True)
    return {}


def _params(client: MlflowClient, run: str, batch: Sequence[Record], _: Path) -> Mapping[str, Any]:
    from mlflow.entities import Param

    client.log_batch(run, params=[Param(*item) for item in _values(batch)], synchronous=True)
    return {}


def _tags(client: MlflowClient, run: str, batch: Sequence[Record], _: Path) -> Mapping[str, Any]:
    from mlflow.entities import RunTag

    client.log_batch(run, tags=[RunTag(*item) for item in _values(batch)], synchronous=True)
    return {}


def _artifact(client: MlflowClient, run: str, batch: Sequence[Record], files: Path) -> Mapping[str, Any]:
    name = Path(batch[0]["path"])
    client.log_artifact(run, str(files / name), str(name.parent) if name.parent.name else None)
    return {}


def _resume(client: MlflowClient, run: str, _: Sequence[Record], __: Path) -> Mapping[str, Any]:
    client.update_run(run, status="RUNNING")
    return {"ended": False}


def _end(client: MlflowClient, run: str, batch: Sequence[Record], _: Path) -> Mapping[str, Any]:
    client.set_terminated(run, batch[0]["state"], batch[0]["time"])
    return {"ended": True}


def _curves(client: MlflowClient, run: str, batch: Sequence[Record], _: Path) -> Mapping[str, Any]:
    """Copy the training curves of the stage's run with a fingerprint, and the revision of its code."""
    experiment = client.get_run(run).info.experiment_id
    for source in _search(client, experiment, {"dvc.fingerprint": batch[0]["fingerprint"]}):
        if source.info.status != "FINISHED":
            continue
        for name in source.data.metrics:
            if not name.startswith("system/"):
                history = client.get_metric_history(source.info.run_id, name)
                for part in range(0, len(history), _PAGE):
                    client.log_batch(run, metrics=history[part : part + _PAGE], synchronous=True)
        for tag in ("git.rev", "git.dirty"):
            if tag in source.data.tags:
                client.set_tag(run, tag, source.data.tags[tag])
        client.set_tag(run, "curves.run", source.info.run_id)
        break
    return {}


def _inputs(client: MlflowClient, run: str, batch: Sequence[Record], _: Path) -> Mapping[str, Any]:
    """Name what a model was made from, with DVC's hashes; no byte of it is sent."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    client.log_inputs(
        run,
        [
            DatasetInput(
                Dataset(item["name"], item["digest"], "dvc", item["path"]),
                [InputTag("mlflow.data.context", item["context"])],
            )
            for item in batch[0]["datasets"]
        ],
    )
    return {}


def _model(client: MlflowClient, run: str, batch: Sequence[Record], _: Path) -> Mapping[str, Any]:
    """Register weights that DVC keeps, as a version without bytes; one version for each set of tags."""
    from mlflow.entities import LoggedModelOutput

    record = batch[0]
    name, tags = record["registered"], dict(record["tags"])
    if _version(client, name, tags) is None:
        _ensure_model(client, name)
        model = _external_model(client, run, record["name"], tags)
        made = client.create_model_version(name, f"models:/{model}", run, tags, model_id=model).version
        if _version(client, name, tags) != made:  # another process was first
            client.delete_model_version(name, made)
            client.delete_logged_model(model)
        else:
            client.log_outputs(run, [LoggedModelOutput(model, 0)])
    return {}


def _version(client: MlflowClient, name: str, tags: Mapping[str, str]) -> str | None:
    """The first version of a registered model that has all the tags."""
    versions = client.search_model_versions(f"name = '{name}'", max_results=10_000)
    return min((v.version for v in versions if tags.items() <= v.tags.items()), key=int, default=None)


def _ensure_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _external_model(client: MlflowClient, run: str, name: str, tags: Mapping[str, str]) -> str:
    """Id of a new model of a run whose bytes are elsewhere: `mlflow.create_external_model` with a client of its own."""
    from mlflow.models.utils import get_external_mlflow_model_spec

    experiment = client.get_run(run).info.experiment_id
    model = client.create_logged_model(experiment, name, run, {**tags, "mlflow.model.isExternal": "true"})
    with tempfile.TemporaryDirectory() as folder:
        get_external_mlflow_model_spec(model).save(str(Path(folder) / "MLmodel"))
        client.log_model_artifacts(model.model_id, folder)
    client.finalize_logged_model(model.model_id, "READY")
    return str(model.model_id)


def _study(client: MlflowClient, run: str, batch: Sequence[Record], _: Path) -> Mapping[str, Any]:
    """Gather a study's runs below this one, mark those that they replace, and name the best student.

    Raises:
        NotYetError: one of them is not on the server.
    """
    record = batch[0]
    experiment = client.get_run(run).info.experiment_id
    runs = {r.data.tags[JOURNAL]: r for r in _search(client, experiment, record["of"]) if JOURNAL in r.data.tags}
    _check_whole(record["children"], runs)
    for journal, other in runs.items():
        member = journal in record["children"]
        wanted = {STATE: CURRENT if member or other.info.run_id == run else REPLACED}
        if member:
            wanted[PARENT_RUN] = run
        for name, value in wanted.items():
            if other.data.tags.get(name) != value:
                client.set_tag(other.info.run_id, name, value)
    if (best := record["best"]) and (version := _version(client, best["registered"], best["tags"])):
        client.set_registered_model_alias(best["registered"], BEST, version)
    return {}


def _check_whole(children: Iterable[str], runs: Mapping[str, Run]) -> None:
    missing = [name for name in children if name not in runs or runs[name].info.status != "FINISHED"]
    if missing:
        raise NotYetError(f"{len(missing)} runs of the study are not on the server yet, such as {missing[0]}")


def _values(batch: Sequence[Record]) -> Iterator[tuple[str, str]]:
    for record in batch:
        yield from record["values"].items()


OPERATIONS: dict[str, Operation] = {
    "start": lambda *_: {},
    "resume": _resume,
    "params": _params,
    "metrics": _metrics,
    "tags": _tags,
    "artifact": _artifact,
    "curves": _curves,
    "inputs": _inputs,
    "model": _model,
    "study": _study,
    "end": _end,
}
