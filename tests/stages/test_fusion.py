"""The fusion teacher from its parts to a student: its start, its store, and that it stays as it is while it teaches."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from config.graph import StageSpec
from config.nested import merge
from config.params import Params
from distill.features import MapTerm
from distill.term import Outcome
from distill.terms import TermConfig
from models.detectors.build import build_detector
from models.detectors.detector import Detector
from models.ports import Batch, Prediction
from results.tracking.runs import NullTracker
from stages import distill, extract, teacher
from stages.context import StageContext, StageError, Stop
from stages.distill import Distillation
from stages.inputs.datasets import plain_dataset
from stages.inputs.weights import load_detector, save_detector, start_as_set
from tests.models.factory import COMPENSATION, GRID, camera_config, fusion_config, simulated_config
from tests.params_files import read_params
from tests.stages.tasks import task_of
from tests.stages.untrained import TEACHER, make_root
from training.seeding import MODEL, seed_everything

PARAMS = read_params(Path(__file__).resolve().parents[2])
SAMPLES = 4
LIDAR = fusion_config()["lidar"] | {"voxel": TEACHER["voxel"]}
CODED = {"serve": "cached-warp", "dtype": "int8", "compression": "zstd"}
HALF = {"serve": "cached-warp", "dtype": "float16"}
TAPS = {"bev_lift_camera": CODED, "bev_lift_lidar": CODED, "bev_fused": CODED, "bev_neck": HALF, "head": HALF}
ONLINE = {tap: {"serve": "online"} for tap in TAPS}
TERMS = {"imd", "cmd", "mmdf", "mmdp_cls", "mmdp_box"}
NECK = {"student": "bev_neck", "teacher": "fusion.bev_neck", "distance": "l2", "weight": 1.0}
STARTS = {"start": ["images", "lift"], "fusion": ["bev_backbone", "bev_neck", "head"]}
STILL = {
    "image": {"size": [32, 64], "resize": [1.0, 1.0], "rotate": 0.0, "flip": 0.0},
    "bev": {"flip_x": 0.0, "flip_y": 0.0, "rotate": 0.0, "scale": [1.0, 1.0]},
}


def of_online(terms: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The terms with the teacher in the step instead of the store."""
    return {name: term | {"teacher": f"live.{term['teacher'].partition('.')[2]}"} for name, term in terms.items()}


def parse(**changes: Any) -> Params:
    """The project's parameters with small models; variants `simdistill`, and `online` without a store."""
    raw = copy.deepcopy(PARAMS)
    raw["stores"] |= {
        name: {"teacher": "fusion", "score_threshold": 0.1, "taps": taps}
        for name, taps in (("fusion", TAPS), ("live", ONLINE))
    }
    raw["teachers"]["fusion"]["model"] = fusion_config(lidar=LIDAR)
    starts = [{"teacher": teacher, "only": only} for teacher, only in STARTS.items()]
    raw["students"]["simulated"] |= {"model": simulated_config(), "start": starts}
    raw["variants"]["simdistill"]["model"] = COMPENSATION
    whole = raw["variants"]["simdistill"]
    raw["variants"]["online"] = whole | {"terms": of_online(whole["terms"])}
    train = {"epochs": 1, "batch_size": 2, "precision": "bf16-mixed", "workers": 0, "checkpoint_minutes": 0}
    overlay = {
        "data": {"version": "v1.0-trainval", "splits": {"train": "train", "val": "val"}},
        "input": {"sweeps": 1} | STILL,
        "grid": GRID,
        "store": {"shard_samples": 4, "calibration_samples": SAMPLES, "gap_samples": 0},
        "teachers": {"fusion": {"train": train}},
        "students": {"simulated": {"train": train}},
        "study": {
            "segmenters": [],
            "stores": ["fusion"],
            "variants": ["simdistill", "online"],
            "featured": [],
            "baselines": [],
        },
    }
    return Params.model_validate(merge(merge(raw, overlay), changes))


def context_of(root: Path, stage: str, key: str, params: Params | None = None) -> StageContext:
    outs = (f"outputs/teachers/{key}", f"outputs/stores/{key}", f"reports/stores/{key}.json", f"outputs/students/{key}")
    scratch = root / f".scratch/{stage}-{key}"
    scratch.mkdir(parents=True, exist_ok=True)
    spec = StageSpec(stage, key, "", {}, {}, outs)
    return StageContext(stage, key, params or parse(), spec, root, scratch, NullTracker(), Stop(), 0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with untrained parts, the fusion teacher that was trained from them, and its store."""
    root = make_root(tmp_path_factory.mktemp("project"), train_keyframes=SAMPLES // 2)
    torch.manual_seed(1)
    save_detector(root / "outputs/teachers/start", camera_config(), build_detector(camera_config()).state_dict())
    teacher.run(context_of(root, "fusion", "fusion"))
    extract.run(context_of(root, "extract", "fusion"))
    return root


def published(root: Path, model: str) -> dict[str, Tensor]:
    return load_file(root / f"outputs/{model}/model.safetensors")


def test_the_second_step_is_published_and_has_moved_from_its_parts(root: Path) -> None:
    teacher = load_detector(root / "outputs/teachers/fusion")
    assert type(teacher).__name__ == "BEVFusion"
    weights, lidar, camera = (published(root, f"teachers/{name}") for name in ("fusion", "lidar", "start"))
    for name, start in [
        ("lift.depth_net.depth.weight", camera["lift.depth_net.depth.weight"]),
        ("images.backbone.conv1.weight", camera["images.backbone.conv1.weight"]),
        ("lidar.stage.blocks.0.0.weight", lidar["backbone.blocks.0.0.weight"]),
    ]:
        assert 0 < (weights[name] - start).abs().max() < 0.02  # two steps of AdamW away
    steps = (root / ".scratch/fusion-fusion/trace.jsonl").read_text().splitlines()
    assert len(steps) == SAMPLES // 2
    assert {"heatmap", "box", "depth"} < json.loads(steps[0]).keys()


def start(fused: Detector, root: Path, params: Params) -> None:
    """Give a fusion teacher what it starts from."""
    start_as_set(fused, params.teachers["fusion"].start, root, params.study.parts("fusion"))


def test_a_fusion_teacher_starts_from_both_parts(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its branches say what those of its parts say; what sees both maps for the first time is new."""
    torch.manual_seed(2)
    fused = build_detector(fusion_config(lidar=LIDAR))
    before = {name: value.clone() for name, value in fused.state_dict().items()}
    with caplog.at_level(logging.INFO):
        start(fused, root, parse())
    lidar, camera = (published(root, f"teachers/{name}") for name in ("lidar", "start"))
    new = ("fuser.", "bev_backbone.blocks.0.0.")
    assert "new: bev_backbone.blocks.0.0, fuser.conv, fuser.norm" in caplog.text
    places = {"lidar.encoder.": "encoder.", "lidar.stage.": "backbone.", "bev_backbone.": "backbone.",
              "bev_neck.": "neck.", "head.": "head."}  # fmt: skip
    for name, value in fused.state_dict().items():
        place = next((place for place in places if name.startswith(place)), "")
        if name.startswith(new):
            expected = before[name]
        else:
            expected = lidar[places[place] + name.removeprefix(place)] if place else camera[name]
        assert torch.equal(value, expected), name
    dataset = plain_dataset(root, parse(), "train", fused)
    batch = next(iter(DataLoader(dataset, 2, collate_fn=distill.collate)))
    parts = {name: load_detector(root / f"outputs/teachers/{name}") for name in ("lidar", "start")}
    with torch.no_grad():
        taps = fused.eval()(batch, ["bev_lift_camera", "bev_lift_lidar"]).taps
        assert torch.equal(taps["bev_lift_camera"], parts["start"](batch, ["bev_lift"]).taps["bev_lift"])
        stages = parts["lidar"].backbone(parts["lidar"].lift(batch.points))  # type: ignore[operator]
    assert torch.equal(taps["bev_lift_lidar"], stages[0])


def test_what_is_missing_is_named(root: Path) -> None:
    with pytest.raises(StageError, match=r"teacher 'fuson': the parameters have lidar, start, fusion"):
        teacher.run(context_of(root, "fusion", "fuson"))
    fused = build_detector(fusion_config(lidar=LIDAR))
    for part in ("lidar", "camera"):
        absent = {"model": {}, "train": {"epochs": 1, "batch_size": 1, "lr": 1.0}}
        study = {"fusions": {"fusion": {part: "absent"}}, "teachers": ["lidar", "start", "absent"]}
        params = parse(study=study, teachers={"absent": absent})
        with pytest.raises(StageError, match=r"outputs/teachers/absent has no readable weights"):
            start(fused, root, params)
    with pytest.raises(StageError, match=r"nothing of module 'images' fits the BEVFusion; it has backbone, encoder"):
        start(fused, root, parse(study={"fusions": {"fusion": {"camera": "lidar"}}}))


def new_student(context: StageContext, variant: str) -> Detector:
    """A variant's student as its training begins with it."""
    settings = context.params.student(variant)
    seed_everything(MODEL, 0)
    student = build_detector(settings.model)
    start_as_set(student, settings.start, context.root)
    return student


def set_up(root: Path, variant: str, **more: dict[str, Any]) -> tuple[Distillation, list[Any]]:
    """The task of a variant, with more terms, and the batches of an epoch in order."""
    context = context_of(root, "distill", f"{variant}-0")
    configs = context.params.variants[variant].terms | {name: TermConfig(**term) for name, term in more.items()}
    return task_of(context, new_student(context, variant), configs, SAMPLES)


def test_cached_and_online_targets_are_equal_without_augmentation(root: Path) -> None:
    """Of float16 up to its rounding, of int8 up to half a step of the channel's range."""
    cached, batches = set_up(root, "simdistill", neck=NECK)
    live, others = set_up(root, "online", **of_online({"neck": NECK}))
    stored = [cached.sources(batch) for batch in batches]
    rerun = [live.sources(batch) for batch in others]
    assert stored[0].keys() == {f"fusion.{tap}{end}" for tap in TAPS for end in ("", ".valid")}
    for tap, settings in TAPS.items():
        kept, expected = (torch.cat([outputs[f"{name}.{tap}"] for outputs in given])
                          for name, given in (("fusion", stored), ("live", rerun)))  # fmt: skip
        assert kept.shape == expected.shape
        assert expected.std() > 0
        assert all(outputs[f"fusion.{tap}.valid"].all() for outputs in stored)
        if settings is HALF:
            torch.testing.assert_close(kept, expected, rtol=1e-3, atol=1e-4)
        else:
            width = expected.amax((0, 2, 3)).clamp(min=0) - expected.amin((0, 2, 3)).clamp(max=0)
            error = (kept - expected).abs().amax((0, 2, 3))
            assert (error <= 0.52 * width / 254 + 1e-6).all(), tap
    for one, two in zip(batches, others, strict=True):
        first, second = cached.loss(one, 0.5), live.loss(two, 0.5)
        terms = {f"distill/{name}" for name in [*TERMS, "neck"]}
        assert first.keys() == second.keys() == {"heatmap", "box", "depth"} | terms
        for name, value in first.items():
            assert value > 0
            torch.testing.assert_close(value, second[name], rtol=0.02, atol=1e-5, msg=name)


def faults(teacher: Detector, before: Mapping[str, Tensor]) -> set[str]:
    """What of a teacher is not as frozen as it should be: parameters and buffers that moved, that may or did learn."""
    moved = {name for name, value in teacher.state_dict().items() if not torch.equal(value, before[name])}
    learning = {name for name, p in teacher.named_parameters() if p.requires_grad or p.grad is not None}
    training = {f"{name} in training" for name, module in teacher.named_modules() if module.training}
    return moved | learning | training


def step(task: Distillation, batch: Any, *others: torch.nn.Module) -> None:
    """One of training; `others` are in the optimiser too."""
    task.module.train()
    parameters = [p for module in (task.module, *others) for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(parameters, 0.01)
    torch.stack(list(task.loss(batch, 0.5).values())).sum().backward()
    optimiser.step()


def test_a_step_leaves_the_teacher_as_it_is(root: Path) -> None:
    task, batches = set_up(root, "online")
    teacher, before = task.sources.online["live"].detector, published(root, "teachers/fusion")  # type: ignore[attr-defined]
    student = {name: value.clone() for name, value in task.student.state_dict().items()}
    step(task, batches[0])
    assert faults(teacher, before) == set()
    changed = [name for name, p in task.student.named_parameters() if not torch.equal(p, student[name])]
    learned = {name.partition(".")[0] for name in changed}
    assert learned == {name for name, _ in task.student.named_children()}
    everything = {id(part) for part in (*task.module.modules(), *task.module.parameters(), *task.module.buffers())}
    assert not everything & {id(part) for part in (*teacher.modules(), *teacher.parameters(), *teacher.buffers())}


def test_a_teacher_that_is_not_frozen_would_be_seen(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The release's fuser: in training mode, with gradients, and in the graph of MMD-F."""
    before = published(root, "teachers/fusion")
    task, batches = set_up(root, "online")
    teacher = task.sources.online["live"].detector  # type: ignore[attr-defined]
    teacher.fuser.train()
    step(task, batches[0])
    assert {"fuser.norm.running_mean", "fuser.norm.running_var", "fuser in training"} <= faults(teacher, before)

    def forward(self: MapTerm, student: Prediction, teacher: Mapping[str, Any], batch: Batch, progress: float) -> Any:
        return Outcome(F.mse_loss(self.adapter(student.taps[self.config.student]), teacher[self.config.teacher]))

    task, batches = set_up(root, "online")
    teacher = task.sources.online["live"].detector  # type: ignore[attr-defined]
    teacher.fuser.requires_grad_(True)
    monkeypatch.setattr(MapTerm, "forward", forward)
    task.sources = lambda batch: {f"live.{tap}": maps for tap, maps in teacher(batch, list(TAPS)).taps.items()}
    step(task, batches[0], teacher)
    assert {"fuser.conv.weight", "fuser.norm.weight"} <= faults(teacher, before)
    assert teacher.fuser.conv.weight.grad.abs().sum() > 0
    assert not torch.equal(teacher.fuser.conv.weight, before["fuser.conv.weight"])


def surplus(weights: Mapping[str, Tensor], config: dict[str, Any]) -> set[str]:
    """Of an export what the model alone has not, or has and is missing."""
    return weights.keys() ^ build_detector(config).state_dict().keys()


def weights_of(weights: Mapping[str, Tensor], *parts: str) -> int:
    return sum(value.numel() for name, value in weights.items() if name.startswith(parts))


@pytest.mark.parametrize("variant", ["simdistill", "online"])
def test_a_whole_run_exports_the_student_alone(root: Path, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of the store and from the teacher in the step: nothing of the recipe in the file, the teacher untouched."""
    opened: list[Distillation] = []

    def keep(*parts: Any) -> Distillation:
        opened.append(Distillation(*parts))
        return opened[-1]

    monkeypatch.setattr(distill, "Distillation", keep)
    files = [path for folder in ("teachers", "stores") for path in (root / "outputs" / folder).rglob("*.*")]
    contents = {path: path.read_bytes() for path in files if path.is_file()}
    context = context_of(root, "distill", f"{variant}-0")
    distill.run(context)
    assert all(path.read_bytes() == content for path, content in contents.items())
    task, before = opened[0], published(root, "teachers/fusion")
    teachers = [online.detector for online in task.sources.online.values()]  # type: ignore[attr-defined]
    assert len(teachers) == (variant == "online")
    assert all(faults(teacher, before) == set() for teacher in teachers)
    steps = [json.loads(line) for line in (context.scratch / "trace.jsonl").read_text().splitlines()]
    losses = {"heatmap", "box", "depth", *(f"distill/{name}" for name in TERMS)}
    assert all(line.keys() == losses | {"step", "loss", "grad_norm", "lr"} for line in steps)

    config, weights = context.params.student(variant).model, published(root, f"students/{variant}-0")
    assert surplus(weights, config) == set()
    assert any(name.startswith("recipe.") for name in task.module.state_dict())  # CMD's adapter trained beside it
    assert surplus(task.module.state_dict(), config)
    start = published(root, "teachers/start")
    lift, fused, lifted = weights_of(start, "lift."), 16, 12
    wider = 9 * (fused - lifted) * 16  # of the first convolution behind the fuser
    fuser = 9 * 2 * lifted * fused + 4 * fused + 1  # convolution, batch norm with its statistics and counter
    compensation = weights_of(weights, "image_compensation.", "bev_compensation.")
    assert compensation > 0
    assert weights_of(weights, "") == weights_of(start, "") + wider + lift + fuser + compensation


def test_variants_of_a_seed_begin_alike(root: Path) -> None:
    """From the modules that they start from, the rest from the seed; compensation is all that may differ."""
    context = context_of(root, "distill", "simdistill-0")
    simdistill, again, plain = (
        new_student(context, name).state_dict() for name in ("simdistill", "online", "simulated")
    )
    assert all(map(torch.equal, simdistill.values(), again.values()))
    assert [name for name, value in plain.items() if not torch.equal(value, simdistill[name])] == []
    extra = {name.partition(".")[0] for name in simdistill.keys() - plain.keys()}
    assert extra == {"image_compensation", "bev_compensation"}
    sources = {name: published(root, f"teachers/{name}") for name in STARTS}
    seed_everything(MODEL, 0)
    unstarted = build_detector(simulated_config()).state_dict()
    for name, value in plain.items():
        module, _, rest = name.partition(".")
        module = {"camera_lift": "lift", "simulated_lift": "lift"}.get(module, module)
        teacher = next((teacher for teacher, only in STARTS.items() if module in only), None)
        expected = unstarted[name] if teacher is None else sources[teacher][f"{module}.{rest}"]
        assert torch.equal(value, expected), name
        assert (teacher is None) == (module == "fuser")
