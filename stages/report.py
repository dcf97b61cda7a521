"""Stage `report`: the metrics and pictures of a study -> one HTML page, a Markdown table, a table on the terminal."""

from __future__ import annotations

from collections import Counter

from pipeline import graph
from pipeline.report import build
from pipeline.stage import StageContext


def run(context: StageContext) -> None:
    """Build the report of `study`, publish it, and print its table."""
    params = context.params
    study = params.study
    stages, edges = stage_graph(graph.graph(context.root))
    report = build(
        context.root / "reports/metrics",
        context.root / "outputs/predictions",
        context.root / "reports/stores",
        profile=params.profile,
        teachers=study.teachers,
        stores=study.stores,
        variants={name: params.variants[name].model_dump() for name in study.variants},
        seeds=study.seeds,
        stages=stages,
        edges=edges,
    )
    files = {"report.html": report.html, "table.md": report.markdown, "table.txt": f"{report.plain}\n"}
    for name, text in files.items():
        made = context.scratch / name
        made.write_text(text)
        context.tracker.log_artifact(made)
        context.publish(made, f"reports/{name}")
    print("\n" + report.plain, flush=True)


def stage_graph(nodes: dict[str, graph.Node]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """DVC's graph with the instances of a stage taken together: stage -> number of instances, and the edges."""
    base = {name: name.partition("@")[0] for name in nodes}
    edges = [(base[source], base[name]) for name, node in nodes.items() for source in node.upstream]
    return dict(Counter(base.values())), list(dict.fromkeys(edges))
