"""The parameters: the repository's are valid, and a mistake is named with its key, its value and what is allowed."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from config.files import load_params, read_texts
from config.nested import flatten, merge
from config.params import Params, ParamsError, split_key
from config.profiles import ProfileError, lay_over
from tests.params_files import write_params
from tests.pipeline.project import REMOVED, ROOT, params_text, params_values


def plain(**changes: Any) -> str:
    """The parameters in one file: as JSON, which is YAML too and written at once, unless a name is no text."""
    values = params_values(**changes)
    return json.dumps(values) if all(isinstance(name, str) for name in values["variants"]) else params_text(**changes)


def broken(tmp_path: Path, **changes: Any) -> str:
    """The message for params.yaml with changes."""
    (tmp_path / "params.yaml").write_text(plain(**changes))
    with pytest.raises(ParamsError) as error:
        load_params(tmp_path)
    return str(error.value)


def test_repository_is_valid() -> None:
    params = load_params(ROOT)
    assert params.study.variants
    assert params.student(params.study.variants[0]).train.epochs == params.students["camera"].train.epochs


BOXES = {"student": "head", "teacher": "lidar.boxes", "distance": "qfl", "weight": 1.0}
RELATION = {"student": "bev_lift", "teacher": "lidar.bev_lift", "distance": "kl_rel", "weight": 1.0}
PLAIN: dict[str, Any] = {"student": "camera", "terms": {}}
TAPS = "stores__lidar__taps"
MAPS = {"serve": "cached-warp"}
ONLINE = {"teacher": "lidar", "score_threshold": 0.1, "taps": {"boxes": {"serve": "online"}}}

SEGMENTER = {"image": [128, 352], "model": {}, "train": {"epochs": 1, "batch_size": 1, "lr": 1.0}}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"data__skip_broken": "many"}, ["data.skip_broken", "'many'", "integer"]),
        ({"input__frames": 3}, ["input.frames: 3 is unknown; allowed: 1, 2"]),
        ({"input__radars": True}, ["input.radars", "unknown key", "did you mean 'radar'"]),
        ({"input__radar": REMOVED}, ["input.radar", "missing"]),
        ({"study__teachers": ["lydar"]}, ["study.teachers", "'lydar'", "did you mean 'lidar'"]),
        ({"variants__xod__student": "kamera"}, ["variants.xod.student", "'kamera'", "did you mean 'camera'"]),
        (
            {"variants__xod__terms": {"cls": BOXES | {"teacher": "lidar.box"}}},
            ["variants.xod.terms.cls.teacher", "lidar.box", "did you mean 'boxes'"],
        ),
        (
            {"variants__xod__terms": {"cls": BOXES | {"teacher": "radar.boxes"}}},
            ["unknown store", "allowed: lidar, fusion"],
        ),
        (
            {"variants__xod__terms": {"cls": BOXES | {"wieght": 2.0}}},
            ["variants.xod.terms.cls.wieght: unknown key; did you mean 'weight'"],
        ),
        (
            {"variants__xod__terms": {"cls": BOXES | {"mask": {"kind": "teacher_konf"}}}},
            ["variants.xod.terms.cls.mask.kind: 'teacher_konf' is unknown; did you mean 'teacher_conf'"],
        ),
        (
            {"variants__xod__terms": {"cls": BOXES | {"adapter": {"kind": "projektion"}}}},
            ["variants.xod.terms.cls.adapter.kind: 'projektion' is unknown; did you mean 'projection'"],
        ),
        (
            {"variants__xod__terms": {"cls": BOXES | {"distance": "qfll"}}},
            ["variants.xod.terms.cls.distance: 'qfll' is unknown; did you mean 'qfl'", "allowed: l1, l2,"],
        ),
        (
            {"variants__xod__terms": {"cls": {"student": "head", "teacher": "lidar.boxes", "distance": "qfl"}}},
            ["variants.xod.terms.cls.weight: missing"],
        ),
        (
            {"variants__xod__terms": {"tm": RELATION}},
            ["'lidar.bev_prev' names a tap that stores.lidar.taps lacks, which the term reads beside its own"],
        ),
        *(
            ({f"variants__{bad}": PLAIN}, [f"variants.{bad}: no name: it is made of"])
            for bad in ("kd-w0.5", "a b", "a/b", "12")
        ),
        *(
            ({"variants": {"baseline": PLAIN, bad: PLAIN}}, [f"variants.{bad}: no name: it is made of"])
            for bad in (12, None)
        ),
        ({"resources__teacher__gpus": "all"}, ["resources.teacher.gpus: 'all'", "integer"]),
        ({"resources__teacher__cpus": REMOVED}, ["resources.teacher.cpus: missing"]),
        ({"resources__predict__nodes": 2}, ["resources.predict.nodes: unknown key", "allowed: gpus, cpus, hours"]),
        ({"data__version": "v1.0-test"}, ["data.version: no city can be made for 'v1.0-test'"]),
        (
            {"variants__xod__truth": False, "variants__xod__terms": {"xfd": RELATION | {"distance": "l1"}}},
            ["variants.xod.truth: false, and its head needs a term to learn from"],
        ),
        ({"variants__xod__truth_share": 0.5}, ["variants.xod: truth_share 0.5 mixes a split with the rest"]),
        (
            {
                "variants__baseline__truth": "train[::4]",
                "variants__baseline__truth_share": 0.5,
                "variants__baseline__train": {"balanced": True},
            },
            ["variants.baseline.truth_share: its student's train.balanced draws the samples: choose one"],
        ),
        (
            {"students__camera__start": {"teachr": "start"}},
            ["students.camera.start.0.teachr: unknown key; did you mean"],
        ),
        ({"students__camera__start": {"folder": "x"}}, ["students.camera.start.checksum: missing"]),
        ({"study__seeds": [0, -1]}, ["study.seeds.1: -1"]),
        ({"study__stores": ["lydar"]}, ["study.stores", "'lydar'", "did you mean 'lidar'"]),
        ({"study__stores": ["lidar", "lidar"]}, ["study.stores", "'lidar' is listed more than once"]),
        ({"study__stores": []}, ["variants.xod.terms.", "needs store 'lidar' in study.stores []"]),
        ({"study__teachers": []}, ["study.stores: 'lidar' needs teacher 'lidar' in study.teachers []"]),
        (
            {"stores__online": ONLINE, "study__stores": ["lidar", "online"]},
            ["study.stores: all taps of 'online' are online", "nothing to extract"],
        ),
        (
            {
                "stores__online": ONLINE | {"teacher": "other"},
                "teachers__other": {"model": {}, "train": {"epochs": 1, "batch_size": 1, "lr": 1.0}},
                "variants__xod__terms": {"cls": BOXES | {"teacher": "online.boxes"}},
            },
            ["'online.boxes' is online", "needs teacher 'other' in study.teachers ['lidar', 'start']"],
        ),
        ({"stores__lidar__teacher": "lydar"}, ["stores.lidar.teacher", "'lydar'", "did you mean 'lidar'"]),
        ({f"{TAPS}__boxes": MAPS}, ["stores.lidar: taps.boxes", "'cached-warp'", "allowed: cached-exact, online"]),
        ({f"{TAPS}__boxes": {"serve": "online", "halo": 0.0, "dtype": "int8"}}, ["stored exactly", "no dtype, halo"]),
        ({f"{TAPS}__bev_neck": {"serve": "cached-exact"}}, ["taps.bev_neck", "allowed: cached-warp, online"]),
        ({f"{TAPS}__head": MAPS | {"dtype": "int8"}}, ["taps.head", "dtype 'int8'", "allowed: float32, float16"]),
        ({f"{TAPS}__bev_lift": MAPS | {"dtype": "int4"}}, ["taps.bev_lift.dtype", "'int4'", "int8"]),
        ({f"{TAPS}__bev_lift": MAPS | {"halo": 2.0}}, ["taps.bev_lift.halo: 2.0 m are 1.25 cells", "whole number"]),
        ({f"{TAPS}__bev_lift": MAPS | {"channels": 0}}, ["channels", "0", "greater than or equal to 1"]),
        ({f"{TAPS}__bev_lift": MAPS | {"cell": "all"}}, ["taps.bev_lift.cell", "did you mean 'cells'"]),
        ({"store__gap_samples": -1}, ["store.gap_samples", "-1"]),
        ({"store__dtype": "float16"}, ["store.dtype", "unknown key"]),
        ({"teachers__lidar__taps": {}}, ["teachers.lidar.taps", "unknown key"]),
        ({"variants__baseline__train": {"epoch": 1}}, ["variants.baseline.train.epoch", "did you mean 'epochs'"]),
        ({"grid__z": [5.0, 3.0]}, ["grid", "[5.0, 3.0]", "lowest"]),
        ({"grid__range": 51.3}, ["grid", "51.3", "whole number"]),
        ({"teachers__lidar__train__lr": -1}, ["teachers.lidar.train.lr", "-1", "greater than 0"]),
        ({"teachers__lidar__train__milestones": [0.5]}, ["milestones [0.5] with schedule 'one_cycle'"]),
        (
            {"teachers__lidar__train__schedule": "multi_step", "teachers__lidar__train__milestones": [0.9, 0.5]},
            ["milestones [0.9, 0.5] must ascend"],
        ),
        ({"students__camera__start": {"teacher": "stert"}}, ["students.camera.start.teacher", "did you mean 'start'"]),
        (
            {"students__camera__start": {"teacher": "fusion"}},
            [
                "variants.baseline",
                "'fusion'",
                "is not in study.teachers ['lidar', 'start'], study.fusions [] or study.large []",
            ],
        ),
        (
            {"study__large": {"camera-large": {"lidar": "lidar"}}, "study__fusions": REMOVED},
            ["study.large.camera-large.camera: missing", "camera-large.lidar: unknown key", "study.fusions: missing"],
        ),
        ({"segmenters__instance__train": None}, ["segmenters.instance", "train and start are both null"]),
        ({"segmenters__instance__image": [100, 352]}, ["segmenters.instance", "[100, 352]", "multiples of 32"]),
        ({"segmenters__lidar": SEGMENTER}, ["segmenters.lidar: teachers has the same name"]),
        (
            {"segmenters__xod-0": SEGMENTER, "study__segmenters": ["xod-0"]},
            ["segmenters.xod-0: a student of the study has the same key"],
        ),
        (
            {"segmenters__features": SEGMENTER, "study__segmenters": ["features"]},
            ["segmenters.features: outputs/evaluations/features is the folder of features"],
        ),
        ({"terms__x.y": BOXES}, ["terms.x.y: no name: it is made of letters"]),
        (
            {"study__stores": ["lidar", "instance"]},
            ["study.stores: 'instance' needs teacher 'instance' in study.segmenters []"],
        ),
        ({"stores__instance__taps": {"boxes": {"serve": "cached-exact"}}}, ["stores.instance.taps: boxes", "inst2d"]),
        ({f"{TAPS}__inst2d": {"serve": "cached-exact"}}, ["stores.lidar.taps", "other teachers have no inst2d"]),
        ({"stores__instance__taps__inst2d__serve": "online"}, ["taps.inst2d", "'online'", "allowed: cached-exact"]),
        (
            {"data__instances": None, "study__segmenters": ["instance"]},
            ["data.instances: missing", "study.segmenters ['instance']"],
        ),
        ({"teachers__lidar__train__warmup": 1.5}, ["warmup", "1.5", "less than 1"]),
        ({"input__image__size": [128, 360]}, ["input", "[128, 360]", "multiples of 32"]),
        ({"input__depth_stride": 48}, ["input: image.size [128, 352] must be multiples of depth_stride 48"]),
        ({"input__depth_stride": 44, "input__image__size": [176, 352]}, ["multiples of 352", "depth_stride is 44"]),
        ({"study__seeds": [0, 0]}, ["study.seeds", "more than once"]),
        ({"data__version": "v1.0"}, ["data.version", "'v1.0'", "v1.0-mini"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict[str, Any], parts: list[str]) -> None:
    message = broken(tmp_path, **changes)
    for part in parts:
        assert part in message, message


def test_duplicate_keys_are_errors(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(params_text() + "seed: 1\n")
    with pytest.raises(ParamsError, match="not valid YAML"):
        load_params(tmp_path)


def test_more_sweeps_than_the_city_has(tmp_path: Path) -> None:
    world = {"data__worlds": ["city"], "data__dataroot": "outputs/city"}
    message = broken(tmp_path, input__sweeps=99, **world)
    assert "input.sweeps: 99" in message
    assert "city.sweeps" in message
    # A real dataroot has more sweeps than the city.
    (tmp_path / "params.yaml").write_text(plain(input__sweeps=99, data__worlds=[], data__dataroot="/data/nuscenes"))
    assert load_params(tmp_path).input.sweeps == 99


def test_unknown_profile_only_where_there_are_profiles(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(plain(profile="domo"))
    assert load_params(tmp_path).profile == "domo"
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "demo.yaml").write_text("{}")
    with pytest.raises(ParamsError, match=r"profile: 'domo' is unknown; did you mean 'demo'"):
        load_params(tmp_path)


def test_missing_file_and_wrong_shape(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="does not exist"):
        load_params(tmp_path)
    (tmp_path / "params.yaml").write_text("- a\n")
    with pytest.raises(ParamsError, match="mapping"):
        load_params(tmp_path)


def test_online_taps_need_a_teacher_and_no_store(tmp_path: Path) -> None:
    terms = {"cls": BOXES | {"teacher": "online.boxes"}}
    (tmp_path / "params.yaml").write_text(plain(stores__online=ONLINE, study__stores=[], variants__xod__terms=terms))
    params = load_params(tmp_path)
    assert params.stores["online"].cached == {}
    assert list(params.stores["lidar"].cached) == ["bev_lift", "boxes"]


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    """The repository's parameters with one teacher of each part and no fusion teacher in its study, parsed once."""
    return params_values()


CAMERA = {"camera": "start"}
PARTS = CAMERA | {"lidar": "lidar"}
FUSION = {"fusion": PARTS}
CAMERA_START = [{"teacher": "start", "only": ["images"]}, {"teacher": "fusoin"}]
OF_FUSION = {"cls": BOXES | {"teacher": "fusion-online.head"}}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"study": {"fusions": {"fusoin": PARTS}}}, ["study.fusions: 'fusoin' is unknown", "did you mean 'fusion'"]),
        (
            {"study": {"fusions": {"fusion": PARTS, "lidar": PARTS}}},
            ["study.fusions: ['lidar'] are in study.teachers too", "in one step or in two"],
        ),
        (
            {"study": {"fusions": {"fusion": PARTS | {"camera": "stert"}}}},
            ["study.fusions.fusion.camera: needs 'stert' in study.teachers ['lidar', 'start']"],
        ),
        (
            {"study": {"fusions": FUSION, "teachers": ["start"]}},
            ["study.fusions.fusion.lidar: needs 'lidar' in study.teachers ['start']"],
        ),
        (
            {"study": {"fusions": {"fusion": PARTS | {"lidar": "fusion"}}}},
            ["study.fusions.fusion.lidar: needs 'fusion' in study.teachers ['lidar', 'start']"],
        ),
        (
            {"study": {"teachers": ["lidar", "start", "fusion"]}},
            ["teachers.fusion.start: takes part 'camera', and 'fusion' is in study.teachers, trained in one step"],
        ),
        (
            {"study": {"large": {"fusion": CAMERA}}},
            ["teachers.fusion.start: takes part 'lidar', and it has camera"],
        ),
        (
            {"teachers": {"fusion": {"start": {"part": "radar"}}}},
            ["teachers.fusion.start.<parts>.0.part", "'lidar' or 'camera'"],
        ),
        (
            {"study": {"large": {"camera-larg": CAMERA}}},
            ["study.large: 'camera-larg' is unknown; did you mean 'camera-large'"],
        ),
        (
            {"study": {"large": {"lidar": CAMERA}}},
            ["study.large: ['lidar'] are in study.teachers or study.fusions too", "trained in one way"],
        ),
        (
            {"study": {"large": {"camera-large": CAMERA}, "teachers": ["lidar"]}},
            ["study.large.camera-large.camera: needs 'start' in study.teachers ['lidar']"],
        ),
        ({"study": {"baselines": ["xod-reg"]}}, ["study.baselines: 'xod-reg' is unknown; did you mean 'xod'?"]),
        (
            {"study": {"variants": ["baseline", "skd"]}},
            ["variants.skd: its student starts from teacher 'small', which is not in study.teachers"],
        ),
        (
            {"variants": {"baseline": {"start": [{"teacher": "stert", "only": ["images"]}]}}},
            ["variants.baseline.start.teacher: 'stert' is unknown; did you mean 'start'?"],
        ),
        (
            {"variants": {"baseline": {"start": {"teacher": "start", "resample": True}}}},
            ["resample brings modules of another size", "name them in only"],
        ),
        ({"study": {"featured": ["xid"]}}, ["study.featured: 'xid' is unknown; did you mean 'xod'?"]),
        ({"study": {"featured": ["simdistill"]}}, ["'simdistill' is unknown; allowed: baseline, xod"]),
        ({"study": {"stores": ["lidar", "fusion"]}}, ["study.stores: 'fusion' needs teacher 'fusion' in study."]),
        (
            {"study": {"variants": ["imd"], "fusions": FUSION}},
            ["variants.imd.terms.imd.teacher: 'fusion.bev_lift_camera' needs store 'fusion' in study.stores ['lidar']"],
        ),
        (
            {"variants": {"baseline": {"terms": OF_FUSION}}},
            ["variants.baseline.terms.cls.teacher: 'fusion-online.head' is online", "needs teacher 'fusion' in study."],
        ),
        (
            {"study": {"variants": ["imd"]}},
            [
                "variants.imd: its student starts from teacher 'fusion', which is not in ",
                "study.teachers ['lidar', 'start'], study.fusions [] or study.large []",
            ],
        ),
        (
            {"students": {"camera": {"start": CAMERA_START}}},
            ["students.camera.start.teacher: 'fusoin' is unknown; did you mean 'fusion'?"],
        ),
    ],
)  # fmt: skip
def test_mistakes_about_fusion_teachers_are_named(
    values: dict[str, Any], changes: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(ValidationError) as error:
        Params.model_validate(merge(values, changes))
    assert all(part in str(error.value) for part in parts), error.value


def test_fusion_teachers_count_as_teachers_and_parts_are_theirs_alone(values: dict[str, Any]) -> None:
    study = {"fusions": FUSION, "stores": ["lidar", "fusion"], "variants": ["imd"], "featured": ["imd"]}
    assert Params.model_validate(merge(values, {"study": study})).study.detectors == ["lidar", "start", "fusion"]
    online = {"study": {"fusions": FUSION}, "variants": {"baseline": {"terms": OF_FUSION}}}
    assert Params.model_validate(merge(values, online)).stores["fusion-online"].cached == {}
    params = Params.model_validate(merge(values, {"study": {"fusions": FUSION}}))
    assert (params.study.parts("fusion"), params.study.parts("lidar")) == (PARTS, {})


@pytest.mark.parametrize(
    ("start", "teachers"),
    [
        ({"teacher": "start", "only": ["images"]}, ["start"]),
        ([{"teacher": "start"}, {"teacher": "lidar", "only": ["head"]}], ["start", "lidar"]),
        ({"folder": "outputs/teachers/start", "checksum": "0"}, []),
        (None, []),
    ],
)
def test_a_student_starts_from_teachers_or_a_folder_or_nothing(
    values: dict[str, Any], start: Any, teachers: list[str]
) -> None:
    values = copy.deepcopy(values)
    values["students"]["camera"]["start"] = start
    assert [each.teacher for each in Params.model_validate(values).students["camera"].starts] == teachers


def test_variant_overrides_its_student(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(plain(variants__baseline__train={"lr": 1e-5}))
    params = load_params(tmp_path)
    assert params.student("baseline").train.lr == 1e-5
    assert params.student("xod").train == params.students["camera"].train
    assert params.student("baseline").train.epochs == params.students["camera"].train.epochs


def written(root: Path, **arms: str) -> None:
    """The parameters of a tiny project in their files, and files of arms beside them."""
    write_params(root, params_values())
    for name, text in arms.items():
        (root / f"params/arms/{name}.yaml").write_text(text)


def test_a_variant_names_its_terms_and_another_variant(tmp_path: Path) -> None:
    written(
        tmp_path,
        one="terms: {far: {student: bev_neck, teacher: lidar.bev_lift, distance: l1, weight: 2.0}}\n"
        "variants: {named: {student: camera, train: {epochs: 9}, terms: [far, xod_cls]}}\n",
        two="variants:\n  other: {like: named, terms: {far: {weight: 5.0}}}\n"
        "  third:\n    like: named\n    train: {lr: 0.5}\n"
        "    terms: {own: {student: head, teacher: lidar.boxes, distance: qfl, weight: 1}}\n",
    )
    params = load_params(tmp_path)
    named, other, third = (params.variants[name] for name in ("named", "other", "third"))
    assert list(named.terms) == ["far", "xod_cls"]
    assert named.terms["xod_cls"] == params.terms["xod_cls"]
    assert (other.student, other.train, other.terms["far"].weight) == ("camera", {"epochs": 9}, 5.0)
    assert other.terms["far"].distance == "l1"
    assert third.train == {"epochs": 9, "lr": 0.5}
    assert list(third.terms) == ["own"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("variants: {a: {student: camera, terms: [xod_cl]}}", "variants.a.terms: 'xod_cl' is unknown; did you mean"),
        ("variants: {a: {student: camera, terms: {xod_cl: {weight: 1}}}}", "variants.a.terms: 'xod_cl' is unknown"),
        ("variants: {a: {student: camera, terms: [xod_cls, xod_cls]}}", "variants.a.terms: 'xod_cls' is listed more"),
        ("variants: {a: {like: a, terms: []}}", "variants.a.like: 'a' is like another one: name a variant"),
        ("variants: {a: {like: [xod], terms: []}}", "variants.a.like: ['xod'] is unknown"),
        ("variants: {a: {lik: xod, student: camera, terms: []}}", "variants.a.lik: unknown key; did you mean 'like'?"),
        ("variants: {a: {student: camera, terms: xfd}}", "variants.a.terms: 'xfd': must be a list of names"),
        ("variants: {a: {student: camera, terms: }}", "variants.a.terms: None: must be a list of names"),
        ("variants: {a: {student: camera, terms: {xod_clss: {teacher: lidar.boxes}}}}", "'xod_clss' is unknown"),
        ("variants: [a]", "variants: in params/arms/one.yaml it must be a mapping of names, not list"),
        ("terms: {bad: {student: head, teacher: lidr.boxes, distance: qfl, weight: 1}}\n"
         "variants: {a: {student: camera, terms: [bad]}, b: {student: camera, terms: [bad]}}",
         "terms.bad.teacher: 'lidr.boxes' names an unknown store; did you mean 'lidar'"),
        ("variants: {a: {like: xodd, terms: []}}", "variants.a.like: 'xodd' is unknown; did you mean 'xod'"),
        ("variants: {a: {like: xod, terms: []}, b: {like: a, terms: []}}", "variants.b.like: 'a' is like a"),
        ("variants: {a: {student: camera, terms: [xod_cls], model: {grid: {}}}}", "variants.a.model.grid: every"),
        ("variants: {xod: {student: camera, terms: []}}", "variants.xod: stands in params/arms/all.yaml and in"),
        ("seed: 1", "seed: stands in params/arms/one.yaml, and dvc.yaml looks for it in params.yaml"),
        ("terms: {bad: {student: head, teacher: lidar.boxes, distance: qfl, weight: -1}}\n"
         "variants: {a: {student: camera, terms: [bad]}, b: {student: camera, terms: [bad]}}", "terms.bad.weight: -1"),
    ],
)  # fmt: skip
def test_a_mistake_is_said_once_with_its_file(tmp_path: Path, text: str, line: str) -> None:
    written(tmp_path, one=text + "\n")
    with pytest.raises(ParamsError) as error:
        load_params(tmp_path)
    lines = str(error.value).splitlines()[1:]
    assert sum(line in each for each in lines) == 1, error.value
    assert "params/arms/one.yaml" in next(each for each in lines if line in each), error.value


def test_dict_helpers() -> None:
    assert merge({"a": {"b": 1, "c": [1]}}, {"a": {"c": [2]}, "d": 3}) == {"a": {"b": 1, "c": [2]}, "d": 3}
    assert flatten({"a": {"b": {"c": 1}, "d": {}}, "e": [1]}) == {"a.b.c": 1, "a.d": {}, "e": [1]}
    assert split_key("xod-xfd-3") == ("xod-xfd", 3)
    with pytest.raises(ParamsError, match="<variant>-<seed>"):
        split_key("lidar")


def test_other_values_of_a_term_keep_what_they_do_not_name(tmp_path: Path) -> None:
    """Within a mask or adapter too, unless it is of another kind; so does `like`, for which a start is one thing."""
    start = "{teacher: start, only: [images], resample: true}"
    written(
        tmp_path,
        one="variants:\n"
        "  same: {student: camera, terms: {xod_cls: {mask: {threshold: 0.5}}}}\n"
        "  other: {student: camera, terms: {xod_cls: {mask: {kind: none}}}}\n"
        f"  begun: {{student: camera, truth: false, start: {start}, terms: [xod_cls]}}\n"
        "  again: {like: begun, start: {teacher: start}, terms: [xod_cls]}\n",
        empty="variants:\n",
    )
    variants = load_params(tmp_path).variants
    assert variants["same"].terms["xod_cls"].mask.model_dump() == {"kind": "teacher_conf", "threshold": 0.5}
    assert variants["other"].terms["xod_cls"].mask.model_dump() == {"kind": "none"}
    assert variants["again"].truth is False
    assert [(start.only, start.resample) for start in variants["again"].starts] == [(None, False)]
    assert "xod" in variants  # an empty section takes nothing away


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "params/arms/one.yaml is empty: it must be a mapping of sections"),
        (b"- a", "params/arms/one.yaml must be a mapping of sections, not list"),
        (b"variants: {\xff: 1}", "one.yaml is not UTF-8 text: invalid start byte at byte 11"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    written(tmp_path)
    (tmp_path / "params/arms/one.yaml").write_bytes(content)
    for read in (load_params, lambda root: lay_over(read_texts(root), "seed: 3\n", "x")):
        with pytest.raises((ParamsError, ProfileError), match=re.escape(message)):
            read(tmp_path)


def test_what_an_editor_leaves_is_no_file_and_other_endings_are_named(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "params/arms/.#x3kd.yaml").symlink_to("someone@host.1234")
    assert load_params(tmp_path).profile == "demo"
    (tmp_path / "params/arms/more.yml").write_text("variants: {}\n")
    with pytest.raises(ParamsError, match=r"params/arms/more.yml: files of params end in .yaml: rename"):
        load_params(tmp_path)


def test_a_key_of_a_section_that_may_be_left_out_has_its_suggestions(tmp_path: Path) -> None:
    message = broken(tmp_path, data__instances={"root": "a", "train": "b", "val": "c", "rot": "d"})
    assert "data.instances.rot: unknown key; did you mean 'root'?; allowed: root, train, val" in message
