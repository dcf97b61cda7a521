"""params.yaml: the repository's is valid, and a mistake is named with its key, its value and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.params import ParamsError, flatten, load_params, merge, split_key
from tests.pipeline.project import PARAMS, ROOT


def broken(tmp_path: Path, old: str, new: str) -> str:
    """The message for params.yaml with one change."""
    assert old in PARAMS
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS.replace(old, new, 1))
    with pytest.raises(ParamsError) as error:
        load_params(path)
    return str(error.value)


def test_repository_is_valid() -> None:
    params = load_params(ROOT / "params.yaml")
    assert params.study.variants
    assert params.student(params.study.variants[0]).train.epochs == params.students["camera"].train.epochs


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("skip_broken: 0", "skip_broken: many", ["data.skip_broken", "'many'", "integer"]),
        ("  frames: 1 ", "  frames: 3 ", ["input.frames", "3", "1 or 2"]),
        ("  radar: false", "  radars: false", ["input.radars", "unknown key", "did you mean 'radar'"]),
        ("  radar: false", "", ["input.radar", "missing"]),
        (
            "study: {teachers: [lidar]",
            "study: {teachers: [lydar]",
            ["study.teachers", "'lydar'", "did you mean 'lidar'"],
        ),
        ("xod: {student: camera", "xod: {student: kamera", ["variants.xod.student", "'kamera'", "'camera'"]),
        (
            "teacher: lidar.boxes",
            "teacher: lidar.box",
            ["variants.xod.terms.xod_cls.teacher", "lidar.box", "allowed: boxes"],
        ),
        ("teacher: lidar.boxes", "teacher: radar.boxes", ["unknown teacher", "allowed: lidar"]),
        ("z: [-5.0, 3.0]", "z: [5.0, 3.0]", ["grid", "lowest"]),
        ("range: 51.2", "range: 51.3", ["grid", "51.3", "whole number"]),
        ("lr: 3.0e-3", "lr: -1", ["teachers.lidar.train.lr", "-1", "greater than 0"]),
        ("warmup: 0.3", "warmup: 1.5", ["warmup", "1.5", "less than 1"]),
        ("  depth_stride: 16", "  depth_stride: 48", ["input", "multiples of 96", "depth_stride is 48"]),
        (
            "baseline: {student: camera,",
            "baseline: {student: camera, train: {epoch: 1},",
            ["variants.baseline.train.epoch"],
        ),
        ("seeds: [0]", "seeds: [0, 0]", ["study.seeds", "more than once"]),
        ("seed: 0 ", "seed: 0\nseed: 1 ", ["not valid YAML", "seed"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, parts: list[str]) -> None:
    message = broken(tmp_path, old, new)
    for part in parts:
        assert part in message, message


def test_more_sweeps_than_the_city_has(tmp_path: Path) -> None:
    lines = PARAMS.splitlines()
    start = lines.index("input:")
    at = next(i for i in range(start, len(lines)) if lines[i].startswith("  sweeps:"))
    message = broken(tmp_path, "\n".join(lines[start : at + 1]), "\n".join([*lines[start:at], "  sweeps: 99"]))
    assert "input.sweeps: 99" in message
    assert "city.sweeps" in message
    path = tmp_path / "params.yaml"  # a real dataroot has more sweeps than the city
    path.write_text(path.read_text().replace("worlds: [city]", "worlds: []  "))
    assert load_params(path).input.sweeps == 99


def test_unknown_profile_only_where_there_are_profiles(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(PARAMS.replace("profile: demo", "profile: domo"))
    assert load_params(tmp_path / "params.yaml").profile == "domo"
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "demo.yaml").write_text("{}")
    with pytest.raises(ParamsError, match=r"profile: 'domo' is unknown; did you mean 'demo'"):
        load_params(tmp_path / "params.yaml")


def test_missing_file_and_wrong_shape(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="does not exist"):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("- a\n")
    with pytest.raises(ParamsError, match="mapping"):
        load_params(tmp_path / "params.yaml")


def test_variant_overrides_its_student(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS.replace("baseline: {student: camera,", "baseline: {student: camera, train: {lr: 1e-5},", 1))
    params = load_params(path)
    assert params.student("baseline").train.lr == 1e-5
    assert params.student("xod").train == params.students["camera"].train
    assert params.student("baseline").train.epochs == params.students["camera"].train.epochs


def test_dict_helpers() -> None:
    assert merge({"a": {"b": 1, "c": [1]}}, {"a": {"c": [2]}, "d": 3}) == {"a": {"b": 1, "c": [2]}, "d": 3}
    assert flatten({"a": {"b": {"c": 1}, "d": {}}, "e": [1]}) == {"a.b.c": 1, "a.d": {}, "e": [1]}
    assert split_key("xod-xfd-3") == ("xod-xfd", 3)
    with pytest.raises(ParamsError, match="<variant>-<seed>"):
        split_key("lidar")
