"""Our CenterHead against mmdet3d's own, on random boxes and on the real keyframes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmdet3d.models.dense_heads import CenterHead
from mmdet3d.structures import LiDARInstance3DBoxes
from mmengine.structures import InstanceData
from torch import Tensor

from models.head.center_head import GridCenterHead
from models.head.targets import REGRESSION, Targets

TASKS = [
    ["car"],
    ["truck", "construction_vehicle"],
    ["bus", "trailer"],
    ["barrier"],
    ["motorcycle", "bicycle"],
    ["pedestrian", "traffic_cone"],
]
SEPARATE = {"type": "SeparateHead", "init_bias": -2.19, "final_kernel": 3}
REACH = 51.2


def heads(
    cell: float, radius: int, tasks: list[list[str]] = TASKS, nms: float = 0.0
) -> tuple[GridCenterHead, CenterHead]:
    """Ours and mmdet3d's with the same settings."""
    size = round(2 * REACH / cell)
    ours = GridCenterHead(
        {"range": REACH, "cell": cell, "z": [-5, 3]},
        tasks,
        4,
        separate_head=SEPARATE,
        share_conv_channel=8,
        min_radius=radius,
        nms_radius=nms,
        candidates=60,
        score_threshold=0.1,
        max_detections=10_000,
    )
    limits = [-REACH, -REACH, -5, REACH, REACH, 3]
    train = {
        "max_objs": 500,
        "dense_reg": 1,
        "grid_size": [size, size, 1],
        "point_cloud_range": limits,
        "voxel_size": [cell, cell, 8],
        "out_size_factor": 1,
        "gaussian_overlap": 0.1,
        "min_radius": radius,
        "code_weights": [1.0] * 10,
    }
    # mmdet3d compares the squared distance with its radius.
    test = {"nms_type": "circle", "min_radius": [nms**2] * len(tasks), "post_max_size": 10_000}
    coder = {
        "type": "CenterPointBBoxCoder",
        "pc_range": limits[:2],
        "out_size_factor": 1,
        "voxel_size": [cell, cell],
        "max_num": 60,
        "code_size": 9,
        "score_threshold": 0.1,
        "post_center_range": [-REACH - 10, -REACH - 10, -10, REACH + 10, REACH + 10, 10],
    }
    theirs = CenterHead(
        4,
        [{"num_class": len(t), "class_names": t} for t in tasks],
        coder,
        {name: (channels, 2) for name, channels in REGRESSION.items()},
        separate_head=dict(SEPARATE),
        share_conv_channel=8,
        train_cfg=train,
        test_cfg=test,
        loss_cls={"type": "mmdet.GaussianFocalLoss", "reduction": "mean"},
        loss_bbox={"type": "mmdet.L1Loss", "reduction": "mean", "loss_weight": 0.25},
    )
    return ours, theirs


def instances(boxes: Tensor, labels: Tensor) -> InstanceData:
    return InstanceData(bboxes_3d=LiDARInstance3DBoxes(boxes, box_dim=9), labels_3d=labels)


def random_boxes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Boxes of all sizes, some outside the grid, some without velocity."""
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(count, 9, generator=generator) * torch.tensor([110, 110, 4, 12, 4, 4, 6.2, 10, 10])
    boxes -= torch.tensor([55, 55, 3, 0, 0, 0, 3.1, 5, 5])
    boxes[::5, 7:] = torch.nan
    return boxes, torch.randint(0, 10, (count,), generator=generator)


def targets_by_task(head: GridCenterHead, batch: list[InstanceData]) -> tuple[list[Tensor], ...]:
    """Our targets as mmdet3d's `get_targets` returns its own: heatmaps, codes, cells and masks by task."""
    targets = head.targets([gt.bboxes_3d.tensor for gt in batch], [gt.labels_3d for gt in batch])
    heatmaps = list(targets.heatmap.split([len(task) for task in head.class_names], dim=1))
    return heatmaps, *(list(values.unbind(1)) for values in (targets.code, targets.cell, targets.valid.byte()))


def assert_same_targets(ours: tuple[list[Tensor], ...], theirs: tuple[list[Tensor], ...]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        for task_mine, task_other in zip(mine, other, strict=True):
            torch.testing.assert_close(task_mine.float(), task_other.float(), rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(("cell", "radius"), [(1.6, 1), (0.8, 2), (0.4, 2)])
def test_targets_equal_on_random_boxes(cell: float, radius: int) -> None:
    ours, theirs = heads(cell, radius)
    batch = [instances(*random_boxes(count, seed)) for seed, count in enumerate((60, 0, 25, 1))]
    assert_same_targets(targets_by_task(ours, batch), theirs.get_targets(batch))


def test_targets_equal_without_any_box() -> None:
    ours, theirs = heads(1.6, 1)
    batch = [instances(torch.zeros(0, 9), torch.zeros(0, dtype=torch.long))] * 2
    assert_same_targets(targets_by_task(ours, batch), theirs.get_targets(batch))


def real_instances(dataroot: Path) -> list[InstanceData]:
    """The boxes of both real keyframes in the LiDAR frame, read with the devkit."""
    from nuscenes.eval.detection.utils import category_to_detection_name
    from nuscenes.nuscenes import NuScenes

    nusc = NuScenes("v1.0-mini", str(dataroot), verbose=False)
    names = [name for task in TASKS for name in task]
    found = []
    for sample in nusc.sample:
        _, boxes, _ = nusc.get_sample_data(sample["data"]["LIDAR_TOP"])
        boxes = [box for box in boxes if category_to_detection_name(box.name)]
        rows = [
            [
                *box.center[:2],
                box.center[2] - box.wlh[2] / 2,
                *box.wlh[[1, 0, 2]],
                box.orientation.yaw_pitch_roll[0],
                *nusc.box_velocity(box.token)[:2],
            ]
            for box in boxes
        ]
        labels = [names.index(category_to_detection_name(box.name)) for box in boxes]
        found.append(instances(torch.tensor(np.array(rows)).float(), torch.tensor(labels)))
    return found


def test_targets_equal_on_the_real_keyframes(real_dataroot: Path) -> None:
    batch = real_instances(real_dataroot)
    assert sum(len(sample.labels_3d) for sample in batch) > 60
    for cell, radius in ((1.6, 1), (0.8, 2)):
        ours, theirs = heads(cell, radius)
        assert_same_targets(targets_by_task(ours, batch), theirs.get_targets(batch))


def test_weights_and_maps_equal() -> None:
    """The same draws under the same names, so that a checkpoint of either fits the other."""
    torch.manual_seed(0)
    ours, theirs = heads(1.6, 1)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 16, 16)
    for mine, other in zip(ours(x), theirs.forward_single(x), strict=True):
        assert list(mine) == list(other)
        assert all(torch.equal(mine[name], other[name]) for name in mine)


def random_maps(tasks: list[list[str]], size: int, batch: int = 2, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            name: torch.randn(batch, channels, size, size, generator=generator)
            for name, channels in (REGRESSION | {"heatmap": len(names)}).items()
        }
        for names in tasks
    ]


def test_losses_equal_on_random_maps_with_known_velocities() -> None:
    ours, theirs = heads(1.6, 1)
    maps = random_maps(TASKS, 64)
    batch = [instances(boxes.nan_to_num(0.0), labels) for boxes, labels in (random_boxes(40, 0), random_boxes(9, 1))]
    mine = ours.losses(maps, ours.targets([b.bboxes_3d.tensor for b in batch], [b.labels_3d for b in batch]))
    reference = theirs.loss_by_feat([[dict(task)] for task in maps], batch)
    for name, key in (("heatmap", "loss_heatmap"), ("box", "loss_bbox")):
        total = sum(value for task, value in reference.items() if task.endswith(key))
        torch.testing.assert_close(mine[name], total, rtol=1e-4, atol=1e-4)


def test_samples_without_labels_do_not_count() -> None:
    """The losses of a batch are then those of its labelled samples alone, and the others get no gradient."""
    ours, _ = heads(1.6, 1)
    maps = [{name: value.requires_grad_() for name, value in task.items()} for task in random_maps(TASKS, 64)]
    known = random_boxes(40, 0)
    none = (known[0][:0], known[1][:0])
    found = ours.losses(maps, ours.targets(*zip(known, none, strict=True)), torch.tensor([True, False]))
    alone = [{name: value[:1] for name, value in task.items()} for task in maps]
    expected = ours.losses(alone, ours.targets(*zip(known, strict=True)))
    assert expected["heatmap"] > 0
    assert expected["box"] > 0
    torch.testing.assert_close(found, expected)
    sum(found.values()).backward()
    for task in maps:
        assert all(value.grad[0].abs().sum() > 0 and value.grad[1].abs().sum() == 0 for value in task.values())
    nothing = ours.losses(maps, ours.targets(*zip(none, none, strict=True)), torch.tensor([False, False]))
    assert all(value == 0 for value in nothing.values())


def detections(head: CenterHead, maps: list[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    found = head.predict_by_feat([[dict(task)] for task in maps], [{"box_type_3d": LiDARInstance3DBoxes}] * 2)
    return [(sample.bboxes_3d.tensor, sample.scores_3d, sample.labels_3d) for sample in found]


def in_order(boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Any, ...]:
    order = np.lexsort((boxes[:, 0].numpy(), scores.numpy(), labels.numpy()))
    return boxes[order], scores[order], labels[order]


@pytest.mark.parametrize("nms", [0.0, 2.0, 6.0])
def test_decoded_boxes_equal(nms: float) -> None:
    """One class per task, because our NMS works inside classes and mmdet3d's inside tasks."""
    tasks = [[name] for task in TASKS for name in task]
    ours, theirs = heads(1.6, 1, tasks, nms)
    maps = random_maps(tasks, 64)
    expected = detections(theirs, maps)
    for mine, reference in zip(ours.decode(maps), expected, strict=True):
        assert len(mine.scores) == len(reference[1]) > 100
        assert (mine.scores.diff() <= 0).all()
        for value, other in zip(in_order(*mine), in_order(*reference), strict=True):
            torch.testing.assert_close(value.double(), other.double(), rtol=1e-5, atol=1e-4)


def test_targets_decode_to_the_boxes_they_came_from() -> None:
    ours, _ = heads(0.8, 2)
    boxes, labels = random_boxes(30, 3)
    boxes[:, 7:] = 1.0
    targets = ours.targets([boxes], [labels])
    maps = maps_of(targets, ours)
    found = ours.decode(maps)[0]
    kept = found.scores > 0.9
    inside = ours.targets.encode(boxes, labels).inside
    expected = in_order(boxes[inside], torch.ones(int(inside.sum())), labels[inside])
    actual = in_order(found.boxes[kept], torch.ones(int(kept.sum())), found.labels[kept])
    for index in (0, 2):
        torch.testing.assert_close(actual[index], expected[index], rtol=1e-4, atol=1e-3)


def maps_of(targets: Targets, head: GridCenterHead) -> list[dict[str, Tensor]]:
    """Head maps that say exactly what the targets say."""
    size = head.grid.size
    codes = torch.zeros(len(TASKS), 10, size * size)
    for task in range(len(TASKS)):
        valid = targets.valid[0, task]
        codes[task][:, targets.cell[0, task, valid]] = targets.code[0, task, valid].T
    logits = torch.logit(targets.heatmap.clamp(1e-6, 1 - 1e-6)).split([len(task) for task in TASKS], dim=1)
    parts = codes.view(len(TASKS), 10, size, size).split(list(REGRESSION.values()), dim=1)
    return [
        {name: part[task][None] for name, part in zip(REGRESSION, parts, strict=True)} | {"heatmap": logits[task]}
        for task in range(len(TASKS))
    ]
