"""Distillation from cached and online taps: they agree, the teacher stays as it is, only the student is exported."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from base.watching import WATCHED
from config.graph import StageSpec
from config.nested import merge
from config.params import Params
from config.sections import ImportParams, StudentParams, TeacherStart
from data.reading.config import BevConfig
from data.reading.index import Index
from data.store import StaleStoreError, Store, StoreError
from distill.terms import TermConfig
from models.detectors.build import build_detector
from models.detectors.detector import Detector
from results.tracking.runs import NullTracker
from stages import distill, extract
from stages.context import StageContext, StageError, Stop
from stages.distill import (
    Distillation,
    make_recipe,
    open_sources,
    samples_of,
    tap_statistics,
    taught,
)
from stages.inputs.weights import checksum_of, save_detector, start_as_set
from stages.teaching.taught import TaughtDataset
from tests.models.factory import GRID, camera_config, fusion_config, simulated_config
from tests.params_files import read_params
from tests.stages.tasks import task_of
from tests.stages.untrained import make_root
from training.config import TrainConfig
from training.trainer import minimised

ROOT = Path(__file__).resolve().parents[2]
SAMPLES, HALO = 6, 6.4
EXACT = {"serve": "cached-warp", "dtype": "float32"}
SMALL = {"serve": "cached-warp", "dtype": "int8", "channels": 8, "cells": "foreground", "compression": "zstd"}
BOXES = {"serve": "cached-exact"}
ONLINE = {"serve": "online"}
STORES = {
    "exact": {"boxes": BOXES, "bev_lift": EXACT},
    "half": {"boxes": BOXES, "bev_lift": EXACT | {"dtype": "float16"}},
    "small": {"bev_lift": SMALL | {"halo": HALO}},
    "live": {"boxes": ONLINE, "bev_lift": ONLINE, "head": ONLINE},
    "mixed": {"boxes": BOXES, "bev_lift": ONLINE},
}
STILL = {"flip_x": 0.0, "flip_y": 0.0, "rotate": 0.0, "scale": [1.0, 1.0]}
MOVED = {"flip_x": 0.5, "flip_y": 0.5, "rotate": 22.5, "scale": [0.95, 1.05]}
BOX_MASK = {"kind": "teacher_conf", "threshold": 0.101}
KINDS = {
    "cls": {"student": "head", "mask": BOX_MASK, "distance": "qfl", "weight": 1.0},
    "reg": {"student": "head", "mask": BOX_MASK, "distance": "sl1", "weight": 0.25},
    "xfd": {"student": "bev_neck", "mask": {"kind": "balanced"}, "adapter": {"kind": "decoder"}, "distance": "l1",
            "weight": 0.3},
    "xat": {"student": "bev_neck", "adapter": {"kind": "grl_disc", "width": 8}, "distance": "bce_adv", "weight": 0.1},
}  # fmt: skip
DENSE = {f"dense_{kind}": KINDS[kind] for kind in ("cls", "reg")}
TAPS = {"cls": "boxes", "reg": "boxes", "xfd": "bev_lift", "xat": "bev_lift", "dense_cls": "head", "dense_reg": "head"}


def terms_of(store: str, *kinds: str) -> dict[str, Any]:
    return {kind: (KINDS | DENSE)[kind] | {"teacher": f"{store}.{TAPS[kind]}"} for kind in kinds}


def kinds_of(store: str) -> list[str]:
    """The terms that a store has taps for."""
    return [kind for kind, tap in TAPS.items() if tap in STORES[store]]


def parse(bev: dict[str, Any] = STILL, **changes: Any) -> Params:
    raw = read_params(ROOT)
    raw["stores"] = {name: {"teacher": "lidar", "score_threshold": 0.1, "taps": taps} for name, taps in STORES.items()}
    raw["variants"] = {
        f"from-{name}": {"student": "camera", "terms": terms_of(name, *kinds_of(name))} for name in STORES
    } | {"baseline": {"student": "camera", "terms": {}}}
    raw["students"]["camera"] |= {"model": camera_config(), "start": None}
    raw["study"] |= {"variants": [], "featured": [], "baselines": [], "stores": ["exact", "half", "small", "mixed"]}
    train = {"epochs": 1, "batch_size": 2, "precision": "bf16-mixed", "workers": 0, "checkpoint_minutes": 0}
    train["gradients_every"] = 1
    overlay = {
        "data": {"version": "v1.0-trainval", "splits": {"train": "train", "val": "val"}},
        "input": {"sweeps": 1, "image": {"size": [32, 64]}, "bev": bev},
        "grid": GRID,
        "store": {"shard_samples": 4, "calibration_samples": SAMPLES, "gap_samples": 0},
        "students": {"camera": {"train": train}},
    }
    return Params.model_validate(merge(merge(raw, overlay), changes))


def context_of(root: Path, params: Params, stage: str, key: str) -> StageContext:
    outs = (f"outputs/stores/{key}", f"reports/stores/{key}.json", f"outputs/students/{key}")
    scratch = root / f".scratch/{stage}-{key}"
    scratch.mkdir(parents=True, exist_ok=True)
    return StageContext(stage, key, params, StageSpec(stage, key, "", {}, {}, outs), root, scratch, NullTracker(),
                        Stop(), 0)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with the code, a dataroot, an index, an untrained teacher and its stores."""
    root = make_root(tmp_path_factory.mktemp("project"), train_keyframes=3)
    for name in ("exact", "half", "small", "mixed"):
        extract.run(context_of(root, parse(), "extract", name))
    return root


def configs(store: str, *kinds: str) -> dict[str, TermConfig]:
    return {name: TermConfig(**term) for name, term in terms_of(store, *kinds).items()}


def set_up(root: Path, params: Params, store: str, *kinds: str) -> tuple[Distillation, list[Any]]:
    """The task of a variant on one student, and the batches of an epoch."""
    context, terms = context_of(root, params, "distill", "x-0"), configs(store, *kinds)
    torch.manual_seed(1)
    return task_of(context, build_detector(camera_config()), terms, SAMPLES)


def losses(root: Path, params: Params, store: str, *kinds: str) -> Tensor:
    task, batches = set_up(root, params, store, *kinds)
    found = [task.loss(batch, 0.5) for batch in batches]
    return torch.stack([torch.stack([terms[name] for name in minimised(terms)]) for terms in found]).detach()


def test_cached_and_online_losses_agree_without_augmentation(root: Path) -> None:
    params = parse()
    live = losses(root, params, "live", *KINDS)
    assert live.shape == (SAMPLES // 2, 3 + len(KINDS))
    assert (live[:, 3:] > 0).all()
    torch.testing.assert_close(losses(root, params, "exact", *KINDS), live, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses(root, params, "half", *KINDS), live, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(losses(root, params, "mixed", *KINDS), live, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bev", [STILL, STILL | {"flip_x": 1.0}, STILL | {"flip_y": 1.0}])
def test_online_and_cached_maps_lie_in_the_same_frame(root: Path, bev: dict[str, Any]) -> None:
    """Cells with points are the same ones; their values are equal where nothing is mirrored."""
    params = parse(bev)
    (live, batches), (exact, taught) = (set_up(root, params, name, "xfd") for name in ("live", "exact"))
    for batch, cached in zip(batches, taught, strict=True):
        online, stored = live.sources(batch), exact.sources(cached)
        assert online["live.bev_lift.valid"].all()
        assert stored["exact.bev_lift.valid"].all()
        rerun, served = online["live.bev_lift"], stored["exact.bev_lift"]
        occupied, expected = (maps.ne(0).any(1) for maps in (rerun, served))
        assert 0.05 < occupied.float().mean() < 0.95
        assert (occupied ^ expected).float().mean() < 0.01
        if bev == STILL:
            torch.testing.assert_close(rerun, served, rtol=1e-5, atol=1e-5)


def test_the_online_teacher_runs_in_float32(root: Path) -> None:
    task, batches = set_up(root, parse(MOVED), "live", *KINDS)
    plain = task.sources(batches[0])
    with torch.autocast("cpu", torch.bfloat16):
        cast = task.sources(batches[0])
    assert plain["live.bev_lift"].dtype == cast["live.bev_lift"].dtype == torch.float32
    assert torch.equal(plain["live.bev_lift"], cast["live.bev_lift"])
    assert all(map(torch.equal, plain["live.boxes"], cast["live.boxes"]))
    assert not any(value.requires_grad for value in plain["live.boxes"])
    assert all((rows[:, 9] >= 0.1).all() for rows in plain["live.boxes"])


@pytest.mark.parametrize("store", ["live", "small"])
def test_only_the_student_trains_and_is_exported(root: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole run: the teacher's parameters and buffers keep every bit, and no file or optimiser has them."""
    opened = []
    monkeypatch.setattr(distill, "Distillation", lambda *parts: opened.append(Distillation(*parts)) or opened[-1])
    context = context_of(root, parse(MOVED), "distill", f"from-{store}-0")
    distill.run(context)
    task = opened[0]
    before = load_file(root / "outputs/teachers/lidar/model.safetensors")
    teachers = [online.detector for online in task.sources.online.values()]
    assert len(teachers) == (store == "live")
    for teacher in teachers:
        assert teacher.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
        assert not teacher.training
        assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())
    trained = {id(p) for p in task.module.parameters()}
    assert not trained & {id(p) for teacher in teachers for p in teacher.parameters()}
    weights = load_file(root / f"outputs/students/from-{store}-0/model.safetensors")
    assert weights.keys() == task.student.state_dict().keys()
    allowed = {f"{kind}/{name}" for kind in ("model", "ema") for name in task.module.state_dict()}
    saved = load_file(max(context.scratch.glob("checkpoints/*.safetensors")))
    assert {name for name in saved if not name.startswith("optimizer/")} <= allowed
    parameters = sum(1 for _ in task.module.parameters())
    assert {int(name.split("/")[1]) for name in saved if name.startswith("optimizer/")} == set(range(parameters))
    steps = [json.loads(line) for line in (context.scratch / "trace.jsonl").read_text().splitlines()]
    terms = {f"distill/{kind}" for kind in kinds_of(store)}
    watched = {f"{WATCHED}xat/{what}" for what in ("accuracy", "grl")} if "xat" in kinds_of(store) else set()
    for step in steps:
        assert {name for name in step if name.startswith(("distill/", "watch/"))} == terms | watched
        assert step["loss"] == pytest.approx(sum(step[name] for name in {"heatmap", "box", "depth"} | terms), rel=1e-5)


def test_without_truth_a_student_learns_from_its_teachers_and_from_depth(root: Path) -> None:
    variant = {"variants": {"blind": {"student": "camera", "truth": False, "terms": terms_of("live", "cls", "reg")}}}
    context = context_of(root, parse(**variant), "distill", "blind-0")
    distill.run(context)
    steps = [json.loads(line) for line in (context.scratch / "trace.jsonl").read_text().splitlines()]
    names = {"step", "loss", "depth", "distill/cls", "distill/reg", "grad_norm", "lr"}
    assert all(step.keys() == names for step in steps)
    headless = {"variants": {"blind": {"student": "camera", "truth": False, "terms": terms_of("live", "xfd")}}}
    with pytest.raises(ValidationError, match=r"variants\.blind\.truth: false, and its head needs a term"):
        parse(**headless)


def test_few_labels(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scene has truth, the others a teacher: each step holds both, and the truth of the others changes nothing."""
    terms = {"pseudo": {"student": "head", "mask": BOX_MASK, "teacher": "exact.boxes", "distance": "labels",
                        "weight": 1.0}} | terms_of("exact", "cls")  # fmt: skip
    few = {"student": "camera", "truth": "train[:1]", "truth_share": 0.5, "terms": terms}
    context = context_of(root, parse(variants={"few": few}), "distill", "few-0")
    batches = []

    class Seen(Distillation):
        def loss(self, batch: Any, progress: float) -> dict[str, Tensor]:
            batches.append(batch)
            return super().loss(batch, progress)

    monkeypatch.setattr(distill, "Distillation", Seen)
    distill.run(context)
    index = Index.open(root / "outputs/index")
    known = set(index.tokens("train[:1]"))
    assert known < set(index.tokens("train"))
    for batch in batches:
        assert batch.labelled.tolist() == [token in known for token in batch.tokens]
        assert batch.labelled.sum() == 1
        assert all(len(boxes) == 0 for boxes, labelled in zip(batch.boxes, batch.labelled, strict=True) if not labelled)
    steps = [json.loads(line) for line in (context.scratch / "trace.jsonl").read_text().splitlines()]
    assert len(steps) == SAMPLES // 2
    assert all(step["heatmap"] > 0 and step["distill/pseudo"] > 0 and step["distill/cls"] > 0 for step in steps)
    nowhere = parse(variants={"few": few | {"truth": "val"}})
    with pytest.raises(StageError, match=r"variants\.few\.truth: no keyframe that students learn from is of"):
        distill.run(context_of(root, nowhere, "distill", "few-1"))


def started(start: TeacherStart | list[TeacherStart] | ImportParams | None) -> StudentParams:
    """Settings of a student with a start."""
    return StudentParams(start=start, model={}, train=TrainConfig(epochs=1, batch_size=1, lr=1.0))


def begun(context: StageContext, start: Any, config: dict[str, Any]) -> Detector:
    """A student of seed 0 that has started so."""
    torch.manual_seed(0)
    student = build_detector(config)
    start_as_set(student, started(start).start, context.root)
    return student


@pytest.fixture(scope="module")
def starts(root: Path) -> dict[str, dict[str, Tensor]]:
    """Weights of two untrained teachers that students start from: one with images, and one that fuses."""
    for seed, (name, config) in enumerate({"start": camera_config(), "fusion": fusion_config()}.items(), start=9):
        torch.manual_seed(seed)
        save_detector(root / f"outputs/teachers/{name}", config, build_detector(config).state_dict())
    return {name: load_file(root / f"outputs/teachers/{name}/model.safetensors") for name in ("start", "fusion")}


def test_a_student_starts_from_a_teacher_or_a_folder_or_from_its_seed(
    root: Path, starts: dict[str, dict[str, Tensor]]
) -> None:
    context, weights, config = context_of(root, parse(), "distill", "x-0"), starts["start"], camera_config()
    checksum = checksum_of((root / "outputs/teachers/start/model.safetensors").read_bytes())
    imported = ImportParams(folder="outputs/teachers/start", checksum=checksum)
    for start in (TeacherStart(teacher="start"), [TeacherStart(teacher="start")], imported, None):
        student = begun(context, start, config)
        equal = [torch.equal(value, weights[name]) for name, value in student.state_dict().items()]
        assert all(equal) == (start is not None)
    with pytest.raises(StageError, match="has checksum"):
        begun(context, ImportParams(folder="outputs/teachers/start", checksum="0"), config)
    with pytest.raises(StageError, match="outputs/teachers/other has no readable weights"):
        begun(context, TeacherStart(teacher="other"), config)


def test_a_student_starts_from_modules_of_teachers(root: Path, starts: dict[str, dict[str, Tensor]]) -> None:
    """Both lifts from the one of the start, the BEV part from another teacher or from the seed."""
    lift_only = TeacherStart(teacher="start", only=["images", "lift"])
    decoder = TeacherStart(teacher="fusion", only=["bev_neck", "head"])
    places = {"images": "images", "camera_lift": "lift", "simulated_lift": "lift"}
    context = context_of(root, parse(), "distill", "x-0")
    of_seed = begun(context, None, simulated_config()).state_dict()
    for start, taken in ((lift_only, set()), ([lift_only, decoder], {"bev_neck", "head"})):
        student, again = (begun(context, start, simulated_config()).state_dict() for _ in range(2))
        assert all(map(torch.equal, student.values(), again.values()))
        for name, value in student.items():
            module, _, rest = name.partition(".")
            given = starts["start"].get(f"{places.get(module)}.{rest}", of_seed[name])
            assert torch.equal(value, starts["fusion"][name] if module in taken else given), name
    for only in (["images", "lifts"], ["bev_lift"]):
        wrong = TeacherStart(teacher="start", only=only)
        with pytest.raises(StageError, match=f"start/model.safetensors: nothing of module '{only[-1]}' fits"):
            begun(context, [decoder, wrong], simulated_config())
    with pytest.raises(StageError, match=r"does not fit the model: missing .*camera_lift"):
        begun(context, TeacherStart(teacher="start"), simulated_config())


def test_students_learn_from_their_own_part_of_the_split(root: Path) -> None:
    context = context_of(root, parse(data={"splits": {"students": "train[:1]"}}), "distill", "x-0")
    student = build_detector(camera_config())
    sources = open_sources(context, configs("exact", "cls"))
    samples = samples_of(context, student, sources, seed=0)
    assert samples.tokens == Index.open(root / "outputs/index").tokens("train[:1]")
    assert len(samples) == SAMPLES // 2
    assert len(samples.classes()) == len(samples)
    recipe = make_recipe(student, configs("exact", "cls"), tap_statistics(context, sources))
    dataset, _ = taught(samples, recipe, sources)
    assert isinstance(dataset, TaughtDataset)  # the store holds the whole split


def test_a_student_may_turn_scenes_over_less_than_others(root: Path) -> None:
    context = context_of(root, parse(MOVED), "distill", "x-0")
    student, sources = build_detector(camera_config()), open_sources(context, {})
    own = BevConfig(**STILL)
    moved, still = (samples_of(context, student, sources, 0, bev)[0].bev_aug for bev in (None, own))
    assert not torch.equal(moved, torch.eye(4))
    assert torch.equal(still, torch.eye(4))


@pytest.mark.parametrize("frames", [1, 2])
def test_only_the_keyframes_that_a_student_reads_are_loaded(root: Path, frames: int) -> None:
    context = context_of(root, parse(input={"frames": 2}), "distill", "x-0")
    student, sources = build_detector(camera_config(frames=frames)), open_sources(context, {})
    assert samples_of(context, student, sources, seed=0)[0].images.shape[0] == frames
    if frames == 2:
        short = context_of(root, parse(input={"frames": 1}), "distill", "x-0")
        with pytest.raises(StageError, match=r"input.frames: 1, and CameraBEVDepth reads 2: raise it"):
            samples_of(short, student, sources, seed=0)


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_depth_is_read_only_where_a_loss_compares_with_it(root: Path, weight: float) -> None:
    context = context_of(root, parse(), "distill", "x-0")
    student, sources = build_detector(camera_config(depth_loss_weight=weight)), open_sources(context, {})
    assert bool(samples_of(context, student, sources, seed=0)[0].depth.numel()) == (weight > 0)


def test_a_students_start_and_samples_do_not_depend_on_how_it_is_taught(root: Path) -> None:
    params = parse(MOVED)
    (first, batches), (second, others) = (set_up(root, params, name, *KINDS) for name in ("exact", "live"))
    assert all(map(torch.equal, first.student.state_dict().values(), second.student.state_dict().values()))
    for batch, other in zip(batches, others, strict=True):
        assert torch.equal(batch.images, other.images)
        assert torch.equal(batch.bev_aug, other.bev_aug)
        assert all(map(torch.equal, batch.boxes, other.boxes))
        assert not any(map(len, batch.points))
        assert all(map(len, other.points))


def test_a_halo_is_served_on_the_grid_with_a_source_everywhere_there_is_foreground(root: Path) -> None:
    task, batches = set_up(root, parse(MOVED), "small", "xfd")
    store = task.sources.stores["small"]
    assert store.taps["bev_lift"].shape == (48, 48, 8)
    for batch in batches:
        outputs = task.sources(batch)
        maps, valid = outputs["small.bev_lift"], outputs["small.bev_lift.valid"]
        assert maps.shape == (2, 12, 32, 32)
        assert 0 < valid.float().mean() < 1
        assert set(outputs) == {"small.bev_lift", "small.bev_lift.valid"}
        assert (maps.abs().sum(1, keepdim=True)[~valid] == 0).all()


def test_statistics_of_an_online_tap_are_those_of_a_store(root: Path) -> None:
    context = context_of(root, parse(), "distill", "x-0")
    found = {
        name: tap_statistics(context, open_sources(context, configs(name, "xfd")))[f"{name}.bev_lift"]
        for name in ("live", "exact")
    }
    torch.testing.assert_close(found["live"], found["exact"], rtol=1e-5, atol=1e-7)


def test_only_what_the_terms_read_is_opened(root: Path, tmp_path: Path) -> None:
    context = context_of(root, parse(), "distill", "x-0")
    sources = open_sources(context, {})
    assert (sources.stores, sources.online) == ({}, {})
    assert tap_statistics(context, sources) == {}
    online = open_sources(context, configs("mixed", "xfd"))
    assert (list(online.stores), list(online.online)) == ([], ["mixed"])
    cached = open_sources(context, configs("mixed", "cls", "reg"))
    assert (list(cached.stores), list(cached.online)) == (["mixed"], [])
    both = open_sources(context, configs("mixed", *KINDS))
    assert both.online["mixed"].taps == ["bev_lift"]
    assert both.cached(["mixed.boxes", "mixed.bev_lift"]) == {"mixed.boxes"}


def test_a_stale_store_is_refused_and_an_absent_teacher_is_told(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = parse(stores={"exact": {"score_threshold": 0.2}})
    with pytest.raises(StaleStoreError, match="preprocessing is"):
        open_sources(context_of(root, other, "distill", "x-0"), configs("exact", "cls"))
    away = tmp_path / "project"
    shutil.copytree(root, away, ignore=shutil.ignore_patterns("teachers", "city", ".scratch"))
    context = context_of(away, parse(), "distill", "x-0")
    with caplog.at_level(logging.WARNING):
        assert isinstance(open_sources(context, configs("exact", "cls")).stores["exact"], Store)
    assert "the weights of teacher lidar are not here: store exact is not compared with them" in caplog.text
    with pytest.raises(StaleStoreError, match="preprocessing is"):
        open_sources(context_of(away, other, "distill", "x-0"), configs("exact", "cls"))
    with pytest.raises(StageError, match="does not hold a whole model"):
        open_sources(context, configs("live", "cls"))
    shutil.rmtree(away / "outputs/stores/exact")
    with pytest.raises(StoreError, match="does not exist"):
        open_sources(context, configs("exact", "cls"))


def test_a_tap_that_the_online_teacher_lacks_is_named(root: Path) -> None:
    params = parse(stores={"live": {"taps": {"pv": ONLINE}}})
    terms = {"x": TermConfig(**KINDS["xfd"] | {"teacher": "live.pv"})}
    context = context_of(root, params, "distill", "x-0")
    with pytest.raises(StageError, match=r"stores\.live\.taps: LidarCenterPoint has no tap 'pv'"):
        tap_statistics(context, open_sources(context, terms))


def test_without_cached_taps_the_data_set_is_the_plain_one(root: Path) -> None:
    context = context_of(root, parse(), "distill", "x-0")
    student = build_detector(camera_config())
    for name, kind in (("live", "NuScenesDataset"), ("exact", "TaughtDataset")):
        terms = configs(name, *KINDS)
        sources = open_sources(context, terms)
        recipe = make_recipe(student, terms, tap_statistics(context, sources))
        dataset, _ = taught(samples_of(context, student, sources, seed=0), recipe, sources)
        assert type(dataset).__name__ == kind
        plain = dataset.dataset if isinstance(dataset, TaughtDataset) else dataset
        assert ("points" in plain.modalities) == (name == "live")  # type: ignore[attr-defined]
