"""Worktrees: further checkouts of this repository, each with a study of its own, that share what is expensive.

A worktree has its own parameters, dvc.lock, outputs and logs, so a flow in it knows nothing of the flow next door. It
shares DVC's cache, whose run cache restores what any of them has computed; the environment; the tracking store, so that
their studies stand side by side; and data that no stage makes.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from base.errors import PipelineError
from config.files import FOLDER, PARAMS, load_params, read_texts, read_yaml
from config.params import Params
from config.profiles import GROUND, apply_profile, available, lay_over, profile_overlay
from config.studies import apply_study, read_study

MADE = ("dvc.lock", "reports/")  # runs write them; everything else that is not committed is work
LINKED = (".venv", "imported")  # what setup and a person made, where it is there
STORE = "mlflow.db"


class WorktreeError(PipelineError):
    """A worktree cannot be made here, or not as asked."""


@dataclass(frozen=True)
class Workspace:
    """A checkout of the repository, and what its parameters say."""

    path: Path
    revision: str
    branch: str | None
    study: str
    profile: str

    def __str__(self) -> str:
        branch = f"branch {self.branch}" if self.branch else "no branch"
        return f"{self.path}: study {self.study}, profile {self.profile}, {self.revision[:10]} ({branch})"


def make(
    path: Path, root: Path, study: str | None = None, profile: str | None = None, branch: str | None = None
) -> Workspace:
    """Make a worktree of the current commit, ready to run; nothing of it is left when that fails.

    Args:
        path: where it is made; must not be there yet.
        root: this workspace, whose cache, environment and tracking store it shares.
        study: laid over its parameters; None: no study, the parameters as they were committed.
        profile: laid over its parameters, or instead of the one that the study names.
        branch: a new one, made for it; None: it is on no branch.
    """
    path = path.parent.resolve() / path.name
    _check_repository(root)
    _check_path(path, root)
    _check_committed(root)
    if study:
        read_study(study, root)
    _git(root, "worktree", "add", "--quiet", *(["-b", branch] if branch else ["--detach"]), str(path))
    try:
        _share(path, root)
        params = _lay(path, study, profile)
        _link_data(path, root, params)
    except BaseException:
        _remove(path, root, branch)
        raise
    return _workspace(path, _git(path, "rev-parse", "HEAD"), branch)


def workspaces(root: Path) -> list[Workspace]:
    """The checkouts of this repository in which DVC can work, the first one first."""
    _check_repository(root)
    found = []
    for block in _git(root, "worktree", "list", "--porcelain").split("\n\n"):
        fields = dict(line.partition(" ")[::2] for line in block.splitlines())
        path = Path(fields["worktree"])
        if (path / "dvc.yaml").is_file():
            branch = fields.get("branch", "").removeprefix("refs/heads/")
            found.append(_workspace(path, fields["HEAD"], branch or None))
    return found


def gc_command(found: list[Workspace], root: Path) -> str:
    """How to remove, in `root`, what none of the workspaces has now; DVC keeps nothing of those that are not named."""
    others = [str(workspace.path) for workspace in found if not workspace.path.samefile(root)]
    return shlex.join(["dvc", "gc", "--workspace", *(["--projects", *others] if others else [])])


def describe(root: Path) -> str:
    """The workspaces in lines, and how to make their cache smaller without harm to any of them."""
    found = workspaces(root)
    return "\n".join([*map(str, found), f"to remove from the cache what none of them has: {gc_command(found, root)}"])


def what_next(made: Workspace) -> str:
    """What a person types after a worktree was made."""
    return (
        f"run it:    cd {shlex.quote(str(made.path))} && .venv/bin/python -m pipeline run\n"
        f"remove it: git worktree remove --force {shlex.quote(str(made.path))} (what it computed stays in the cache)"
    )


def _check_repository(root: Path) -> None:
    try:
        top = Path(_git(root, "rev-parse", "--show-toplevel"))
        _git(root, "rev-parse", "--verify", "HEAD")
    except WorktreeError as error:
        raise WorktreeError(f"{root} has no commit, so no worktree can be made of it: {error}") from None
    if top.resolve() != root.resolve():
        raise WorktreeError(f"{root} is a folder of the git repository {top}: worktrees are made of a whole repository")


def _check_path(path: Path, root: Path) -> None:
    if path.exists() or path.is_symlink():
        raise WorktreeError(f"{path} is already there: name a folder that is not, as in ../{root.name}-study")
    if path.is_relative_to(root.resolve()):
        raise WorktreeError(f"{path} is inside this workspace, where DVC would find it: name a folder beside it")


def _check_committed(root: Path) -> None:
    """A worktree holds what is committed: refuse when that is not what this workspace runs."""
    listing = _git(root, "status", "--porcelain", "-z", "--no-renames", "--untracked-files=all")
    changed = [entry[3:] for entry in listing.split("\0") if entry]
    if missing := [name for name in changed if _is_work(name, root)]:
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise WorktreeError(
            f"a worktree has what is committed, and these changes are not: {', '.join(missing[:10])}{more}; "
            "commit them, or put them aside (git stash --include-untracked)"
        )


def _is_work(name: str, root: Path) -> bool:
    """Whether a file that is not as committed holds what a person did; links to data are made again."""
    if name == PARAMS or (name.startswith(f"{FOLDER}/") and name.endswith(".yaml")):
        return _edited_by_hand(name, root)
    return not name.startswith(MADE) and not (root / name).is_symlink()


def _edited_by_hand(name: str, root: Path) -> bool:
    """Whether a file of the parameters differs from the committed one by more than what is laid over it."""
    listed = _git(root, "ls-tree", "-r", "--name-only", "HEAD", PARAMS, FOLDER).splitlines()
    committed = [file for file in listed if file.endswith(".yaml")]
    here, there = read_texts(root), {file: _git(root, "show", f"HEAD:{file}") + "\n" for file in committed}
    if GROUND in available(root):
        here, there = (lay_over(texts, *profile_overlay(GROUND, root)) for texts in (here, there))
    return here.get(name) != there.get(name)


def _share(path: Path, root: Path) -> None:
    """Let a new worktree use this workspace's cache, environment and tracking store."""
    _share_cache(path, root)
    for name in LINKED:
        if (root / name).exists() and not (path / name).exists():
            _link(path / name, root / name)
    if not (root / STORE).exists():  # two workspaces that make its tables at once break them
        from results.tracking.runs import init_store

        init_store(f"sqlite:///{root / STORE}")
    _link(path / STORE, root / STORE)


def _share_cache(path: Path, root: Path) -> None:
    """Give DVC there the settings that this workspace alone has (.dvc/config.local), and this workspace's cache."""
    local = Path(".dvc", "config.local")
    if (root / local).exists():
        shutil.copy(root / local, path / local)  # whole: passwords of remotes belong on no command line
        copied = _settings(path)
        for key, value in _settings(root).items():
            if copied.get(key) != value:  # a path that begins where the file is
                _dvc(path, "config", "--local", key, value)
    _dvc(path, "cache", "dir", "--local", _dvc(root, "cache", "dir"))


def _settings(where: Path) -> dict[str, str]:
    """DVC's local settings, with absolute paths."""
    lines = _dvc(where, "config", "--local", "--list").splitlines()
    return {key: value for key, _, value in (line.partition("=") for line in lines)}


def _lay(path: Path, study: str | None, profile: str | None) -> Params:
    """Lay what is asked for over the worktree's parameters."""
    if study:
        return apply_study(study, path, profile)
    return apply_profile(profile, path) if profile else load_params(path)


def _link_data(path: Path, root: Path, params: Params) -> None:
    """Link data inside this workspace that no stage makes; data elsewhere must be found from the worktree, too."""
    data, instances = params.data, params.data.instances
    places = [data.dataroot, *([instances.root, instances.train, instances.val] if instances else [])]
    for place in places:
        made = any(Path(place).is_relative_to(f"outputs/{world}") for world in data.worlds)
        if made or (path / place).exists() or not (root / place).exists():
            continue
        if ".." in Path(place).parts:
            raise WorktreeError(
                f"data: {place} is {(root / place).resolve()}, but from {path} nothing is there: "
                f"make the worktree beside {root}, or give an absolute path"
            )
        (path / place).parent.mkdir(parents=True, exist_ok=True)
        _link(path / place, root / place)


def _link(link: Path, target: Path) -> None:
    """Link to what is behind `target`, which may be a link in a worktree that is removed one day."""
    link.symlink_to(target.resolve())


def _remove(path: Path, root: Path, branch: str | None) -> None:
    """Undo a worktree that was not finished."""
    with suppress(WorktreeError):
        _git(root, "worktree", "remove", "--force", str(path))
        if branch:
            _git(root, "branch", "--quiet", "-D", branch)


def _workspace(path: Path, revision: str, branch: str | None) -> Workspace:
    params = read_yaml(path / PARAMS)  # unchecked: a list names a workspace whose parameters are being edited, too
    return Workspace(path, revision, branch, params.get("study", {}).get("name", "own"), params.get("profile", "none"))


def _git(where: Path, *arguments: str) -> str:
    return _output(["git", "-C", str(where), *arguments], where)


def _dvc(where: Path, *arguments: str) -> str:
    return _output([sys.executable, "-m", "dvc", *arguments], where)


def _output(command: list[str], where: Path) -> str:
    """What a command prints, without the last line's end; raises WorktreeError with its complaint when it fails."""
    try:
        done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise WorktreeError(f"{command[0]} is not installed: worktrees need it") from error
    except subprocess.CalledProcessError as error:
        raise WorktreeError(error.stderr.strip() or f"{' '.join(command)} ended with {error.returncode}") from error
    return done.stdout.removesuffix("\n")
