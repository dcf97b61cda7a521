"""DVC's graph, status and hashes. With `lockfile` the only module that imports what DVC does not document."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from base.errors import PipelineError

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc.stage import PipelineStage


PATIENCE = 5.0  # seconds for another DVC to finish writing dvc.lock

P = ParamSpec("P")
T = TypeVar("T")


class GraphError(PipelineError):
    """dvc.yaml cannot be read, names an unknown stage, or is in use by another process."""


class LockFileError(GraphError):
    """dvc.lock is broken, or half written."""


def _settled(read: Callable[P, T]) -> Callable[P, T]:
    """Read again while dvc.lock is broken: DVC writes it in place, so that a reader beside it may see an empty file."""

    @functools.wraps(read)
    def patiently(*args: P.args, **kwargs: P.kwargs) -> T:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return read(*args, **kwargs)
            except LockFileError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.05)

    return patiently


@dataclass(frozen=True)
class Node:
    """A stage in the graph, without hashes."""

    name: str  # as DVC has it: distill@baseline-0
    cmd: str
    meta: dict[str, Any]
    upstream: tuple[str, ...]  # names of the stages whose outs it reads
    outs: tuple[str, ...]


@dataclass(frozen=True)
class StageSpec:
    """What a stage is about to run on."""

    name: str  # distill
    key: str | None  # baseline-0
    cmd: str
    deps: dict[str, str | None]  # path -> md5 (None: not there)
    params: dict[str, Any]  # dotted key -> value, of the params the stage uses
    outs: tuple[str, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """The stage's name in DVC: name@key."""
        return f"{self.name}@{self.key}" if self.key else self.name

    @property
    def fingerprint(self) -> str:
        """SHA-256 over (cmd, dependency hashes, parameter values). Resources (`meta`) are not part of it."""
        text = json.dumps([self.cmd, self.deps, self.params], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def address(name: str, key: str | None) -> str:
    """The stage's name in DVC."""
    return f"{name}@{key}" if key else name


@_settled
def graph(root: Path | None = None) -> dict[str, Node]:
    """All stages, dependencies before their dependants."""
    with _repo(root) as repo:
        return _nodes(repo)


@_settled
def status(root: Path | None = None) -> dict[str, list[str]]:
    """Stages that are out of date, each with the reasons. Asked before anything runs: later DVC is busy."""
    with _repo(root) as repo, _locked(repo):
        return _changed(repo)


@_settled
def graph_and_status(root: Path | None = None) -> tuple[dict[str, Node], dict[str, list[str]]]:
    """Both from one reading of the project, which is most of what either of them costs."""
    with _repo(root) as repo, _locked(repo):
        return _nodes(repo), _changed(repo)


@_settled
def resolve(name: str, root: Path | None = None) -> StageSpec:
    """What stage `name` (distill@baseline-0) runs on now; quick, as DVC keeps hashes, and free of its locks."""
    from dvc.dependency import ParamsDependency
    from dvc.dvcfile import PROJECT_FILE, ProjectFile
    from dvc.stage.loader import StageLoader

    with _repo(root) as repo:
        file = ProjectFile(repo, os.path.join(repo.root_dir, PROJECT_FILE))
        stages = StageLoader(file, file.contents)  # only this stage is made, and dvc.lock is not read
        if name not in stages:
            raise GraphError(f"stage {name!r} is not in dvc.yaml; there are: {', '.join(sorted(stages))}")
        stage = stages[name]
        deps: dict[str, str | None] = {}
        params: dict[str, Any] = {}
        for dep in stage.deps:
            if isinstance(dep, ParamsDependency):
                params |= dep.read_params()
            else:
                deps[dep.def_path] = dep.get_hash().value if dep.exists else None
        base, _, key = name.partition("@")
        outs = tuple(out.def_path for out in stage.outs)
        return StageSpec(base, key or None, _cmd(stage), deps, params, outs, dict(stage.meta or {}))


def select(nodes: Mapping[str, Node], targets: Iterable[str]) -> dict[str, Node]:
    """The targets (a stage, or a group such as `distill`) and all they need; everything when there are no targets."""
    wanted: set[str] = set()
    frontier: list[str] = []
    for target in targets:
        matches = [name for name in nodes if target in (name, name.partition("@")[0])]
        if not matches:
            raise GraphError(f"target {target!r} is not a stage; there are: {', '.join(nodes)}")
        frontier += matches
    if not frontier:
        return dict(nodes)
    while frontier:
        name = frontier.pop()
        if name not in wanted:
            wanted.add(name)
            frontier += nodes[name].upstream
    return {name: node for name, node in nodes.items() if name in wanted}


def beside(nodes: Mapping[str, Node]) -> dict[str, int]:
    """How many stages may run at the same time as each: those that it does not need and that do not need it."""
    needed: dict[str, set[str]] = {}
    for name, node in nodes.items():  # dependencies come first
        needed[name] = {name}.union(*(needed[other] for other in node.upstream))
    dependants = Counter(other for names in needed.values() for other in names)  # each is among its own
    return {name: len(nodes) + 1 - len(needed[name]) - dependants[name] for name in nodes}


@contextlib.contextmanager
def _repo(root: Path | None) -> Iterator[Repo]:
    """DVC's view of the project; its errors become ours, with what to do."""
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo
    from dvc.rwlock import RWLockFileCorruptedError, RWLockFileFormatError
    from dvc.utils.strictyaml import YAMLSyntaxError, YAMLValidationError

    try:
        with Repo(os.fspath(root) if root else None) as repo:
            yield repo
    except LockError as error:
        raise GraphError(f"another DVC process is at work here: wait until it ends, or stop it.\n{error}") from error
    except (RWLockFileCorruptedError, RWLockFileFormatError) as error:
        raise GraphError(
            f"{error}: a DVC process died while writing it; when none runs here, remove .dvc/tmp/rwlock"
        ) from error
    except (YAMLSyntaxError, YAMLValidationError) as error:
        kind = LockFileError if str(error.path).endswith("dvc.lock") else GraphError
        raise kind(f"DVC: {error}") from error
    except DvcException as error:
        causes = [str(error), *([str(error.__cause__)] if error.__cause__ else [])]
        raise GraphError("DVC: " + "\n".join(causes)) from error


@contextlib.contextmanager
def _locked(repo: Repo) -> Iterator[None]:
    """Hold DVC's lock: what `repo.status` asks for, and what keeps it from reading the project again each time."""
    from dvc.repo import lock_repo

    with lock_repo(repo):
        yield


def _nodes(repo: Repo) -> dict[str, Node]:
    import networkx

    edges = repo.index.graph  # stage -> the stages it depends on
    position = {stage: i for i, stage in enumerate(repo.index.stages)}  # ties in the order of dvc.yaml
    order = networkx.lexicographical_topological_sort(edges.reverse(copy=False), position.__getitem__)
    return {
        stage.name: Node(
            stage.name,
            _cmd(stage),
            dict(stage.meta or {}),
            tuple(sorted(other.name for other in edges.successors(stage) if getattr(other, "name", None))),
            tuple(out.def_path for out in stage.outs),
        )
        for stage in order
        if getattr(stage, "name", None)
    }


def _changed(repo: Repo) -> dict[str, list[str]]:
    _hash_once(repo)
    entries = repo.status()
    return {
        stage.name: _reasons(stage, entries[stage.addressing]) for stage in _stages(repo) if stage.addressing in entries
    }


def _hash_once(repo: Repo) -> None:
    """Have DVC hash what several stages depend on once: it would walk a folder of code again for each of them."""
    from dvc.dependency import ParamsDependency

    hashed: dict[str, Any] = {}

    def once(path: str, compute: Callable[[], Any]) -> Any:
        if path not in hashed:
            hashed[path] = compute()
        return hashed[path]

    for stage in repo.index.stages:
        for dep in stage.deps:
            if not isinstance(dep, ParamsDependency):
                dep._get_hash_meta = functools.partial(once, dep.fs_path, dep._get_hash_meta)


def _stages(repo: Repo) -> list[PipelineStage]:
    return [stage for stage in repo.index.stages if getattr(stage, "name", None)]


def _cmd(stage: PipelineStage) -> str:
    return stage.cmd if isinstance(stage.cmd, str) else "\n".join(stage.cmd)


def _reasons(stage: PipelineStage, entries: list[Any]) -> list[str]:
    """DVC's status entries of one stage in words: changed params with their values first."""
    from dvc.dependency import ParamsDependency

    if not stage.md5 and not any(dep.hash_info for dep in stage.deps):
        return ["never ran"]
    reasons: list[str] = []
    for dep in stage.deps:
        if isinstance(dep, ParamsDependency):
            reasons += _changed_params(dep.hash_info.value or {}, dep.read_params())
    params_files = {str(dep) for dep in stage.deps if isinstance(dep, ParamsDependency)}
    for entry in entries:
        if isinstance(entry, str):  # "changed command", "always changed"
            reasons.append(entry)
            continue
        for kind, paths in entry.items():
            word = {"changed deps": "dependency", "changed outs": "out"}.get(kind, kind)
            reasons += [f"{word} {state}: {path}" for path, state in paths.items() if path not in params_files]
    return reasons


def _changed_params(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` of every leaf that differs."""
    from config.nested import flatten

    before, after = flatten(old), flatten(new)
    keys = [key for key in {**before, **after} if before.get(key, ...) != after.get(key, ...)]
    return [f"param {key}: {before.get(key, 'none')} -> {after.get(key, 'none')}" for key in keys]
