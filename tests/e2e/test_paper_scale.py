"""The paper-scale profiles: everything builds, and a training step at full resolution on a real keyframe works.

The step of the large profile takes a minute of CPU time and 6 GB.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mmdet.registry
import mmdet3d
import numpy as np
import pytest
import torch
from mmdet3d.registry import MODELS
from mmengine.config import Config
from torch import nn

from data.batch import Batch, collate
from data.boxes import box_corners, transform_boxes
from data.build import build_index
from data.classes import CLASSES
from data.instances import ImageInstances
from models.detector import build_detector
from models.distill import TermConfig
from models.segmenter import build_segmenter
from pipeline.params import Params, load_params
from pipeline.profiles import apply_profile, lay_over
from pipeline.sampler import ClassBalance
from pipeline.seeding import MODEL, seed_everything
from pipeline.trainer import minimised
from stages.distill import Distillation, make_recipe
from stages.inputs import INDEX, training_dataset
from stages.sources import OnlineTeacher
from tests.conftest import ROOT

pytestmark = pytest.mark.xdist_group("paper")
VERSION, SPLIT = "v1.0-mini", "mini_train"
CONFIGS = Path(mmdet3d.__file__).parent / ".mim/configs"
ROWS = {"A0": 0, "A1": 2, "A2": 1, "A3": 1, "A4": 4, "A5": 1, "A6": 5}
"""Terms of the rows of the paper's ablation."""
DEPTH = {"nuscenes-x3kd-r50": 50, "nuscenes-x3kd-r101": 101}


@pytest.fixture(params=DEPTH)
def params(request: pytest.FixtureRequest, tmp_path: Path) -> Params:
    """A profile laid over the project's params.yaml."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    return apply_profile(request.param, tmp_path)


def test_every_part_builds_with_the_sizes_of_the_paper(params: Params) -> None:
    """Shapes of methods.md A.1, the rows of the ablation, and what a segmenter and a LiDAR teacher are."""
    student = build_detector(params.student("x3kd").model)
    assert student.image_backbone.depth == DEPTH[params.profile]
    assert student.tap_channels == {"pv": 512, "depth": 112, "bev_lift": 80, "bev_prev": 80, "bev_fused": 160,
                                    "bev_neck": 256}
    assert (student.grid.size, student.stride, params.input.depth_stride) == (128, 16, 16)
    lidar = build_detector(params.teachers["lidar"].model)
    assert lidar.tap_channels == {"bev_lift": 256, "bev_neck": 512}
    zoo = Config.fromfile(CONFIGS / "_base_/models/centerpoint_voxel01_second_secfpn_nus.py").model
    for part, theirs in {"middle": "pts_middle_encoder", "backbone": "pts_backbone", "neck": "pts_neck"}.items():
        assert shapes(getattr(lidar, part)) == shapes(MODELS.build(zoo[theirs])), part
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
        terms = {term: TermConfig(**config) for term, config in params.variants[name].terms.items()}
        assert make_recipe(student, terms, statistics).terms.keys() == terms.keys()
    train = params.student("x3kd").train
    assert (train.schedule, train.balanced, train.batch_size) == ("multi_step", True, 64)


def shapes(module: nn.Module) -> dict[str, list[int]]:
    """Of the weights and buffers, by name."""
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.timeout(900)
def test_a_training_step_on_a_real_keyframe(params: Params, real_dataroot: Path, tmp_path: Path) -> None:
    """All five terms of X³KD in the profile's precision: losses and gradients are finite, and reach every weight."""
    params = on_real_keyframes(params, real_dataroot, tmp_path)
    build_index(real_dataroot, VERSION, [SPLIT], tmp_path / INDEX, sweeps=params.input.sweeps)
    settings, terms = params.student("x3kd"), params.variants["x3kd"].terms
    seed_everything(MODEL, 0)
    student = build_detector(settings.model)
    configs = {name: TermConfig(**config) for name, config in terms.items()}
    samples = training_dataset(tmp_path, params, student, 0, SPLIT)
    samples.modalities |= {"points"}
    assert len(ClassBalance(samples.classes())) >= 1
    batch = collate([samples[(0, 0, 0)]])
    assert batch.images.shape == (1, 2, 6, 3, *params.input.image.size)
    outputs = teacher_outputs(params, batch)
    task = Distillation(student, make_recipe(student, configs, {"lidar.bev_lift": torch.ones(256)}), lambda _: outputs)
    task.module.train()
    assert settings.train.precision == "bf16-mixed"
    with torch.autocast("cpu", torch.bfloat16):
        losses = task.loss(batch, 0.5)
    parts = {name: losses[name] for name in minimised(losses)}
    assert parts.keys() == {"heatmap", "box", "depth", *(f"distill/{name}" for name in terms)}
    assert not {name: float(value) for name, value in parts.items() if not (value.isfinite() and value > 0)}
    torch.stack(list(parts.values())).sum().backward()
    for name, parameter in task.module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def on_real_keyframes(params: Params, dataroot: Path, folder: Path) -> Params:
    """The profile with the real keyframes instead of trainval."""
    path = folder / "params.yaml"
    data = f"{{dataroot: {dataroot}, version: {VERSION}, splits: {{train: {SPLIT}, val: {SPLIT}}}}}"
    path.write_text(lay_over(path.read_text(), f"data: {data}\n", "test"))
    return load_params(path)


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
