"""Extraction: what is stored is what the teacher says, in equal bytes however it came to be; what the card tells."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from base.environment import die_with_parent
from base.errors import PipelineError
from base.stopping import Preempted
from config.files import load_params
from config.graph import StageSpec
from config.nested import merge
from config.params import Params
from config.sections import StoreParams
from data.reading.augment import bev_matrix
from data.store import Store
from distill.recipe import Recipe
from distill.terms import TermConfig
from models.detectors.build import build_detector
from models.layers.warp import warp_bev
from models.ports import Prediction
from results.tracking.runs import NullTracker
from stages import extract
from stages.context import StageContext, StageError, Stop
from stages.inputs.weights import load_detector, save_detector
from stages.teaching.frozen import FrozenTeacher, evenly, grown
from stages.teaching.identity import CODE, store_identity
from stages.teaching.sources import OnlineTeacher, Sources
from stages.teaching.taught import TaughtDataset, collate_taught
from tests.models.factory import GRID, camera_config, lidar_config
from tests.params_files import read_params, write_params
from tests.stages.untrained import TEACHER, make_root
from tests.test_stage_dependencies import closure

ROOT = Path(__file__).resolve().parents[2]
SAMPLES, SHARD = 10, 3
PLAIN = {"boxes": {"serve": "cached-exact"}, "bev_lift": {"serve": "cached-warp"}}
CODED = {"serve": "cached-warp", "dtype": "int8", "channels": 6, "cells": "occupied", "compression": "zstd"}
HEAD = {"serve": "cached-warp", "dtype": "float16", "compression": "zstd"}
HALO = 6.4
# As many voxels as there are: where their limit is met, a larger grid keeps others.


def values(taps: dict[str, Any] = PLAIN, **changes: Any) -> dict[str, Any]:
    """The project's parameters on the small grid, without variants."""
    raw = read_params(ROOT)
    raw["stores"] = {"lidar": {"teacher": "lidar", "score_threshold": 0.1, "taps": taps}}
    raw["variants"] = {}
    raw["study"] |= {"stores": ["lidar"], "variants": [], "featured": [], "baselines": []}
    overlay = {
        "data": {"version": "v1.0-trainval", "splits": {"train": "train", "val": "val"}},
        "input": {"sweeps": 1},
        "grid": GRID,
        "store": {"shard_samples": SHARD, "calibration_samples": 4, "gap_samples": 2},
    }
    return merge(merge(raw, overlay), changes)


def parse(taps: dict[str, Any] = PLAIN, **changes: Any) -> Params:
    return Params.model_validate(values(taps, **changes))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with the code, a dataroot, an index and an untrained teacher; to be copied."""
    root = make_root(tmp_path_factory.mktemp("made"), train_keyframes=5)
    shutil.copytree(ROOT / ".dvc", root / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp"))
    for name in ("dvc.yaml", ".gitignore", ".dvcignore"):
        shutil.copy(ROOT / name, root / name)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "project"))


def context_of(root: Path, params: Params, fingerprint: str = "f") -> StageContext:
    outs = ("outputs/stores/lidar", "reports/stores/lidar.json")
    scratch = root / ".scratch/extract-lidar" / fingerprint
    scratch.mkdir(parents=True, exist_ok=True)
    spec = StageSpec("extract", "lidar", "", {}, {}, outs)
    return StageContext("extract", "lidar", params, spec, root, scratch, NullTracker(), Stop(), 0)


def run(root: Path, params: Params, fingerprint: str = "f") -> tuple[Store, dict[str, Any]]:
    extract.run(context_of(root, params, fingerprint))
    return Store.open(root / "outputs/stores/lidar"), json.loads((root / "reports/stores/lidar.json").read_text())


def teacher_of(root: Path, params: Params) -> FrozenTeacher:
    folder = root / "outputs/teachers/lidar"
    return FrozenTeacher(root, params, params.stores["lidar"], folder, torch.device("cpu"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_store_holds_what_the_teacher_says(root: Path) -> None:
    params = parse()
    store, card = run(root, params)
    assert len(store) == SAMPLES
    teacher = teacher_of(root, params)
    for token, expected in teacher.stream([range(i, min(i + SHARD, SAMPLES)) for i in range(0, SAMPLES, SHARD)]):
        got = store.read(token)
        assert np.array_equal(got["bev_lift"], np.moveaxis(expected["bev_lift"], 0, -1).astype(np.float16))
        assert np.array_equal(got["boxes"], expected["boxes"])
    assert {"store", "teacher", "samples", "split", "taps"} == card.keys()
    entry = card["taps"]["bev_lift"]
    assert entry["encoding"] == "float16, all channels, all cells"
    assert entry["bytes"] == SAMPLES * entry["bytes_per_sample"] == SAMPLES * entry["float16_bytes_per_sample"]
    assert entry["error"]["mean"] == entry["error"]["float16"]["mean"] < 1e-3
    assert entry["gap"]["identity"] == pytest.approx(entry["error"]["mean"], rel=0.2)
    assert {"flip x", "rotate 22.5", "scale 0.95"} < entry["gap"].keys()
    assert card["taps"]["boxes"].keys() == {"serve", "encoding", "bytes", "bytes_per_sample"}


def test_what_an_encoding_loses_is_in_the_card(root: Path) -> None:
    _, card = run(root, parse(PLAIN | {"bev_lift": CODED}))
    entry = card["taps"]["bev_lift"]
    assert entry["encoding"] == "int8, 6 channels, occupied cells, zstd"
    assert entry["error"]["float16"]["mean"] < entry["error"]["mean"] < 0.5
    assert entry["error"]["max_of_std"] > entry["error"]["float16"]["max_of_std"] > 0
    assert entry["gap"]["identity"] == pytest.approx(entry["error"]["mean"], rel=0.3)  # of other samples


def test_gaps_are_those_of_the_teacher_and_not_of_the_way_they_are_measured(root: Path) -> None:
    """A teacher that does not look at x and y says the same of a mirrored scene; one that does says another thing."""
    params = parse({"bev_lift": {"serve": "cached-warp", "dtype": "float32"}})
    _, card = run(root, params)
    plain = card["taps"]["bev_lift"]["gap"]
    folder = root / "outputs/teachers/lidar"
    blind = load_detector(folder)
    blind.encoder.linear.weight.data[:, [0, 1, 5, 6, 8, 9]] = 0
    save_detector(folder, TEACHER, blind.state_dict())
    _, card = run(root, params)
    gap = card["taps"]["bev_lift"]["gap"]
    assert gap["identity"] < 1e-6
    assert max(gap["flip x"], gap["flip y"]) < 0.02 < min(plain["flip x"], plain["flip y"])
    assert gap["rotate 10"] > 0.02  # cells hold other points


def test_gaps_can_be_left_out_and_do_not_make_another_store(root: Path) -> None:
    run(root, parse())
    before = contents(root / "outputs/stores/lidar")
    store, card = run(root, parse(store={"gap_samples": 0}), "g")
    assert "gap" not in card["taps"]["bev_lift"]
    assert contents(store.folder) == before


def head_both_ways(root: Path, store: Store, params: Params, **kinds: Any) -> tuple[Any, dict[str, Any], FrozenTeacher]:
    """Two samples with an augmentation matrix, their head maps out of the store and of the teacher in the step."""
    teacher = teacher_of(root, params)
    samples = TaughtDataset(teacher.views[0].dataset, {"lidar": store}, ["lidar.head"])
    batch = collate_taught([samples[0], samples[7]])
    batch.bev_aug[:] = torch.from_numpy(bev_matrix(**kinds))
    live = OnlineTeacher(teacher.plain, ["head", "boxes"], 0.1, torch.device("cpu"))
    return batch, Sources({"lidar": store}, {"live": live}, params.grid.range, teacher.plain.targets)(batch), teacher


def test_a_stored_head_is_the_online_one_without_augmentation(root: Path) -> None:
    params = parse({"head": HEAD})
    store, card = run(root, params)
    assert card["taps"]["head"]["gap"]["identity"] < 1e-3
    assert min(card["taps"]["head"]["gap"][name] for name in ("flip x", "rotate 10")) > 0.01
    batch, outputs, teacher = head_both_ways(root, store, params)
    assert outputs["lidar.head.valid"].all()
    torch.testing.assert_close(outputs["lidar.head"], outputs["live.head"], rtol=1e-3, atol=1e-4)
    shared = {"student": "head", "weight": 1.0}
    kinds = {"cls": shared | {"distance": "qfl"}, "box": shared | {"distance": "sl1", "mask": {"kind": "gt_centers"}}}
    configs = {
        f"{name}_{kind}": TermConfig(**term, teacher=f"{name}.head")
        for name in ("lidar", "live")
        for kind, term in kinds.items()
    }
    terms = Recipe(configs, teacher.plain.targets, {}, {"lidar.head": 70, "live.head": 70})
    with torch.no_grad():
        torch.manual_seed(0)
        head = [
            {name: maps + torch.randn_like(maps) for name, maps in task.items()} for task in teacher.plain(batch).head
        ]
        batch.boxes = [rows[:20, :9] for rows in outputs["live.boxes"]]
        batch.labels = [rows[:20, 10].long() for rows in outputs["live.boxes"]]
        # Untrained scores are all about 0.1, above which a cell counts: rounding must not decide whether it does.
        losses = terms(
            Prediction(head, {}), {name: outputs[name] + 1.0 for name in ("lidar.head", "live.head")}, batch, 0.0
        )
    assert min(len(boxes) for boxes in batch.boxes) > 0
    for kind in kinds:
        assert losses[f"lidar_{kind}"] > 0
        torch.testing.assert_close(losses[f"lidar_{kind}"], losses[f"live_{kind}"], rtol=1e-3, atol=0)


def test_a_stored_head_needs_the_students_targets(root: Path) -> None:
    params = parse({"head": HEAD})
    store, _ = run(root, params)
    samples = TaughtDataset(teacher_of(root, params).views[0].dataset, {"lidar": store}, ["lidar.head"])
    with pytest.raises(ValueError, match=r"lidar\.head is a cached head map: .* the student's targets"):
        Sources({"lidar": store}, {}, params.grid.range)(collate_taught([samples[0]]))


def test_a_head_that_cannot_be_moved_is_refused() -> None:
    wrong = HEAD | {"dtype": "int8", "channels": 6, "cells": "occupied"}
    with pytest.raises(ValueError, match=r"taps\.head: dtype 'int8'.*allowed: float32, float16") as caught:
        parse({"head": wrong})
    assert "channels 6 is not possible for head; allowed: null" in str(caught.value)
    assert "cells 'occupied' is not possible for head; allowed: all" in str(caught.value)


def test_a_halo_changes_nothing_inside_the_grid(root: Path) -> None:
    """Up to the rounding of pillar centres: bev_lift comes before any convolution."""
    plain, haloed = (
        dict(teacher_of(root, parse({"bev_lift": {"serve": "cached-warp", "halo": halo}})).stream([range(4)]))
        for halo in (0.0, HALO)
    )
    border = round(HALO / GRID["cell"])
    for token, outputs in plain.items():
        inside = haloed[token]["bev_lift"][:, border:-border, border:-border]
        np.testing.assert_allclose(inside, outputs["bev_lift"], atol=2e-5)
        assert haloed[token]["bev_lift"][:, :border].any()


def test_learned_queries_have_no_halo(tmp_path: Path) -> None:
    former = {"type": "BEVFormer", "channels": 8, "queries": 8, "layers": 1, "heads": 2, "points": 1, "pillar": [-1.0]}
    plain = {key: value for key, value in camera_config().items() if key not in ("depth_net", "depth_bins")}
    detector = build_detector(plain | former | {"feedforward": 8})
    with pytest.raises(StageError, match=r"cannot run with a halo of 3.2 m: its queries were learned for the grid"):
        grown(tmp_path, detector, 3.2)


def test_with_a_halo_turned_and_scaled_maps_are_whole(root: Path) -> None:
    params = parse({"boxes": {"serve": "cached-exact"}, "bev_lift": {"serve": "cached-warp", "halo": HALO}})
    store, _ = run(root, params)
    spec = store.taps["bev_lift"]
    assert spec.extent == GRID["range"] + HALO
    degrees, scale = 22.5, 0.95
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    assert GRID["range"] * (cos + sin) / scale < spec.extent
    matrix = torch.from_numpy(bev_matrix(degrees=degrees, scale=scale))[None]
    stored = torch.from_numpy(store.read(store.tokens[0])["bev_lift"]).float().permute(2, 0, 1)[None]
    _, valid = warp_bev(stored, matrix, spec.extent, GRID["range"])
    assert valid.all()
    inner = (spec.map_shape[0] - round(2 * GRID["range"] / GRID["cell"])) // 2
    cut = stored[..., inner:-inner, inner:-inner]
    assert not warp_bev(cut, matrix, GRID["range"])[1].all()


def test_boxes_and_maps_of_several_halos_come_from_models_of_their_own(root: Path) -> None:
    teacher = teacher_of(root, parse(PLAIN | {"bev_neck": {"serve": "cached-warp", "halo": HALO}}))
    plain = teacher_of(root, parse())
    assert [view.taps for view in teacher.views] == [["bev_lift", "boxes"], ["bev_neck"]]
    for (token, outputs), (other, expected) in zip(teacher.stream([[0, 1]]), plain.stream([[0, 1]]), strict=True):
        assert token == other
        assert np.array_equal(outputs["boxes"], expected["boxes"])
        assert outputs["bev_neck"].shape[-1] == round(2 * (GRID["range"] + HALO) / GRID["cell"])


def test_only_the_foreground_is_kept_near_objects(root: Path) -> None:
    params = parse({"bev_lift": {"serve": "cached-warp", "cells": "foreground", "halo": HALO}})
    store, _ = run(root, params)
    teacher = teacher_of(root, params)
    dataset = teacher.views[0].dataset
    assert "boxes" in dataset.modalities
    assert "boxes" not in teacher_of(root, parse()).views[0].dataset.modalities
    kept = 0
    for row in range(SAMPLES):
        sample = dataset[row]
        present = store.read(sample.token)["bev_lift.present"]
        heat = teacher.views[0].detector.targets([sample.boxes], [sample.labels]).heatmap.sum(1)[0]
        assert np.array_equal(present, (heat > 0.01).numpy())
        kept += present.sum()
    assert 0 < kept < 0.5 * SAMPLES * present.size


def test_identity_names_what_differs_and_covers_all_code_that_bytes_depend_on(root: Path) -> None:
    def of(taps: dict[str, Any] = PLAIN, **changes: Any) -> dict[str, str]:
        return vars(store_identity(root, parse(taps, **changes), "lidar"))

    first = of()
    assert first["encoding"] == "bev_lift: float16, all channels, all cells; boxes"
    assert of(store={"gap_samples": 5, "shard_samples": 9}) == first
    for changed, field in (
        (of(PLAIN | {"bev_lift": {"serve": "cached-warp", "halo": HALO}}), "preprocessing"),
        (of(store={"calibration_samples": 5}), "preprocessing"),
        (of(stores={"lidar": {"score_threshold": 0.2}}), "preprocessing"),
        (of(PLAIN | {"bev_lift": CODED}), "encoding"),
    ):
        assert [name for name in first if changed[name] != first[name]] == [field]
    online = {"bev_lift": PLAIN["bev_lift"], "boxes": {"serve": "online"}}
    assert of(online, stores={"lidar": {"score_threshold": 0.2}}) == of(online)  # no boxes are stored

    harmless = {"data/hashing.py", "stages/card.py", "stages/teaching/identity.py"}
    rooms = ("data/", "models/", "stages/")
    needed = {name for name in closure("extract") if name.startswith(rooms)} - harmless
    assert not [name for name in needed if not any(f"{name}/".startswith(f"{path}/") for path in CODE)]
    path = root / "data/store/encoding.py"
    path.write_text(path.read_text() + "\n")
    assert of()["code"] != first["code"]


def test_what_cannot_be_extracted_is_named(root: Path) -> None:
    with pytest.raises(StageError, match="all its taps are online"):
        extract.run(context_of(root, parse({"boxes": {"serve": "online"}}, study={"stores": []})))
    with pytest.raises(StageError, match=r"cannot give bev_nick: .*has bev_lift, bev_neck"):
        run(root, parse({"bev_nick": {"serve": "cached-warp"}}))
    deep = lidar_config(voxel={"size": [0.8, 0.8], "max_points": 8, "max_voxels": 1000})
    deep["neck"] |= {"upsample_strides": [2, 4]}
    save_detector(root / "outputs/teachers/lidar", deep, build_detector(deep).state_dict())
    with pytest.raises(StageError, match=r"bev_neck with a halo of 0\.8 m .*multiple"):
        run(root, parse({"bev_neck": {"serve": "cached-warp", "halo": 0.8}}))


def test_a_build_that_cannot_fit_is_refused_before_anything_is_written(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30, 1 << 30, 10_000))
    with caplog.at_level(logging.INFO), pytest.raises(PipelineError, match=r"the store needs .* and 10 kB are free"):
        run(root, parse())
    assert re.search(rf"plan: {SAMPLES} samples, .*bev_lift .*10 kB free", caplog.text)
    assert not (root / ".scratch/extract-lidar/f/store").exists()
    assert not (root / "outputs/stores").exists()


def test_a_stopped_build_goes_on_to_the_same_bytes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = parse(PLAIN | {"bev_lift": CODED})
    run(root, params)
    whole = contents(root / "outputs/stores/lidar")
    shutil.rmtree(root / ".scratch")
    shutil.rmtree(root / "outputs/stores")
    asked = iter([False] * 4 + [True])
    monkeypatch.setattr(Stop, "is_set", lambda self: next(asked, False))
    with pytest.raises(Preempted):
        run(root, params)
    assert len(list((root / ".scratch/extract-lidar/f/store").glob("shard-*"))) == 1
    store, _ = run(root, params, "f2")  # taken over although other parameters gave another fingerprint
    assert contents(store.folder) == whole


def test_another_teacher_makes_a_wholly_new_store(root: Path) -> None:
    run(root, parse())
    before = contents(root / "outputs/stores/lidar")
    folder = root / "outputs/teachers/lidar"
    torch.manual_seed(1)
    save_detector(folder, TEACHER, build_detector(TEACHER).state_dict())
    store, _ = run(root, parse(), "g")
    after = contents(store.folder)
    assert all(after[name] != before[name] for name in before if name.startswith("shard-"))
    shutil.rmtree(root / "outputs/stores")
    shutil.rmtree(root / ".scratch")
    run(root, parse())
    assert contents(root / "outputs/stores/lidar") == after


def test_samples_are_spaced_evenly() -> None:
    assert evenly(4, 10) == [0, 2, 5, 7]
    assert evenly(32, 3) == [0, 1, 2]
    assert evenly(0, 3) == []


def test_a_store_of_params_has_its_cached_taps_in_order() -> None:
    assert list(StoreParams.model_validate(values()["stores"]["lidar"]).cached) == ["bev_lift", "boxes"]


class Commands:
    """The project with real DVC, git and processes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        quiet = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT", "MLFLOW", "PIPELINE", "DVC"))}
        self.env = quiet | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "DVC_NO_ANALYTICS": "1",
            "DVC_SITE_CACHE_DIR": str(root / ".site-cache"),
            "PIPELINE_TRACK_LATER": "1",
        }
        subprocess.run(["git", "init", "-q", str(root)], check=True)
        self.set()

    def set(self, taps: dict[str, Any] = PLAIN, **changes: Any) -> None:
        write_params(self.root, values(taps, **changes))

    def start(self, *command: str, processes: int = 1) -> subprocess.Popen[str]:
        launcher = {"PIPELINE_LAUNCHER": "torchrun", "PIPELINE_PROCESSES": str(processes)} if processes > 1 else {}
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=self.root,
            env=self.env | launcher,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        )

    def run(self, *command: str, processes: int = 1, code: int = 0) -> str:
        child = self.start(*command, processes=processes)
        output, _ = child.communicate(timeout=200)
        assert child.returncode == code, output
        return output

    def extract(self, processes: int) -> str:
        return self.run("pipeline", "stage", "extract", "--key", "lidar", processes=processes)

    def repro(self) -> str:
        return self.run("dvc", "repro", "--single-item", "extract@lidar")

    @property
    def store(self) -> dict[str, bytes]:
        return contents(self.root / "outputs/stores/lidar")

    def clear(self, *names: str) -> None:
        for name in names or (".scratch", "outputs/stores", "reports"):
            shutil.rmtree(self.root / name)


@pytest.fixture
def commands(root: Path) -> Iterator[Commands]:
    made = Commands(root)
    yield made
    for process in psutil.process_iter(["cwd"]):
        if process.info["cwd"] == str(root):
            process.kill()


def ranks(torchrun: int) -> list[psutil.Process]:
    """The ranks below the process of a stage, by number."""
    found = [p for p in psutil.Process(torchrun).children(recursive=True) if "RANK" in p.environ()]
    return sorted(found, key=lambda p: int(p.environ()["RANK"]))


@pytest.mark.timeout(600)
@pytest.mark.xdist_group("extract")
def test_two_processes_write_the_bytes_of_one_even_when_one_of_them_dies(commands: Commands) -> None:
    commands.set(PLAIN | {"bev_lift": CODED})
    run(commands.root, load_params(commands.root))
    store, card = commands.store, (commands.root / "reports/stores/lidar.json").read_text()
    commands.clear()
    child = commands.start("pipeline", "stage", "extract", "--key", "lidar", processes=2)
    scratch, deadline = commands.root / ".scratch/extract-lidar", time.monotonic() + 120
    while not any(scratch.glob("*/store/calibration.safetensors")):
        assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    ranks(child.pid)[1].send_signal(signal.SIGKILL)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 1, output
    assert not (commands.root / "outputs/stores/lidar").exists()
    commands.extract(processes=2)
    assert commands.store == store
    assert (commands.root / "reports/stores/lidar.json").read_text() == card


@pytest.mark.timeout(600)
@pytest.mark.xdist_group("extract")
def test_dvc_restores_what_it_has_and_only_a_damaged_shard_is_computed_again(commands: Commands) -> None:
    commands.repro()
    store, damaged = commands.store, commands.root / "outputs/stores/lidar/shard-00001.bin"
    damage(damaged)
    assert "is cached - skipping run, checking out outputs" in commands.repro()
    assert commands.store == store

    commands.clear(".dvc/cache")
    for path in (damaged, *commands.root.glob(".scratch/extract-lidar/*/kept/shard-00001.bin")):
        damage(path)
    output = commands.repro()
    assert commands.store == store
    assert "writes 1 of 4 shards" in output
    assert re.search(r"shard-00001\.bin.* is damaged: tap \w+ of sample \w+ changed: writing", output)

    card = commands.root / "stages/card.py"  # a dependency of the stage, and not of a store's identity
    card.write_text(card.read_text() + "\n")
    assert "writes 0 of 4 shards" in commands.repro()
    assert commands.store == store


def damage(path: Path) -> None:
    """Put a file with a changed byte of the first chunk in the place of a shard; links to it elsewhere stay whole."""
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.unlink()
    path.write_bytes(content)
