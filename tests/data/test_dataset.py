from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from nuscenes.utils.data_classes import LidarPointCloud, RadarPointCloud
from nuscenes.utils.geometry_utils import points_in_box, view_points
from pyquaternion import Quaternion
from torch import Tensor
from torch.utils.data import DataLoader

from data.preparing.build import build_index
from data.reading.batch import Batch, Sample, collate
from data.reading.blobs import BlobError
from data.reading.boxes import boxes_in_range, points_in_boxes, transform_boxes
from data.reading.classes import CATEGORY_TO_CLASS, CLASSES
from data.reading.config import GridConfig, InputConfig
from data.reading.dataset import NuScenesDataset
from data.reading.geometry import inverse, project
from data.reading.index import CAMERAS, LIDAR, RADARS, Index
from data.reading.sensors import depth_map, load_image, load_points, load_radar, read_points

KEYS = [(epoch, position, index) for epoch in (0, 3) for position, index in enumerate((2, 0, 1))]


@pytest.fixture
def dataset(made_index: Index, made_dataroot: Path, config: InputConfig, grid: GridConfig) -> NuScenesDataset:
    return NuScenesDataset(made_index, made_dataroot, "mini_train", config, grid, train=True, seed=5)


def tensors(sample: Sample) -> dict[str, Tensor]:
    return {name: value for name, value in vars(sample).items() if isinstance(value, Tensor)}


def assert_equal(one: Sample, other: Sample) -> None:
    assert (one.token, one.has_previous) == (other.token, other.has_previous)
    for name, value in tensors(one).items():
        torch.testing.assert_close(value, tensors(other)[name], rtol=0, atol=0, equal_nan=True, msg=name)


def devkit_pixels(nusc: Any, sample: dict[str, Any], channel: str, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The devkit's way of LiDAR points [P, 3] into an image, in its own steps and operations."""
    lidar, camera = (nusc.get("sample_data", sample["data"][name]) for name in (LIDAR, channel))
    cloud = LidarPointCloud(np.vstack([points.T, np.zeros(len(points))]).astype(np.float64))
    for data, forward in ((lidar, True), (camera, False)):
        calibration = nusc.get("calibrated_sensor", data["calibrated_sensor_token"])
        pose = nusc.get("ego_pose", data["ego_pose_token"])
        for step in (calibration, pose) if forward else (pose, calibration):
            if forward:
                cloud.rotate(Quaternion(step["rotation"]).rotation_matrix)
                cloud.translate(np.array(step["translation"]))
            else:
                cloud.translate(-np.array(step["translation"]))
                cloud.rotate(Quaternion(step["rotation"]).rotation_matrix.T)
    intrinsic = np.array(nusc.get("calibrated_sensor", camera["calibrated_sensor_token"])["camera_intrinsic"])
    return view_points(cloud.points[:3], intrinsic, normalize=True)[:2].T, cloud.points[2]


def check_projections(index: Index, dataroot: Path, nusc: Any) -> None:
    for row in range(len(index)):
        record = index.sample(row)
        points = read_points(dataroot / record.lidar.files[0], record.token)[:, :3].astype(np.float64)
        camera_SE3_lidar = inverse(inverse(record.global_SE3_lidar) @ record.cameras.global_SE3_camera)
        pixels, depth = project(points, camera_SE3_lidar, record.cameras.intrinsics)
        for n, channel in enumerate(CAMERAS):
            expected, expected_depth = devkit_pixels(nusc, nusc.get("sample", record.token), channel, points)
            ahead = expected_depth > 0.5
            assert ahead.sum() > 20
            np.testing.assert_allclose(depth[n], expected_depth, atol=1e-8)
            np.testing.assert_allclose(pixels[n, ahead], expected[ahead], atol=1e-6)


def test_projections_equal_the_devkits(made_index: Index, made_dataroot: Path, devkit: Any) -> None:
    check_projections(made_index, made_dataroot, devkit)


def test_projections_equal_the_devkits_on_real_keyframes(
    real_index: Index, real_dataroot: Path, real_devkit: Any
) -> None:
    check_projections(real_index, real_dataroot, real_devkit)


def test_projections_equal_the_devkits_in_the_city(city_index: Index, city: Path, city_devkit: Any) -> None:
    check_projections(city_index, city, city_devkit)


def test_a_city_sample_holds_everything(city_index: Index, city: Path, config: InputConfig, grid: GridConfig) -> None:
    dataset = NuScenesDataset(city_index, city, "train", config, grid, train=True)
    batch = collate([dataset[0, position, position] for position in range(3)])
    assert batch.has_previous.tolist() == [False, True, True]
    for points, radar, boxes in zip(batch.points, batch.radar, batch.boxes, strict=True):
        assert len(points) > 1000
        assert len(points[:, 4].unique()) == 3
        assert len(radar) > 0
        assert len(boxes) > 0
    assert (batch.depth > 0).float().mean() > 0.05


def test_points_inside_real_boxes_match_the_devkit_and_the_annotated_counts(
    real_index: Index, real_dataroot: Path, real_devkit: Any
) -> None:
    for row, inside, annotated in ((0, 984, 999), (1, 1530, 1541)):
        record = real_index.sample(row)
        points = torch.from_numpy(read_points(real_dataroot / record.lidar.files[0], record.token)).double()
        boxes = torch.from_numpy(record.annotations.boxes)
        counted = points_in_boxes(points, boxes).sum(dim=0).numpy()
        lidar = real_devkit.get("sample", record.token)["data"][LIDAR]
        theirs = [points_in_box(box, points[:, :3].numpy().T).sum() for box in real_devkit.get_sample_data(lidar)[1]]
        np.testing.assert_array_equal(counted, theirs)
        assert (counted.sum(), record.annotations.num_lidar_points.sum()) == (inside, annotated)


def test_sweeps_equal_the_devkits(made_index: Index, made_dataroot: Path, devkit: Any) -> None:
    record = made_index.sample(2)
    sample = devkit.get("sample", record.token)
    ours = load_points(made_dataroot, record.token, record.lidar, 4, record.global_SE3_lidar)
    theirs, age = LidarPointCloud.from_file_multisweep(devkit, sample, LIDAR, LIDAR, nsweeps=4, min_distance=1.0)
    np.testing.assert_allclose(ours[:, :3], theirs.points[:3].T, atol=2e-4)
    np.testing.assert_allclose(ours[:, 3] * 255, theirs.points[3], rtol=1e-6)
    np.testing.assert_allclose(ours[:, 4], age[0], atol=1e-6)
    assert len(np.unique(ours[:, 4])) == 4


def test_radar_equals_the_devkits(made_index: Index, made_dataroot: Path, devkit: Any) -> None:
    record = made_index.sample(1)
    sample = devkit.get("sample", record.token)
    ours = load_radar(made_dataroot, record.token, record.radars, record.timestamp, record.global_SE3_lidar)
    theirs, ages, velocities = [], [], []
    for channel in RADARS:
        cloud, age = RadarPointCloud.from_file_multisweep(devkit, sample, channel, LIDAR, nsweeps=6, min_distance=0.0)
        theirs.append(cloud.points.T)
        ages.append(age[0])
        data = devkit.get("sample_data", sample["data"][channel])
        turn = Quaternion()
        for table, key in (("calibrated_sensor", "calibrated_sensor_token"), ("ego_pose", "ego_pose_token")):
            turn = Quaternion(devkit.get(table, data[key])["rotation"]) * turn
        velocity = np.zeros((3, len(age[0])))
        velocity[:2] = cloud.points[8:10]
        turned = record.global_SE3_lidar[:3, :3].T @ turn.rotation_matrix @ velocity
        velocities.append(turned[:2].T)
    expected = np.concatenate(theirs)
    np.testing.assert_allclose(ours[:, :3], expected[:, :3], atol=2e-4)
    np.testing.assert_allclose(ours[:, 3], expected[:, 5], rtol=1e-6)
    np.testing.assert_allclose(ours[:, 6], np.concatenate(ages), atol=1e-6)
    newest = ours[:, 6] == 0
    np.testing.assert_allclose(ours[newest, 4:6], np.concatenate(velocities)[newest], atol=1e-4)


def test_the_depth_map_is_the_nearest_point_of_each_cell(real_index: Index, real_dataroot: Path) -> None:
    record, stride, size = real_index.sample(0), 16, (128, 352)
    points = load_points(real_dataroot, record.token, record.lidar, 1, record.global_SE3_lidar)[::7]
    camera_SE3_lidar = inverse(inverse(record.global_SE3_lidar) @ record.cameras.global_SE3_camera)
    scale = np.diag([0.22, 0.22, 1.0]) @ np.array([[1, 0, 0], [0, 1, -300.0], [0, 0, 1]])
    matrices = scale @ record.cameras.intrinsics
    expected = np.zeros((6, size[0] // stride, size[1] // stride))
    for n in range(6):
        for x, y, z in points[:, :3].astype(np.float64):
            u, v, depth = matrices[n] @ (camera_SE3_lidar[n] @ [x, y, z, 1.0])[:3]
            column, row = int(np.floor((u / depth + 0.5) / stride)), int(np.floor((v / depth + 0.5) / stride))
            if depth > 0 and 0 <= row < expected.shape[1] and 0 <= column < expected.shape[2]:
                held = expected[n, row, column]
                expected[n, row, column] = min(held, depth) if held else depth
    found = depth_map(points, camera_SE3_lidar, matrices, size, stride)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (found > 0).mean() > 0.1


def test_a_sample_has_the_shapes_of_the_batch(dataset: NuScenesDataset) -> None:
    batch = collate([dataset[0, 0, 1], dataset[0, 1, 0]])
    assert batch.tokens == [dataset.tokens[1], dataset.tokens[0]]
    assert batch.images.shape == (2, 2, 6, 3, 64, 128)
    assert batch.images.dtype == torch.uint8
    assert batch.intrinsics.shape == batch.image_aug.shape == (2, 2, 6, 3, 3)
    assert batch.lidar_SE3_cam.shape == (2, 2, 6, 4, 4)
    assert batch.bev_aug.shape == (2, 4, 4)
    assert batch.has_previous.tolist() == [True, False]
    assert batch.depth.shape == (2, 6, 4, 8)
    for points, radar, boxes, labels in zip(batch.points, batch.radar, batch.boxes, batch.labels, strict=True):
        assert (points.shape[1], radar.shape[1], boxes.shape[1]) == (5, 7, 9)
        assert len(boxes) == len(labels) > 0
        assert labels.dtype == torch.int64
        assert points[:, 3].min() >= 0
        assert points[:, 3].max() <= 1
    batch.teacher = {"lidar.boxes": [torch.zeros(3, 11)], "lidar.bev_lift": torch.zeros(2, 4, 8, 8)}
    moved = batch.to("meta")
    assert isinstance(moved, Batch)
    assert moved.images.device.type == moved.teacher["lidar.boxes"][0].device.type == "meta"
    assert moved.tokens == batch.tokens


def test_everything_follows_the_bev_matrix(dataset: NuScenesDataset, grid: GridConfig) -> None:
    plain = NuScenesDataset(
        dataset.index, dataset.dataroot, "mini_train", dataset.config, grid, train=False, modalities=dataset.modalities
    )
    wide = GridConfig(range=102.4, cell=1.6, z=(-50, 50))
    plain.grid = dataset.grid = wide
    for key in KEYS:
        augmented, canonical = dataset[key], plain[key]
        matrix = augmented.bev_aug
        assert not torch.equal(matrix, torch.eye(4))
        assert torch.equal(canonical.bev_aug, torch.eye(4))
        expected = canonical.points[:, :3] @ matrix[:3, :3].T
        torch.testing.assert_close(augmented.points[:, :3], expected, rtol=0, atol=1e-4)
        moved = transform_boxes(canonical.boxes, matrix)
        torch.testing.assert_close(augmented.boxes, moved, rtol=0, atol=1e-4, equal_nan=True)
        expected = canonical.radar[:, 4:6] @ matrix[:2, :2].T
        torch.testing.assert_close(augmented.radar[:, 4:6], expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(augmented.lidar_SE3_cam, canonical.lidar_SE3_cam)


def test_only_seen_boxes_inside_the_grid_are_kept(dataset: NuScenesDataset) -> None:
    dataset.grid = GridConfig(range=25.6, cell=1.6, z=(-1.0, 2.0))
    annotations = dataset.index.sample(0).annotations
    assert not annotations.valid.all()
    for key in KEYS:
        sample = dataset[key]
        assert boxes_in_range(sample.boxes, 25.6).all()
        assert (sample.points[:, :2].abs() < 25.6).all()
        assert ((sample.points[:, 2] > -1) & (sample.points[:, 2] < 2)).all()
        assert len(sample.boxes) <= dataset.index.sample(key[2]).annotations.valid.sum()


def test_classes_of_samples_are_the_devkits(dataset: NuScenesDataset, devkit: Any) -> None:
    expected = []
    for token in dataset.tokens:
        found = [devkit.get("sample_annotation", name) for name in devkit.get("sample", token)["anns"]]
        seen = {one["category_name"] for one in found if one["num_lidar_pts"] + one["num_radar_pts"] > 0}
        expected.append({CLASSES.index(CATEGORY_TO_CLASS[name]) for name in seen & CATEGORY_TO_CLASS.keys()})
    assert dataset.classes() == expected
    assert len(set(map(frozenset, expected))) > 1


def test_the_previous_frame_is_aligned_by_ego_motion(dataset: NuScenesDataset, devkit: Any) -> None:
    record, previous = dataset.index.sample(2), dataset.index.sample(1)
    sample = dataset[0, 0, 2]
    point = np.array([12.0, 20.0, 1.0])
    in_global = record.global_SE3_lidar @ [*point, 1.0]
    for n, channel in enumerate(CAMERAS):
        in_previous = (inverse(previous.global_SE3_lidar) @ in_global)[None, :3]
        theirs, depth = devkit_pixels(devkit, devkit.get("sample", previous.token), channel, in_previous)
        in_camera = torch.linalg.inv(sample.lidar_SE3_cam[1, n].double()) @ torch.tensor([*point, 1.0]).double()
        pixel = sample.intrinsics[1, n].double() @ in_camera[:3]
        np.testing.assert_allclose(in_camera[2], depth[0], atol=1e-4)
        np.testing.assert_allclose(pixel[:2] / pixel[2], theirs[0], atol=1e-2)
    assert torch.equal(sample.image_aug[0], sample.image_aug[1])
    assert not torch.equal(sample.images[0], sample.images[1])
    first = dataset[0, 0, 0]
    assert not first.has_previous
    assert torch.equal(first.images[0], first.images[1])
    assert torch.equal(first.lidar_SE3_cam[0], first.lidar_SE3_cam[1])


def test_samples_depend_on_their_key_and_seed_alone(dataset: NuScenesDataset) -> None:
    first = [dataset[key] for key in KEYS]
    for sample, again in zip(first, [dataset[key] for key in reversed(KEYS)][::-1], strict=True):
        assert_equal(sample, again)
    assert not torch.equal(first[0].bev_aug, first[3].bev_aug)  # another epoch
    assert not torch.equal(first[0].bev_aug, dataset[0, 9, 2].bev_aug)  # another position
    dataset.seed = 6
    assert not torch.equal(first[0].bev_aug, dataset[KEYS[0]].bev_aug)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_nothing(dataset: NuScenesDataset, workers: int) -> None:
    loader = DataLoader(dataset, sampler=KEYS, batch_size=None, num_workers=workers)
    for sample, key in zip(loader, KEYS, strict=True):
        assert_equal(sample, dataset[key])


def test_boxes_of_other_scenes_are_left_out_and_nothing_else(
    city_index: Index, city: Path, config: InputConfig, grid: GridConfig
) -> None:
    whole = NuScenesDataset(city_index, city, "val", config, grid, train=True, seed=5)
    few = NuScenesDataset(city_index, city, "val", config, grid, train=True, seed=5, labelled="val[::2]")
    known = set(city_index.rows("val[::2]").tolist())
    expected = [int(row) in known for row in whole.rows]
    assert few.labelled.tolist() == expected
    assert any(expected)
    assert not all(expected)
    assert whole.labelled.all()
    for index, labelled in enumerate(expected):
        one, other = whole[index], few[index]
        assert len(one.boxes)
        assert other.labelled == labelled
        if labelled:
            assert_equal(one, other)
            continue
        assert len(other.boxes) == len(other.labels) == 0
        assert_equal(one, dataclasses.replace(other, boxes=one.boxes, labels=one.labels, labelled=True))
    assert [classes if labelled else set() for classes, labelled in zip(whole.classes(), expected, strict=True)] == (
        few.classes()
    )
    assert collate([few[0], few[1]]).labelled.tolist() == expected[:2]


def count_decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are decoded from now on."""
    files: list[str] = []

    def counted(path: Path, *rest: Any) -> Any:
        files.append(path.name)
        return load_image(path, *rest)

    monkeypatch.setattr("data.reading.dataset.load_image", counted)
    return files


def still(config: InputConfig, **image: Any) -> InputConfig:
    """The same input with images that training sees as they are, but for `image`."""
    plain = {"resize": (1.0, 1.0), "rotate": 0.0, "flip": 0.0}
    return config.model_copy(update={"image": config.image.model_copy(update=plain | image)})


@pytest.mark.parametrize("image", [{}, {"flip": 0.5}, {"rotate": 3.0}, {"resize": (0.9, 1.1)}])
def test_images_that_nothing_augments_are_decoded_once(
    made_index: Index,
    made_dataroot: Path,
    config: InputConfig,
    grid: GridConfig,
    monkeypatch: pytest.MonkeyPatch,
    image: dict[str, Any],
) -> None:
    dataset = NuScenesDataset(made_index, made_dataroot, "mini_train", still(config, **image), grid, train=True, seed=5)
    fresh = [
        NuScenesDataset(made_index, made_dataroot, "mini_train", still(config, **image), grid, train=True, seed=5)[key]
        for key in KEYS
    ]
    files = count_decoded(monkeypatch)
    for key, expected in zip(KEYS, fresh, strict=True):
        assert_equal(dataset[key], expected)
    once = len(files) == len(set(files))
    assert once == (not image)


def test_of_more_images_than_fit_two_keyframes_stay(
    made_index: Index, made_dataroot: Path, config: InputConfig, grid: GridConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.reading.dataset.KEPT_BYTES", 0)
    dataset = NuScenesDataset(made_index, made_dataroot, "mini_train", still(config), grid, train=True, seed=5)
    files = count_decoded(monkeypatch)
    for key in (0, 0, 1, 2, 0):  # a keyframe, the same, the two that follow it, the first again
        dataset[key]
    frames = [dataset._frames(dataset.index.sample(int(row))) for row in dataset.rows]
    assert dataset.config.frames == 2
    assert [frame.token for frame in frames[1]] == [frames[1][0].token, frames[0][0].token]
    assert len(files) == 4 * len(CAMERAS)


def test_a_camera_student_needs_no_lidar_and_no_boxes(dataset: NuScenesDataset, tmp_path: Path) -> None:
    blind = Path(shutil.copytree(dataset.dataroot, tmp_path / "blind"))
    for path in [*blind.rglob("*.bin")]:
        path.unlink()
    student = NuScenesDataset(dataset.index, blind, "mini_val", dataset.config, dataset.grid, train=False)
    batch = collate([student[0], student[1]])
    assert batch.images.shape == (2, 2, 6, 3, 64, 128)
    assert [len(part) for part in (*batch.points, *batch.boxes, *batch.labels)] == [0] * 6
    assert batch.depth.numel() == 0
    assert len(batch.radar[1]) > 0
    with pytest.raises(ValueError, match=r"modalities \['sonar'\].*points"):
        NuScenesDataset(
            dataset.index, blind, "mini_val", dataset.config, dataset.grid, train=False, modalities={"sonar"}
        )


def test_a_sample_without_boxes(made_dataroot: Path, tmp_path: Path, config: InputConfig, grid: GridConfig) -> None:
    copy = Path(shutil.copytree(made_dataroot, tmp_path / "dataroot"))
    (copy / "v1.0-mini" / "sample_annotation.json").write_text("[]")
    assert build_index(copy, "v1.0-mini", ["mini_train"], tmp_path / "index", radar=True).boxes == 0
    dataset = NuScenesDataset(tmp_path / "index", copy, "mini_train", config, grid, train=True)
    batch = collate([dataset[0], dataset[1]])
    assert [tuple(boxes.shape) for boxes in batch.boxes] == [(0, 9), (0, 9)]
    assert [labels.dtype for labels in batch.labels] == [torch.int64] * 2


def corrupt(path: Path) -> None:
    """Keep the markers at both ends, destroy what is between."""
    content = path.read_bytes()
    path.write_bytes(content[:2] + bytes(len(content) - 4) + content[-2:])


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("camera", corrupt, "cannot be decoded"),
        ("camera", lambda path: path.write_bytes(path.read_bytes()[:-100]), "truncated JPEG"),
        ("camera", lambda path: cv2.imwrite(str(path), np.zeros((90, 150, 3))), "not the 160x90 image"),
        ("camera", Path.unlink, "is missing"),
        ("lidar", lambda path: path.write_bytes(path.read_bytes()[:-1]), "7999 bytes is not a multiple of 20"),
        ("lidar", lambda path: path.write_bytes(b""), "is empty"),
        ("radar", lambda path: path.write_bytes(path.read_bytes()[:-9]), "is truncated"),
        ("radar", lambda path: path.write_bytes(b"VERSION 0.7\n"), "not a RADAR point cloud"),
    ],
)
def test_a_file_that_breaks_later_is_named_with_its_token(
    dataset: NuScenesDataset, tmp_path: Path, kind: str, damage: Any, message: str
) -> None:
    dataset.dataroot = Path(shutil.copytree(dataset.dataroot, tmp_path / "dataroot"))
    record = dataset.index.sample(0)
    files = {"camera": record.cameras.files[2], "lidar": record.lidar.files[0], "radar": record.radars.files[0]}
    damage(dataset.dataroot / files[kind])
    with pytest.raises(BlobError, match=rf"{files[kind]} .*{message}.*{record.token}"):
        dataset[0]
