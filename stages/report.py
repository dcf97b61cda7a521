"""Stage `report`: the metrics and pictures of a study -> one HTML page, a Markdown table, a table on the terminal.

Beside them summary.json, the study's numbers; a copy of it in studies/results lets other studies show how the weights
of their terms were chosen.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from config import graph
from config.params import Params
from data.reading.index import Index
from results.report.about import About, Published, learned_from
from results.report.build import build
from results.report.lineage import results, teachers_of
from results.report.results import Study
from results.tracking import study_runs as comparison
from stages.context import INDEX, StageContext

logger = logging.getLogger(__name__)


def run(context: StageContext) -> None:
    """Build the report of `study`, publish it, and print its table."""
    params, root = context.params, context.root
    split = getattr(params.data.splits, params.evaluate.split)
    about = About.of(params, graph.graph(root), seen(Index.open(root / INDEX), learned_from(params), split))
    study = results(params, root)
    report = build(study, Published.of(root), about)
    files = {
        "report.html": report.html,
        "table.md": report.markdown,
        "table.txt": f"{report.plain}\n",
        "summary.json": report.summary,
    }
    for name, text in files.items():
        made = context.scratch / name
        made.write_text(text)
        context.tracker.log_artifact(made)
        context.publish(made, f"reports/{name}")
    print("\n" + report.plain, flush=True)
    try:
        logger.info("%s", track(root, params, study))
    except Exception as error:  # tracking never stops a stage
        logger.warning("the study is not tracked (python -m pipeline track study): %s", error)


def track(root: Path, params: Params, study: Study) -> str:
    """Bring the study's runs in MLflow up to date with what is published; returns what was done, in a line."""
    return comparison.track(root, params, study, {name: teachers_of(params, name) for name in params.study.variants})


def seen(index: Index, sources: Mapping[str, str], split: str) -> set[str]:
    """Those whose source has scenes of a split."""
    scored = set(index.scenes(split))
    return {name for name, source in sources.items() if not scored.isdisjoint(index.scenes(source))}
