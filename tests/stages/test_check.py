"""The stage `check`: every mistake that would end a training is said before any begins, in words, all at once."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from config import profiles, studies
from config.files import load_params
from config.graph import StageSpec
from config.nested import merge
from config.params import Params
from results.tracking.runs import NullTracker
from stages import check
from stages.check import Checks
from stages.context import StageContext, StageError, Stop
from tests.params_files import copy_params, read_params

ROOT = Path(__file__).resolve().parents[2]
RAW = read_params(ROOT)
XFD = RAW["terms"]["xfd"]
TRAIN = RAW["students"]["camera"]["train"]
BACKBONE = {"image_backbone": {"type": "ResNett"}}
HEAD = {"start": {"teacher": "start", "only": ["head"]}}
HALF = {"head": {"share_conv_channel": 32}}

# Variant -> what it changes of `baseline`, and the line that says why it cannot be trained.
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "misspelt-key": (
        {"model": {"depth_nett": {}}},
        "variants.misspelt-key.model: CameraBEVDepth has no key 'depth_nett'; did you mean 'depth_net'",
    ),
    "misspelt-detector": (
        {"model": {"type": "CameraBEVDept"}},
        "variants.misspelt-detector.model: model type 'CameraBEVDept' is unknown; did you mean 'CameraBEVDepth'?"
        "; there are: LidarCenterPoint",
    ),
    "misspelt-part": (
        {"model": BACKBONE},
        "variants.misspelt-part.model: type 'ResNett' is unknown; did you mean 'ResNet'",
    ),
    "wrong-value": (
        {"model": {"depth_loss_kind": "bec"}},
        "variants.wrong-value.model: CameraBEVDepth depth_loss_kind 'bec' must be 'bce' or 'ce'",
    ),
    "imported": (
        {"start": {"folder": "nowhere", "checksum": "0"}},
        "variants.imported.start: the start nowhere has no readable weights",
    ),
    "other-stride": (
        {"model": {"stride": 16, "image_neck": {"upsample_strides": [0.5, 1, 2]}}, **HEAD},
        "variants.other-stride.model.stride: 16, and input.depth_stride is 8",
    ),
    "more-frames": (
        {"model": {"frames": 2}, "start": {"teacher": "start", "only": ["images"]}},
        "variants.more-frames.model: the CameraBEVDepth reads 2 keyframes, and input.frames is 1",
    ),
    "no-module": (
        {"start": {"teacher": "start", "only": ["imagez"]}},
        "variants.no-module.start: teacher 'start': nothing of module 'imagez' fits the CameraBEVDepth; it has",
    ),
    "other-size": ({"model": HALF}, "variants.other-size.start: teacher 'start' does not fit the model: head."),
    "other-part": (
        {"model": HALF, **HEAD},
        "variants.other-part.start: teacher 'start': module 'head' fits the CameraBEVDepth but for head.",
    ),
    "more-channels": (
        {"start": {"teacher": "small", "only": ["bev_neck"], "resample": True}},
        "variants.more-channels.start: teacher 'small': ",
    ),
    "frozen-nothing": (
        {"train": {"lr_factors": {"bev_nek": 0.0}}},
        "variants.frozen-nothing.train.lr_factors: the model has no module 'bev_nek'; did you mean 'bev_neck'",
    ),
    "misspelt-truth": (
        {"truth": "trian[::4]"},
        "variants.misspelt-truth.truth: 'trian[::4]' is no part of what data.splits names; did you mean 'train'",
    ),
    "all-truth": (
        {"truth": "train[::4]", "truth_share": 0.9},
        "variants.all-truth.truth_share: 0.9 of a step of 2 samples is 2: at least one must have truth",
    ),
    "pseudo-maps": (
        {"terms": {"pseudo": RAW["terms"]["pseudo"] | {"teacher": "lidar.bev_lift"}}},
        "variants.pseudo-maps.terms.pseudo: distance 'labels' takes a teacher's boxes for labels",
    ),
    "no-tap": (
        {"terms": {"xfd": XFD | {"student": "bev_nek"}}},
        "variants.no-tap.terms.xfd: the student has no dense tap 'bev_nek': it has pv, bev_fused, bev_neck",
    ),
    "other-width": (
        {"terms": {"xfd": XFD | {"adapter": {"kind": "id"}}}},
        "variants.other-width.terms.xfd: adapter 'id' keeps the student's 144 channels",
    ),
    "other-mask": (
        {"terms": {"xfd": XFD | {"mask": {"kind": "gt_centers"}}}},
        "variants.other-mask.terms.xfd: mask 'gt_centers' does not apply to dense maps: use one of none, occupied",
    ),
    "other-distance": (
        {"terms": {"xfd": XFD | {"distance": "qfl", "adapter": {"kind": "conv1x1"}}}},
        "variants.other-distance.terms.xfd: distance 'qfl' does not apply to dense maps",
    ),
    "other-adapter": (
        {"terms": {"xfd": XFD | {"adapter": {"kind": "grl_disc"}}}},
        "variants.other-adapter.terms.xfd: adapter 'grl_disc' does not apply to dense maps",
    ),
    "featureless": (
        {"terms": {"imd": RAW["terms"]["imd"] | {"student": "bev_fused"}}},
        "study.featured: 'featureless' shows taps bev_lift_uncompensated, bev_lift_simulated, which the CameraBEVDepth",
    ),
}
OTHERS = {
    "stores.lidar.taps: the LidarCenterPoint of teacher 'lidar' has no 'bev_nekk'; did you mean 'bev_neck'",
    "stores.live.taps: the LidarCenterPoint of teacher 'lidar' has no 'bev_view'",
    "variants.online.terms.xfd: the store has no dense tap 'live.bev_view'",
    "segmenters.instance: the model of the segmenter cannot be built: segmenter model type 'MaskRCN' is not",
    "segmenters.instance: class_map: cat: allowed are car, truck",
    "teachers.fusion.start: teacher 'small': module 'images' fits the BEVFusion but for ",
    "students.camera-lacks.model: CameraBEVDepth lacks 'stride'",
    "teachers.start.split: 'trian[:-16]' is no part of what data.splits names; did you mean 'train'",
    "teachers.lidar.start: the start elsewhere has no readable weights",
    "teachers.bevformer-large.model: the BEVFormer reads 2 keyframes, and input.frames is 1",
    "stores.lidar.taps.bev_lift.channels: 999 are to be kept, and the LidarCenterPoint of teacher 'lidar' has ",
    "stores.former.taps.bev_lift.halo: the BEVFormer of teacher 'bevformer-large' cannot have one: its queries",
}


def params() -> Params:
    """The demo's study, with all of these mistakes."""
    raw = copy.deepcopy(RAW)
    plain = {"student": "camera", "terms": {}}
    lacking = {key: value for key, value in raw["students"]["camera"]["model"].items() if key != "stride"}
    raw["students"]["camera-lacks"] = {"model": lacking, "train": TRAIN}
    raw["variants"] |= {name: plain | changes for name, (changes, _) in VARIANTS.items()}
    raw["variants"] |= {
        "lacks": {"student": "camera-lacks", "terms": {}},
        "online": plain | {"terms": {"xfd": XFD | {"teacher": "live.bev_view"}}},
    }
    raw["stores"]["lidar"]["taps"]["bev_nekk"] = {"serve": "cached-warp"}
    raw["stores"]["live"] = {"teacher": "lidar", "score_threshold": 0.1, "taps": {"bev_view": {"serve": "online"}}}
    overlay = {
        "segmenters": {"instance": {"class_map": {"car": "cat"}, "model": {"type": "MaskRCN"}}},
        "input": {"frames": 1},
        "study": {
            "teachers": ["lidar", "start", "small"], "fusions": {"fusion": {"camera": "small"}},
            "stores": ["lidar", "fusion", "former", "instance"], "variants": [*VARIANTS, "lacks", "online"],
            "baselines": [], "featured": ["featureless"],
        },
    }  # fmt: skip
    raw["teachers"]["small"]["model"]["frames"] = 1
    raw["study"]["large"] = {"bevformer-large": {"camera": "start"}}
    raw["teachers"]["start"]["split"] = "trian[:-16]"
    raw["teachers"]["lidar"]["start"] = {"folder": "elsewhere", "checksum": "0"}
    raw["stores"]["lidar"]["taps"]["bev_lift"]["channels"] = 999
    raw["stores"]["former"]["taps"]["bev_lift"] = {"serve": "cached-warp", "halo": 3.2}
    return Params.model_validate(merge(raw, overlay))


@pytest.fixture(scope="module")
def problems() -> list[str]:
    return list(dict.fromkeys(Checks(params(), Path()).problems()))


@pytest.mark.parametrize("line", [*(line for _, line in VARIANTS.values()), *sorted(OTHERS)])
def test_a_mistake_is_named(problems: list[str], line: str) -> None:
    assert sum(problem.startswith(line) for problem in problems) == 1, "\n".join(problems)


def test_nothing_else_is_named(problems: list[str]) -> None:
    expected = [*(line for _, line in VARIANTS.values()), *OTHERS]
    assert [problem for problem in problems if not problem.startswith(tuple(expected))] == []


def test_the_stage_fails_with_all_of_them(tmp_path: Path, problems: list[str]) -> None:
    with pytest.raises(StageError) as error:
        check.run(context_of(tmp_path, params()))
    head, *lines = str(error.value).splitlines()
    assert head == "the parameters ask for what cannot be built:"
    assert [re.sub(r"^  [\w./]+\.yaml: ", "  ", line) for line in lines] == [f"  {problem}" for problem in problems]
    assert lines[0].startswith("  params/")  # the file that has the key
    assert not (tmp_path / "outputs").exists()


OUTS = ("outputs/checked-by-dvc-repro-check", "outputs/stores/.checked", "reports/stores/.checked")


def context_of(root: Path, params: Params) -> StageContext:
    spec = StageSpec("check", None, "", {}, {}, OUTS)
    (root / "scratch").mkdir()
    copy_params(root)
    return StageContext("check", None, params, spec, root, root / "scratch", NullTracker(), Stop(), 0)


def test_its_outs_do_not_depend_on_what_was_checked(tmp_path: Path) -> None:
    found = []
    for number, learning_rate in enumerate((1e-3, 2e-3)):
        changed = merge(RAW, {"teachers": {"lidar": {"train": {"lr": learning_rate}}}})
        (tmp_path / str(number)).mkdir()
        check.run(context_of(tmp_path / str(number), Params.model_validate(changed)))
        found.append([(tmp_path / str(number) / out).read_bytes() for out in OUTS])
    assert found[0] == found[1]


BUILT: dict[str, Any] = {}  # most models are those of several profiles or studies
PROFILES, STUDIES = profiles.available(ROOT), studies.available(ROOT)


@pytest.mark.parametrize(("apply", "name"), [*((profiles.apply_profile, name) for name in PROFILES),
                                             *((studies.apply_study, name) for name in STUDIES)])  # fmt: skip
def test_what_the_repository_has_can_be_built(apply: Any, name: str, tmp_path: Path) -> None:
    for entry in ("profiles", "studies"):
        (tmp_path / entry).symlink_to(ROOT / entry)
    copy_params(tmp_path)
    apply(name, tmp_path)
    assert list(Checks(load_params(tmp_path), tmp_path, BUILT).problems()) == []
