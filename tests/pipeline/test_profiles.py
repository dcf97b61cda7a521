"""Profiles change only what they set, and lead back to the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from config.params import load_params
from config.profiles import ProfileError, apply_profile, available, lay_over
from tests.pipeline.project import ROOT

BASE = """\
# head
size: 8                       # a comment
nested: {one: 1, two: [1, 2]}  # beside a flow dict
shared: &shared {cell: 0.5}   # metres
model:
  type: A                     # kept
  depth: 3
other:
  grid: *shared
  text: "a # b"               # not a comment inside
last: 1
"""


@pytest.mark.parametrize("name", available(ROOT))
def test_demo_restores_what_any_profile_changed(folder: Path, name: str) -> None:
    before = (folder / "params.yaml").read_bytes()
    params = apply_profile(name, folder)
    assert params.profile == name
    assert load_params(folder / "params.yaml") == params
    apply_profile("demo", folder)
    assert (folder / "params.yaml").read_bytes() == before


def test_smoke_keeps_comments_and_everything_it_does_not_set(folder: Path) -> None:
    before = (folder / "params.yaml").read_text()
    apply_profile("smoke", folder)
    after = (folder / "params.yaml").read_text()
    comments = [line.partition("#")[2] for line in before.splitlines() if "#" in line]
    assert [line.partition("#")[2] for line in after.splitlines() if "#" in line] == comments
    changed = sum(one != two for one, two in zip(before.splitlines(), after.splitlines(), strict=True))
    assert 5 < changed < 50


def test_values_anchors_and_comments() -> None:
    overlay = "size: 1000\nnested: {two: [3]}\nshared: {cell: 0.25}\nother: {text: 'c # d'}\n"
    result = lay_over(BASE, overlay, "x")
    loaded = YAML(typ="safe").load(result)
    assert loaded["size"] == 1000
    assert loaded["nested"] == {"one": 1, "two": [3]}
    assert loaded["other"] == {"grid": {"cell": 0.25}, "text": "c # d"}
    assert "size: 1000                    # a comment\n" in result
    assert "shared: &shared {cell: 0.25}  # metres\n" in result
    back = 'size: 8\nnested: {two: [1, 2]}\nshared: {cell: 0.5}\nother: {text: "a # b"}\n'
    assert lay_over(result, back, "x") == BASE


def test_replacing_a_dict_whole() -> None:
    result = lay_over(BASE, "model: !replace {type: B, width: 4}\n", "x")
    assert YAML(typ="safe").load(result)["model"] == {"type": "B", "width": 4}
    block = lay_over(result, "model: !replace\n  type: A                     # kept\n  depth: 3\n", "x")
    assert block == BASE


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ("sizes: 1\n", r"x: sizes is not in params.yaml; keys there: size, nested"),
        ("model: {width: 4}\n", r"x: model.width is not in params.yaml; keys there: type, depth"),
        ("other: {grid: {cell: 1}}\n", r"x: other.grid is an alias \(\*shared\)"),
        ("size: [1\n", "x is not valid YAML"),
    ],
)
def test_what_does_not_fit_is_named(overlay: str, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        lay_over(BASE, overlay, "x")


def test_a_profile_that_breaks_the_schema_changes_nothing(folder: Path) -> None:
    before = (folder / "params.yaml").read_bytes()
    (folder / "profiles" / "bad.yaml").write_text("input: {frames: 7}\n")
    with pytest.raises(ProfileError, match=r"profile bad: .*params\.yaml is not valid:\n  input\.frames: 7"):
        apply_profile("bad", folder)
    with pytest.raises(ProfileError, match=r"profile 'smog' is unknown; allowed: .*smoke"):
        apply_profile("smog", folder)
    assert (folder / "params.yaml").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["params.yaml", "profiles"]
