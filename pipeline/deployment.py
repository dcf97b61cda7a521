"""The flow as Prefect's deployments start it (prefect.yaml), and what they need of a server: work pools and a limit."""

from __future__ import annotations

import importlib.resources
import json
from typing import Any

# Imported before Prefect has threads: SQLAlchemy breaks when two of them import it at once, and the tracker does, too.
import sqlalchemy.orm  # noqa: F401
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, WorkPoolCreate
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.states import State

from base import redaction
from base.environment import prepare
from config import profiles, studies
from pipeline import flow as flows
from pipeline import slots

PROCESS_POOL = "gpu-pool"
KUBERNETES_POOL = "k8s-pool"
# What a Kubernetes job needs beyond Prefect's template. The image's own entry is this project's command line.
KUBERNETES_VARIABLES: dict[str, dict[str, Any]] = {
    "gpus": {"title": "GPUs", "description": "Of the pod; stages lease them one by one.", "type": "integer"},
    "volume_claim": {
        "title": "Volume claim",
        "description": "A ReadWriteMany claim with the workspace and DVC's cache, so that DVC can link between them.",
        "type": "string",
    },
    "mount_path": {"title": "Mount path", "description": "Where the pod sees that volume.", "type": "string"},
    "working_dir": {"title": "Workspace", "description": "The checkout, below the mount path.", "type": "string"},
}


@flow(name=flows.NAME, persist_result=False, log_prints=True)
def pipeline(
    targets: list[str] | None = None,
    max_parallel: int | None = None,
    study: str | None = None,
    profile: str | None = None,
) -> State[Any]:
    """Bring the workspace that it runs in up to date.

    Args:
        targets: stages (distill@xod-0) or groups (distill); none: everything.
        max_parallel: stages at once; none: one per GPU, without a GPU two.
        study: laid over the parameters first; none: the parameters as they are.
        profile: laid over the parameters first, or instead of the one that the study names.
    """
    root = prepare()
    with redaction.clean_errors(), flows.alone(root):
        if study:
            studies.apply_study(study, root, profile)
        elif profile:
            profiles.apply_profile(profile, root)
        return flows.conduct(flows.make_plan(root, targets or []), root, max_parallel)


def provide(api: str) -> list[str]:
    """Make what prefect.yaml's deployments need and the server at `api` lacks; returns what there is now, in lines."""
    with SyncPrefectClient(api) as client:
        return [
            _pool(client, PROCESS_POOL, "process", _job_template("prefect", "process")),
            _pool(client, KUBERNETES_POOL, "kubernetes", kubernetes_template()),
            _limit(client),
        ]


def kubernetes_template() -> dict[str, Any]:
    """Prefect's template of a Kubernetes job with GPUs, the workspace's volume and its folder added to it."""
    template = _job_template("prefect-kubernetes", "kubernetes")
    template["variables"]["properties"] |= KUBERNETES_VARIABLES
    pod = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    container["command"] = ["tini", "--"]
    container["workingDir"] = "{{ working_dir }}"
    container["volumeMounts"] = [
        {"name": "workspace", "mountPath": "{{ mount_path }}"},
        {"name": "memory", "mountPath": "/dev/shm"},  # loaders hand batches over in it; Kubernetes gives 64 MB
    ]
    container["resources"]["limits"]["nvidia.com/gpu"] = "{{ gpus }}"
    pod["volumes"] = [
        {"name": "workspace", "persistentVolumeClaim": {"claimName": "{{ volume_claim }}"}},
        {"name": "memory", "emptyDir": {"medium": "Memory"}},
    ]
    return template


def _job_template(package: str, kind: str) -> dict[str, Any]:
    """Prefect's own template of a kind of worker; from its files, as its server asks the internet for newer ones."""
    views = importlib.resources.files("prefect") / "server" / "api" / "collections_data" / "views"
    kinds = json.loads((views / "aggregate-worker-metadata.json").read_text())
    template: dict[str, Any] = kinds[package][kind]["default_base_job_configuration"]
    return template


def _pool(client: SyncPrefectClient, name: str, kind: str, template: dict[str, Any]) -> str:
    pool = WorkPoolCreate(name=name, type=kind, base_job_template=template)
    try:
        client.create_work_pool(pool)
    except ObjectAlreadyExists:
        return f"work pool {name} is there"
    return f"work pool {name} ({kind}) was made"


def _limit(client: SyncPrefectClient) -> str:
    try:
        there = client.read_global_concurrency_limit_by_name(slots.LIMIT)
        return f"limit {slots.LIMIT} is there: {there.limit} slots"
    except ObjectNotFound:
        count = slots.of_this_machine()
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=slots.LIMIT, limit=count))
        return f"limit {slots.LIMIT} was made: {count} slots"
