"""Studies: `studies/NAME.yaml` says what one report compares, at which profile, and what of the parameters that needs.

A study says what is compared; its profile says at which size, with how many seeds and from which start, unless the
study sets that too. Both are laid over the parameters in place, and always over the same ground: first profile `demo`,
which resets what any profile or study has set, then the study's profile, then the study. So it is the same study
whatever they held before.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from base.errors import PipelineError
from config.files import read_text, read_yaml
from config.params import Params, ParamsError
from config.profiles import GROUND, apply_overlays, profile_overlay, section


class StudyError(PipelineError):
    """A study is unknown, or its file is not one."""


class Study(BaseModel):
    """The content of a study's file; `params` and `study` mirror the nesting of the parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    about: str  # a line for the list of studies
    profile: str
    params: dict[str, Any] = {}
    study: dict[str, Any]


def available(root: Path) -> list[str]:
    """Names of the studies of a project."""
    return sorted(path.stem for path in (root / "studies").glob("*.yaml"))


def read_study(name: str, root: Path) -> Study:
    """Read and check studies/<name>.yaml; raises StudyError naming what is wrong with it."""
    path = root / "studies" / f"{name}.yaml"
    if not path.is_file():
        raise StudyError(f"study {name!r} is unknown; allowed: {', '.join(available(root)) or 'nothing'}")
    try:
        return Study.model_validate(read_yaml(path))
    except ParamsError as error:
        raise StudyError(str(error)) from None
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg'].lower()}" for item in error.errors())
        raise StudyError(
            f"studies/{name}.yaml: {problems}; a study has the keys about, profile, params (optional) and study"
        ) from None


def apply_study(name: str, root: Path, profile: str | None = None) -> Params:
    """Lay a study over the parameters; returns the checked result. The files are untouched when it fails.

    Args:
        name: a file of studies/ without .yaml.
        root: folder of params.yaml.
        profile: another one than the study names.
    """
    study = read_study(name, root)
    profiles = [profile_overlay(part, root) for part in (GROUND, profile or study.profile)]
    file = f"studies/{name}.yaml"
    text = read_text(root / file)
    own = [(textwrap.dedent(section(text, "params")), file)] if study.params else []
    named = (f"study: {{name: {name}}}\n", file)
    return apply_overlays([*profiles, *own, (f"study:{section(text, 'study')}\n", file), named], root, f"study {name}")
