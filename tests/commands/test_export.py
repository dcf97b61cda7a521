"""Exported students: the files compute what the published weights compute, hold them alone, and say how to be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from config.files import load_params
from config.nested import merge
from data.preparing.build import build_index
from models.detectors.build import build_detector
from models.detectors.detector import Detector
from models.ports import Detections
from pipeline.commands import export
from pipeline.commands.export import Student, inputs_of
from pipeline.commands.export_check import EAGER, TOLERANCE, box_difference, compare, decoded
from stages.context import StageError
from stages.cost import parameters_of
from stages.inputs.weights import WEIGHTS, checksum_of, load_detector, save_detector
from tests.models.factory import (
    COMPENSATION,
    RADAR_MAP,
    awaken,
    bevformer_config,
    camera_config,
    fusion_config,
    head_config,
    lidar_config,
    radar_config,
    random_batch,
    simulated_config,
    trained,
)
from tests.params_files import read_params, write_params

ROOT = Path(__file__).resolve().parents[2]
KEY = "two-words-3"


def grown_up(config: dict[str, Any]) -> Detector:
    """A detector as after training: running statistics of its own, compensations that act, and scores that differ."""
    torch.manual_seed(0)
    detector = build_detector(config)
    if config.get("bev_compensation"):
        awaken(detector)
    if config["type"] == "BEVFormer":
        trained(detector.get_submodule("encoder"), 0.1)
    for module in detector.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    for task in detector.head.task_heads:
        nn.init.normal_(task.output.weight, std=0.3)
        nn.init.normal_(task.output.bias)
    return detector.eval()


@pytest.fixture(scope="module")
def root(city: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with an index of a city, and the weights of a student, of a LiDAR teacher and of a fusion teacher."""
    root = tmp_path_factory.mktemp("project")
    build_index(city, "v1.0-trainval", ("train", "val"), root / "outputs/index")
    overlay = {
        "data": {"worlds": [], "dataroot": str(city)},
        "input": {"image": {"size": [32, 64]}},
        "evaluate": {"score_threshold": 0.3},
    }
    write_params(root, merge(read_params(ROOT), overlay))
    models = {f"students/{KEY}": camera_config(), "teachers/lidar": lidar_config(), "teachers/fusion": fusion_config()}
    for folder, config in models.items():
        save_detector(root / "outputs" / folder, config, grown_up(config).state_dict())
    return root


@pytest.fixture(scope="module")
def exported(root: Path) -> Path:
    """Folder of the files of the student."""
    assert export.run(root, key=KEY, out=None, formats=["onnx", "torch"], samples=2) == 0
    return root / "outputs/exports" / KEY


@pytest.fixture(scope="module")
def description(exported: Path) -> dict[str, Any]:
    return json.loads((exported / "model.json").read_text())


@pytest.fixture(scope="module")
def given(root: Path) -> dict[str, Tensor]:
    detector = load_detector(root / f"outputs/students/{KEY}")
    return export.read_inputs(root, load_params(root), detector, 1)[0]


def test_the_files_compute_what_the_student_computes(
    root: Path, exported: Path, description: dict[str, Any], given: dict[str, Tensor]
) -> None:
    """By the runtimes alone, from the files; the outputs are those that model.json names, with those shapes."""
    with torch.no_grad():
        head = load_detector(root / f"outputs/students/{KEY}")(_batch_of(given)).head
        loaded = torch.export.load(exported / "model.pt2").module()(given)
    expected = {f"task{i}_{name}": value for i, task in enumerate(head) for name, value in task.items()}
    session = onnxruntime.InferenceSession(exported / "model.onnx", providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    found = dict(zip(outputs, session.run(None, {n: v.numpy() for n, v in given.items()}), strict=True))
    assert outputs == [entry["name"] for entry in description["outputs"]] == list(expected)
    assert max(float(value.abs().max()) for value in expected.values()) > 1, "the maps say something"
    for entry in description["outputs"]:
        assert list(found[entry["name"]].shape) == entry["shape"]
        torch.testing.assert_close(loaded[entry["name"]], expected[entry["name"]], rtol=0, atol=1e-4)
        torch.testing.assert_close(torch.from_numpy(found[entry["name"]]), expected[entry["name"]], rtol=0, atol=1e-4)


def _batch_of(given: dict[str, Tensor]) -> Any:
    """A batch of the inputs, and of noise in all that a student must not see."""
    batch = random_batch(1, frames=given["images"].shape[1])
    for name, value in given.items():
        setattr(batch, name, value)
    return batch


def test_the_inputs_are_those_that_the_description_names(description: dict[str, Any], given: dict[str, Tensor]) -> None:
    entries = {entry["name"]: entry for entry in description["inputs"]}
    assert entries.keys() == given.keys() == {"images", "intrinsics", "image_aug", "lidar_SE3_cam"}
    for name, value in given.items():
        assert entries[name]["shape"] == list(value.shape)
        assert entries[name]["dtype"] == str(value.dtype).removeprefix("torch.")
    assert entries["images"]["shape"] == [1, 1, 6, 3, 32, 64]


def test_the_description_alone_tells_how_boxes_are_read(
    root: Path, exported: Path, description: dict[str, Any], given: dict[str, Tensor]
) -> None:
    """Decoding written down again, number by number, with nothing but model.json and the ONNX outputs."""
    session = onnxruntime.InferenceSession(exported / "model.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    maps = dict(zip(names, session.run(None, {n: v.numpy() for n, v in given.items()}), strict=True))
    boxes = boxes_of(description["decoding"], maps)
    detector = load_detector(root / f"outputs/students/{KEY}")
    expected = decoded(detector, {name: torch.from_numpy(value) for name, value in maps.items()})
    theirs = [(float(score), CLASS_NAMES[label], box.tolist()) for box, score, label in zip(*expected, strict=True)]
    assert len(boxes) == len(theirs) > 50
    in_order = (sorted(found, key=lambda one: (one[1], one[2])) for found in (boxes, theirs))
    for ours, other in zip(*in_order, strict=True):
        assert ours[1] == other[1]
        np.testing.assert_allclose([ours[0], *ours[2]], [other[0], *other[2]], rtol=1e-4, atol=1e-4)


CLASS_NAMES = [
    "car",
    "truck",
    "construction_vehicle",
    "bus",
    "trailer",
    "barrier",
    "motorcycle",
    "bicycle",
    "pedestrian",
    "traffic_cone",
]


def boxes_of(decoding: dict[str, Any], maps: dict[str, np.ndarray]) -> list[tuple[float, str, list[float]]]:
    """Score, class and box of what the maps of one sample hold, best first, one candidate after another."""
    found, label = [], 0
    for number, names in enumerate(decoding["tasks"]):
        task = {kind: maps[f"task{number}_{kind}"][0] for kind in ("reg", "height", "dim", "rot", "vel", "heatmap")}
        for channel, name in enumerate(names):
            kept: list[tuple[float, str, list[float]]] = []
            logits = task["heatmap"][channel]
            for cell in np.argsort(-logits, axis=None, kind="stable")[: decoding["candidates"]]:
                row, column = np.unravel_index(cell, logits.shape)
                score = 1 / (1 + np.exp(-np.float64(logits[row, column])))
                box = box_of(decoding, {kind: value[:, row, column] for kind, value in task.items()}, row, column)
                low, high = np.split(np.array(decoding["center_range"]), 2)
                near = [np.hypot(box[0] - b[0], box[1] - b[1]) <= decoding["nms_radius"][label] for _, _, b in kept]
                center = np.array([*box[:2], box[2] + box[5] / 2])
                if score > decoding["score_threshold"] and (low <= center).all() and (center <= high).all():
                    kept += [] if any(near) else [(score, name, box)]
            found, label = found + kept, label + 1
    return sorted(found, key=lambda entry: -entry[0])[: decoding["most_boxes"]]


def box_of(decoding: dict[str, Any], at: dict[str, np.ndarray], row: int, column: int) -> list[float]:
    """x, y, z_bottom, length, width, height, yaw, vx, vy of what the maps say at a cell."""
    grid = decoding["grid"]
    x, y = (np.array([column, row]) + at["reg"]) * grid["cell"] - grid["range"]
    size = np.exp(at["dim"].clip(max=decoding["largest_log_size"])) if decoding["log_size"] else at["dim"]
    return [x, y, at["height"][0] - size[2] / 2, *size, np.arctan2(*at["rot"]), *at["vel"]]


def test_the_files_hold_the_students_weights_and_nothing_else(
    root: Path, exported: Path, description: dict[str, Any]
) -> None:
    """Each of them by its name; in the ONNX file batch norms are folded into what precedes them."""
    weights = load_file(root / f"outputs/students/{KEY}" / WEIGHTS)
    program = torch.export.load(exported / "model.pt2")
    held = {name.removeprefix("student."): value for name, value in program.state_dict.items()}
    assert held.keys() == weights.keys()
    assert all(torch.equal(held[name], weights[name]) for name in weights)
    model = onnx.load(exported / "model.onnx")
    arrays = {one.name.removeprefix("student."): onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    norms = {
        f"{name}.{part}"
        for name, module in load_detector(root / f"outputs/students/{KEY}").named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    assert weights.keys() - arrays.keys() <= norms
    made = {name: value.size for name, value in arrays.items() if name not in weights}
    parameters = sum(value.numel() for value in weights.values())
    assert sum(made.values()) < 0.02 * parameters, f"constants, and biases of folded norms: {made}"
    assert description["parameters"] == parameters_of(load_detector(root / f"outputs/students/{KEY}"))
    assert description["weights"]["checksum"] == checksum_of((root / f"outputs/students/{KEY}" / WEIGHTS).read_bytes())


def test_no_file_holds_a_keyframe_or_names_a_folder(root: Path, exported: Path, given: dict[str, Tensor]) -> None:
    """Of the data set or of this machine: the keyframes that the graphs were made with stay here."""
    image = given["images"][0, 0, 0, 0].numpy().tobytes()
    assert {path.name for path in exported.iterdir()} == {"model.onnx", "model.pt2", "model.json"}
    for path in exported.iterdir():
        content = path.read_bytes()
        for place in (str(ROOT), str(root), str(Path(torch.__file__).parent), "/tmp/"):
            assert place.encode() not in content, f"{path.name} names {place}"
        assert image not in content, path.name
        assert path.stat().st_size < 2**21, path.name


def test_a_file_that_computes_something_else_is_not_put_in_place(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = load_detector(root / f"outputs/students/{KEY}")

    def wrong(given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value + 0.002 * (name == "task4_dim") for name, value in Student(detector)(given).items()}

    monkeypatch.setattr(export, "export", lambda *_: {"torch": wrong})
    monkeypatch.setattr(export, "words", lambda *_: "")
    with pytest.raises(StageError, match=r"more than 0\.001, nothing was written: model\.pt2: task4_dim 0\.002"):
        export.run(root, key=KEY, out=root / "elsewhere", formats=["torch"], samples=1)
    assert not (root / "elsewhere").exists()


PILLARS = {"max_points": 8, "max_voxels": export.RADAR_RETURNS}
# The head of six tasks is most of a tiny student's graph, and the student above has it.
TASKS = {"head": head_config(tasks=[CLASS_NAMES[:5], CLASS_NAMES[5:]])}
KINDS = {
    "two frames and RADAR": camera_config(
        frames=2, radar=RADAR_MAP | {"voxel": {"size": [0.8, 0.8], **PILLARS}}, **TASKS
    ),
    "simulated fusion": simulated_config(
        image_compensation=COMPENSATION["image_compensation"], bev_compensation={"kind": "deform_conv"}, **TASKS
    ),
    "transformer": bevformer_config(layers=1, **TASKS),
    "RADAR": radar_config(voxel={"size": [0.4, 0.4], **PILLARS}, **TASKS),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_student_leaves(kind: str, tmp_path: Path) -> None:
    """In both formats; on other inputs than those that the graphs were made with, boxes too."""
    student = Student(grown_up(KINDS[kind])).eval()
    frames = student.student.frames
    made, other = (inputs_of(random_batch(1, frames=frames, seed=seed), student.student) for seed in (0, 1))
    if frames == 2:
        assert made["has_previous"].all()
        other["has_previous"][:] = False
    runners = {EAGER: student, **export.export(student, made, ["onnx", "torch"], tmp_path)}
    difference = compare(runners, [made, other], student.student, 0.3)
    assert difference.keys() == {"onnx", "torch"}
    for by in difference.values():
        assert by.keys() == {*student(made), "boxes"}
        assert by.pop("boxes") < TOLERANCE
        assert max(by.values()) < 1e-4
    assert not torch.equal(student(made)["task0_dim"], student(other)["task0_dim"])


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("two-words-4", "no such student .* or teacher in outputs; there are: fusion, lidar, two-words-3"),
        ("lidar", "'lidar': LidarCenterPoint reads LiDAR"),
        ("fusion", "'fusion': BEVFusion reads LiDAR"),
    ],
)
def test_what_cannot_leave_is_refused(root: Path, key: str, message: str) -> None:
    with pytest.raises(StageError, match=message):
        export.run(root, key=key, out=None, formats=["onnx"], samples=1)


def test_a_part_without_a_graph_of_fixed_shapes_is_named(tmp_path: Path) -> None:
    encoder = {"type": "PillarFeatureNet", "feat_channels": [12], "norm_cfg": {"type": "BN1d"}}
    student = Student(grown_up(radar_config(encoder=encoder))).eval()
    with pytest.raises(StageError, match="export of PillarFeatureNet"):
        export.export(student, inputs_of(random_batch(1), student.student), ["torch"], tmp_path)


def test_a_folder_with_something_else_in_it_is_left_alone(root: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(StageError, match="is not an export, and would be replaced"):
        export.run(root, key=KEY, out=tmp_path, formats=["onnx"], samples=1)


def test_too_many_returns_are_not_cut_off() -> None:
    batch = random_batch(1)
    batch.radar = [torch.zeros(export.RADAR_RETURNS + 1, 7)]
    with pytest.raises(StageError, match="3751 RADAR returns"):
        inputs_of(batch, build_detector(radar_config()))


def test_a_student_of_another_image_size_gets_its_own(root: Path) -> None:
    """The keyframe at the size that the student brings images to, of as many frames as it reads."""
    params = load_params(root)
    detector = build_detector(camera_config(image=[64, 128], frames=2))
    (inputs,) = export.read_inputs(root, params, detector, 1)
    assert inputs["images"].shape == (1, 2, 6, 3, 64, 128)
    (usual,) = export.read_inputs(root, params, build_detector(camera_config()), 1)
    ratio = inputs["image_aug"][0, 0, 0, 0, 0] / usual["image_aug"][0, 0, 0, 0, 0]
    assert float(ratio) == pytest.approx(2.0)


def detections(*boxes: tuple[float, float, float, int]) -> Detections:
    """Of x, yaw, score and label."""
    values = torch.zeros(len(boxes), 9)
    values[:, 0], values[:, 6] = torch.tensor([box[:2] for box in boxes]).reshape(-1, 2).T
    return Detections(values, torch.tensor([box[2] for box in boxes]), torch.tensor([box[3] for box in boxes]))


def test_boxes_are_compared_with_the_nearest_of_their_class() -> None:
    one = detections((0.0, 3.14, 0.9, 1), (5.0, 0.0, 0.8, 0), (7.0, 0.0, 0.1, 0))
    other = detections((5.0, 0.25, 0.8, 0), (0.0, -3.14, 0.9, 1))
    assert box_difference(one, other, 0.2) == pytest.approx(0.25)
    assert box_difference(one, other, 0.85) == pytest.approx(2 * np.pi - 6.28, abs=1e-5)
    assert box_difference(one, other, 0.95) is None
    assert box_difference(one, detections((0.0, 3.14, 0.9, 1)), 0.2) == torch.inf
    assert box_difference(detections((0.0, 3.14, 0.9, 1)), one, 0.2) == torch.inf
    assert box_difference(one, detections((5.0, 0.0, 0.8, 0), (0.0, 3.14, 0.5, 1)), 0.2) == pytest.approx(0.4)
