"""What the stages `predict*` published, as the stages `evaluate*` of the same key read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stages.context import StageContext, StageError


def folder(context: StageContext) -> Path:
    """Where the predictions of the stage's key are."""
    return context.root / f"outputs/predictions/{context.key}"


def read(context: StageContext, file: str) -> Any:
    """A JSON file of the predictions.

    Raises:
        StageError: it is not there, or no JSON; says what to run.
    """
    path = folder(context) / file
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StageError(f"{path} cannot be read ({error}): run `{command(context)}`") from error


def command(context: StageContext) -> str:
    """What makes the predictions that a stage `evaluate*` reads."""
    return f"dvc repro {context.name.replace('evaluate', 'predict')}@{context.key}"
