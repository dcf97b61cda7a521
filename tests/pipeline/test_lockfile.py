"""dvc.lock as the flow has it written, against DVC's own writing of the same stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.lockfile import HEAD, updated, written
from tests.pipeline.project import Project

OURS = ("pipeline.lockfile", "--wait-for-lock")
# Each of the four reads a mapping that the others read as well, and `top` one that is in it twice.
PARAMS = """
shared: &shared {list: [1, 2, {deep: null}], text: "a: b, &c *d", long: %s, number: 1.0e-3, yes: true}
left: {shared: *shared, own: 1}
right: {shared: *shared, own: 2}
top: {one: *shared, two: *shared}
""" % ("word " * 60)
STAGES = """
stages:
  top: {cmd: echo top > top.txt, params: [top], outs: [top.txt]}
  side:
    matrix: {name: [left, right]}
    cmd: mkdir -p out && cp top.txt out/${item.name}.txt
    deps: [top.txt]
    params: ["${item.name}", shared]
    outs: ["out/${item.name}.txt"]
    metrics: []
  last:
    cmd: cat out/*.txt > last.txt
    deps: [out/left.txt, out/right.txt]
    params: [shared, top]
    outs: [last.txt]
"""
NAMES = ("top", "side@left", "side@right", "last")


@pytest.fixture
def make(make_project: Callable[..., Project]) -> Callable[[], Project]:
    """Make a project with the stages."""

    def made() -> Project:
        project = make_project()
        project.write("params.yaml", PARAMS)
        project.write("dvc.yaml", STAGES)
        return project

    return made


def load(project: Project) -> Any:
    return YAML(typ="safe").load((project.root / "dvc.lock").read_text())


def run_each(project: Project, *command: str) -> None:
    for name in NAMES:
        assert f"Running stage '{name}'" in project.run(*command, "repro", "--single-item", name)


def test_it_says_what_dvc_says(make: Callable[[], Project]) -> None:
    """The same entries in the same order, and DVC takes them for its own: nothing is out of date."""
    theirs, ours = make(), make()
    run_each(theirs, "dvc")
    run_each(ours, *OURS)
    assert load(ours) == load(theirs)
    assert list(load(ours)["stages"]) == list(NAMES)
    assert ours.repro() == []
    assert ours.run("dvc", "status").strip() == "Data and pipelines are up to date."


def test_a_changed_stage_keeps_its_place_and_all_other_lines(make: Callable[[], Project]) -> None:
    project = make()
    run_each(project, *OURS)
    before = (project.root / "dvc.lock").read_text()
    project.edit("params.yaml", "own: 1", "own: 3")
    project.run(*OURS, "repro", "--single-item", "side@left")
    after = (project.root / "dvc.lock").read_text()
    changed = [pair for pair in zip(before.splitlines(), after.splitlines(), strict=True) if pair[0] != pair[1]]
    assert changed == [("          own: 1", "          own: 3")]
    assert project.run("dvc", "status").strip() == "Data and pipelines are up to date."


def test_values_that_dvc_wrote_for_several_stages_are_taken_apart(make: Callable[[], Project]) -> None:
    """One `dvc repro` of all writes a value of several stages once; no reference to it may be left alone."""
    project = make()
    project.repro()
    assert "*id001" in (project.root / "dvc.lock").read_text()
    before = load(project)
    project.edit("params.yaml", "two: *shared", "two: 2")
    project.run(*OURS, "repro", "--single-item", "top")
    after = load(project)
    assert after["stages"]["top"]["params"]["params.yaml"]["top"]["two"] == 2
    assert {name: entry for name, entry in after["stages"].items() if name != "top"} == {
        name: entry for name, entry in before["stages"].items() if name != "top"
    }
    assert "*id001" not in (project.root / "dvc.lock").read_text()
    assert project.repro() == ["last"]  # reads `top`; DVC writes beside what we wrote
    assert project.run("dvc", "status").strip() == "Data and pipelines are up to date."


def test_dvc_writes_where_a_file_is_not_as_it_writes_them(make: Callable[[], Project]) -> None:
    """A person's comment stays."""
    project = make()
    run_each(project, "dvc")
    lock = project.root / "dvc.lock"
    lock.write_text("# kept\n" + lock.read_text())
    project.edit("params.yaml", "own: 1", "own: 3")
    project.run(*OURS, "repro", "--single-item", "side@left")
    assert lock.read_text().startswith("# kept\n")
    assert project.run("dvc", "status").strip() == "Data and pipelines are up to date."


@pytest.mark.parametrize(
    "text",
    [
        "",
        "schema: '2.0'\n",
        "schema: '2.0'\ndatasets: []\nstages:\n",
        HEAD + "  a:\n    cmd: x\ndatasets:\n- name: y\n",
        HEAD + "  # of a\n  a:\n    cmd: x\n",
        HEAD + "  '12':\n    cmd: x\n",
        HEAD + "  a: {cmd: x}\n",
        HEAD + "<<<<<<< ours\n  a:\n    cmd: x\n",
        HEAD + "  a:\n    cmd: torn",
    ],
)
def test_other_texts_are_left_to_dvc(text: str) -> None:
    assert updated(text, {"b": {"cmd": "y"}}) is None


def test_a_new_file_and_equal_entries() -> None:
    text = updated(HEAD, {"b": {"cmd": "y"}, "a.b@c-0": {"cmd": "z"}})
    assert text == f"{HEAD}  b:\n    cmd: y\n  a.b@c-0:\n    cmd: z\n"
    assert updated(text, {"b": {"cmd": "y"}}) == text


def test_anchors_of_two_stages_differ() -> None:
    shared = {"a": [1]}
    lines = [written(name, {"cmd": "x", "params": {"p": {"one": shared, "two": shared}}}) for name in ("s@a", "s@b")]
    text = HEAD + "".join(lines)
    assert "&s-at-a-001" in lines[0]
    stages = YAML(typ="safe").load(text)["stages"]
    assert stages["s@a"]["params"]["p"] == stages["s@b"]["params"]["p"] == {"one": shared, "two": shared}


def test_a_long_file_costs_no_more_than_a_short_one() -> None:
    """Only the lines of the stage are made: what else is in the file is not even read as YAML."""
    text = HEAD + "".join(f"  stage@{i}:\n    cmd: '\n" for i in range(3))  # no YAML at all
    changed = updated(text, {"stage@1": {"cmd": "x"}})
    assert changed == text.replace("  stage@1:\n    cmd: '\n", "  stage@1:\n    cmd: x\n")
