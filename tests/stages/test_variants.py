"""Every variant of the repository: its student and recipe are built and learn one step from their own losses alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from config.files import load_params
from config.sections import StudentParams
from data.reading.classes import CLASSES
from data.reading.instances import ImageInstances
from models.detectors.build import build_detector
from stages.distill import Distillation, make_recipe
from tests.models.factory import CAMERAS, random_batch
from training.gradients import gradient_norms

PARAMS = load_params(Path(__file__).resolve().parents[2])
LIFT, HEAD = 48, 70  # channels of the teachers' maps
MAPS = {"bev_lift": LIFT, "bev_lift_camera": LIFT, "bev_lift_lidar": LIFT, "bev_fused": LIFT, "head": HEAD,
        "bev_view": CAMERAS * LIFT, "bev_prev": LIFT, "bev_neck": 3 * LIFT}  # fmt: skip

# SimDistill's ablation: two branches, IMD, CMD, its mask of objects, MMD-F, MMD-P, compensation in image and BEV.
COLUMNS = ("branches", "imd", "cmd", "mask", "mmdf", "mmdp", "image", "bev")
SIMDISTILL = {
    "B0": "--------", "B1": "x-------", "B2": "xx------", "B3": "x-xx----", "B4": "x---x---", "B5": "x----x--",
    "B6": "xxxxx---", "B7": "xxxxxx--", "B8": "xxxxxxxx", "B9": "xxx-xxxx", "B10": "xxxxxxx-", "B11": "xxxxxx-x",
    "B12 deformable": "xxxxxxxx", "B12 plain": "xxxxxxxx", "B13": "----xx--",
}  # fmt: skip
# Structured KD's: relations of views, of timestamps, the response, what is inherited, and by what pillars are weighted.
STRUCTURED = {
    "C0": "---- -", "C1": "---x -", "C2": "x--- phi", "C3": "-x-- phi", "C4": "--x- phi", "C5": "xx-- phi",
    "C6": "xxx- phi", "C7": "xxxx phi", "C8": "xxxx uniform", "C9": "xxxx truth", "C10": "xxxx phi",
}  # fmt: skip
WEIGHTING = {"phi_softmax": "phi", "uniform": "uniform", "none": "uniform", "gt_heat": "truth"}
ROWS = {variant.row: name for name, variant in PARAMS.variants.items() if variant.row}


def instances(height: int, width: int) -> ImageInstances:
    """Two rectangles."""
    boxes = torch.tensor([[4.0, 6.0, 30.0, 28.0], [40.0, 10.0, 60.0, 50.0]])
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = 1
    return ImageInstances(boxes, torch.tensor([0, len(CLASSES) - 2]), torch.tensor([0.9, 0.8]), masks)


def outputs(batch: Any, size: int) -> dict[str, Any]:
    """What teachers say, by the tap's name."""
    generator = torch.Generator().manual_seed(0)
    count, (height, width) = len(batch.boxes), batch.images.shape[-2:]

    def maps(channels: int) -> Tensor:
        return torch.randn(count, channels, size, size, generator=generator)

    rows = [
        torch.cat([b, torch.full((len(b), 1), 0.7), n[:, None].float()], 1)
        for b, n in zip(batch.boxes, batch.labels, strict=True)
    ]
    cameras = [[instances(height, width)] * batch.images.shape[2]] * count
    dense = {tap: maps(channels) if tap == "head" else maps(channels).relu() for tap, channels in MAPS.items()}
    return {"boxes": rows, "inst2d": cameras} | dense


def batch_for(settings: StudentParams, frames: int) -> Any:
    """A batch with small images, or of the size that a learned position is for."""
    compensation = settings.model.get("image_compensation") or {}
    if (position := compensation.get("position")) is None:
        return random_batch(batch_size=1, frames=frames)
    rows, columns = position
    return random_batch(batch_size=1, image=(rows * settings.model["stride"], columns * settings.model["stride"]))


SEEN: set[str] = set()
"""Terms of which some variant has shown that they pull at the student; a backward pass for each is enough."""


@pytest.mark.parametrize("name", list(PARAMS.variants))
def test_variant_learns_from_its_own_losses(name: str) -> None:
    variant, settings = PARAMS.variants[name], PARAMS.student(name)
    torch.manual_seed(0)
    student = build_detector(settings.model)
    terms = dict(variant.terms)
    taps = {source: source.partition(".")[2] for term in terms.values() for source in term.teacher_taps}
    recipe = make_recipe(student, terms, {t: torch.ones(MAPS[tap]) for t, tap in taps.items() if tap in MAPS})
    batch = batch_for(settings, student.frames)
    said = outputs(batch, student.targets.grid.size)
    said_of = {t: said[tap] for t, tap in taps.items()}
    task = Distillation(student, recipe, lambda _: said_of, variant.truth is not False)
    task.module.train()
    batch.labelled[:] = variant.labelled is None  # of few labels, a sample without

    losses = task.loss(batch, 0.5)
    summed = {key: value for key, value in losses.items() if not key.startswith("watch/")}
    fresh = {key: term for key, term in terms.items() if term.model_dump_json() not in SEEN}
    SEEN.update(term.model_dump_json() for term in fresh.values())
    pulls = gradient_norms({key: losses[f"distill/{key}"] for key in fresh}, student.parameters())
    assert all(pull > 0 for key, pull in pulls.items() if fresh[key].distance != "similarity")  # 0 of a batch of one
    torch.stack(list(summed.values())).sum().backward()

    own = {"heatmap", "box"} if variant.truth else set()
    depth = {"depth"} if settings.model.get("depth_loss_weight") else set()
    assert summed.keys() == own | depth | {f"distill/{key}" for key in terms}
    assert all(value.isfinite() for value in losses.values())
    gradients = [p.grad for p in task.module.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


def marks(name: str) -> str:
    """A variant's columns of SimDistill's table, read off its student and what its terms compare."""
    model, terms = PARAMS.student(name).model, PARAMS.variants[name].terms
    pairs = {(term.student, term.teacher.partition(".")[2]): term for term in terms.values()}
    cmd = pairs.get(("bev_lift_simulated", "bev_lift_lidar"))
    outputs = sorted(term.distance for term in terms.values() if term.student == "head")
    assert outputs in ([], ["qfl", "sl1"])
    has = {
        "branches": model["type"] == "SimulatedFusion",
        "imd": ("bev_lift_camera", "bev_lift_camera") in pairs,
        "cmd": cmd is not None,
        "mask": cmd is not None and cmd.mask.kind == "gt_gauss",
        "mmdf": ("bev_fused", "bev_fused") in pairs,
        "mmdp": bool(outputs),
        "image": bool(model.get("image_compensation")),
        "bev": bool(model.get("bev_compensation")),
    }
    assert len(terms) == sum(has[column] for column in ("imd", "cmd", "mmdf")) + len(outputs)
    return "".join("x" if has[column] else "-" for column in COLUMNS)


def test_every_row_of_simdistill_is_there_and_is_what_its_table_says() -> None:
    assert {row: marks(name) for row, name in ROWS.items() if row.startswith("B")} == SIMDISTILL
    assert {row for row in ROWS if row.startswith("A")} == {f"A{i}" for i in range(7)}


@pytest.mark.parametrize("row", [row for row, columns in SIMDISTILL.items() if set(columns[1:6]) != {"-"}])
def test_the_weights_are_those_of_the_released_code(row: str) -> None:
    for term in PARAMS.variants[ROWS[row]].terms.values():
        masked = term.mask.kind == "gt_gauss"
        assert term.weight == (0.25 if term.student == "head" else 100.0 if masked else 1.0)
        assert term.normalise is (term.student == "head")
        if term.distance == "sl1":
            assert term.beta == pytest.approx(1 / 9, abs=1e-4)
            assert term.code_weights == (1, 1, 1, 1, 1, 1, 1, 1, 0.2, 0.2)


def compensation_weights(config: dict[str, Any] | None, channels: int) -> int:
    """Of a compensation, by hand."""
    if config is None:
        return 0
    square = channels * channels
    if config["kind"] == "conv":
        return 2 * (9 * square + channels)
    if config["kind"] == "deform_conv":  # each with a convolution that says where its nine taps read
        return 2 * (9 * square + 18 * (9 * channels + 1))
    points = config["heads"] * config["points"]  # of each two offsets and a share
    position = channels // 2 * sum(config.get("position") or ())
    return 2 * (square + channels) + 3 * points * (channels + 1) + position


@pytest.mark.parametrize("row", SIMDISTILL)
def test_a_row_has_no_more_weights_than_its_branches_and_compensations(row: str) -> None:
    plain, model = build_detector(PARAMS.student(ROWS["B0"]).model), PARAMS.student(ROWS[row]).model
    channels, pixels = plain.tap_channels["bev_lift"], plain.tap_channels["pv"]
    lift = sum(p.numel() for p in plain.get_submodule("lift").parameters())
    fused = model.get("fused_channels", 0)
    assert fused in (0, channels)  # the BEV encoder's input is as wide with the fuser as without it
    fuser = 9 * 2 * channels * fused + 2 * fused
    expected = sum(p.numel() for p in plain.parameters()) + (lift + fuser if SIMDISTILL[row][0] == "x" else 0)
    expected += compensation_weights(model.get("image_compensation"), pixels)
    expected += compensation_weights(model.get("bev_compensation"), channels)
    assert sum(p.numel() for p in build_detector(model).parameters()) == expected


def test_learned_positions_are_those_of_the_image_features() -> None:
    models = [PARAMS.student(name).model for name in PARAMS.variants]
    learned = [model for model in models if "position" in (model.get("image_compensation") or {})]
    assert learned
    for model in learned:
        sides = [side // model["stride"] for side in PARAMS.input.image.size]
        assert model["image_compensation"]["position"] == sides


def structure(name: str) -> str:
    """A variant's columns of Structured KD's table, read off its start and its terms."""
    terms = PARAMS.variants[name].terms.values()
    distances = [term.distance for term in terms]
    inherits = any(start.resample for start in PARAMS.student(name).starts)
    marks = ["cos_rel" in distances, "kl_rel" in distances, "qfl" in distances, inherits]
    weighting = {WEIGHTING[term.mask.kind] for term in terms if term.distance in ("qfl", "sl1", "l1")}
    assert len(weighting) <= 1
    assert ("qfl" in distances) == ("sl1" in distances)
    assert ("l1" in distances) == bool({"cos_rel", "kl_rel"} & {*distances})  # relations come with their anchor
    return "".join("x" if mark else "-" for mark in marks) + f" {weighting.pop() if weighting else '-'}"


@pytest.mark.parametrize(("student", "store"), [("camera-small", "large"), ("bevformer-small", "former")])
def test_every_row_of_structured_kd_is_there_for_each_family(student: str, store: str) -> None:
    of_student = {name: variant for name, variant in PARAMS.variants.items() if variant.student == student}
    variants = {variant.row: name for name, variant in of_student.items() if variant.row}
    assert {row: structure(name) for row, name in variants.items() if not row.startswith("C11")} == STRUCTURED
    baselines = {row.removeprefix("C11 ") for row in variants if row.startswith("C11 ")}
    assert baselines == {"features", "attention", "similarity", "logits"}
    for name in variants.values():
        read = {term.teacher.store for term in PARAMS.variants[name].terms.values()}
        assert read <= {store, "large-online"} if store == "large" else read <= {store}


@pytest.mark.parametrize("name", ["skd-frozen", "former-frozen"])
def test_what_is_frozen_is_what_is_inherited(name: str) -> None:
    settings = PARAMS.student(name)
    frozen = {module for module, factor in settings.train.lr_factors.items() if factor == 0}
    inherited = {module for start in settings.starts if start.resample for module in start.only or ()}
    assert frozen
    assert frozen <= inherited
