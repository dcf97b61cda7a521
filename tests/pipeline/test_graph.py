"""The contract with DVC's internals: graph, status, hashes, and what makes a fingerprint."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from dvc.output import build
from dvc.repo import Repo
from dvc.repo.index import Index

from config import graph
from tests.pipeline.project import ROOT, Project, wait_until

CHAIN = """
stages:
  one:
    cmd: cp in.txt one.txt
    deps: [in.txt]
    params: [seed, "input.image"]
    outs: [one.txt]
    meta: {gpus: 2, timeout_h: 3}
  two:
    cmd: mkdir -p d && cp one.txt d/two.txt
    deps: [one.txt]
    outs: [d]
  three:
    foreach: [a, b]
    do:
      cmd: cp d/two.txt three-${item}.txt
      deps: [d]
      outs: ["three-${item}.txt"]
"""


@pytest.fixture
def chain(project: Project) -> Project:
    project.write("dvc.yaml", CHAIN)
    project.write("in.txt", "1")
    return project


def test_the_repository_has_the_stages_that_it_should(project: Project) -> None:
    project.write("dvc.yaml", (ROOT / "dvc.yaml").read_text())
    nodes = graph.graph(project.root)
    names = list(nodes)
    assert names[0] == "generate@city"
    assert names[-1] == "report"
    assert nodes["prepare"].upstream == ("generate@city",)
    assert set(nodes["extract@lidar"].upstream) == {"prepare", "teacher@lidar", "teacher@start"}
    assert nodes["extract@lidar"].outs == ("outputs/stores/lidar", "reports/stores/lidar.json")
    assert {"extract@lidar", "teacher@lidar"} < set(nodes["needs@baseline"].upstream)
    assert nodes["distill@baseline-0"].upstream == ("needs@baseline", "prepare")
    assert "extract@lidar" in nodes["report"].upstream
    assert nodes["predict@baseline-0"].upstream == ("distill@baseline-0", "prepare")
    assert nodes["evaluate@baseline-0"].upstream == ("predict@baseline-0", "prepare")
    asked = {"gpus": 1, "cpus": None, "timeout_h": 48}
    assert nodes["teacher@lidar"].meta == asked | {"nodes": 1, "distributed": True}
    assert nodes["predict@baseline-0"].meta == asked | {"timeout_h": 4}
    before = graph.resolve("teacher@lidar", project.root).fingerprint
    project.set(resources__teacher={"gpus": 8, "nodes": 2, "cpus": 16, "hours": 0.5})
    spec = graph.resolve("teacher@lidar", project.root)
    assert spec.meta == {"gpus": 8, "nodes": 2, "cpus": 16, "timeout_h": 0.5, "distributed": True}
    assert spec.fingerprint == before
    for name, node in nodes.items():
        base, _, key = name.partition("@")
        assert node.cmd == f"exec python -m pipeline stage {base}" + (f" --key {key}" if key else "")
        assert {"gpus", "timeout_h"} <= node.meta.keys()
        assert all(names.index(other) < names.index(name) for other in node.upstream)


@pytest.mark.parametrize("stores", [["lidar"], []])
def test_what_stages_read_is_there_or_made(project: Project, stores: list[str]) -> None:
    """In studies without stores, too, in which nothing is extracted. DVC refuses a dependency that does not exist."""
    project.write("dvc.yaml", (ROOT / "dvc.yaml").read_text())
    project.set(study__stores=stores, study__variants=["baseline"])
    stages = Repo(str(project.root)).index.stages
    made = [out.def_path for stage in stages for out in stage.outs]
    for stage in stages:
        for path in (dep.def_path for dep in stage.deps):
            if path.startswith(("outputs/", "reports/")):
                own = [
                    out for out in made if out == path or f"{out}/".startswith(f"{path}/") or path.startswith(f"{out}/")
                ]
                assert own, f"{stage.name} reads {path}, which no stage makes"
            else:
                assert (ROOT / path).exists(), f"{stage.name} reads {path}"


def test_graph_and_selection(chain: Project) -> None:
    nodes = graph.graph(chain.root)
    assert list(nodes) == ["one", "two", "three@a", "three@b"]
    assert nodes["three@a"].upstream == ("two",)
    assert nodes["one"].meta == {"gpus": 2, "timeout_h": 3}
    assert nodes["two"].outs == ("d",)
    assert list(graph.select(nodes, ["two"])) == ["one", "two"]
    assert list(graph.select(nodes, ["three"])) == ["one", "two", "three@a", "three@b"]
    assert list(graph.select(nodes, ["three@b"])) == ["one", "two", "three@b"]
    with pytest.raises(graph.GraphError, match="target 'four' is not a stage; there are: one, two"):
        graph.select(nodes, ["four"])


def test_what_several_stages_read_is_hashed_once(chain: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    chain.repro()
    hashed: list[str] = []

    def counted(odb: Any, path: str, *rest: Any, **more: Any) -> Any:
        hashed.append(Path(path).name)
        return build(odb, path, *rest, **more)

    monkeypatch.setattr("dvc.output.build", counted)
    chain.write("d/two.txt", "changed")
    changed = ["dependency modified: d"]
    assert graph.status(chain.root) == {"two": ["out modified: d"], "three@a": changed, "three@b": changed}
    assert hashed.count("d") == 2  # as what `two` makes, and as what the others read


def test_status_says_why(chain: Project) -> None:
    assert graph.status(chain.root) == {name: ["never ran"] for name in ("one", "two", "three@a", "three@b")}
    chain.repro()
    assert graph.status(chain.root) == {}
    chain.set(input__image__flip=0.25)
    assert graph.status(chain.root) == {"one": ["param input.image.flip: 0.5 -> 0.25"]}
    chain.set()
    chain.write("in.txt", "2")
    (chain.root / "three-a.txt").unlink()
    chain.edit("dvc.yaml", "mkdir -p d &&", "mkdir -p d;")
    reasons = graph.status(chain.root)
    assert reasons["one"] == ["dependency modified: in.txt"]
    assert reasons["two"] == ["changed command"]
    assert reasons["three@a"] == ["out deleted: three-a.txt"]


def test_graph_and_status_come_from_one_reading(chain: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    chain.repro("one")
    chain.write("in.txt", "2")
    apart = graph.graph(chain.root), graph.status(chain.root)
    read: list[str] = []
    from_file = Index.from_file
    monkeypatch.setattr(
        Index, "from_file", lambda repo, path, **options: (read.append(path), from_file(repo, path, **options))[1]
    )
    assert graph.graph_and_status(chain.root) == apart
    assert read == [str(chain.root / "dvc.yaml")]


def test_fingerprint_follows_command_dependencies_and_params_and_not_meta(chain: Project) -> None:
    first = graph.resolve("one", chain.root)
    assert first.deps == {"in.txt": "c4ca4238a0b923820dcc509a6f75849b"}  # md5 of "1"
    assert first.params["seed"] == 0
    assert first.params["input.image"]["flip"] == 0.5
    assert (first.name, first.key, first.outs) == ("one", None, ("one.txt",))
    assert len(first.fingerprint) == 64

    chain.edit("dvc.yaml", "gpus: 2", "gpus: 8")
    chain.set(data__skip_broken=5)  # not a param of this stage
    again = graph.resolve("one", chain.root)
    assert again.meta["gpus"] == 8
    assert again.fingerprint == first.fingerprint

    changes = [
        ("dvc.yaml", "cp in.txt", "cp -f in.txt"),
        ("in.txt", "1", "2"),
        ("params.yaml", "\nseed: 0", "\nseed: 1"),
    ]
    seen = {first.fingerprint}
    for path, old, new in changes:
        text = (chain.root / path).read_text()
        chain.write(path, text.replace(old, new, 1))
        seen.add(graph.resolve("one", chain.root).fingerprint)
        chain.write(path, text)
    assert len(seen) == 4
    assert graph.resolve("one", chain.root).fingerprint == first.fingerprint


def test_fingerprint_survives_a_different_order_of_keys(chain: Project) -> None:
    spec = graph.resolve("one", chain.root)
    turned = dataclasses.replace(
        spec, params=dict(reversed(spec.params.items())), deps=dict(reversed(spec.deps.items()))
    )
    assert turned.fingerprint == spec.fingerprint


def test_missing_dependency_and_unknown_stage(chain: Project) -> None:
    assert graph.resolve("two", chain.root).deps == {"one.txt": None}
    three = graph.resolve("three@a", chain.root)
    assert (three.name, three.key, three.address) == ("three", "a", "three@a")
    with pytest.raises(
        graph.GraphError, match=r"stage 'three' is not in dvc.yaml; there are: one, three@a, three@b, two"
    ):
        graph.resolve("three", chain.root)


def test_resolving_does_not_wait_for_a_running_stage(chain: Project) -> None:
    chain.edit("dvc.yaml", "cmd: cp in.txt one.txt", "cmd: touch started && sleep 30 && cp in.txt one.txt")
    running = chain.start("dvc", "repro", "one")
    wait_until((chain.root / "started").exists)
    began = time.monotonic()
    assert graph.resolve("one", chain.root).deps["in.txt"]
    assert time.monotonic() - began < 15
    with pytest.raises(graph.GraphError, match="another DVC process is at work"):
        graph.status(chain.root)
    running.kill()
    chain.stop_all()
    running.wait()


@pytest.mark.parametrize("half", ["", "stages:\n  one:\n    cmd: [", "schema: '2.0'\nstages:\n  one: {cmd: \"cp in"])
def test_a_lock_file_that_is_being_written_is_read_again(chain: Project, half: str) -> None:
    """DVC truncates dvc.lock before it writes it; a stage that starts at that moment must not fail."""
    chain.repro("one")
    whole = (chain.root / "dvc.lock").read_text()
    expected = graph.resolve("one", chain.root)
    chain.write("dvc.lock", half)
    writer = threading.Timer(0.5, chain.write, ("dvc.lock", whole))
    writer.start()
    assert graph.resolve("one", chain.root) == expected
    writer.join()


def test_a_lock_file_that_stays_broken_is_named(chain: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "PATIENCE", 0.2)
    chain.write("dvc.lock", "stages: {}\n")
    with pytest.raises(graph.LockFileError, match=r"dvc\.lock' validation failed"):
        graph.status(chain.root)


def test_broken_projects_are_named(chain: Project) -> None:
    chain.run("dvc", "status")
    (chain.root / ".dvc" / "tmp" / "rwlock").write_text('{"read": {')
    with pytest.raises(graph.GraphError, match=r"remove \.dvc/tmp/rwlock"):
        graph.status(chain.root)
    (chain.root / ".dvc" / "tmp" / "rwlock").unlink()
    chain.edit("dvc.yaml", "deps: [one.txt]", "dips: [one.txt]")
    with pytest.raises(graph.GraphError, match=r"dvc\.yaml"):
        graph.graph(chain.root)


def test_beside_counts_what_is_neither_needed_nor_dependent() -> None:
    upstream = {"a": (), "b": ("a",), "c": ("a",), "d": ("b",), "e": ("c", "d"), "alone": ()}
    nodes = {name: graph.Node(name, "true", {}, needs, ()) for name, needs in upstream.items()}
    assert graph.beside(nodes) == {"a": 1, "b": 2, "c": 3, "d": 2, "e": 1, "alone": 5}
