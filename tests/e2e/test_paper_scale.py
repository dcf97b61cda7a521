"""The paper-scale profiles: everything builds, and a training step on a real keyframe works.

Steps are at full resolution where that takes at most a few minutes of CPU time.
"""

from __future__ import annotations

import ctypes
import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mmdet
import mmdet.registry
import mmdet3d
import numpy as np
import pytest
import torch
from mmdet3d.registry import MODELS
from mmengine.config import Config
from torch import nn

from config.files import load_params
from config.params import Params
from config.profiles import apply_profile
from data.preparing.build import build_index
from data.reading.batch import Batch, collate
from data.reading.boxes import box_corners, transform_boxes
from data.reading.classes import CLASSES
from data.reading.instances import ImageInstances
from distill.terms import TermConfig
from models.detectors.build import build_detector
from models.detectors.detector import Detector
from models.detectors.segmenter import build_segmenter
from models.inherit import inherited
from stages.context import INDEX
from stages.distill import Distillation, make_recipe
from stages.inputs.datasets import training_dataset
from stages.teacher import SupervisedDetector
from stages.teaching.sources import OnlineTeacher
from tests.conftest import ROOT
from tests.params_files import copy_params, lay_text
from training.sampler import ClassBalance
from training.seeding import MODEL, seed_everything
from training.trainer import minimised, precision_here

pytestmark = [pytest.mark.whole, pytest.mark.xdist_group("paper")]
VERSION, SPLIT = "v1.0-mini", "mini_train"
CONFIGS, IMAGE_CONFIGS = (Path(package.__file__).parent / ".mim/configs" for package in (mmdet3d, mmdet))
ROWS = {"A0": 0, "A1": 2, "A2": 1, "A3": 1, "A4": 4, "A5": 1, "A6": 5}
"""Terms of the rows of the paper's ablation."""
DEPTH = {"nuscenes-x3kd-r50": 50, "nuscenes-x3kd-r101": 101}
HALVED = {"nuscenes-x3kd-r101"}
"""Profiles whose step has images of half the height and width: at 640 x 1600 it may take nine minutes of CPU time."""
STRUCTURED = {"bevdepth": ("camera-large", "skd"), "bevformer": ("bevformer-large", "former")}
"""Of the families of Structured KD the teacher and the variant with everything."""
WIDTHS = {
    "bevdepth": (
        {"pv": 512, "depth": 112, "bev_lift": 80, "bev_prev": 80, "bev_view": 480, "bev_fused": 160, "bev_neck": 256},
        {"pv": 512, "depth": 112, "bev_lift": 80, "bev_prev": 80, "bev_view": 480, "bev_fused": 160, "bev_neck": 128},
    ),
    "bevformer": (
        {"pv": 512, "bev_lift": 256, "bev_prev": 256, "bev_view": 1536, "bev_fused": 256, "bev_neck": 256},
        {"pv": 512, "bev_lift": 128, "bev_prev": 128, "bev_view": 768, "bev_fused": 128, "bev_neck": 128},
    ),
}
"""Channels of the taps of their teacher and student."""
NECK_OF_DEPTH = {50: [256, 512, 1024, 2048], 18: [64, 128, 256, 512]}
"""What the student's image neck reads, by the depth of its backbone."""
REDUCED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bevdepth": ({}, {}),
    "bevformer": ({"queries": 50}, {"queries": 25}),
}
"""Changes of teacher and student for a step at half the height and width of the images."""


@pytest.fixture(autouse=True)
def _give_memory_back() -> Iterator[None]:
    """A step leaves gigabytes with this process's allocator, and the forks of later tests would copy all its pages."""
    yield
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(params=DEPTH)
def params(request: pytest.FixtureRequest, tmp_path: Path) -> Params:
    """A profile laid over the project's parameters."""
    return laid_over(request.param, tmp_path)


@pytest.fixture
def simdistill(tmp_path: Path) -> Params:
    """SimDistill's profile laid over the project's parameters."""
    return laid_over("nuscenes-simdistill", tmp_path)


def laid_over(profile: str, folder: Path) -> Params:
    """A profile laid over a copy of the project's parameters."""
    copy_params(folder)
    shutil.copytree(ROOT / "profiles", folder / "profiles")
    return apply_profile(profile, folder)


def test_every_part_builds_with_the_sizes_of_the_paper(params: Params) -> None:
    """Shapes of methods.md A.1, the rows of the ablation, and what a segmenter and a LiDAR teacher are."""
    student = build_detector(params.student("x3kd").model)
    assert student.images.backbone.depth == DEPTH[params.profile]
    assert student.tap_channels == {
        "pv": 512,
        "depth": 112,
        "bev_lift": 80,
        "bev_view": 480,
        "bev_prev": 80,
        "bev_fused": 160,
        "bev_neck": 256,
    }
    assert (student.grid.size, student.stride, params.input.depth_stride) == (128, 16, 16)
    lidar = build_detector(params.teachers["lidar"].model)
    assert lidar.tap_channels == {"bev_lift": 256, "bev_neck": 512}
    assert_mmdet3ds_centerpoint(lidar)
    branches = [[one.heads for one in model.head.task_heads] for model in (lidar, student)]
    assert branches[0] == branches[1], "the head's maps of teacher and student have the same layout"
    segmenter = params.segmenters["instance"]
    zoo = Config.fromfile(CONFIGS / "nuimages/mask-rcnn_r50_fpn_1x_nuim.py").model
    zoo.pop("pretrained")
    ours = build_segmenter({"model": segmenter.model, "classes": segmenter.classes or CLASSES}).detector
    assert shapes(ours) == shapes(mmdet.registry.MODELS.build(zoo))

    assert {params.variants[name].row: len(params.variants[name].terms) for name in params.study.variants} == ROWS
    statistics = {"lidar.bev_lift": torch.ones(256)}
    for name in params.study.variants:
        terms = dict(params.variants[name].terms)
        assert make_recipe(student, terms, statistics).terms.keys() == terms.keys()
    train = params.student("x3kd").train
    assert (train.schedule, train.balanced, train.batch_size) == ("multi_step", True, 64)


def test_simdistill_builds_with_the_sizes_of_the_paper(simdistill: Params) -> None:
    """Shapes of methods.md B.1 for teachers and student, and all rows of B.4."""
    lidar, camera, fusion = (build_detector(simdistill.teachers[name].model) for name in ("lidar", "start", "fusion"))
    assert lidar.tap_channels == {"bev_lift": 256, "bev_neck": 512}
    assert_mmdet3ds_centerpoint(lidar)
    assert camera.tap_channels == {"pv": 256, "depth": 118, "bev_lift": 80, "bev_fused": 80, "bev_neck": 256}
    assert fusion.tap_channels == {
        "pv": 256,
        "depth": 118,
        "bev_lift_camera": 80,
        "bev_lift_lidar": 256,
        "bev_fused": 256,
        "bev_neck": 256,
    }
    zoo = Config.fromfile(IMAGE_CONFIGS / "swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py").model.backbone
    swin = shapes(mmdet.registry.MODELS.build(zoo | {"init_cfg": None}))
    assert shapes(fusion.images.backbone) == {name: size for name, size in swin.items() if "norm0." not in name}
    assert shapes(fusion.lidar.middle) == shapes(lidar.middle)

    widths = {**fusion.tap_channels, "head": 70}
    statistics = {f"fusion.{tap}": torch.ones(width) for tap, width in widths.items()}
    rows = {name: variant for name, variant in simdistill.variants.items() if (variant.row or "").startswith("B")}
    assert len(rows) == 15, "B0 to B13, of which B12 is two"
    for name, variant in rows.items():
        student = build_detector(simdistill.student(name).model)
        assert (student.grid.size, student.stride) == (180, 8)
        fused = 80 if variant.student == "bevfusion-c" else 256
        assert (student.tap_channels["bev_fused"], student.tap_channels["bev_neck"]) == (fused, 256), name
        terms = dict(variant.terms)
        assert make_recipe(student, terms, statistics).terms.keys() == terms.keys()
    train = simdistill.student("simdistill").train
    assert (train.schedule, train.balanced, train.batch_size, train.lr) == ("one_cycle", True, 48, 1e-3)


@pytest.mark.parametrize("family", STRUCTURED)
def test_structured_kd_builds_with_its_sizes(family: str, tmp_path: Path) -> None:
    """Sizes of methods.md C.1, both students, all rows of C.4, and the students inherit from the teacher."""
    params = laid_over(f"nuscenes-structured-{family}", tmp_path)
    name, full = STRUCTURED[family]
    teacher = build_detector(params.teachers[name].model)
    assert teacher.images.backbone.depth == 101
    assert [type(block[-1].conv2).__name__ for block in deep_stages(teacher)] == (
        ["FullPrecisionDCNv2"] * 2 if family == "bevformer" else ["Conv2d"] * 2
    )
    rows = {row: variant for row, variant in params.variants.items() if row in params.study.variants}
    assert sorted({variant.row.split()[0] for variant in rows.values()}) == sorted(f"C{i}" for i in range(12))
    assert len(rows) == 15, "C0 to C11, of which C11 is four"
    widths = {**teacher.tap_channels, "head": 70}
    for depth in NECK_OF_DEPTH:
        student = build_detector(of_depth(params.student(full).model, depth))
        assert (student.images.backbone.depth, student.image) == (depth, (256, 704))
        assert (teacher.tap_channels, student.tap_channels) == WIDTHS[family]
        assert (student.grid, student.grid.size) == (teacher.grid, 128)
        assert (student.frames, teacher.frames) == (2, 2)
        if family == "bevformer":
            assert [(one.cells.size, len(one.encoder.layers)) for one in (teacher, student)] == [(200, 6), (100, 3)]
        for variant in rows.values():
            terms = dict(variant.terms)
            statistics = {tap: torch.ones(widths[tap.partition(".")[2]]) for tap in teacher_taps(params, name, terms)}
            assert make_recipe(student, terms, statistics).terms.keys() == terms.keys()
        assert_inherits(student, teacher, params, full)


def teacher_taps(params: Params, teacher: str, terms: dict[str, TermConfig]) -> set[str]:
    """What terms read, all of it of one teacher."""
    taps = {tap for term in terms.values() for tap in term.teacher_taps}
    assert {params.stores[tap.partition(".")[0]].teacher for tap in taps} <= {teacher}
    return taps


def deep_stages(detector: Detector) -> list[nn.Module]:
    """Blocks of the last two stages of the image backbone."""
    backbone = detector.images.backbone
    return [getattr(backbone, name) for name in backbone.res_layers[2:]]


def of_depth(model: dict[str, Any], depth: int) -> dict[str, Any]:
    """A student's config with an image backbone of another depth, as the profile's first lines say."""
    backbone, neck = model["image_backbone"] | {"depth": depth}, model["image_neck"]
    return model | {"image_backbone": backbone, "image_neck": neck | {"in_channels": NECK_OF_DEPTH[depth]}}


def assert_inherits(student: Detector, teacher: Detector, params: Params, variant: str) -> None:
    """All weights of the modules that a variant inherits come from the teacher, at the student's size."""
    (start,) = params.student(variant).starts
    assert [start.teacher] == params.study.teachers
    weights, own = teacher.state_dict(), student.state_dict()
    for name, weight in own.items():
        if name.partition(".")[0] in (start.only or []):
            assert inherited(student, name, weights[name]).shape == weight.shape, name


def assert_mmdet3ds_centerpoint(lidar: nn.Module) -> None:
    """The parts before the head have the weights of mmdet3d's configurations with voxels, whatever their size."""
    zoo = Config.fromfile(CONFIGS / "_base_/models/centerpoint_voxel01_second_secfpn_nus.py").model
    for part, theirs in {"middle": "pts_middle_encoder", "backbone": "pts_backbone", "neck": "pts_neck"}.items():
        assert shapes(getattr(lidar, part)) == shapes(MODELS.build(zoo[theirs])), part


def shapes(module: nn.Module) -> dict[str, list[int]]:
    """Of the weights and buffers, by name."""
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.timeout(900)
def test_a_training_step_on_a_real_keyframe(params: Params, real_dataroot: Path, tmp_path: Path) -> None:
    """All five terms of X³KD in the profile's precision: losses and gradients are finite, and reach every weight."""
    params = on_real_keyframes(params, real_dataroot, tmp_path)
    if params.profile in HALVED:
        params = halved(params, tmp_path)
    build_index(real_dataroot, VERSION, [SPLIT], tmp_path / INDEX, sweeps=params.input.sweeps)
    settings, terms = params.student("x3kd"), params.variants["x3kd"].terms
    seed_everything(MODEL, 0)
    student = build_detector(settings.model)
    samples = training_dataset(tmp_path, params, student, 0, SPLIT)
    samples.modalities |= {"points"}
    assert len(ClassBalance(samples.classes())) >= 1
    batch = collate([samples[(0, 0, 0)]])
    assert batch.images.shape == (1, 2, 6, 3, *params.input.image.size)
    outputs = teacher_outputs(params, batch)
    task = Distillation(student, make_recipe(student, terms, {"lidar.bev_lift": torch.ones(256)}), lambda _: outputs)
    assert settings.train.precision == "bf16-mixed"
    assert finite_step(task, batch) == {"heatmap", "box", "depth", *(f"distill/{name}" for name in terms)}


@pytest.mark.timeout(900)
def test_steps_of_simdistill_on_a_real_keyframe(simdistill: Params, real_dataroot: Path, tmp_path: Path) -> None:
    """The fusion teacher alone, then the student with all five terms against that teacher's maps."""
    params = on_real_keyframes(simdistill, real_dataroot, tmp_path)
    build_index(real_dataroot, VERSION, [SPLIT], tmp_path / INDEX, sweeps=params.input.sweeps)
    seed_everything(MODEL, 0)
    teacher = build_detector(params.teachers["fusion"].model)
    batch = collate([training_dataset(tmp_path, params, teacher, 0, SPLIT)[(0, 0, 0)]])
    assert finite_step(SupervisedDetector(teacher), batch) == {"heatmap", "box", "depth"}

    terms = dict(params.variants["simdistill"].terms)
    taps = [term.teacher.removeprefix("fusion.") for term in terms.values()]
    outputs = {
        f"fusion.{tap}": value for tap, value in OnlineTeacher(teacher, taps, 0.0, torch.device("cpu"))(batch).items()
    }
    assert {tap: list(value.shape) for tap, value in outputs.items()} == {
        "fusion.bev_lift_camera": [1, 80, 180, 180],
        "fusion.bev_lift_lidar": [1, 256, 180, 180],
        "fusion.bev_fused": [1, 256, 180, 180],
        "fusion.head": [1, 70, 180, 180],
    }
    assert 0.01 < (outputs["fusion.bev_lift_lidar"] != 0).any(1).float().mean() < 0.9, "the sparse map of the points"
    student = build_detector(params.student("simdistill").model)
    statistics = {tap: torch.ones(value.shape[1]) for tap, value in outputs.items()}
    task = Distillation(student, make_recipe(student, terms, statistics), lambda _: outputs)
    assert finite_step(task, batch) == {"heatmap", "box", "depth", *(f"distill/{name}" for name in terms)}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", STRUCTURED)
def test_a_step_of_structured_kd_on_a_real_keyframe(family: str, real_dataroot: Path, tmp_path: Path) -> None:
    """All five terms against the teacher's maps; images of half the height and width, and fewer queries."""
    params = on_real_keyframes(laid_over(f"nuscenes-structured-{family}", tmp_path), real_dataroot, tmp_path)
    params = halved(params, tmp_path)
    changes = REDUCED[family]
    losses, shapes_of_taps = structured_step(
        params, family, changes[0], {"image": [128, 352], **changes[1]}, real_dataroot, tmp_path
    )
    assert losses == {
        "heatmap",
        "box",
        *(["depth"] if family == "bevdepth" else []),
        *(f"distill/{name}" for name in params.variants[STRUCTURED[family][1]].terms),
    }
    side, width = (128, 80) if family == "bevdepth" else (50, 256)
    assert shapes_of_taps == {
        "bev_lift": [1, width, side, side],
        "bev_prev": [1, width, side, side],
        "bev_view": [1, 6 * width, side, side],
        "head": [1, 70, 128, 128],
    }


def structured_step(
    params: Params,
    family: str,
    teacher_changes: dict[str, Any],
    student_changes: dict[str, Any],
    dataroot: Path,
    folder: Path,
) -> tuple[set[str], dict[str, list[int]]]:
    """Names of the losses of a step with all of Structured KD's terms, and the shapes of what the teacher gave."""
    name, variant = STRUCTURED[family]
    build_index(dataroot, VERSION, [SPLIT], folder / INDEX, sweeps=params.input.sweeps)
    seed_everything(MODEL, 0)
    student = build_detector(params.student(variant).model | student_changes)
    batch = collate([training_dataset(folder, params, student, 0, SPLIT)[(0, 0, 0)]])
    batch.has_previous[:] = True  # the real keyframes have none; frame 1 repeats frame 0
    terms = dict(params.variants[variant].terms)
    taps = {tap: tap.partition(".")[2] for tap in teacher_taps(params, name, terms)}
    detector = build_detector(params.teachers[name].model | teacher_changes)
    found = OnlineTeacher(detector, set(taps.values()), 0.0, torch.device("cpu"))(batch)
    outputs = {source: found[tap] for source, tap in taps.items()}
    statistics = {tap: torch.ones(value.shape[1]) for tap, value in outputs.items()}
    task = Distillation(student, make_recipe(student, terms, statistics), lambda _: outputs)
    return finite_step(task, batch), {tap: list(value.shape) for tap, value in found.items()}


def finite_step(task: SupervisedDetector | Distillation, batch: Batch) -> set[str]:
    """Names of the losses of a forward and a backward pass, of which all that comes out is finite.

    The precision is that of training here: a CPU without bfloat16 takes a quarter of an hour to emulate such a step.
    """
    task.module.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision_here("bf16-mixed") == "bf16-mixed"):
        losses = task.loss(batch, 0.5)
    parts = {name: losses[name] for name in minimised(losses)}
    assert not {name: float(value) for name, value in parts.items() if not (value.isfinite() and value > 0)}
    torch.stack(list(parts.values())).sum().backward()
    for name, parameter in task.module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    return set(parts)


def on_real_keyframes(params: Params, dataroot: Path, folder: Path) -> Params:
    """The profile with the real keyframes instead of trainval."""
    data = f"{{dataroot: {dataroot}, version: {VERSION}, splits: {{train: {SPLIT}, val: {SPLIT}}}}}"
    return overlaid(f"data: {data}\n", folder)


def halved(params: Params, folder: Path) -> Params:
    """The folder's parameters with images of half the height and width."""
    return overlaid(f"input: {{image: {{size: {[length // 2 for length in params.input.image.size]}}}}}\n", folder)


def overlaid(text: str, folder: Path) -> Params:
    """The folder's parameters with other values."""
    lay_text(folder, text)
    return load_params(folder)


def teacher_outputs(params: Params, batch: Batch) -> dict[str, Any]:
    """What the terms read: the untrained LiDAR teacher's map, and the truth in place of what would need training."""
    teacher = OnlineTeacher(build_detector(params.teachers["lidar"].model), ["bev_lift"], 0.0, torch.device("cpu"))
    lifted = teacher(batch)["bev_lift"]
    assert lifted.shape == (1, 256, 128, 128)
    assert 0.01 < (lifted != 0).any(1).float().mean() < 0.9, "the sparse map of the points"
    boxes, labels = batch.boxes[0], batch.labels[0][:, None]
    return {
        "lidar.bev_lift": lifted,
        "lidar.boxes": [torch.cat([boxes, torch.full((len(boxes), 1), 0.9), labels.float()], dim=1)],
        "instance.inst2d": [[instances_of(batch, camera) for camera in range(6)]],
    }


def instances_of(batch: Batch, camera: int) -> ImageInstances:
    """The boxes of the truth in one image, as full rectangles."""
    height, width = batch.images.shape[-2:]
    boxes = transform_boxes(batch.boxes[0], torch.linalg.inv(batch.bev_aug[0]))
    corners = torch.from_numpy(box_corners(boxes.double().numpy())).float()
    cam_SE3_lidar = torch.linalg.inv(batch.lidar_SE3_cam[0, 0, camera])
    points = corners @ cam_SE3_lidar[:3, :3].T + cam_SE3_lidar[:3, 3]
    pixels = points @ (batch.image_aug[0, 0, camera] @ batch.intrinsics[0, 0, camera]).T
    pixels = pixels[..., :2] / pixels[..., 2:]
    limit = torch.tensor([width, height])
    low, high = (limit * 0).maximum(pixels.amin(1)).minimum(limit), pixels.amax(1).maximum(limit * 0).minimum(limit)
    low, high = low.round(), high.round()
    seen = (points[..., 2] > 1).all(1) & (high - low >= 8).all(1)
    masks = np.zeros((int(seen.sum()), height, width), np.uint8)
    rectangles = torch.cat([low, high], dim=1)[seen]
    for mask, (x0, y0, x1, y1) in zip(masks, rectangles.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = 1
    return ImageInstances(rectangles, batch.labels[0][seen], torch.ones(len(masks)), torch.from_numpy(masks))
