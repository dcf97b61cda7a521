"""A model can start from published weights, whole or in part, and from no others than those that were meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file
from torch import Tensor

from config.files import load_params
from models.detectors.build import build_detector
from models.detectors.detector import Detector
from stages.context import StageError
from stages.inputs.weights import WEIGHTS, save_detector, start_as_set, start_from, start_in_part
from tests.models.factory import (
    COMPENSATION,
    bevformer_config,
    camera_config,
    fusion_config,
    lidar_config,
    second,
    second_fpn,
    simulated_config,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return load_params(ROOT).students["camera"].model


@pytest.fixture
def published(tmp_path: Path, config: dict[str, Any]) -> tuple[Path, str]:
    torch.manual_seed(1)
    save_detector(tmp_path / "start", config, build_detector(config).state_dict())
    return tmp_path / "start", xxhash.xxh3_128_hexdigest((tmp_path / "start" / WEIGHTS).read_bytes())


def test_all_weights_are_taken_over(published: tuple[Path, str], config: dict[str, Any]) -> None:
    torch.manual_seed(2)
    detector, other = build_detector(config), build_detector(config)
    start_from(detector, *published)
    start_from(other, *published)
    pairs = zip(detector.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


def test_another_file_is_refused(published: tuple[Path, str], config: dict[str, Any]) -> None:
    folder, checksum = published
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    detector = build_detector(config)
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    with pytest.raises(StageError, match=f"has checksum [0-9a-f]+, the parameters say {checksum}"):
        start_from(detector, folder, checksum)
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())


def test_a_missing_file_and_another_model_are_refused(published: tuple[Path, str], config: dict[str, Any]) -> None:
    folder, checksum = published
    wider = {**config, "depth_net": {**config["depth_net"], "context_channels": 40}}
    with pytest.raises(StageError, match="does not fit the model"):
        start_from(build_detector(wider), folder, checksum)
    with pytest.raises(StageError, match="has no readable weights"):
        start_from(build_detector(config), folder / "nowhere", checksum)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Published detectors of three kinds, none trained."""
    configs = {"camera": camera_config(), "lidar": lidar_config(), "fusion": fusion_config()}
    folders = {}
    for seed, (name, config) in enumerate(configs.items(), start=10):
        torch.manual_seed(seed)
        folders[name] = tmp_path_factory.mktemp("published") / name
        save_detector(folders[name], config, build_detector(config).state_dict())
    return folders


def copies(detector: Detector) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in detector.state_dict().items()}


def sources(detector: Detector, folder: Path, places: dict[str, str]) -> dict[str, str]:
    """What a detector's weights should come from: by name the name there, where a place's module has such a shape."""
    given = load_file(folder / WEIGHTS)
    found = {name: module + name.removeprefix(place) for place, module in places.items()
             for name in detector.state_dict() if name.startswith(f"{place}.")}  # fmt: skip
    own = detector.state_dict()
    return {name: there for name, there in found.items() if there in given and given[there].shape == own[name].shape}


@pytest.mark.parametrize(
    ("part", "only", "config", "places", "new"),
    [
        ("camera", ["images", "lift"], fusion_config(), {"images": "images", "lift": "lift"},
         {"lidar", "fuser", "bev_backbone", "bev_neck", "head"}),
        # Of the decoder all but what sees a map of another width.
        ("lidar", None, fusion_config(),
         {"lidar.encoder": "encoder", "lidar.stage": "backbone", "bev_backbone": "backbone", "bev_neck": "neck",
          "head": "head"}, {"images", "lift", "fuser", "bev_backbone"}),
        ("camera", ["images", "lift"], simulated_config(**COMPENSATION),
         {"images": "images", "camera_lift": "lift", "simulated_lift": "lift"},
         {"image_compensation", "bev_compensation", "fuser", "bev_backbone", "bev_neck", "head"}),
        ("fusion", ["bev_backbone", "bev_neck", "head"], simulated_config(),
         {name: name for name in ("bev_backbone", "bev_neck", "head")},
         {"images", "camera_lift", "simulated_lift", "fuser"}),
        ("camera", ["images", "lift"], camera_config(), {"images": "images", "lift": "lift"},
         {"bev_backbone", "bev_neck", "head"}),
        # A camera student inherits the BEV encoder and the head of a LiDAR teacher (visible by what it says of places).
        ("lidar", ["neck", "head"], camera_config(), {"bev_neck": "neck", "head": "head"},
         {"images", "lift", "bev_backbone"}),
        ("lidar", None, simulated_config(), {"bev_backbone": "backbone", "bev_neck": "neck", "head": "head"},
         {"images", "camera_lift", "simulated_lift", "fuser", "bev_backbone"}),
    ],
)  # fmt: skip
def test_parts_take_the_weights_of_their_modules_and_the_rest_stays(
    parts: dict[str, Path], part: str, only: list[str] | None, config: dict[str, Any], places: dict[str, str],
    new: set[str],
) -> None:  # fmt: skip
    detector = build_detector(config)
    before, given = copies(detector), load_file(parts[part] / WEIGHTS)
    filled = start_in_part(detector, parts[part], only)
    expected = sources(detector, parts[part], places)
    assert filled == expected.keys()
    assert filled
    for name, value in detector.state_dict().items():
        assert torch.equal(value, given[expected[name]] if name in expected else before[name]), name
    assert {name.partition(".")[0] for name in before.keys() - filled} == new
    moved = {name.partition(".")[0] for name in filled if not torch.equal(before[name], detector.state_dict()[name])}
    assert moved == {place.partition(".")[0] for place in places}  # drawn anew it is not what was published


def test_a_part_leaves_out_what_has_another_shape(parts: dict[str, Path]) -> None:
    filled = start_in_part(build_detector(fusion_config()), parts["lidar"])
    decoder = {name for name in build_detector(fusion_config()).state_dict() if name.startswith("bev_backbone.")}
    assert decoder - filled == {"bev_backbone.blocks.0.0.weight"}


@pytest.mark.parametrize(
    ("only", "message"),
    [
        (["images", "lifts"], "nothing of module 'lifts' fits the SimulatedFusion; it has bev_backbone, .*, lift$"),
        (["camera_lift"], "nothing of module 'camera_lift' fits the SimulatedFusion"),
        (["images", ""], "nothing of module '' fits"),
    ],
)  # fmt: skip
def test_unknown_modules_are_named_and_nothing_is_set(parts: dict[str, Path], only: list[str], message: str) -> None:
    student = build_detector(simulated_config())
    before = copies(student)
    with pytest.raises(StageError, match=message) as caught:
        start_in_part(student, parts["camera"], only)
    assert str(parts["camera"] / WEIGHTS) in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_parts_that_do_not_fit_are_named(parts: dict[str, Path], tmp_path: Path) -> None:
    student = build_detector(simulated_config())
    odd = {"images.backbone.conv1.weight": torch.zeros(3), "other.weight": torch.zeros(2)}
    save_detector(tmp_path / "odd", {}, odd)
    with pytest.raises(StageError, match="nothing of module 'images' fits the SimulatedFusion; it has images, other"):
        start_in_part(student, tmp_path / "odd", ["images"])
    with pytest.raises(StageError, match=r"odd/model\.safetensors: no weight of it fits the SimulatedFusion"):
        start_in_part(student, tmp_path / "odd")
    with pytest.raises(StageError, match=r"the start .*nowhere has no readable weights .*give a published model"):
        start_in_part(student, tmp_path / "nowhere", ["images"])
    (tmp_path / "odd" / WEIGHTS).write_bytes((parts["camera"] / WEIGHTS).read_bytes()[:-9])
    with pytest.raises(StageError, match="odd has no readable weights"):
        start_in_part(student, tmp_path / "odd", ["images"])


def test_a_named_module_that_fits_in_part_is_refused(parts: dict[str, Path]) -> None:
    """This fuser has other widths: it would give its norm alone."""
    student = build_detector(simulated_config())
    before = copies(student)
    with pytest.raises(StageError, match=r"module 'fuser' fits the SimulatedFusion but for fuser\.conv\.weight"):
        start_in_part(student, parts["fusion"], ["images", "fuser"])
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published camera detector of two frames."""
    torch.manual_seed(20)
    config, folder = camera_config(frames=2), tmp_path_factory.mktemp("teacher") / "large"
    save_detector(folder, config, build_detector(config).state_dict())
    return folder


NARROW = {"depth_net": {"mid_channels": 16, "context_channels": 6, "blocks": 1}, "frames": 2}
HALF_NECK = second_fpn([8, 8], [1, 2]) | {"out_channels": [8, 8]}
HALF = {**NARROW, "bev_backbone": second(12, [1, 2]) | {"out_channels": [8, 8]}, "bev_neck": HALF_NECK}


def test_a_student_of_half_the_width_inherits_every_second_channel(teacher: Path) -> None:
    student = build_detector(camera_config(**HALF))
    before, given = copies(student), load_file(teacher / WEIGHTS)
    filled = start_in_part(student, teacher, ["bev_backbone", "bev_neck", "head"], resample=True)
    assert {name.partition(".")[0] for name in filled} == {"bev_backbone", "bev_neck", "head"}
    own = student.state_dict()
    first = "bev_backbone.blocks.0.0.weight"  # 24 inputs (two frames of 12) to 16 of the teacher, 12 to 8 here
    assert torch.equal(own[first], given[first][::2, ::2] * 2)
    assert torch.equal(own["bev_backbone.blocks.0.1.bias"], given["bev_backbone.blocks.0.1.bias"][::2])
    shared = "head.shared_conv.conv.weight"  # equal outputs, half as many inputs
    assert torch.equal(own[shared], given[shared][:, ::2] * 2)
    last = "head.task_heads.0.output.weight"
    assert torch.equal(own[last], given[last])
    assert all(torch.equal(value, before[name]) for name, value in own.items() if name not in filled)


def test_a_student_of_the_teachers_size_inherits_bit_for_bit(teacher: Path) -> None:
    student, given = build_detector(camera_config(frames=2)), load_file(teacher / WEIGHTS)
    filled = start_in_part(student, teacher, ["bev_backbone", "bev_neck", "head"], resample=True)
    assert all(torch.equal(student.state_dict()[name], given[name]) for name in filled)


def test_a_student_inherits_from_no_smaller_teacher(teacher: Path, tmp_path: Path) -> None:
    student = build_detector(
        camera_config(
            frames=2,
            bev_backbone=second(12, [1, 2]) | {"out_channels": [32, 16]},
            bev_neck=second_fpn([32, 16], [1, 2]),
        )
    )
    with pytest.raises(StageError, match=r"bev_backbone.blocks.0.0.weight cannot be inherited: .* not narrower"):
        start_in_part(student, teacher, ["bev_backbone"], resample=True)
    deeper = build_detector(camera_config(frames=2, bev_backbone=second(12, [1, 2]) | {"layer_nums": [2, 1]}))
    with pytest.raises(StageError, match=r"module 'bev_backbone' lacks .*blocks\.0\.6.* of the CameraBEVDepth"):
        start_in_part(deeper, teacher, ["bev_backbone"], resample=True)


def test_a_large_teacher_takes_what_the_camera_part_has_for_it(parts: dict[str, Path]) -> None:
    root, teachers = parts["camera"].parents[1], load_params(ROOT).teachers
    folder = root / "outputs/teachers"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "camera").symlink_to(parts["camera"])
    given = load_file(parts["camera"] / WEIGHTS)
    large = {"camera-large": camera_config(frames=2), "bevformer-large": bevformer_config()}
    for (name, config), modules in zip(large.items(), ({"images", "lift"}, {"images"}), strict=True):
        detector = build_detector(config)
        before = copies(detector)
        start_as_set(detector, teachers[name].start, root, {"camera": "camera"})
        for name, value in detector.state_dict().items():
            taken = name.partition(".")[0] in modules
            assert torch.equal(value, given[name] if taken else before[name]), name
