"""Stage `needs`: what the students of a variant are trained on, as values and hashes in a small file.

DVC cannot look up which terms a variant names and which teachers they read, only depend on params/arms,
outputs/teachers and outputs/stores whole, where every study has others. So students depend on this file instead: it is
made again whenever something changes there, and is the same again unless they read it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from config.params import Params
from data.hashing import hash_files
from stages.context import StageContext


def run(context: StageContext) -> None:
    """Publish outputs/needs/<variant>.json."""
    content = needs(context.root, context.params, context.key or "")
    made = context.scratch / "needs.json"
    made.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    context.publish(made, f"outputs/needs/{context.key}.json")


def needs(root: Path, params: Params, variant: str) -> dict[str, Any]:
    """The student, its terms, the stores that they read, and hashes of the weights and stores behind them.

    Raises:
        MissingFileError: naming a teacher whose weights are not there.
    """
    chosen, student = params.variants[variant], params.student(variant)
    terms = chosen.terms
    names = sorted({term.teacher.store for term in terms.values()})
    stores = {name: params.stores[name] for name in names}
    teachers = {store.teacher for store in stores.values()} | {start.teacher for start in student.starts}
    manifests = [f"outputs/stores/{name}/manifest.json" for name in names]  # with a checksum of every shard
    files = [f"outputs/teachers/{name}" for name in teachers] + [path for path in manifests if (root / path).exists()]
    return {
        "student": student.model_dump(mode="json"),
        "terms": [
            [name, term.model_dump(mode="json")] for name, term in terms.items()
        ],  # their draws follow their order
        "truth": [chosen.truth, chosen.truth_share],
        "stores": {name: store.model_dump(mode="json") for name, store in stores.items()},
        "calibration_samples": params.store.calibration_samples,
        "files": {path: hash_files(root, [path]) for path in sorted(files)},
    }
