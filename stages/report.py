"""Stage `report`: the metrics and pictures of a study -> one HTML page, a Markdown table, a table on the terminal.

Beside them summary.json, the study's numbers; a copy of it in studies/results lets other studies show how the weights
of their terms were chosen.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from config import graph
from config.params import Params
from data.reading.index import Index
from results.report.build import build
from results.report.efficiency import Pair
from results.tracking import study_runs as comparison
from stages.context import StageContext
from stages.lineage import results, starts, teachers_of

logger = logging.getLogger(__name__)

INDEX: Final = "outputs/index"
RESULTS: Final = "studies/results"


def run(context: StageContext) -> None:
    """Build the report of `study`, publish it, and print its table."""
    params = context.params
    study, sources = params.study, learned_from(params)
    stages, edges = stage_graph(graph.graph(context.root))
    report = build(
        context.root / "reports/metrics",
        context.root / "outputs/evaluations",
        context.root / "reports/stores",
        context.root / "outputs/evaluations/features",
        context.root / "reports/cost.json",
        context.root / "outputs/film",
        profile=params.profile,
        teachers=study.teachers,
        fusions={name: study.parts(name) for name in study.fusions},
        large=[*study.large],
        starts=starts(params),
        segmenters=study.segmenters,
        stores=study.stores,
        variants={name: params.variants[name].model_dump(mode="json") for name in study.variants},
        baselines=study.baselines,
        pairs=pairs(params),
        featured=study.featured,
        seeds=study.seeds,
        learned_from=sources,
        seen=seen(Index.open(context.root / INDEX), sources, getattr(params.data.splits, params.evaluate.split)),
        search=(context.root / RESULTS, study.search) if study.search else None,
        stages=stages,
        edges=edges,
    )
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
        logger.info("%s", track(context.root, params))
    except Exception as error:  # tracking never stops a stage
        logger.warning("the study is not tracked (python -m pipeline track study): %s", error)


def track(root: Path, params: Params) -> str:
    """Bring the study's runs in MLflow up to date with what is published; returns what was done, in a line."""
    study = results(params, root)
    return comparison.track(root, params, study, {name: teachers_of(params, name) for name in params.study.variants})


def pairs(params: Params) -> list[Pair]:
    """The camera teachers, each with every student that learns or inherits from it; one model is one student."""
    variants = params.study.variants
    cameras = [name for name in params.study.detectors if sees_only_images(params.teachers[name].model)]
    models = {name: params.student(name).model for name in variants}
    taught = {name: teachers_of(params, name) & {*cameras} for name in variants}
    found = []
    for teacher in cameras:
        learners = [name for name in variants if teacher in taught[name]]
        while learners:
            same = [name for name in variants if models[name] == models[learners[0]]]
            alone = [name for name in same if not taught[name] and not params.variants[name].terms]
            own = [name for name in learners if name in same]
            found.append(Pair(teacher, params.variants[own[0]].student, models[own[0]]["type"], alone, own))
            learners = [name for name in learners if name not in same]
    return found


def sees_only_images(model: Mapping[str, Any]) -> bool:
    """Whether a detector's config is of one that reads images and no other sensor."""
    return "image_backbone" in model and not {"lidar", "radar"} & model.keys()


def learned_from(params: Params) -> dict[str, str]:
    """Teachers of the study, and "students" -> the split that they learn from."""
    splits = params.data.splits
    teachers = {name: params.teachers[name].split or splits.train for name in params.study.detectors}
    return {**teachers, "students": splits.of_students}


def seen(index: Index, sources: Mapping[str, str], split: str) -> set[str]:
    """Those whose source has scenes of a split."""
    scored = set(index.scenes(split))
    return {name for name, source in sources.items() if not scored.isdisjoint(index.scenes(source))}


def stage_graph(nodes: dict[str, graph.Node]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """DVC's graph with the instances of a stage taken together: stage -> number of instances, and the edges."""
    base = {name: name.partition("@")[0] for name in nodes}
    edges = [(base[source], base[name]) for name, node in nodes.items() for source in node.upstream]
    return dict(Counter(base.values())), list(dict.fromkeys(edges))
