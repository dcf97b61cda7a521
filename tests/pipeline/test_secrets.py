"""No secret leaves: not to the terminal, not to a file, not to Prefect's pages, not to a command line."""

from __future__ import annotations

import base64
import html
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest

from base import redaction
from base.errors import PipelineError
from pipeline.launchers import Job, slurm
from pipeline.processes import together
from results.tracking.runs import artifact_root, run_link
from tests.pipeline.project import Project

USER, PASSWORD = "alice-tracks", "hunter2/sec ret&öx"  # needs encoding in every format
BASIC, LATIN = (base64.b64encode(f"{USER}:{PASSWORD}".encode(form)).decode() for form in ("utf-8", "latin-1"))
ENCODED = f"{USER}:{quote(PASSWORD, safe='')}"
PLANTED = {
    "MLFLOW_TRACKING_TOKEN": "mlflow-token-1234",
    "PREFECT_API_KEY": "pnu_prefect_key_5678",
    "AWS_SECRET_ACCESS_KEY": "aws+secret/key=9",
    "HTTP_PROXY_OF_TESTS": "http://proxyman:proxyword@127.0.0.1:9",
    "SIGNED_PLACE": "https://127.0.0.1:9/x?region=a&X-Token=query-token-77",
    "CLONE_FROM": "https://ghp_codehosttoken@127.0.0.1/repository.git",
}
IN_FILES = {
    "params.yaml": "s3://paramuser:paramword@bucket/nuscenes",
    ".git/config": "https://gituser:gitword@127.0.0.1/repository.git",
    ".dvc/config.local": "dvcpassword",
}
SECRETS = [
    *(USER, PASSWORD, BASIC, LATIN, "mlflow-token-1234", "pnu_prefect_key_5678", "aws+secret/key=9"),
    *("proxyman", "proxyword", "query-token-77", "ghp_codehosttoken", "paramuser", "paramword", "gituser", "gitword"),
    *("dvcpassword", "s3word"),
]
# What the stage does: shows what it knows, sees the command lines of all, and fails if it is told to.
STAGE = """
import json, os, pathlib, sys, urllib.parse, html, warnings, logging
import psutil

def run(context):
    places = ["params.yaml", ".git/config", ".dvc/config.local"]
    known = "\\n".join([*os.environ.values(), *(pathlib.Path(place).read_text() for place in places)]).splitlines()
    known = [line for line in known if any(mark in line for mark in ("@", "token", "key", "password"))]
    said = "\\n".join(known)
    forms = [said, repr(said), json.dumps(said), html.escape(said), urllib.parse.quote(said)]
    forms += [urllib.parse.quote_plus(said)]
    forms += [str(pathlib.Path(context.params.data.dataroot) / "missing"), urllib.parse.unquote(said)]
    text = "\\n".join(forms)
    print(text)
    print(text, file=sys.stderr)
    warnings.warn(text)
    logging.getLogger("somebody.else").warning("%s", text)
    context.tracker.set_tags({"said": text[:4000], "where": context.params.data.dataroot})
    context.tracker.log_params({"place": os.environ["MLFLOW_TRACKING_URI"], "deep": {"list": known}})
    made = context.scratch / "made"
    made.write_text(json.dumps([process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]))
    context.publish(made, "outputs/index")
"""
FAILS = """
import os, pathlib

def run(context):
    try:
        raise OSError(2, "not there", os.environ["MLFLOW_TRACKING_URI"])
    except OSError as error:
        raise RuntimeError("\\n".join(os.environ.values()) + pathlib.Path(".dvc/config.local").read_text()) from error
"""


class Server(ThreadingHTTPServer):
    """Asks for a password, and has nothing but errors, which repeat what it was told."""

    def __init__(self) -> None:
        self.told: set[str] = set()
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        told = self.headers.get("Authorization", "")
        self.server.told.add(told)
        body = json.dumps({"error_code": "BAD_REQUEST", "message": f"no luck with {told} of {ENCODED} on {self.path}"})
        self.send_response(400)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


@pytest.fixture(autouse=True)
def _forgets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test planted is no secret in the next one."""
    yield
    monkeypatch.undo()
    redaction._from_files.clear()
    redaction.start()


def spellings(secret: str) -> set[str]:
    lower = re.sub("%..", lambda found: found[0].lower(), quote(secret, safe=""))
    forms = {secret, quote(secret), quote(secret, safe=""), lower, html.escape(secret)}
    return forms | {json.dumps(secret)[1:-1], repr(secret)[1:-1], secret.replace(" ", "+"), quote(quote(secret))}


def leaks(text: str) -> list[str]:
    """The secrets that a text holds."""
    return sorted({secret for secret in SECRETS for form in spellings(secret) if form in text})


def test_no_command_and_no_file_tells_a_secret(tmp_path: Path, server: Server) -> None:
    address = f"http://{ENCODED}@127.0.0.1:{server.server_port}"
    project = Project(
        tmp_path / "project",
        **PLANTED,
        BASIC_OF_TESTS=BASIC,
        MLFLOW_TRACKING_URI=address,
        MLFLOW_DEFAULT_ARTIFACT_ROOT="s3://AKIAUSER:s3word@bucket/runs",
        PIPELINE_TRACK_LATER="",
        PYTHONWARNINGS="default",
    )
    project.set(data__dataroot=IN_FILES["params.yaml"])
    project.edit("dvc.yaml", "[input.sweeps]", "[input.sweeps, data.dataroot]")
    project.write("stages/prepare.py", STAGE)
    project.write("stages/distill.py", FAILS)
    with (project.root / ".git/config").open("a") as config:
        config.write(f'[remote "origin"]\n\turl = {IN_FILES[".git/config"]}\n')
    project.write(".dvc/config.local", "['remote \"far\"']\n    url = https://127.0.0.1:9/\n    password = dvcpassword")
    nowhere = f"http://{ENCODED}@127.0.0.1:9/api"
    said = {
        "published": project.run("pipeline", "stage", "prepare"),
        "stage": project.run("pipeline", "stage", "distill", "--key", "baseline-0", code=1),
        "dry-run": project.run("pipeline", "run", "--dry-run"),
        "away": project.run("pipeline", "run", code=1, PREFECT_API_URL=nowhere),
        "replay": project.run("pipeline", "track", "replay", MLFLOW_TRACKING_TOKEN=""),
        "ui": project.run("pipeline", "ui", code=1),
        "root": project.run("pipeline", "ui", code=1, MLFLOW_TRACKING_URI="sqlite:///mlflow.db"),
    }
    assert {command: found for command, text in said.items() if (found := leaks(text))} == {}
    wrote = {
        str(path.relative_to(project.root)): leaks(path.read_bytes().decode(errors="replace"))
        for path in project.root.rglob("*")
        if path.is_file()
    }
    theirs = {name for name in wrote if name in (*IN_FILES, "dvc.lock") or name.startswith(".dvc/cache/runs/")}
    assert {name: found for name, found in wrote.items() if found and name not in theirs} == {}

    assert server.told == {f"Basic {LATIN}"}  # it was reached, as before, by requests
    assert (project.root / "outputs/index").exists()
    assert "RuntimeError" in said["stage"]
    assert "does not answer" in said["away"]
    assert "http://127.0.0.1:9/api" in said["away"]
    assert said["ui"] == f"error: MLFLOW_TRACKING_URI is http://127.0.0.1:{server.server_port}: its pages are there\n"
    assert "MLFLOW_DEFAULT_ARTIFACT_ROOT=s3://***@bucket/runs holds a secret" in said["root"]
    assert list((project.root / "logs/tracking").glob("*.jsonl"))


@pytest.mark.parametrize("secret", [PASSWORD, "short1", "p@ss:w/rd", "100%sure", 'it\'s "me"\\', "ünïcödé-paß", BASIC])
def test_every_spelling_is_found(secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql+psycopg2://{USER}:{quote(secret, safe='')}@host/db")
    redaction.start()
    for form in spellings(secret):
        assert redaction.redact(f"a '{form}' b") == "a '***' b", form
    assert redaction.redact(f'password authentication failed for user "{USER}"').endswith('"***"')
    assert redaction.redact(f"https://{USER}:{secret}@host:80/path") == "https://***@host:80/path"
    encoded = quote(f"https://{USER}:{secret}@host", safe="")
    assert redaction.redact(encoded) == "https%3A%2F%2F***%3A***%40host"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("at http://a:b@host:80/x/y?z=1#f.", "at http://***@host:80/x/y?z=1#f."),
        ("http://a:p@ss@host", "http://***@host"),
        ("s3:/key:word@bucket/x", "s3:/***@bucket/x"),
        ("GET /x?a=1&token=abc&b=2", "GET /x?a=1&token=***&b=2"),
        ("git@github.com:x/y, distill@xod-0 and /a/b@c", "git@github.com:x/y, distill@xod-0 and /a/b@c"),
        ("127.0.0.1:5000/#/runs/0a", "127.0.0.1:5000/#/runs/0a"),
    ],
)
def test_what_stands_before_the_at_sign_of_any_address_goes(text: str, clean: str) -> None:
    assert redaction.redact(text) == clean


def test_common_words_and_paths_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://mlflow:mlflow@host/mlflow")
    monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", "postgresql://lara:1234@host/prefect")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "maybe")
    redaction.start()
    text = "mlflow: run 20261130-020433-123456-1234 in /home/lara/mlflow.db, maybe of lara-1"
    assert redaction.redact(text) == text
    assert redaction.redact("lara, 1234") == "***, ***"


@pytest.mark.parametrize(
    ("address", "link"),
    [
        (f"https://{ENCODED}@host:5000/mlflow/", "https://host:5000/mlflow/#/runs/7"),
        ("http://host/x?token=abc", "http://host/x/#/runs/7"),
        ("http://u:[@host", "http://host/#/runs/7"),
        (f"postgresql://{ENCODED}@host/db", "run 7 (make ui)"),
    ],
)
def test_links_lead_there_without_a_password(address: str, link: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert run_link("7") == link


def test_a_user_who_is_called_like_the_host_breaks_no_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "mlops")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "long-password")
    redaction.start()
    assert redaction.public("https://mlops:pw@mlops.example.com/runs") == "https://mlops.example.com/runs"
    assert redaction.public("http://mlops.example.com/long-password/x") == "http://mlops.example.com/***/x"
    assert redaction.public("postgresql://mlops:a/b@c@host/db") == "postgresql://host/db"


def test_what_looks_like_a_secret_and_is_none_stays() -> None:
    text = "model?num_tokens=512&tokenizer=bert docker://image@sha256:0123"
    assert redaction.redact(text) == text
    assert redaction.redact("model?token=512") == "model?token=***"


def test_a_library_may_wrap_the_factory_of_log_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray does, between two commands of this project in one process."""
    redaction.start()
    made = logging.getLogRecordFactory()
    monkeypatch.setattr(logging, "_logRecordFactory", lambda *values, **named: made(*values, **named))
    redaction.start()
    logging.getLogger("somebody").warning("still there")


def test_a_place_of_artifacts_with_a_password_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """MLflow would write it into its tables."""
    monkeypatch.setenv("MLFLOW_DEFAULT_ARTIFACT_ROOT", "s3://key:word@bucket/runs")
    with pytest.raises(PipelineError, match=re.escape("s3://***@bucket/runs holds a secret")):
        artifact_root("sqlite:///x.db", tmp_path)
    monkeypatch.setenv("MLFLOW_DEFAULT_ARTIFACT_ROOT", "s3://bucket/runs@2")
    assert artifact_root("sqlite:///x.db", tmp_path) == "s3://bucket/runs@2"


def test_servers_of_others_print_no_secret(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Not even in the last words of one that cannot start."""
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", f"foo://{ENCODED}@host/db")
    redaction.start()
    code = "import os, sys; sys.exit('unsupported URI ' + os.environ['MLFLOW_BACKEND_STORE_URI'])"
    assert together([[sys.executable, "-c", code]], lambda: True) == 1
    assert capfd.readouterr() == ("unsupported URI foo://***@host/db\n", "")


def test_a_job_of_slurm_gets_secrets_by_environment_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{ENCODED}@host")
    job = Job("distill", "x-0", "distill@x-0", tmp_path, "0" * 64, lambda: 0, 1, 2, 3, 4.0, True)
    assert not leaks(slurm.script(job) + " ".join(slurm.options(job, gpus=True)))
    assert job.far_environment("slurm", gpus_given=True)["MLFLOW_TRACKING_URI"] == f"http://{ENCODED}@host"


def test_errors_for_prefect_and_records_of_any_logger_are_clean(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "key-of-somebody")
    redaction.start()
    with pytest.raises(PipelineError, match=re.escape("KeyError: '***'")) as caught, redaction.clean_errors():
        raise KeyError(os.environ["SOME_API_KEY"])
    assert caught.value.__cause__ is None
    try:
        raise ValueError("key-of-somebody")
    except ValueError:
        logging.getLogger("of.another.library").exception("it was %s", "key-of-somebody")
    assert "it was ***" in caplog.text
    assert "ValueError: ***" in caplog.text
    assert "key-of-somebody" not in caplog.text
