"""The command line. Every command imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from base import redaction
from base.environment import cores, prepare
from base.errors import PipelineError

if TYPE_CHECKING:
    from config.graph import Node

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Run the study in dvc.yaml."
)
track = typer.Typer(no_args_is_help=True, help="The tracking store (MLflow).")
app.add_typer(track, name="track")
cache = typer.Typer(no_args_is_help=True, help="Teacher outputs on disk (docs/cache.md).")
app.add_typer(cache, name="cache")

Targets = Annotated[
    list[str] | None, typer.Option("--targets", help="A stage (distill@xod-0) or a group (distill); repeat for more.")
]
MaxParallel = Annotated[
    int | None, typer.Option(min=1, help="Stages at once; default: one per GPU, without a GPU two.")
]


def main() -> None:
    """Entry point: errors that a person can act on are printed without a traceback, and nothing with a secret."""
    redaction.start()
    redaction.guard_streams()
    try:
        app()
    except PipelineError as error:
        sys.exit(f"error: {error}")


@app.command()
def run(
    targets: Targets = None,
    max_parallel: MaxParallel = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run and why, and stop.")] = False,
) -> None:
    """Bring the study up to date with a Prefect flow over DVC's graph, in parallel where the graph allows."""
    from pipeline import flow

    root = prepare()
    plan = flow.make_plan(root, targets or [])
    if dry_run:
        print(flow.describe(plan))
        _print_memory(root, [step.node for step in plan.values() if step.action != "cached"])
        return
    _leave(flow.run(plan, root, max_parallel))


def _print_memory(root: Path, nodes: list[Node]) -> None:
    from config.files import load_params
    from pipeline import memory

    if text := memory.describe(load_params(root), nodes):
        print(text)


@app.command()
def check() -> None:
    """See that the parameters are right and that all they ask for can be built: models, taps, starts, terms."""
    from config.files import load_params

    root = prepare()
    params = load_params(root)
    from stages.check import check  # late: it brings torch, and what is misspelt is said without

    print(check(params, root))


@app.command()
def stage(name: str, key: Annotated[str | None, typer.Option(help="Which of a group: lidar, xod-0.")] = None) -> None:
    """Run one stage here (DVC calls this; `dvc repro --single-item NAME@KEY` also records the result)."""
    from pipeline.stage import run_stage

    _leave(run_stage(name, key))


@app.command()
def profile(name: Annotated[str | None, typer.Argument(help="A file in profiles/, without .yaml.")] = None) -> None:
    """Lay a profile over the parameters; without a name, list the profiles."""
    from config import profiles

    root = prepare()
    if name is None:
        print("\n".join(profiles.available(root)))
        return
    profiles.apply_profile(name, root)
    print(f"parameters: profile {name}")


@app.command()
def study(
    name: Annotated[str | None, typer.Argument(help="A file in studies/, without .yaml.")] = None,
    profile: Annotated[str | None, typer.Option(help="Instead of the one that the study names.")] = None,
) -> None:
    """Lay a study (docs/studies.md) over the parameters; without a name, list the studies."""
    from config import studies

    root = prepare()
    if name is None:
        print("\n".join(f"{name}: {studies.read_study(name, root).about}" for name in studies.available(root)))
        return
    params = studies.apply_study(name, root, profile)
    print(f"parameters: study {name}, profile {params.profile}")


@app.command()
def worktree(
    path: Annotated[Path | None, typer.Argument(help="A folder that is not there yet, beside this one.")] = None,
    study: Annotated[str | None, typer.Option(help="Laid over its parameters.")] = None,
    profile: Annotated[str | None, typer.Option(help="Instead of the one that the study names.")] = None,
    branch: Annotated[str | None, typer.Option(help="A new branch for it; default: none.")] = None,
) -> None:
    """Make a workspace for another study, which shares this one's cache and environment; without a path, list them."""
    from pipeline import worktree

    path = path.absolute() if path else None
    root = prepare()
    if path is None:
        print(worktree.describe(root))
        return
    made = worktree.make(path, root, study, profile, branch)
    print(f"{made}\n{worktree.what_next(made)}")


@app.command()
def report() -> None:
    """Build the report from reports/metrics again."""
    from pipeline.stage import run_stage

    _leave(run_stage("report", None))


@app.command("import-segmenter")
def import_segmenter(
    file: Annotated[Path, typer.Argument(help="Weights: .safetensors, or a checkpoint of mmdet (.pth).")],
    name: Annotated[str, typer.Option(help="Of the folder in imported/ and of the entry of segmenters.")],
    config: Annotated[Path, typer.Option(help="With model and classes: .yaml, .json, or a .py of mmdet.")],
    trust_pickle: Annotated[bool, typer.Option("--trust-pickle", help="Read .pth and .py: they can run code.")] = False,
) -> None:
    """Take over an instance segmenter that was trained elsewhere; prints what the parameters need."""
    options = {"file": file.absolute(), "name": name, "config": config.absolute(), "trust_pickle": trust_pickle}
    root = prepare()
    _leave(importlib.import_module("pipeline.commands.import_segmenter").run(root, **options))


@app.command()
def export(
    key: Annotated[str, typer.Argument(help="<variant>-<seed>, or the name of a teacher that reads no LiDAR.")],
    out: Annotated[Path | None, typer.Option(help="Folder; default: outputs/exports/KEY.")] = None,
    form: Annotated[Literal["onnx", "torch", "both"], typer.Option("--format", help="ONNX, torch.export.")] = "both",
    samples: Annotated[int, typer.Option(min=1, help="Keyframes of evaluate.split to compare on.")] = 4,
) -> None:
    """Write a student without its teachers: ONNX and a torch program, compared with the weights that were published."""
    options = {"key": key, "out": out.absolute() if out else None, "samples": samples}
    formats = ["onnx", "torch"] if form == "both" else [form]
    root = prepare()
    _leave(importlib.import_module("pipeline.commands.export").run(root, formats=formats, **options))


@app.command()
def ui(port: int = 5000) -> None:
    """Show the runs: MLflow's pages on 127.0.0.1."""
    from pipeline.processes import together

    prepare()
    _leave(together([_mlflow("ui", port)], lambda: True))


@app.command()
def up(prefect_port: int = 4200, mlflow_port: int = 5000) -> None:
    """Serve Prefect and MLflow on 127.0.0.1 until Ctrl-C, with the work pools of prefect.yaml (docs/cluster.md)."""
    from pipeline.processes import together

    prepare()
    api = f"http://127.0.0.1:{prefect_port}/api"
    prefect = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(prefect_port)]

    def greet() -> bool:
        if not _answers(f"{api}/health"):
            return False
        from pipeline.deployment import provide

        print("\n".join(provide(api)))
        print(f"export PREFECT_API_URL={api} MLFLOW_TRACKING_URI=http://127.0.0.1:{mlflow_port}", flush=True)
        return True

    _leave(together([prefect, _mlflow("server", mlflow_port)], greet))


def _answers(url: str) -> bool:
    import urllib.request

    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@track.command("init")
def track_init() -> None:
    """Make or migrate the tables of a database, sqlite or PostgreSQL (once; several processes may ask)."""
    from results.tracking.runs import init_store

    prepare()
    if not (uri := os.environ["MLFLOW_TRACKING_URI"]).startswith("http"):
        init_store(uri)


@track.command("replay")
def track_replay() -> None:
    """Send what could not be sent while the tracking server was away."""
    from results.tracking.runs import JOURNALS, replay

    sent, waiting = replay(prepare() / JOURNALS)
    print(f"{sent} runs are on the server whole, {waiting} wait")


@track.command("study")
def track_study() -> None:
    """Bring the runs of `study` in MLflow up to date with what is published (docs/tracking.md)."""
    from config.files import load_params
    from results.report.lineage import results

    root = prepare()
    params = load_params(root)
    print(importlib.import_module("stages.report").track(root, params, results(params, root)))


@cache.command("plan")
def cache_plan(
    stores: Annotated[list[str] | None, typer.Argument(help="Of the parameters; default: study.stores.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """What stores will take in bytes and minutes, here and for nuScenes trainval; fails if a build cannot fit."""
    _cache("plan", names=stores or [], as_json=as_json)


@cache.command("verify")
def cache_verify(
    stores: Annotated[list[str] | None, typer.Argument(help="Default: all that are in outputs/stores.")] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Build damaged shards again, through DVC.")] = False,
) -> None:
    """Read stores whole and compare them with their checksums; fails if something is damaged."""
    _cache("verify", names=stores or [], repair=repair)


@cache.command("ls")
def cache_ls(as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False) -> None:
    """List stores and unfinished builds: samples, bytes, and whether they are what the parameters ask for."""
    _cache("ls", as_json=as_json)


@cache.command("gc")
def cache_gc(
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without, it is only listed.")] = False,
    stale: Annotated[bool, typer.Option("--stale", help="Stale stores, too.")] = False,
) -> None:
    """Remove what no current parameter needs: builds of other fingerprints, stores that the parameters do not name."""
    _cache("gc", yes=yes, stale=stale)


@cache.command("look")
def cache_look(
    store: str,
    sample: Annotated[str | None, typer.Option(help="Token or its beginning; default: the first.")] = None,
    out: Annotated[Path | None, typer.Option(help="Default: reports/look-STORE-TOKEN.png.")] = None,
) -> None:
    """Draw a sample: cameras and LiDAR with the truth, beside them the teacher's feature maps and boxes."""
    _cache("look", name=store, sample=sample, out=out.absolute() if out else None)


def _cache(command: str, **options: Any) -> NoReturn:
    """Run a command of pipeline.commands.cache, which is imported now: it brings torch."""
    root = prepare()
    _leave(importlib.import_module(f"pipeline.commands.cache.{command}").run(root, **options))


def _mlflow(command: str, port: int) -> list[str]:
    """MLflow's server on the tracking database, which it gets by environment: a URI can hold a password."""
    from results.tracking.runs import artifact_root

    store = os.environ["MLFLOW_TRACKING_URI"]
    if store.startswith("http"):
        raise PipelineError(f"MLFLOW_TRACKING_URI is {redaction.public(store)}: its pages are there")
    os.environ |= {"MLFLOW_BACKEND_STORE_URI": store, "MLFLOW_DEFAULT_ARTIFACT_ROOT": artifact_root(store, Path.cwd())}
    # Four are MLflow's default; each takes six seconds of CPU to start, and more than there are cores only wait.
    os.environ.setdefault("MLFLOW_WORKERS", str(min(4, cores())))
    return [sys.executable, "-m", "mlflow", command, "--host", "127.0.0.1", "--port", str(port)]


def _leave(code: int) -> NoReturn:
    """End with `code`, even when a thread still waits for a tracking server that does not answer."""
    sys.stdout.flush()
    sys.stderr.flush()
    if any(thread.name == "tracking" for thread in threading.enumerate()):
        os._exit(code)
    sys.exit(code)
