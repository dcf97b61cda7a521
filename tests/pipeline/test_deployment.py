"""Prefect's deployments: a real server as `up` serves it, a real process worker, runs that come in by the API."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import StateType
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling
from prefect.utilities.templating import apply_values
from ruamel.yaml import YAML

from base.environment import ROOMS
from pipeline import deployment
from pipeline.slots import LIMIT
from results.tracking.runs import MlflowTracker
from tests.params_files import copy_params
from tests.pipeline.project import ROOT, Project, free_port, wait_until
from tests.pipeline.test_flow import Trace, diamond

SECRET = "token-of-the-worker"
SECONDS = 180  # for a server or a run on a busy machine
BESIDE = """
import time
def run(context):
    while (context.root / "hold-beside").exists() and not context.stop.is_set():
        print("beside 3/12 of its work", flush=True)
        time.sleep(0.2)
    if context.stop.is_set():
        raise SystemExit(75)
    (context.scratch / "x").write_text("x")
    context.publish(context.scratch / "x", "beside.txt")
"""


def unlucky(project: Project) -> Project:
    """The diamond, whose stages say a secret where they fail."""
    diamond(project).edit("work.py", "has no luck", "has no luck with {os.environ.get('FAR_TOKEN')}")
    return project


class Served:
    """A workspace with its deployments, the server that `up` started, and a worker."""

    def __init__(self, folder: Path, api: str, mlflow: str) -> None:
        self.mlflow = mlflow
        self.project = unlucky(Project(folder, PREFECT_API_URL=api, PREFECT_HOME=str(folder / ".prefect")))
        self.project.edit("dvc.yaml", "python work.py beside", "exec python -m pipeline stage beside")
        self.project.write("stages/beside.py", BESIDE)
        copy_params(self.project.root)
        shutil.copy(ROOT / "prefect.yaml", self.project.root)
        shutil.copytree(ROOT / "profiles", self.project.root / "profiles")
        shutil.copytree(ROOT / "studies", self.project.root / "studies")
        self.client = SyncPrefectClient(api)

    def start(self, variables: dict[str, Any] | None = None, **parameters: Any) -> UUID:
        """Start a run of the deployment `local`, as a click on "Run" does."""
        there = self.client.read_deployment_by_name("pipeline/local")
        run = self.client.create_flow_run_from_deployment(there.id, parameters=parameters, job_variables=variables)
        return run.id

    def state(self, run: UUID) -> StateType | None:
        """The run's state, once it is a final one."""
        state = self.client.read_flow_run(run).state
        return state.type if state is not None and state.is_final() else None

    def message(self, run: UUID) -> str:
        """What the run's state says."""
        state = self.client.read_flow_run(run).state
        return (state.message or "") if state is not None else ""

    def log(self, run: UUID) -> str:
        """What the run and its tasks have printed."""
        records = self.client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run])), limit=200)
        return "\n".join(record.message for record in records)

    def artifacts(self, run: UUID) -> dict[str, Any]:
        """Key (or kind) and content of the run's artifacts."""
        chosen = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run]))
        return {str(a.key or a.type): a.data for a in self.client.read_artifacts(artifact_filter=chosen)}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, migrated: Path, prefect_database: Path) -> Iterator[Served]:
    """`up`, `prefect deploy --all` and `prefect worker start`, as docs/cluster.md says."""
    folder = tmp_path_factory.mktemp("served")
    prefect, mlflow = free_port(), free_port()
    made = Served(folder / "workspace", f"http://127.0.0.1:{prefect}/api", f"http://127.0.0.1:{mlflow}")
    project = made.project
    (project.root / ".prefect").mkdir()
    shutil.copy(prefect_database, project.root / ".prefect")
    store = f"sqlite:///{shutil.copy(migrated, folder / 'mlflow.db')}"
    up = project.start(
        "pipeline",
        "up",
        "--prefect-port",
        str(prefect),
        "--mlflow-port",
        str(mlflow),
        MLFLOW_TRACKING_URI=store,
        MLFLOW_WORKERS="1",
    )
    try:
        assert up.stdout is not None
        said = []
        for line in up.stdout:
            said.append(line)
            if line.startswith("export PREFECT_API_URL="):
                break
        assert f"export PREFECT_API_URL={project.env['PREFECT_API_URL']}" in said[-1], "".join(said)
        assert "limit gpu was made: 2 slots\n" in said or "limit gpu was made: 1 slots\n" in said
        project.run("prefect", "deploy", "--all", PWD="/")  # a shell's idea of where it is must not matter
        online = {"MLFLOW_TRACKING_URI": made.mlflow, "PIPELINE_TRACK_LATER": "", "FAR_TOKEN": SECRET}
        worker = project.start("prefect", "worker", "start", "--pool", "gpu-pool", **online)
        yield made
        worker.terminate()
        worker.communicate(timeout=60)
        up.terminate()
        up.communicate(timeout=60)
        assert project.processes() == []
    finally:
        project.stop_all()
        made.client.__exit__(None, None, None)


pytestmark = pytest.mark.xdist_group("prefect-deployments")  # one server and one worker do


@pytest.fixture
def workspace(served: Served) -> Served:
    """The same, with nothing run yet."""
    for pattern in ("*.txt", "hold-*", "fail-*", "dvc.lock"):
        for path in served.project.root.glob(pattern):
            path.unlink()
    shutil.rmtree(served.project.root / ".dvc" / "cache", ignore_errors=True)  # nothing is restored from other tests
    served.project.write("extra.txt", "1")
    return served


def test_up_makes_pools_and_the_limit_once(served: Served) -> None:
    assert {pool.name: pool.type for pool in served.client.read_work_pools()} == {
        deployment.PROCESS_POOL: "process",
        deployment.KUBERNETES_POOL: "kubernetes",
    }
    limit = served.client.read_global_concurrency_limit_by_name(LIMIT)
    slots = limit.limit
    assert slots in (1, 2)  # no GPU here: one stage per core, two at most
    served.client.upsert_global_concurrency_limit_by_name(LIMIT, 7)
    try:
        said = deployment.provide(served.project.env["PREFECT_API_URL"])
        assert said == ["work pool gpu-pool is there", "work pool k8s-pool is there", "limit gpu is there: 7 slots"]
    finally:
        served.client.upsert_global_concurrency_limit_by_name(LIMIT, slots)


def test_deploy_all_sends_what_prefect_yaml_says(served: Served) -> None:
    names = ["local", "slurm", "ray", "kubernetes"]
    found = {name: served.client.read_deployment_by_name(f"pipeline/{name}") for name in names}
    assert {name: there.work_pool_name for name, there in found.items()} == {
        "local": "gpu-pool",
        "slurm": "gpu-pool",
        "ray": "gpu-pool",
        "kubernetes": "k8s-pool",
    }
    variables = {name: there.job_variables for name, there in found.items()}
    assert variables["local"] == {"working_dir": str(served.project.root)}
    assert variables["slurm"]["env"]["PIPELINE_LAUNCHER"] == "slurm"
    assert variables["ray"]["env"]["PIPELINE_LAUNCHER"] == "ray"
    assert {name: [s.active for s in there.schedules] for name, there in found.items()} == {
        "local": [False],
        "slurm": [],
        "ray": [],
        "kubernetes": [],
    }
    assert all(there.parameter_openapi_schema["properties"].keys() == PARAMETERS for there in found.values())


PARAMETERS = inspect.signature(deployment.pipeline.fn).parameters.keys()


def test_a_run_from_the_api_runs_in_the_workspace(workspace: Served) -> None:
    project = workspace.project
    project.write("hold-beside", "")
    (project.root / "reports").mkdir(exist_ok=True)
    project.write("reports/table.md", "| row | mAP |")
    run = workspace.start(targets=["left", "beside"], max_parallel=2, profile="smoke")
    wait_until(lambda: "progress" in workspace.artifacts(run), SECONDS)
    assert workspace.artifacts(run)["progress"] == 25.0
    (project.root / "hold-beside").unlink()
    assert wait_until(lambda: workspace.state(run), SECONDS) == StateType.COMPLETED, workspace.log(run)
    assert "profile: smoke" in project.lines("params.yaml")
    assert sorted(Trace(project).names("end")) == ["left", "top"]
    assert (project.root / "beside.txt").exists()
    artifacts = workspace.artifacts(run)
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in artifacts["stages"].splitlines()[2:5]]
    assert sorted(rows) == [["beside", "done"], ["left", "done"], ["top", "done"]]
    assert artifacts["mlflow"].startswith(f"[the stages' runs]({workspace.mlflow}/#/runs/"), artifacts["mlflow"]
    assert artifacts["ablation"].startswith("| row | mAP |")
    assert str(project.root / "reports" / "report.html") in artifacts["ablation"]
    wait_until(lambda: "3 done" in workspace.log(run))  # logs are sent a little later
    assert "[beside] beside 3/12 of its work" in workspace.log(run)
    assert project.repro("left", "beside") == []  # what the flow did, DVC knows


def test_a_failed_run_of_another_workspace_says_what_failed(
    served: Served, make_project: Callable[..., Project]
) -> None:
    other = unlucky(make_project())
    other.write("fail-right", "")
    run = served.start(targets=["right"], variables={"working_dir": str(other.root)})
    assert wait_until(lambda: served.state(run), SECONDS) == StateType.FAILED, served.log(run)
    assert served.message(run) == "failed: right"
    assert Trace(other).names("end") == ["top"]
    wait_until(lambda: "rerun:  dvc repro --single-item right" in served.log(run))
    assert "[right] right has no luck with ***" in served.log(run)
    assert SECRET not in served.log(run) + json.dumps(served.artifacts(run))


def test_a_run_with_a_wrong_parameter_fails_and_says_why(workspace: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here and not by the worker, whose every run takes ten seconds to start."""
    monkeypatch.chdir(workspace.project.root)
    with temporary_settings({PREFECT_API_URL: workspace.project.env["PREFECT_API_URL"]}):
        state = deployment.pipeline(profile="no-such", return_state=True)
    assert state.type == StateType.FAILED
    run = state.state_details.flow_run_id
    assert run is not None
    assert "profile 'no-such' is unknown; allowed: bench-cpu" in workspace.message(run)


def test_a_tracker_talks_to_the_server(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's, which `up` serves beside Prefect's and ends with it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", served.mlflow)
    tracker = MlflowTracker("remote", served.project.root, {})
    tracker.log_metrics({"m": 1.0}, 7)
    tracker.log_artifact(served.project.root / "params.yaml")
    tracker.close()
    client = MlflowClient(served.mlflow)
    (run,) = client.search_runs(["1"], "tags.mlflow.runName = 'remote'")
    assert (run.info.run_name, run.info.status, run.data.metrics) == ("remote", "FINISHED", {"m": 1.0})
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["params.yaml"]


def test_cancelling_a_run_leaves_no_process(workspace: Served) -> None:
    project = workspace.project
    before = {process.pid for process in project.processes()}
    project.write("hold-beside", "")
    project.write("hold-top", "")
    run = workspace.start(max_parallel=2)
    wait_until(lambda: "top" in Trace(project).names("begin") and "beside 3/12" in workspace.log(run), SECONDS)
    assert len({process.pid for process in project.processes()} - before) >= 5  # the flow, two of DVC, two stages

    workspace.client.set_flow_run_state(run, Cancelling())
    began = time.monotonic()
    wait_until(lambda: {process.pid for process in project.processes()} <= before, 60)
    assert time.monotonic() - began < 45  # Prefect looks every ten seconds or so, and the machine may be busy
    assert wait_until(lambda: workspace.state(run), SECONDS) == StateType.CANCELLED
    history = [state.type for state in workspace.client.read_flow_run_states(run)]
    assert StateType.CRASHED not in history
    for name in ("beside", "top"):
        (project.root / f"hold-{name}").unlink()
    assert sorted(project.repro("top", "beside")) == ["beside", "top"]  # nothing is locked


def test_the_kubernetes_job_has_gpus_the_volume_and_the_workspace() -> None:
    template = deployment.kubernetes_template()
    (variables,) = (
        there["work_pool"]["job_variables"] for there in deployments() if there["work_pool"]["name"] == "k8s-pool"
    )
    assert variables.keys() <= template["variables"]["properties"].keys()
    values = variables | {"command": ["prefect", "flow-run", "execute"]}
    job = apply_values(template["job_configuration"], values)["job_manifest"]
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == "bev-distillery:latest"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 1}
    assert [container["command"], container["args"]] == [["tini", "--"], ["prefect", "flow-run", "execute"]]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert volumes.keys() == mounts.keys()
    assert volumes["workspace"]["persistentVolumeClaim"]["claimName"] == "bev-distillery"
    assert mounts["memory"] == "/dev/shm"
    assert Path(container["workingDir"]).is_relative_to(mounts["workspace"])


def test_prefect_yaml_names_the_flow_and_its_parameters() -> None:
    assert {there["entrypoint"] for there in deployments()} == {"pipeline.deployment.pipeline"}
    assert all(there["parameters"].keys() == PARAMETERS for there in deployments())


SETUP = ["machine", "build_mmcv", "sparse_convolution", "spconv_on_triton", "check"]


def test_what_the_image_copies_is_there() -> None:
    """There is no engine to build it with: at least its sources exist and are not ignored."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    copies = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY")]
    sources = [word for words in copies for word in words if not word.startswith("--")]
    assert sources == ["setup/requirements.txt", *(f"setup/{name}.py" for name in SETUP), "."]
    assert all((ROOT / source).exists() for source in sources)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert not {*ROOMS, "setup", "profiles", "studies", ".dvc"} & set(ignored)
    made = [name.strip("/") for name in (ROOT / ".gitignore").read_text().split() if name.startswith("/")]
    assert not [name for name in made if not {name, name + "*"} & set(ignored) and name != "reports/look-*.png"]
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)
    assert json.loads(entry) == ["tini", "--", "python", "-m", "pipeline"]
    (python,) = set(re.findall(r"python(3\.\d+)", text))
    assert tuple(map(int, python.split("."))) in [(3, 11), (3, 12)]  # setup/setup.sh takes no other


def deployments() -> list[dict[str, Any]]:
    return YAML(typ="safe", pure=True).load((ROOT / "prefect.yaml").read_text())["deployments"]
