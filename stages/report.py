"""Stage `report`: the metrics and pictures of a study -> one HTML page, a Markdown table, a table on the terminal.

Beside them summary.json, the study's numbers; a copy of it in studies/results lets other studies show how the weights
of their terms were chosen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from data.index import Index
from pipeline import graph
from pipeline.params import Params
from pipeline.report import Pair, build
from pipeline.stage import StageContext

INDEX: Final = "outputs/index"
RESULTS: Final = "studies/results"


def run(context: StageContext) -> None:
    """Build the report of `study`, publish it, and print its table."""
    params = context.params
    study, sources = params.study, learned_from(params)
    stages, edges = stage_graph(graph.graph(context.root))
    report = build(
        context.root / "reports/metrics",
        context.root / "outputs/predictions",
        context.root / "reports/stores",
        context.root / "outputs/predictions/features",
        context.root / "reports/cost.json",
        profile=params.profile,
        teachers=study.teachers,
        fusions=study.fusions,
        large=study.large,
        parts=study.parts.model_dump(),
        starts=starts(params),
        segmenters=study.segmenters,
        stores=study.stores,
        variants={name: params.variants[name].model_dump() for name in study.variants},
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


def starts(params: Params) -> set[str]:
    """The teachers from which students or other teachers of the study start, and from which no store is made."""
    study = params.study
    begun = {start.teacher for name in study.variants for start in params.student(name).starts}
    parts = set(study.parts.model_dump().values()) if study.fusions else set()
    camera = {study.parts.camera} if study.large else set()
    return (begun | parts | camera) - {params.stores[name].teacher for name in study.stores}


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


def teachers_of(params: Params, variant: str) -> set[str]:
    """The teachers that a variant's terms read, and those that its student inherits weights from."""
    stores = [term["teacher"].partition(".")[0] for term in params.variants[variant].terms.values()]
    inherited = [start.teacher for start in params.student(variant).starts if start.resample]
    return {*(params.stores[name].teacher for name in stores), *inherited}


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
