"""`python -m pipeline cache`: figures, damage and its repair, what may go, and pictures, in a project with real DVC."""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from base.environment import ROOMS, die_with_parent
from base.errors import PipelineError
from config.nested import merge
from config.sections import StoreParams
from data.drawing.pictures import Boxes, draw_map, feature_colours
from data.preparing.build import build_index
from data.store import Encoding, Store, TapSpec
from data.store.writer import readable
from models.detectors.build import build_detector
from pipeline.commands.cache import plan
from pipeline.commands.cache.plan import TRAINVAL, StoreCost, describe, tap_costs
from pipeline.commands.cache.table import duration, table
from stages.inputs.weights import save_detector
from tests.params_files import copy_params, read_params, write_params

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = 4
STORES = {
    "lidar": {
        "teacher": "lidar",
        "score_threshold": 0.0,
        "taps": {
            "boxes": {"serve": "cached-exact"},
            "bev_lift": {"serve": "cached-warp", "cells": "occupied", "compression": "lz4"},
            "head": {"serve": "online"},
        },
    },
    "small": {
        "teacher": "lidar",
        "score_threshold": 0.1,
        "taps": {"bev_neck": {"serve": "cached-warp", "dtype": "int8", "channels": 16, "cells": "foreground"}},
    },
    "online": {"teacher": "lidar", "score_threshold": 0.1, "taps": {"head": {"serve": "online"}}},
}

QUIET = {"CUDA_VISIBLE_DEVICES": "", "PIPELINE_TRACK_LATER": "1", "DVC_NO_ANALYTICS": "1"}
DEFAULTS: dict[str, dict[str, Any]] = {
    "plan": {"names": [], "as_json": False},
    "verify": {"names": [], "repair": False},
    "ls": {"as_json": False},
    "gc": {"yes": False, "stale": False},
    "look": {"sample": None, "out": None},
}


@dataclass
class Project:
    """A copy of this repository's code with a tiny city, its index, and a teacher that was never trained."""

    root: Path
    capture: Any = None

    def run(self, *command: str, code: int = 0) -> str:
        """Run `python -m COMMAND` to its end and return what it printed; `code` is what it must end with."""
        quiet = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "PIPELINE", "DVC"))}
        environment = quiet | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "DVC_SITE_CACHE_DIR": str(self.root / ".site-cache"),
            **QUIET,
        }
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=self.root,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
            check=False,
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    def cache(self, command: str, *, code: int = 0, **options: Any) -> str:
        """Run a command here, without starting Python anew; returns what it and its children printed."""
        settings = DEFAULTS[command] | options
        last = ""
        try:
            found = importlib.import_module(f"pipeline.commands.cache.{command}").run(self.root, **settings)
        except PipelineError as error:
            found, last = 1, f"error: {error}"
        printed = self.capture.readouterr()
        text = printed.out + printed.err + last
        assert found == code, text
        return text

    @property
    def params(self) -> dict[str, Any]:
        """What the parameters say."""
        return json.loads(json.dumps(read_params(self.root)))

    def write(self, params: dict[str, Any]) -> None:
        write_params(self.root, params)

    def set(self, **changes: Any) -> None:
        """Lay changes over the parameters."""
        self.write(merge(self.params, changes))

    @property
    def store(self) -> Path:
        return self.root / "outputs/stores/lidar"


@pytest.fixture(scope="module")
def built(city: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose store `lidar` was built by DVC; tests work on copies."""
    root = tmp_path_factory.mktemp("built") / "project"
    for room in ROOMS:
        shutil.copytree(ROOT / room, root / room, ignore=shutil.ignore_patterns("__pycache__"))
    copy_params(root)
    for file in ("dvc.yaml", ".dvc/config", ".dvcignore"):
        (root / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, root / file)
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    shutil.copytree(city, root / "outputs/city")
    project = Project(root)
    plain = {"student": "camera", "terms": {}}
    study = {"teachers": ["lidar", "start"], "fusions": {}, "large": {}, "segmenters": [], "stores": ["lidar"]}
    project.write(
        project.params
        | {"stores": STORES, "variants": {"plain": plain}}
        | {
            "study": project.params["study"]
            | study
            | {"variants": ["plain"], "featured": [], "baselines": [], "seeds": [0]}
        }
    )
    project.set(
        data={"splits": {"train": "val", "val": "val"}},  # of the tiny city, the split with more keyframes
        input={"sweeps": 1, "image": {"size": [64, 192]}},
        city={"sweeps": 1},
        store={"shard_samples": 1, "calibration_samples": 2, "gap_samples": 0},
    )
    build_index(root / "outputs/city", "v1.0-trainval", ("train", "val"), root / "outputs/index")
    torch.manual_seed(0)
    model = project.params["teachers"]["lidar"]["model"]
    save_detector(root / "outputs/teachers/lidar", model, build_detector(model).state_dict())
    project.run("dvc", "repro", "--single-item", "extract@lidar")
    return root


@pytest.fixture
def project(built: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A copy that a test may spoil; with the hard links between the store, DVC's cache and what the stage keeps."""
    root = tmp_path / "project"
    subprocess.run(["cp", "-a", str(built), str(root)], check=True)
    monkeypatch.chdir(root)
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(root / ".site-cache"))
    return Project(root, capfd)


def test_figures_are_short_and_decimal() -> None:
    counts = [0, 999, 1000, 8_388_608, 999_600_000, 236e9, 1.5e12]
    assert [readable(count) for count in counts] == ["0 B", "999 B", "1 kB", "8.39 MB", "1 GB", "236 GB", "1.5 TB"]
    assert [duration(seconds) for seconds in (0.1, 40, 720, 12_600)] == ["1 s", "40 s", "12 min", "3.5 h"]


def test_columns_are_aligned() -> None:
    assert table(["a", "bytes"], [["long", "1"], ["b", "200"]], right={"bytes"}) == (
        "a     bytes\nlong      1\nb       200"
    )


def test_features_of_one_kind_have_one_colour() -> None:
    features = np.zeros((4, 4, 5), np.float32)
    features[0, 0] = features[0, 1] = [1, 2, 0, 0, 0]
    features[3, 3] = [0, 0, 3, 0, 1]
    present = np.ones((4, 4), bool)
    present[2] = False
    colours = feature_colours(features, present)
    assert (colours[0, 0] == colours[0, 1]).all()
    assert (colours[0, 0] != colours[3, 3]).any()
    assert (colours[1] == colours[1, 0]).all()  # all zero
    assert (colours[2] == colours[2, 0]).all()  # not there
    assert len({tuple(colour) for colour in colours.reshape(-1, 3).tolist()}) == 4
    assert (colours == feature_colours(features, present)).all()
    assert feature_colours(np.zeros((2, 2, 1), np.float32)).shape == (2, 2, 3)


def test_the_figures_of_the_methods_page(built: Path) -> None:
    settings = StoreParams.model_validate(
        {"teacher": "lidar", "score_threshold": 0.1, "taps": {"bev_neck": {"serve": "cached-warp"}}}
    )
    spec = TapSpec.dense((256, 128, 128), Encoding("float16"), 51.2)
    taps = tap_costs(settings, {"bev_neck": spec}, {"bev_neck": float(spec.bytes(0))}, 1)
    text = describe([StoreCost("full", "lidar", True, 1, 10.0, 0.1, TRAINVAL / 10, 10, taps)], 10**12, True)
    assert "per sample" in text
    assert "8.39 MB" in text
    assert "236 GB" in text
    assert "~" not in text


def test_plan_expects_what_a_build_writes(project: Project) -> None:
    told = json.loads(project.cache("plan", names=["lidar", "small", "online"], as_json=True))
    assert (told["trainval_samples"], told["fits"]) == (28_130, True)
    lidar, small, online = told["stores"]
    card = json.loads((project.root / "reports/stores/lidar.json").read_text())
    taps = {tap["tap"]: tap for tap in lidar["taps"]}
    for tap, measured in card["taps"].items():  # with so few samples all are measured
        assert taps[tap]["bytes_per_sample"] == pytest.approx(
            measured["bytes_per_sample"], rel=1e-5
        )  # all are measured
        assert measured["bytes"] <= taps[tap]["bytes"] <= taps[tap]["at_most"]
        assert taps[tap]["trainval_at_most"] * SAMPLES == taps[tap]["at_most"] * 28_130
    assert taps["head"]["bytes"] is None
    assert lidar["to_write"] == 0
    assert 0 < small["to_write"] <= told["free"]
    assert online["samples_per_second"] is None
    assert lidar["samples_per_second"] > 0
    assert small["taps"][0]["encoding"] == "int8, 16 channels, foreground cells"


def test_plan_says_what_is_guessed_before_training(project: Project) -> None:
    shutil.rmtree(project.root / "outputs/teachers/lidar")
    text = project.cache("plan", names=["lidar", "online"])
    assert "teacher lidar is not trained yet" in text
    assert "~" in text.splitlines()[1]
    assert "online, nothing stored" in text
    assert "samples/s here" in text


def test_plan_fails_when_it_cannot_fit(built: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("pipeline.commands.cache.plan._free", lambda root: 1000)
    assert plan.run(built, names=["small"], as_json=False) == 1
    assert "does not fit" in capsys.readouterr().out
    assert plan.run(built, names=["lidar"], as_json=False) == 0
    assert "nothing is to be built" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("plan", {"names": ["lidr"]}, "store 'lidr' is unknown; did you mean 'lidar'?; there are: lidar"),
        ("verify", {"names": ["none"]}, "store 'none' is unknown"),
        ("look", {"name": "lidar", "sample": "zz"}, "no token begins so"),
        ("look", {"name": "lidar", "out": Path("a.jpg")}, "must end in .png"),
        ("look", {"name": "small"}, "does not exist"),
        ("look", {"name": "lidar"}, "dvc repro prepare"),
        ("plan", {}, "dvc repro prepare"),
    ],
)
def test_errors_say_what_to_do(project: Project, command: str, options: dict[str, Any], message: str) -> None:
    if "prepare" in message:
        shutil.rmtree(project.root / "outputs/index")
    assert message in project.cache(command, code=1, **options)


def test_the_commands_of_the_command_line(project: Project) -> None:
    assert "current" in project.run("pipeline", "cache", "ls")
    assert "whole, 4 samples" in project.run("pipeline", "cache", "verify", "lidar")
    assert "nothing was removed" in project.run("pipeline", "cache", "gc", "--yes", "--stale")
    text = project.run("pipeline", "cache", "look", "lidr", code=1)
    assert text.startswith("error: store 'lidr'")
    assert text.count("\n") == 1


def flip(path: Path, offset: int = 100) -> None:
    """Flip a bit, and let the file look untouched: same inode, size and time."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(data)
    path.chmod(before.st_mode)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def spoil(project: Project, name: str) -> None:
    """Damage a file of the store, and of what the stage keeps where that is a copy and not a link."""
    flip(project.store / name)
    for kept in (project.root / ".scratch/extract-lidar").glob(f"*/kept/{name}"):
        if not kept.samefile(project.store / name):
            flip(kept)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("link", ["hardlink", "symlink", "copy"])
def test_repair_is_not_fooled_by_dvcs_cache(project: Project, link: str) -> None:
    """DVC trusts a file of its cache that is read-only, and a link shares the damage with it.

    What is damaged is built again, and nothing else.
    """
    whole = contents(project.store)
    assert "lidar: whole, 4 samples" in project.cache("verify")
    project.run("dvc", "config", "cache.type", link)
    project.run("dvc", "checkout", "--relink", "--force", "extract@lidar")
    if link == "copy":  # made with hard links, what is kept shares its bytes with the cache; with copies it never did
        for kept in (project.root / ".scratch/extract-lidar").glob("*/kept/*"):
            content = kept.read_bytes()
            kept.unlink()
            kept.write_bytes(content)
    spoil(project, "shard-00001.bin")
    spoil(project, "manifest.json")
    text = project.cache("verify", code=1)
    assert text.count("\n") == 2
    assert "shard-00001.bin" in text
    assert "manifest.json" in text
    text = project.cache("verify", names=["lidar"], repair=True)
    assert ("writes 1 of 4 shards" in text) == (link != "copy")
    assert "lidar: whole, 4 samples" in text
    assert contents(project.store) == whole
    assert project.run("dvc", "status", "extract@lidar").strip().endswith("up to date.")
    assert not list((project.root / ".scratch/extract-lidar").glob("damaged"))


def test_repair_names_what_it_cannot_do(project: Project) -> None:
    (project.store / "shard-00000.bin").unlink()
    (project.store / "calibration.safetensors").chmod(0o644)
    (project.store / "calibration.safetensors").write_bytes(b"")
    lines = project.cache("verify", code=1).splitlines()
    assert "calibration outputs/stores/lidar/calibration.safetensors is damaged" in lines[0]
    assert "shard outputs/stores/lidar/shard-00000.bin is missing" in lines[1]
    assert len(lines) == 2
    with (project.root / ".scratch/extract-lidar/lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "extract@lidar is running" in project.cache("verify", repair=True, code=1)
    project.set(study={"stores": []})
    text = project.cache("verify", repair=True, code=1)
    assert "study.stores [] does not name it" in text


def test_ls_says_what_each_store_is_worth(project: Project) -> None:
    rows = {row["store"]: row for row in json.loads(project.cache("ls", as_json=True))}
    assert {name: row["state"].partition(":")[0] for name, row in rows.items()} == {
        "lidar": "current",
        "small": "not built",
        "online": "online, nothing stored",
    }
    assert rows["lidar"]["samples"] == SAMPLES
    assert rows["lidar"]["bytes"] == sum(path.stat().st_size for path in project.store.iterdir())
    assert rows["lidar"]["taps"] == "bev_lift: float16, all channels, occupied cells, lz4; boxes; head: online"
    shutil.copytree(project.store, project.root / "outputs/stores/old")
    [build] = [path.parent for path in (project.root / ".scratch/extract-lidar").glob("*/kept")]
    shutil.copytree(build / "kept", build.with_name("0123456789abcdef") / "store")
    (build.with_name("0123456789abcdef") / "store/manifest.json").unlink()
    project.set(stores={"lidar": {"taps": {"bev_lift": {"dtype": "int8"}}}})
    text = project.cache("ls")
    assert "stale: encoding" in text
    assert "unnamed: the parameters have no such store" in text
    assert "unfinished: of other parameters (cache gc)" in text
    flip(project.store / "manifest.json")
    (project.root / "outputs/stores/old/manifest.json").unlink()
    rows = {row["path"]: row for row in json.loads(project.cache("ls", as_json=True))}
    assert rows["outputs/stores/lidar"]["state"].startswith("damaged: ")


def test_gc_removes_what_is_not_needed_and_nothing_else(project: Project, tmp_path: Path) -> None:
    stores, scratch = project.root / "outputs/stores", project.root / ".scratch"
    needed = {path for path in project.root.rglob("*") if "__pycache__" not in path.parts}
    assert "nothing was removed" in project.cache("gc", yes=True)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(project.store, elsewhere)
    shutil.copytree(project.store, stores / "old")
    (stores / "link").symlink_to(elsewhere)
    (stores / "old/link").symlink_to(elsewhere)
    (scratch / "extract-link").symlink_to(elsewhere)
    (scratch / "extract-lidar/0123456789abcdef/store").mkdir(parents=True)
    (scratch / "extract-lidar/0123456789abcdef/store/shard-00000.bin.tmp-1").write_bytes(bytes(1000))
    (scratch / "distill-xod-0").mkdir()
    (scratch / "distill-xod-0/lock").touch()
    text = project.cache("gc")
    assert (stores / "old").exists()
    assert "1 kB" in text
    assert "can go: python -m pipeline cache gc --yes" in text
    with (scratch / "distill-xod-0/lock").open() as lock, (scratch / "extract-lidar/lock").open() as builder:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fcntl.flock(builder, fcntl.LOCK_EX)
        text = project.cache("gc", yes=True)
        assert "skipped: distill@xod-0 is running" in text
        assert "skipped: extract@lidar is running" in text
        assert (stores / "old").exists()
    text = project.cache("gc", yes=True)
    assert "removed" in text.splitlines()[-1]
    assert not (stores / "old").exists()
    assert not (scratch / "extract-lidar/0123456789abcdef").exists()
    assert contents(elsewhere) == contents(project.store)
    assert (stores / "link").is_symlink()
    assert needed <= {path for path in project.root.rglob("*") if "__pycache__" not in path.parts}


def test_a_stale_store_goes_only_when_it_is_asked_for(project: Project) -> None:
    project.set(stores={"lidar": {"score_threshold": 0.5}})
    assert "kept without --stale" in project.cache("gc", yes=True)
    assert project.store.exists()
    (project.root / "outputs/index").rename(project.root / "outputs/elsewhere")
    assert "outputs/stores/lidar" not in project.cache("gc", yes=True, stale=True)  # nobody can tell what is current
    assert project.store.exists()
    (project.root / "outputs/elsewhere").rename(project.root / "outputs/index")
    text = project.cache("gc", yes=True, stale=True)
    assert "stale: preprocessing" in text
    assert not project.store.exists()


def test_look_draws_the_same_picture_twice(project: Project) -> None:
    path = project.root / project.cache("look", name="lidar").strip()
    token = Store.open(project.store).tokens[0]
    assert path.name == f"look-lidar-{token[:8]}.png"
    assert Image.open(path).size[0] == 1448
    project.cache("look", name="lidar", sample=token[:12], out=project.root / "again.png")
    assert (project.root / "again.png").read_bytes() == path.read_bytes()


def test_features_are_drawn_where_they_are() -> None:
    """Forward is up and x to the right, as in the panel of the points."""
    colours = np.zeros((4, 4, 3), np.uint8)
    colours[3, 0] = 255  # y of 25.6 to 51.2 m, x of -51.2 to -25.6 m
    nothing = Boxes(np.empty((0, 9)), np.empty(0, np.int64))
    panel = draw_map(colours, 51.2, nothing, "", nothing, side=400)[-400:]
    assert (panel[10:90, 10:90] == 255).all()
    assert (panel[110:, :190] == 0).all()
