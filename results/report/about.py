"""What a report is told beside the results: what the parameters say of the study, and where results are published."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from config.graph import Node
from config.params import Params
from results.report.efficiency import Pair
from results.report.lineage import teachers_of


@dataclass(frozen=True)
class Published:
    """Where stages publish what a report reads."""

    metrics: Path  # folder of `<teacher>.json`, `<segmenter>.json` and `<variant>-<seed>.json`
    evaluations: Path  # with a folder per run: evaluation.json, metrics_details.json, pictures.json and the pictures
    cards: Path  # folder of `<store>.json`, what extraction says of each store
    features: Path  # with a folder per run of a featured variant: features.json and the pictures that it names
    cost: Path  # file of what the models cost
    film: Path  # folder of film.json and the pictures that it names
    kept: Path  # folder of summaries of other studies

    @classmethod
    def of(cls, root: Path) -> Self:
        """Of a project."""
        evaluations, reports = root / "outputs/evaluations", root / "reports"
        return cls(
            reports / "metrics",
            evaluations,
            reports / "stores",
            evaluations / "features",
            reports / "cost.json",
            root / "outputs/film",
            root / "studies/results",
        )


@dataclass(frozen=True)
class About:
    """What the parameters say of a study."""

    profile: str
    fusions: Mapping[str, Mapping[str, str]]  # fusion teacher -> sensor -> the one of the teachers that it is made of
    segmenters: Sequence[str]
    stores: Sequence[str]
    variants: Mapping[str, Mapping[str, Any]]  # in order, name -> its entry of the parameters; the first is a baseline
    pairs: Sequence[Pair]  # of a large camera teacher and a student
    featured: Sequence[str]  # variants whose simulated LiDAR features are shown
    learned_from: Mapping[str, str]  # teachers and "students" -> the split that they learned from
    seen: Collection[str]  # those of them that learned from scenes on which the study is scored
    search: str | None  # name of the study by which the weights of the terms were chosen
    stages: Mapping[str, int]  # stage name -> number of instances, for the picture of the DAG
    edges: Sequence[tuple[str, str]]  # pairs of stage names

    @classmethod
    def of(cls, params: Params, nodes: Mapping[str, Node], seen: Collection[str]) -> Self:
        """Of a project's parameters and graph; `seen` are those that learned from scenes on which it is scored."""
        study = params.study
        stages, edges = stage_graph(nodes)
        return cls(
            profile=params.profile,
            fusions={name: study.parts(name) for name in study.fusions},
            segmenters=study.segmenters,
            stores=study.stores,
            variants={name: params.variants[name].model_dump(mode="json") for name in study.variants},
            pairs=pairs(params),
            featured=study.featured,
            learned_from=learned_from(params),
            seen=seen,
            search=study.search,
            stages=stages,
            edges=edges,
        )


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


def stage_graph(nodes: Mapping[str, Node]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """DVC's graph with the instances of a stage taken together: stage -> number of instances, and the edges."""
    base = {name: name.partition("@")[0] for name in nodes}
    edges = [(base[source], base[name]) for name, node in nodes.items() for source in node.upstream]
    return dict(Counter(base.values())), list(dict.fromkeys(edges))
