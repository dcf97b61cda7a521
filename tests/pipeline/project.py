"""A tiny project in a folder of its own, with real DVC, Prefect and MLflow around trivial stages."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import psutil
from ruamel.yaml import YAML

from base.environment import die_with_parent
from tests.params_files import read_params
from tests.pipeline import warm

ROOT = Path(__file__).resolve().parents[2]
REMOVED = object()
KEPT = {
    "teachers": ["lidar", "start"],
    "segmenters": [],
    "stores": ["lidar"],
    "students": ["camera"],
    "terms": [],
    "variants": ["baseline", "xod", "xfd"],
}
"""What the parameters of tiny projects have of sections that are long."""


@cache
def params_json() -> str:
    """The repository's parameters as JSON, which has no anchors."""
    whole = read_params(ROOT)
    for section in ("teachers", "students"):
        for entry in whole[section].values():
            del entry["model"]["grid"]  # it is that of the section `grid`
    return json.dumps(whole)


def params_values(**changes: Any) -> dict[str, Any]:
    """The repository's parameters with values set by dotted key (`__` for the dots), or REMOVED."""
    raw: dict[str, Any] = json.loads(params_json())
    raw |= {
        "profile": "demo",
        "seed": 0,
        "study": {
            "teachers": ["lidar", "start"],
            "fusions": {},
            "large": {},
            "segmenters": [],
            "stores": ["lidar"],
            "variants": ["baseline", "xod"],
            "baselines": [],
            "featured": [],
            "seeds": [0],
        },
    }
    raw["data"] |= {"worlds": ["city"], "dataroot": "outputs/city"}
    raw["input"]["image"]["flip"] = 0.5
    for key, value in changes.items():
        *path, last = key.split("__")
        section = raw
        for part in path:
            section = section[part]
        if value is REMOVED:
            del section[last]
        else:
            section[last] = value
    return raw


def params_text(**changes: Any) -> str:
    """The same as the text of one file, a line for each value; writing it takes a good part of a second."""
    stream = io.StringIO()
    YAML(typ="safe").dump(params_values(**changes), stream)
    return stream.getvalue()


DVC_YAML = """
stages:
  prepare:
    cmd: exec python -m pipeline stage prepare
    deps: [stages/prepare.py]
    params: [input.sweeps]
    outs: [outputs/index]
    meta: {gpus: 0, timeout_h: 1}
  distill:
    matrix: {variant: "${study.variants}", seed: "${study.seeds}"}
    cmd: exec python -m pipeline stage distill --key ${key}
    deps: [stages/distill.py, outputs/index]
    params: ["variants.${item.variant}"]
    outs: ["outputs/students/${key}"]
    meta: {gpus: 1, timeout_h: 1, distributed: true}
"""
PREPARE = """
def run(context):
    made = context.scratch / "index"
    made.write_text("index")
    context.publish(made, "outputs/index")
"""
DISTILL = """
def run(context):
    context.tracker.log_metrics({"train/loss": 1.0}, step=1)
    made = context.scratch / "student"
    made.mkdir(exist_ok=True)
    (made / "weights").write_text(context.key)
    context.publish(made, f"outputs/students/{context.key}")
"""


class Project:
    """A project folder, and the environment that its commands run in."""

    def __init__(self, root: Path, **environment: str) -> None:
        self.root = root
        quiet = {
            k: v for k, v in os.environ.items() if not k.startswith(("PREFECT", "MLFLOW", "PIPELINE", "DVC", "OMP"))
        }
        self.env = quiet | {
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "DVC_SITE_CACHE_DIR": str(root / ".site-cache"),
            "CUDA_VISIBLE_DEVICES": "",
            "SHELL": "/bin/sh",  # what DVC starts a cmd with; bash would step aside for the stage by itself, dash stays
            "PIPELINE_TRACK_LATER": "1",
            **environment,
        }
        (root / "stages").mkdir(parents=True)
        (root / ".dvc").mkdir()
        shutil.copy(ROOT / ".dvc" / "config", root / ".dvc" / "config")
        subprocess.run(["git", "init", "-q", str(root)], check=True)
        self.set()
        self.write("dvc.yaml", DVC_YAML)
        self.write("stages/__init__.py", "")
        shutil.copy(ROOT / "stages/context.py", root / "stages")  # this project has stages of its own
        self.write("stages/prepare.py", PREPARE)
        self.write("stages/distill.py", DISTILL)

    def write(self, path: str, text: str) -> None:
        (self.root / path).write_text(text)

    def edit(self, path: str, old: str, new: str) -> None:
        text = (self.root / path).read_text()
        assert old in text, f"{old!r} is not in {path}"
        self.write(path, text.replace(old, new))

    def set(self, **changes: Any) -> None:
        """Write params.yaml with changes to the repository's, and few of its models: every process reads it anew."""
        whole = json.loads(params_json())
        few = {section: {name: whole[section][name] for name in names} for section, names in KEPT.items()}
        self.write("params.yaml", params_text(**few | changes))

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        """Start `python -m COMMAND`, stdout and stderr together."""
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=self.root,
            env=self.env | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,  # nothing outlives the tests
        )

    def run(self, *command: str, code: int | None = 0, **environment: str) -> str:
        """Run `python -m COMMAND` to its end and return what it printed; `code` is what it must end with."""
        if command[0] in warm.MODULES:
            ended, output = warm.run(command, self.root, self.env | environment, 120)
        else:
            child = self.start(*command, **environment)
            output, _ = child.communicate(timeout=120)
            ended = child.returncode
        assert code is None or ended == code, output
        return output

    def repro(self, *arguments: str, code: int = 0, **environment: str) -> list[str]:
        """`dvc repro`; returns the names of the stages that ran."""
        output = self.run("dvc", "repro", *arguments, code=code, **environment)
        return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]

    def lines(self, path: str) -> list[str]:
        """Lines of a file; none when it is not there."""
        file = self.root / path
        return file.read_text().splitlines() if file.exists() else []

    def processes(self) -> list[psutil.Process]:
        """Living processes that were started for this project."""
        mine = []
        for process in psutil.process_iter(["cwd", "status", "environ"]):
            inside = str(self.root) in (process.info["cwd"] or "")
            known = (process.info["environ"] or {}).get("DVC_SITE_CACHE_DIR") == self.env["DVC_SITE_CACHE_DIR"]
            if (inside or known) and process.info["status"] != psutil.STATUS_ZOMBIE:
                mine.append(process)
        return mine

    def stop_all(self) -> None:
        """Kill what a failed test left."""
        for process in self.processes():
            process.send_signal(signal.SIGKILL)


def free_port() -> int:
    """A port on 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Wait for a condition and return its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return value
