"""SimDistill's student: no LiDAR in it, two lifts of its own, compensation on one of them, a teacher that stays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.features import MapTerm
from distill.recipe import Recipe
from distill.term import Outcome
from distill.terms import TermConfig
from models.detectors.build import build_detector
from models.detectors.detector import Detector
from models.layers.depth_net import depth_loss
from models.ports import Batch, Prediction
from tests.distill.test_prediction_terms import SIMDISTILL
from tests.models.factory import (
    COMPENSATION,
    awaken,
    camera_config,
    fusion_config,
    let_in,
    random_batch,
    read_by,
    simulated_config,
)

CHANNELS, FUSED = 12, 16
GEOMETRY = ("images", "intrinsics", "image_aug", "lidar_SE3_cam", "bev_aug")
BEHIND = {"bev_fused", "bev_neck", "head"}


def student(compensated: bool = True) -> Detector:
    """A student whose compensation, where it has one, does something."""
    torch.manual_seed(0)
    return awaken(build_detector(simulated_config(**COMPENSATION))) if compensated else bare()


def bare(**changes: Any) -> Detector:
    torch.manual_seed(0)
    return build_detector(simulated_config(**changes))


def maps_of(detector: Detector, batch: Any) -> dict[str, Tensor]:
    """All taps."""
    with torch.no_grad():
        return detector(batch, [*detector.tap_channels, "head"]).taps


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("compensated", [False, True])
def test_the_student_reads_images_and_nothing_else(compensated: bool, training: bool) -> None:
    detector, batch = student(compensated).train(training), random_batch()
    reads = read_by(detector, batch)
    assert all(read == {"images"} for read in reads.values()), reads
    alone = SimpleNamespace(**{name: getattr(batch, name) for name in GEOMETRY})  # any other attribute is an error
    whole, without = maps_of(detector, batch), maps_of(detector, alone)
    assert whole.keys() == without.keys()
    assert all(torch.equal(without[tap], maps) for tap, maps in whole.items())


@pytest.mark.parametrize("sensed", ["points", "depth"])
@pytest.mark.parametrize("lift", ["camera_lift", "simulated_lift"])
def test_lidar_in_a_lift_would_be_seen(lift: str, sensed: str) -> None:
    """The release's lift, which looks at LiDAR depth in training and at evaluation."""
    detector = bare().eval()
    let_in(detector.get_submodule(lift), sensed)
    reads = read_by(detector, random_batch())
    assert reads["head"] == reads["bev_fused"] == {"images", sensed}
    assert (reads["bev_lift_camera"] == {"images", sensed}) == (lift == "camera_lift")


def shared(first: nn.Module, second: nn.Module) -> list[str]:
    """Modules and weights that are in both."""
    ones = {id(part) for part in (*first.modules(), *first.parameters(), *first.buffers())}
    named = (*second.named_modules(), *second.named_parameters(), *second.named_buffers())
    places = {tensor.data_ptr() for tensor in first.state_dict().values() if tensor.numel()}
    return [
        name for name, part in named if id(part) in ones or (isinstance(part, Tensor) and part.data_ptr() in places)
    ]


def taught(detector: Detector) -> dict[str, list[Tensor | None]]:
    """Gradients of the lifts' weights from the losses against the truth."""
    batch = random_batch()
    torch.stack(list(detector.loss(detector(batch), batch).values())).sum().backward()
    lifts = ("camera_lift", "simulated_lift")
    return {lift: [p.grad for p in detector.get_submodule(lift).parameters()] for lift in lifts}


def test_the_lifts_are_two_that_learn_apart() -> None:
    """Even from equal weights, as a student has them that starts from one lift."""
    detector = bare()
    camera, simulated = detector.get_submodule("camera_lift"), detector.get_submodule("simulated_lift")
    assert shared(camera, simulated) == []
    assert camera.state_dict().keys() == simulated.state_dict().keys()
    assert any(not torch.equal(one, two) for one, two in zip(camera.parameters(), simulated.parameters(), strict=True))
    simulated.load_state_dict(camera.state_dict())
    before = maps_of(detector, random_batch())
    assert torch.equal(before["bev_lift_camera"], before["bev_lift_simulated"])
    gradients = taught(detector)
    for one, two in zip(gradients["camera_lift"], gradients["simulated_lift"], strict=True):
        assert one is not None
        assert two is not None
        assert not torch.equal(one, two)
    torch.optim.SGD(detector.parameters(), 0.1).step()
    after = maps_of(detector, random_batch())
    assert not torch.equal(after["bev_lift_camera"], after["bev_lift_simulated"])


def test_one_lift_for_both_branches_would_be_seen() -> None:
    """The release builds two and calls one of them twice."""
    detector = bare()
    detector.simulated_lift = detector.camera_lift
    assert shared(detector.get_submodule("camera_lift"), detector.get_submodule("simulated_lift"))
    gradients = taught(detector)
    assert all(one is two for one, two in zip(*gradients.values(), strict=True))
    detector = bare()
    detector.simulated_lift.forward = detector.camera_lift.forward  # type: ignore[union-attr]
    assert any(gradient is None for gradient in taught(detector)["simulated_lift"])


def reached(detector: Detector, name: str) -> set[str]:
    """Taps that a compensation has an effect on."""
    batch, module = random_batch(), detector.get_submodule(name)
    with_it, plain = maps_of(detector, batch), module.forward
    module.forward = lambda x: x
    without = maps_of(detector, batch)
    module.forward = plain
    return {tap for tap, maps in with_it.items() if not torch.equal(maps, without[tap])}


def test_the_simulated_branch_alone_is_compensated() -> None:
    detector = student().eval()
    assert reached(detector, "bev_compensation") == BEHIND | {"bev_lift_simulated"}
    assert reached(detector, "image_compensation") == BEHIND | {"bev_lift_simulated", "bev_lift_uncompensated"}
    maps = maps_of(detector, random_batch())
    with torch.no_grad():
        assert torch.equal(detector.bev_compensation(maps["bev_lift_uncompensated"]), maps["bev_lift_simulated"])  # type: ignore[operator]
    maps = maps_of(bare().eval(), random_batch())
    assert torch.equal(maps["bev_lift_uncompensated"], maps["bev_lift_simulated"])


def test_compensation_in_both_lifts_would_be_seen() -> None:
    """The release has the image plane's inside the view transform that both branches call."""
    detector = student().eval()
    camera, compensate = detector.get_submodule("camera_lift"), detector.get_submodule("image_compensation")
    plain: Callable[..., Any] = camera.forward

    def forward(features: Tensor, batch: Any, **options: Any) -> Any:
        return plain(compensate(features.flatten(0, 1)).unflatten(0, features.shape[:2]), batch, **options)

    camera.forward = forward
    assert "bev_lift_camera" in reached(detector, "image_compensation")


@pytest.mark.parametrize("config", [
    COMPENSATION, {"image_compensation": COMPENSATION["image_compensation"]},
    {"bev_compensation": {"kind": "conv"}}, {"image_compensation": {"kind": "deform_conv"}},
])  # fmt: skip
def test_students_of_a_seed_begin_alike(config: dict[str, Any]) -> None:
    """With and without compensation: the same weights, and the same outputs before training."""
    plain, compensated, again = bare(), bare(**config), bare(**config)
    weights, others = plain.state_dict(), compensated.state_dict()
    assert [name for name, value in weights.items() if not torch.equal(value, others[name])] == []
    assert {name.partition(".")[0] for name in others.keys() - weights.keys()} == config.keys()
    assert all(map(torch.equal, others.values(), again.state_dict().values()))
    expected, maps = (maps_of(detector.eval(), random_batch()) for detector in (plain, compensated))
    assert all(torch.equal(maps[tap], value) for tap, value in expected.items())


def test_student_and_teacher_share_nothing() -> None:
    detector, teacher = student(), build_detector(fusion_config())
    assert shared(detector, teacher) == []
    for name in ("fuser", "bev_backbone", "bev_neck", "head"):  # built alike, of the same names
        assert teacher.get_submodule(name).state_dict().keys() == detector.get_submodule(name).state_dict().keys()
    detector.get_submodule("fuser").norm = teacher.get_submodule("fuser").norm
    assert "fuser.norm.running_mean" in shared(detector, teacher)


def gradients_of_the_teacher(terms: Mapping[str, dict[str, Any]]) -> set[str]:
    """Its weights that get one, when it runs with the student as if it were to learn."""
    detector, teacher, batch = student(), build_detector(fusion_config()), random_batch()
    taps = [*teacher.tap_channels, "head"]
    channels = {f"fusion.{tap}": width for tap, width in {**teacher.tap_channels, "head": 70}.items()}
    configs = {name: TermConfig(**term) for name, term in terms.items()}
    recipe = Recipe(configs, detector.targets, detector.tap_channels, channels)
    outputs = {f"fusion.{tap}": maps for tap, maps in teacher.train()(batch, taps).taps.items()}
    losses = recipe(detector(batch, recipe.student_taps), outputs, batch, 0.0)
    assert losses.keys() == terms.keys()
    torch.stack(list(losses.values())).sum().backward()
    assert all(value > 0 for value in losses.values())
    return {name for name, p in teacher.named_parameters() if p.grad is not None}


def test_no_term_reaches_a_teacher_that_could_learn() -> None:
    assert gradients_of_the_teacher(SIMDISTILL) == set()


def test_a_term_that_reaches_the_teacher_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The release's MMD-F, in whose graph the teacher's fuser is."""

    def forward(self: MapTerm, student: Prediction, teacher: Mapping[str, Any], batch: Batch, progress: float) -> Any:
        return Outcome(F.mse_loss(student.taps[self.config.student], teacher[self.config.teacher]))

    monkeypatch.setattr(MapTerm, "forward", forward)
    assert {"fuser.conv.weight", "fuser.norm.weight"} <= gradients_of_the_teacher({"mmdf": SIMDISTILL["mmdf"]})


def test_depth_is_learned_by_both_lifts_alike() -> None:
    detector, batch = bare(), random_batch()
    prediction = detector(batch, ["depth"])
    camera, simulated = prediction.depth
    torch.testing.assert_close(prediction.taps["depth"], camera.softmax(2))
    assert not torch.equal(camera, simulated)
    by_lift = [depth_loss(logits, batch.depth, detector.bins) for logits in prediction.depth]  # type: ignore[arg-type]
    torch.testing.assert_close(detector.loss(prediction, batch)["depth"], 3.0 * (by_lift[0] + by_lift[1]) / 2)


def weights_of(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def attention_weights(channels: int, heads: int, points: int) -> int:
    """Of a deformable attention: two projections of the channels, and of each point two offsets and a share."""
    return 2 * (channels + 1) * channels + (channels + 1) * heads * points * 3


def test_what_the_student_has_beyond_the_plain_detector() -> None:
    plain = build_detector(camera_config())
    fuser = 9 * 2 * CHANNELS * FUSED + 2 * FUSED
    wider = 9 * (FUSED - CHANNELS) * 16  # of the first convolution behind the lift, which has 16 channels
    two_branches = weights_of(plain) + weights_of(plain.get_submodule("lift")) + fuser + wider
    assert weights_of(bare()) == two_branches
    pixels = plain.tap_channels["pv"]
    image, bev = COMPENSATION["image_compensation"], COMPENSATION["bev_compensation"]
    position = pixels // 2 * sum(image["position"])
    attentions = attention_weights(pixels, 4, 3) + attention_weights(CHANNELS, 4, 5)
    assert bev == {"heads": 4, "points": 5}
    assert weights_of(student()) == two_branches + attentions + position


@pytest.mark.parametrize(("changes", "message"), [
    ({"bev_compensation": {"heads": 5}}, "5 heads do not divide 12 channels"),
    ({"image_compensation": {"kind": "atention"}}, "compensation kind 'atention' must be one of attention"),
    ({"depth_loss_kind": "mse"}, "SimulatedFusion depth_loss_kind 'mse'"),
])  # fmt: skip
def test_wrong_configs_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bare(**changes)


def test_a_position_of_another_map_is_named() -> None:
    wrong = bare(image_compensation={**COMPENSATION["image_compensation"], "position": [8, 4]})
    with pytest.raises(ValueError, match=r"position \[8, 4\] for a map of \[4, 8\]: set it to rows and columns"):
        wrong(random_batch())
