"""The report from made-up metrics files: numbers, named errors, a page that needs nothing else, equal bytes."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from PIL import Image

from config.graph import Node
from config.nested import merge
from config.params import Params
from data.preparing.build import build_index
from data.reading.classes import CLASSES
from data.reading.index import Index
from results.report.about import About, Published, learned_from, pairs, stage_graph
from results.report.build import Report, build
from results.report.charts import curve_path, graph, reduced, round_ticks
from results.report.efficiency import Compression, Pair, compression
from results.report.lineage import starts
from results.report.results import ERRORS, EVALUATION, ReportError, load_study
from results.report.scenes import extremes, scene_gains
from results.report.significance import probability
from results.report.statistics import holm, mean_interval, paired_difference
from results.report.tradeoff import log_ticks, side_by_side, span_ticks
from stages.report import seen as seen_by
from tests.params_files import read_params

ROOT = Path(__file__).resolve().parents[2]
TERM = {
    "student": "bev_neck",
    "teacher": "lidar.bev_lift",
    "mask": {"kind": "balanced"},
    "adapter": {"kind": "decoder"},
    "distance": "l1",
    "weight": 0.3,
}
PLAIN: dict[str, Any] = {"student": "camera", "terms": {}, "model": {}, "train": {}, "truth": True, "row": None}
FUSION = {"fusion": {"lidar": "lidar"}}
VARIANTS: dict[str, dict[str, Any]] = {
    "baseline": {**PLAIN, "row": "A0"},
    "xfd": {**PLAIN, "terms": {"xfd": TERM}, "train": {"epochs": 12}, "row": "A2"},
    "xod-<b>": {**PLAIN, "terms": {"xod": {**TERM, "mask": {"kind": "top", "k": 5}}}, "truth": False},
}
STAGES = {"prepare": 1, "teacher": 1, "distill": 6, "evaluate": 6, "report": 1}
EDGES = [("prepare", "teacher"), ("teacher", "distill"), ("prepare", "distill"), ("distill", "evaluate")]
EDGES += [("prepare", "evaluate"), ("evaluate", "report")]

CARD = {
    "store": "lidar",
    "taps": {
        "bev_lift": {
            "serve": "cached-warp", "encoding": "int8, occupied cells, zstd", "bytes_per_sample": 39_300.0,
            "float16_bytes_per_sample": 393_216, "error": {"mean": 0.0123, "max_of_std": 0.02},
            "gap": {"identity": 0.0123, "flip x": 0.25},
        },
        "boxes": {"serve": "cached-exact", "encoding": "float32", "bytes_per_sample": 880.0},
    },
}  # fmt: skip

INSTANCES = {"AP": 0.31, "AP50": 0.52, "AP75": 0.33, "AP_small": 0.12, "AP_medium": 0.4, "AP_large": None, "AR": 0.36}
SEGMENTER = {
    "kind": "segmenter", "key": "instance", "images": 576, "parameters": 2_100_000,
    "bbox": INSTANCES, "mask": {**INSTANCES, "AP": 0.27},
    "classes": {
        "car": {"truth": 900, "bbox": {"AP": 0.41, "AP50": 0.6}, "mask": {"AP": 0.38, "AP50": 0.57}},
        "bus": {"truth": 0, "bbox": {"AP": None, "AP50": None}, "mask": {"AP": None, "AP50": None}},
    },
}  # fmt: skip


def cost_of(parameters: float, multiply_adds: float, latency: float) -> dict[str, float]:
    """In millions, thousands of millions and milliseconds."""
    return {
        "parameters": parameters * 1e6, "multiply_adds": multiply_adds * 1e9, "latency_ms": latency,
        "throughput_1": 1e3 / latency, "throughput_8": 2e3 / latency, "peak_memory": latency * 1e5,
    }  # fmt: skip


COST: dict[str, Any] = {
    "device": "Some CPU", "threads": 2, "torch": "2.13.0", "precisions": ["float32"], "image": [128, 352], "frames": 1,
    "repeats": {"1": 15, "8": 3},
    "teachers": {
        **{name: cost_of(0.65, 1.18, 44.0) for name in ("lidar", "fusion")},
        **{name: cost_of(3.2, 10.0, 160.0) for name in ("giant", "former")},
    },
    "variants": {
        "baseline": cost_of(1.6, 2.5, 80.0), "xfd": cost_of(1.6, 2.5, 80.0), "xod-<b>": cost_of(1.8, 3.5, 100.0),
    },
}  # fmt: skip
PAIR = Pair("giant", "camera", "CameraBEVDepth", ["baseline"], ["xfd"])


def make_metrics(rng: np.random.Generator, kind: str, level: float, absent: tuple[str, ...] = ()) -> dict[str, Any]:
    classes = {}
    for name in CLASSES:
        ap = 0.0 if name in absent else float(np.clip(rng.normal(level, level / 3), 0, 1))
        errors = {error[1:]: float(rng.uniform(0.2, 1.0)) for error in ERRORS}
        truth = 0 if name in absent else 40
        classes[name] = {"AP": ap, **errors, "truth": truth, "predicted": 55}
    classes["traffic_cone"].update(AOE=None, AVE=None, AAE=None)
    ap = float(np.mean([values["AP"] for values in classes.values()]))
    errors = {error: float(rng.uniform(0.3, 1.0)) for error in ERRORS}
    scenes = [
        {"scene": f"scene-000{n}", "mAP": ap * (1 + (-1) ** n * 0.1 * n), "boxes": 10 * n, "samples": 4}
        for n in range(1, 9)
    ]
    scenes.append({"scene": "scene-0009", "mAP": None, "boxes": 0, "samples": 4})
    return {
        "kind": kind, "split": "val", "official": "vectorised", "parameters": 1_650_000,
        "mAP": ap, "NDS": ap * 0.9, **errors,
        "mAP_present": ap * 10 / (10 - len(absent)), "samples": 96, "classes": classes,
        "boxes": {"truth": 40 * (10 - len(absent)), "predicted": 550}, "scenes": scenes,
    }  # fmt: skip


def write_run(root: Path, key: str, run: dict[str, Any]) -> None:
    """The two files of an evaluation: its metrics, and the rest of it."""
    (root / f"metrics/{key}.json").write_text(json.dumps({k: v for k, v in run.items() if k not in EVALUATION}))
    path = root / f"evaluations/{key}/evaluation.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({name: run[name] for name in EVALUATION}))


def read_run(root: Path, key: str) -> dict[str, Any]:
    """The same two files, together."""
    files = (root / f"metrics/{key}.json", root / f"evaluations/{key}/evaluation.json")
    return {name: value for file in files for name, value in json.loads(file.read_text()).items()}


def make_pictures(rng: np.random.Generator, folder: Path, metrics: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    recall = np.linspace(0, 1, 101)
    details = {}
    for name, values in metrics["classes"].items():
        precision = np.where(recall < values["AP"] + 0.2, 1 - recall * rng.uniform(0.3, 1.0), 0.0)
        details[f"{name}:2.0"] = {"recall": recall.tolist(), "precision": precision.tolist()}
    (folder / "metrics_details.json").write_text(json.dumps(details))
    files = {name: f"00-{name}.png" for name in ("truth-cameras", "truth-bev", "cameras", "bev")}
    for file in files.values():
        noise = rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / file)
    scene = {"token": "abc", "caption": "scene-0003, keyframe abc", "files": files}
    (folder / "pictures.json").write_text(json.dumps({"threshold": 0.2, "scenes": [scene]}))


def make_study(root: Path, seeds: list[int], absent: tuple[str, ...] = ()) -> Path:
    rng = np.random.default_rng(0)
    (root / "metrics").mkdir(parents=True)
    levels = {"baseline": 0.1, "xfd": 0.14, "xod-<b>": 0.12}
    runs = {"lidar": ("teacher", 0.5)}
    runs |= {f"{name}-{seed}": ("student", level) for name, level in levels.items() for seed in seeds}
    for key, (kind, level) in runs.items():
        metrics = make_metrics(rng, kind, level, absent)
        write_run(root, key, metrics)
        make_pictures(rng, root / "evaluations" / key, metrics)
    (root / "metrics/instance.json").write_text(json.dumps(SEGMENTER))
    overlays = root / "evaluations/instance"
    overlays.mkdir()
    Image.fromarray(rng.integers(0, 255, (30, 80, 3), dtype=np.uint8)).save(overlays / "00.png")
    images = [{"image": "samples/CAM_BACK/one.jpg", "file": "00.png"}]
    (overlays / "pictures.json").write_text(json.dumps({"threshold": 0.2, "images": images}))
    (root / "cost.json").write_text(json.dumps(COST))
    make_film(root / "film", ["lidar", "baseline-0", "xfd-0"])
    (root / "stores").mkdir()
    (root / "stores/lidar.json").write_text(json.dumps(CARD))
    return root


def make_film(folder: Path, keys: list[str]) -> None:
    """Three keyframes of a scene, and a picture of another one."""
    folder.mkdir()
    frames = [Image.fromarray(np.full((30, 90, 3), shade, np.uint8)) for shade in (0, 99, 200)]
    frames[0].save(folder / "film.webp", save_all=True, append_images=frames[1:], duration=500)
    frames[1].save(folder / "scene-0008.jpg")
    stills = [{"scene": "scene-0008", "token": "abc", "file": "scene-0008.jpg"}]
    content = {"keys": keys, "threshold": 0.2, "scene": "scene-0007", "keyframes": 3, "file": "film.webp"}
    (folder / "film.json").write_text(json.dumps({**content, "scenes": stills}))


def make_film_of(root: Path, keys: list[str]) -> None:
    """The film once more, with other runs in it."""
    shutil.rmtree(root / "film")
    make_film(root / "film", keys)


def add_fusion(root: Path, mean_ap: float, score: float) -> None:
    """A fusion teacher with these metrics beside `lidar`, which gets 0.5 and 0.6."""
    content = {**read_run(root, "lidar"), "mAP": 0.5, "NDS": 0.6}
    write_run(root, "lidar", content)
    write_run(root, "fusion", {**content, "mAP": mean_ap, "NDS": score})
    make_pictures(np.random.default_rng(1), root / "evaluations/fusion", content)


def add_large(root: Path, score: float, alone: float, taught: float, name: str = "giant") -> None:
    """A large teacher with this NDS; the baseline and xfd get theirs, a tenth of the seed's number apart."""
    content = read_run(root, "lidar")
    write_run(root, name, {**content, "NDS": score})
    make_pictures(np.random.default_rng(2), root / f"evaluations/{name}", content)
    for variant, mean in (("baseline", alone), ("xfd", taught)):
        paths = sorted((root / "metrics").glob(f"{variant}-*.json"))
        for index, path in enumerate(paths):
            value = mean + 0.1 * (index - (len(paths) - 1) / 2)
            path.write_text(json.dumps({**json.loads(path.read_text()), "NDS": value}))


def add_features(root: Path, seeds: list[int], before: float | None = 0.2) -> None:
    """Features of xfd, better by 0.1 and a tenth of the seed after compensation."""
    for seed in seeds:
        folder = root / f"features/xfd-{seed}"
        folder.mkdir(parents=True)
        Image.fromarray(np.full((30, 90, 3), 99, np.uint8)).save(folder / "00.png")
        after = 0.3 + 0.1 * seed
        entry = {"token": "abc", "caption": f"seed {seed}", "file": "00.png", "before": before, "after": after}
        content = {"teacher": "fusion", "mean": {"before": before, "after": after}, "keyframes": [entry]}
        (folder / "features.json").write_text(json.dumps(content))


PLACES = ("metrics", "evaluations", "stores", "features", "cost.json", "film", "")  # of what a study publishes


def make_report(root: Path, seeds: list[int], **changes: Any) -> Report:
    """Of the runs below a folder; `changes` are of the study (starts, large, baselines) and of what is said of it."""
    given: dict[str, Any] = {
        "profile": "demo", "fusions": {}, "featured": [], "segmenters": ["instance"], "stores": ["lidar"],
        "variants": VARIANTS, "pairs": [],
        "learned_from": {"lidar": "train", "students": "train"}, "seen": [],
        "search": None,
        "stages": STAGES, "edges": EDGES,
    }  # fmt: skip
    starts, large, baselines = (changes.pop(name, []) for name in ("starts", "large", "baselines"))
    about = About(**{**given, **changes})
    published = Published(*(root / name for name in PLACES))
    rows = {name: entry.get("row") or "" for name, entry in about.variants.items()}
    study = load_study(
        published.metrics, published.evaluations, ["lidar"], rows, seeds, starts, [*about.fusions], large, baselines
    )
    return build(study, published, about)


def section(report: Report, name: str) -> str:
    return report.html.partition(f'<section id="{name}">')[2].partition("</section>")[0]


def cells(text: str) -> list[str]:
    """The texts of a section's cells, tags left out."""
    return [re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", text)]


def test_interval_is_scipys() -> None:
    values = [0.11, 0.14, 0.09, 0.131]
    interval = mean_interval(values)
    assert interval is not None
    low, high = scipy.stats.t.interval(0.95, 3, np.mean(values), scipy.stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx((low, high), rel=1e-12)


def test_interval_of_two_is_the_closed_form() -> None:
    interval = mean_interval([1.0, 3.0])  # t(0.975, 1) = tan(0.475 pi), s / sqrt(2) = 1
    assert interval is not None
    assert (interval.mean, interval.half) == (2.0, pytest.approx(np.tan(0.475 * np.pi), rel=1e-9))


def test_interval_of_one_and_of_none() -> None:
    one = mean_interval([0.4, None, float("nan")])
    assert one is not None
    assert (one.mean, one.half, one.count, one.low, one.resolved) == (0.4, None, 1, 0.4, False)
    assert mean_interval([None]) is None


def test_difference_is_paired_by_seed() -> None:
    gain = paired_difference({0: 0.13, 1: 0.23, 2: 0.33, 9: 5.0, 3: None}, {2: 0.3, 1: 0.21, 0: 0.1, 3: 0.1})
    assert gain is not None
    statistic = scipy.stats.ttest_rel([0.13, 0.23, 0.33], [0.1, 0.21, 0.3]).confidence_interval()
    assert (gain.count, gain.low, gain.high) == (3, pytest.approx(statistic.low), pytest.approx(statistic.high))
    assert gain.resolved == (statistic.low > 0)


@pytest.mark.parametrize("count", [3, 4, 10])
def test_p_is_scipys(count: int) -> None:
    rng = np.random.default_rng(count)
    for shift in (0.0, 0.01, -0.5):
        own, base = rng.normal(shift, 0.1, count), rng.normal(0.0, 0.1, count)
        gain = paired_difference(dict(enumerate(own.tolist())), dict(enumerate(base.tolist())))
        assert gain is not None
        assert gain.p is not None
        assert gain.p == pytest.approx(scipy.stats.ttest_rel(own, base).pvalue, rel=1e-9)
        assert (gain.p < 0.05) == gain.resolved


def test_p_needs_three_values_and_a_spread() -> None:
    assert [interval.p for interval in (mean_interval([0.1]), mean_interval([0.1, 0.2])) if interval] == [None, None]
    assert [interval.p for interval in (mean_interval([0.0] * 3), mean_interval([0.5] * 3)) if interval] == [1.0, 0.0]


def test_holm_is_its_definition() -> None:
    """Corrected p: the largest over the k smallest of min(1, p times the number of those that are not smaller)."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.01, None, 0.04]) == pytest.approx([0.02, None, 0.04])
    assert holm([]) == []
    for seed in range(20):
        tests = np.random.default_rng(seed).uniform(0, 0.2, 7)
        ordered = np.sort(tests)
        expected = [max(min(1.0, (7 - j) * ordered[j]) for j in range(7) if ordered[j] <= p) for p in tests]
        assert holm(tests.tolist()) == pytest.approx(expected)
        held = 0  # step down: stop at the first that is not below 0.05 / (number left)
        while held < 7 and ordered[held] <= 0.05 / (7 - held):
            held += 1
        assert sum(p <= 0.05 for p in holm(tests.tolist()) if p is not None) == held


def values_of(root: Path, name: str, metric: str, seeds: int) -> list[float]:
    return [json.loads((root / f"metrics/{name}-{seed}.json").read_text())[metric] for seed in range(seeds)]


def test_every_pair_of_variants_is_tested_and_corrected(tmp_path: Path) -> None:
    make_study(tmp_path, [0, 1, 2])
    report = make_report(tmp_path, [0, 1, 2])
    names = list(VARIANTS)
    text = section(report, "significance")
    for metric, table in zip(("mAP", "NDS"), text.split('<table class="dense matrix">')[1:], strict=True):
        runs = {name: values_of(tmp_path, name, metric, 3) for name in names}
        places = [(row, column) for row in range(3) for column in range(row)]
        p = {place: scipy.stats.ttest_rel(*(runs[names[index]] for index in place)).pvalue for place in places}
        corrected = dict(zip(places, holm(list(p.values())), strict=True))
        body = cells(table.partition("<tbody>")[2].partition("</tbody>")[0])
        for row, column in places:
            gain = mean_interval(np.subtract(runs[names[row]], runs[names[column]]).tolist())
            assert gain is not None
            assert body[4 * row + column + 1] == f"{gain.mean:+.3f}± {gain.half:.3f}"
            expected = probability(corrected[row, column]) + probability(p[row, column])
            assert body[4 * column + row + 1] == expected
        assert [body[5 * place + 1] for place in range(3)] == [""] * 3
        assert [body[4 * place].split(" ")[1] for place in range(3)] == ["baseline", "xfd", "xod-&lt;b&gt;"]
    assert "Two-sided paired t-test over 3 seeds" in report.markdown
    rows = [cells(row) for row in text.partition("<tbody>")[2].partition("</tbody>")[0].split("<tr>")[1:]]
    tests = json.loads(report.summary)["tests"]
    own = {name: values_of(tmp_path, name, "mAP", 3) for name in names}
    family = [scipy.stats.ttest_rel(own[name], own["baseline"]).pvalue for name in names[1:]]
    for name, texts, p_value, p_holm in zip(names[1:], rows, family, holm(family), strict=True):
        assert texts[1:3] == ["baseline", "3"]
        assert texts[4:6] == [probability(p_value), probability(p_holm)]
        assert tests[name]["mAP"]["p_holm"] == pytest.approx(p_holm, abs=1e-6)
        assert tests[name]["mAP"]["n"] == 3


def test_a_difference_that_holds_is_marked(tmp_path: Path) -> None:
    make_study(tmp_path, [0, 1, 2])
    for name, level in (("baseline", 0.1), ("xfd", 0.2), ("xod-<b>", 0.10001)):
        for seed in range(3):
            path = tmp_path / f"metrics/{name}-{seed}.json"
            value = level + 0.001 * seed + 0.0005 * (name == "xfd") * seed * seed
            path.write_text(json.dumps({**json.loads(path.read_text()), "mAP": value}))
    text = section(make_report(tmp_path, [0, 1, 2]), "significance")
    first = text.split('<table class="dense matrix">')[1].partition("</table>")[0]
    marked = re.findall(r'class="(up|down)? ?sure"[^>]*title="([^:]*):', first)
    assert ("up", "xfd − baseline") in marked
    assert ("down", "xod-&lt;b&gt; − xfd") in marked
    assert "Every pair of variants, mAP: 3 of 3 differences hold" in text  # xod-<b> differs by the same in every seed


@pytest.mark.parametrize("count", [1, 2])
def test_of_fewer_than_three_seeds_nothing_is_said(tmp_path: Path, count: int) -> None:
    seeds = list(range(count))
    report = make_report(make_study(tmp_path, seeds), seeds)
    assert "nothing can be said about significance" in section(report, "significance")
    assert "nothing can be said about significance" in report.markdown
    assert '<table class="dense matrix">' not in report.html
    assert [test["mAP"]["p"] for test in json.loads(report.summary)["tests"].values()] == [None, None]


def test_a_single_variant_has_nothing_to_be_tested_against(tmp_path: Path) -> None:
    make_study(tmp_path, [0, 1, 2])
    make_film_of(tmp_path, ["baseline-0"])
    report = make_report(tmp_path, [0, 1, 2], variants={"baseline": PLAIN})
    assert "<table" not in section(report, "significance")
    assert '<section id="extremes">' not in report.html
    assert section(report, "film")
    assert json.loads(report.summary)["tests"] == {}


def test_classes_and_errors_are_coloured_by_their_difference_to_the_baseline(tmp_path: Path) -> None:
    """Blue is better: a higher AP, a lower error; the strongest cell of a scale is its largest difference."""
    make_study(tmp_path, [0, 1], ("bus",))
    text = section(make_report(tmp_path, [0, 1]), "classes").partition("</table>")[0]
    heads = [re.sub(r"<small>.*", "", head) for head in re.findall(r"<th scope=\"col\"[^>]*>(.*?)</th>", text)][1:]
    assert heads == [*(name.replace("_", " ") for name in CLASSES), *ERRORS]
    rows = {}
    for row in text.partition("<tbody>")[2].split("<tr")[1:]:
        found = re.findall(r'<td class="([^"]*)" style="--a:([\d.]+)" title="[^"]*">([^<]*)</td>', row)
        rows[re.sub(r"<[^>]*>", "", row.partition("</th>")[0]).partition(">")[2].split(" ")[0]] = found
    runs = {name: [read_run(tmp_path, f"{name}-{seed}") for seed in (0, 1)] for name in VARIANTS}
    means = {
        name: np.mean([[run["classes"][c]["AP"] for c in CLASSES] + [run[e] for e in ERRORS] for run in found], axis=0)
        for name, found in runs.items()
    }
    better = {name: (means[name] - means["baseline"]) * ([1] * 10 + [-1] * 5) for name in ("xfd", "xod-<b>")}
    sizes = np.abs(list(better.values()))
    scale = np.concatenate([[sizes[:, :10].max()] * 10, sizes[:, 10:].max(axis=0)])
    for name, gains in better.items():
        found = rows[name.replace("<", "&lt;").replace(">", "&gt;")]
        for column, (kind, strength, shown) in enumerate(found):
            if column == CLASSES.index("bus"):
                assert (shown, float(strength)) == ("–", 0.0)
                continue
            assert shown == f"{means[name][column]:.3f}"
            assert kind.split(" ")[0] == ("up" if gains[column] > 0 else "down")
            assert float(strength) == pytest.approx(abs(gains[column]) / scale[column], abs=6e-4)
    assert {kind.strip() for kind, _, _ in rows["baseline"] + rows["lidar"]} == {"", "edge"}


def test_gains_stand_over_the_costs(tmp_path: Path) -> None:
    make_study(tmp_path, [0, 1])
    text = section(make_report(tmp_path, [0, 1]), "cost")
    plots = re.findall(r'aria-label="Δ (mAP|NDS) over ([\w-]+)"(.*?)</svg>', text, re.DOTALL)
    costs = ["params", "multiply-adds", "latency"]
    assert [plot[:2] for plot in plots] == [(metric, cost) for metric in ("mAP", "NDS") for cost in costs]
    for metric, cost, plot in plots:
        bottom = re.findall(r'<text x="([\d.]+)" y="306.0"[^>]*>([\d.]+)<', plot)
        left = re.findall(r'<text x="-7" y="([\d.-]+)"[^>]*>([\d.-]+)<', plot)
        x = {float(label): float(at) for at, label in bottom}
        y = {float(label): float(at) - 4 for at, label in left}
        across, up = np.polyfit(np.log(list(x)), list(x.values()), 1), np.polyfit(list(y), list(y.values()), 1)
        marks = re.findall(r'class="mark (\w+) \w+" d="M([\d.-]+),([\d.-]+) a([\d.]+),[^>]*><title>([^:]*):', plot)
        assert [(mark[0], mark[4]) for mark in marks] == [
            ("baseline", "baseline"), ("gained", "xfd"), ("gained", "xod-&lt;b&gt;"),
        ]  # fmt: skip
        spent = {"params": (1.6, 1.6, 1.8), "multiply-adds": (2.5, 2.5, 3.5), "latency": (80.0, 80.0, 100.0)}[cost]
        base = values_of(tmp_path, "baseline", metric, 2)
        for (_, start, height, radius, _), name, value in zip(marks, VARIANTS, spent, strict=True):
            gain = np.mean(np.subtract(values_of(tmp_path, name, metric, 2), base))
            aside = 10 * (name == "xfd")  # it costs what the baseline does
            assert float(start) + float(radius) == pytest.approx(np.polyval(across, np.log(value)) + aside, abs=0.3)
            assert float(height) == pytest.approx(np.polyval(up, gain), abs=0.3)
        assert plot.count('class="interval') == 2
        assert float(re.findall(r'class="undistilled" d="M0,([\d.]+) H460"', plot)[0]) == pytest.approx(up[1], abs=0.3)


def test_scenes_are_sorted_by_what_the_best_variant_gains(tmp_path: Path) -> None:
    make_study(tmp_path, [0, 1])
    gains = {"a": 0.3, "b": -0.2, "c": 0.1, "d": 0.0, "e": 0.2, "f": -0.1, "g": 0.05}
    for seed in (0, 1):
        for name, sign in (("baseline", 0), ("xfd", 1)):
            scenes = [
                {"scene": scene, "mAP": 0.4 + sign * (gain + 0.01 * seed), "boxes": 5, "samples": 2}
                for scene, gain in gains.items()
            ]
            scenes.append({"scene": "nothing", "mAP": None, "boxes": 0, "samples": 2})
            write_run(tmp_path, f"{name}-{seed}", {**read_run(tmp_path, f"{name}-{seed}"), "scenes": scenes})
    study = load_study(tmp_path / "metrics", tmp_path / "evaluations", [], dict.fromkeys(VARIANTS, ""), [0, 1])
    assert study.best is not None
    found = scene_gains(study, study.best)
    assert [entry.scene for entry in found] == ["a", "e", "c", "g", "d", "f", "b"]
    assert [entry.gain.mean for entry in found] == pytest.approx([gains[entry.scene] + 0.005 for entry in found])
    for count, expected in ((7, ("aec", "bfd")), (5, ("aec", "dg")), (3, ("ae", "c")), (1, ("a", "")), (0, ("", ""))):
        assert tuple("".join(entry.scene for entry in part) for part in extremes(found[:count])) == expected
    report = make_report(tmp_path, [0, 1])
    best, worst = section(report, "extremes").split("<tbody>")[1:]
    half = scipy.stats.t.ppf(0.975, 1) * 0.005
    shown = [cells(part.partition("</tbody>")[0]) for part in (best, worst)]
    assert [rows[::5] for rows in shown] == [["a", "e", "c"], ["b", "f", "d"]]
    assert shown[0][1:5] == ["5", "0.400± 0.000", f"0.705± {half:.3f}", f"+0.305± {half:.3f}"]
    assert "Where xfd gains and loses" in report.html


def test_the_film_is_in_the_page_as_it_was_published(tmp_path: Path) -> None:
    make_study(tmp_path, [0])
    report = make_report(tmp_path, [0])
    text = section(report, "film")
    (uri,) = re.findall(r'src="data:image/webp;base64,([^"]*)" width="90" height="30"', text)
    assert base64.b64decode(uri) == (tmp_path / "film/film.webp").read_bytes()
    assert "scene-0007, the scene with the most boxes, 3 keyframes at 2 Hz, through lidar, baseline-0, xfd-0" in text
    assert section(report, "extremes").count("<img") == 1  # scene-0008 has a picture
    make_film_of(tmp_path, ["lidar", "skd-0"])
    with pytest.raises(ReportError, match=r"was drawn for another study, with skd-0: run `dvc repro film`"):
        make_report(tmp_path, [0])


def test_more_models_make_smaller_pictures(tmp_path: Path) -> None:
    """Twice the panels of a page have half the area, so that they do not need more bytes."""
    make_study(tmp_path, [0])
    for folder in (tmp_path / "evaluations").iterdir():
        for file in folder.glob("00-*.png"):
            Image.fromarray(np.zeros((300, 1400, 3), np.uint8)).save(file)
    few = section(make_report(tmp_path, [0]), "scenes")
    assert {int(width) for width in re.findall(r'width="(\d+)"', few)} == {560, 1320}
    many = {f"copy-{number}": PLAIN for number in range(34)}
    for name in many:
        shutil.copy(tmp_path / "metrics/xfd-0.json", tmp_path / f"metrics/{name}-0.json")
        (tmp_path / f"evaluations/{name}-0").symlink_to(tmp_path / "evaluations/xfd-0")
    cost = {**COST, "variants": {**COST["variants"], **dict.fromkeys(many, COST["variants"]["xfd"])}}
    (tmp_path / "cost.json").write_text(json.dumps(cost))
    text = section(make_report(tmp_path, [0], variants={**VARIANTS, **many}), "scenes")
    widths = {int(width) for width in re.findall(r'width="(\d+)"', text)}
    assert widths == {round(width * np.sqrt(20 / 39)) for width in (560, 1320)}


def test_the_table_of_several_seeds(tmp_path: Path) -> None:
    report = make_report(make_study(tmp_path, [0, 1, 2]), [0, 1, 2])
    values = [json.loads((tmp_path / f"metrics/xfd-{seed}.json").read_text())["mAP"] for seed in range(3)]
    base = [json.loads((tmp_path / f"metrics/baseline-{seed}.json").read_text())["mAP"] for seed in range(3)]
    half = scipy.stats.t.ppf(0.975, 2) * scipy.stats.sem(values)
    gain = np.subtract(values, base)
    row = next(line for line in report.markdown.splitlines() if line.startswith("| xfd "))
    assert f"| {np.mean(values):.3f} ± {half:.3f} |" in row
    assert f"| {gain.mean():+.3f} ± {scipy.stats.t.ppf(0.975, 2) * scipy.stats.sem(gain):.3f} |" in row
    assert "95 % t-interval over 3 seeds" in report.markdown
    assert "| lidar (teacher) |  | 1 |" in report.markdown


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    report = make_report(make_study(tmp_path, [0], ("bus", "trailer")), [0])
    assert "±" not in report.plain
    assert "One seed, no interval" in report.plain
    assert "Not in the truth: bus, trailer" in report.plain
    assert "mAP present" in report.plain
    lines = report.plain.splitlines()
    assert len({len(line) for line in lines[:6]}) == 1  # aligned


def test_undefined_metrics_become_dashes(tmp_path: Path) -> None:
    make_study(tmp_path, [0])
    path = tmp_path / "metrics/xfd-0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mAVE": None, "mAP": None}))
    report = make_report(tmp_path, [0])
    row = next(line for line in report.markdown.splitlines() if line.startswith("| xfd ")).split(" | ")
    assert row[3:5] == ["–", "–"]
    assert "nan" not in report.plain


def test_teacher_outputs_are_listed(tmp_path: Path) -> None:
    body = section(make_report(make_study(tmp_path, [0]), [0]), "stores").partition("<tbody>")[2]
    dense = ["lidar", "bev_lift", "cached-warp", "int8, occupied cells, zstd", "39.3 kB", "10 %", "1.2 %"]
    dense += ["1.2 %", "25 %"]  # the gaps
    boxes = ["lidar", "boxes", "cached-exact", "float32", "880 B", "–", "–", "–", "–"]
    assert cells(body) == dense + boxes


def test_instance_teachers_have_a_section_of_their_own(tmp_path: Path) -> None:
    make_study(tmp_path, [0])
    text = section(make_report(tmp_path, [0]), "segmenters")
    _, table, classes = text.split("<tbody>")
    box = ["0.310", "0.520", "0.330", "0.120", "0.400", "–", "0.360"]
    assert cells(table.partition("</tbody>")[0]) == [
        *("instance", "box", *box, "576", "2.10 M"),
        *("", "mask", "0.270", *box[1:], "", ""),
    ]
    assert cells(classes) == ["car", "0.410", "0.380", "900", "bus", "–", "–", "0"]
    assert text.count("<img") == 1
    assert "one.jpg" in text
    assert '<section id="segmenters">' not in make_report(tmp_path, [0], segmenters=[]).html


def test_costs_are_compared_with_the_baselines(tmp_path: Path) -> None:
    report = make_report(make_study(tmp_path, [0]), [0])
    expected = {
        "lidar": ["0.65 (0.41 ×)", "1.18 (0.47 ×)", "44.0 (0.55 ×)", "22.7 (1.82 ×)", "45.5 (1.82 ×)", "4.4 (0.55 ×)"],
        "baseline": [f"{text} (1.00 ×)" for text in ("1.60", "2.50", "80.0", "12.5", "25.0", "8.0")],
        "xfd": [f"{text} (1.00 ×)" for text in ("1.60", "2.50", "80.0", "12.5", "25.0", "8.0")],
        "xod-<b>": [
            *("1.80 (1.12 ×)", "3.50 (1.40 ×)", "100.0 (1.25 ×)", "10.0 (0.80 ×)", "20.0 (0.80 ×)", "10.0 (1.25 ×)")
        ],
    }
    body = cells(section(report, "cost").partition("<tbody>")[2])
    found = [body[i : i + 9][3:] for i in range(0, len(body), 9)]
    assert [body[i : i + 9][1] for i in (0, 9)] == ["–", "–"]
    assert body[19] == next(line for line in report.markdown.splitlines() if line.startswith("| xfd ")).split(" | ")[4]
    assert found == [[text.replace(" (", "").rstrip(")") for text in row] for row in expected.values()]
    rows = [line.strip("| ").split(" | ") for line in report.markdown.partition("| model | params, M")[2].splitlines()]
    assert {row[0]: row[1:] for row in rows[2:6]} == expected
    assert "median of 15 forward passes at batch 1 in float32 on Some CPU, 2 threads" in report.markdown
    cost = json.loads(report.summary)["cost"]
    assert cost["variants"]["xod-<b>"] == {
        **COST["variants"]["xod-<b>"],
        "of_baseline": {
            "parameters": 1.125, "multiply_adds": 1.4, "latency_ms": 1.25, "throughput_1": 0.8, "throughput_8": 0.8,
            "peak_memory": 1.25,
        },
    }  # fmt: skip
    assert (cost["device"], list(cost["teachers"])) == ("Some CPU", ["lidar"])


def test_what_was_measured_in_half_precision_has_columns_of_its_own(tmp_path: Path) -> None:
    make_study(tmp_path, [0])
    halves = {"latency_ms": 20.0, "throughput_1": 50.0, "throughput_8": 90.0, "peak_memory": 2e6}
    content = json.loads(json.dumps(COST))
    for entry in [*content["teachers"].values(), *content["variants"].values()]:
        entry |= {f"{key}_float16": value for key, value in halves.items()}
    (tmp_path / "cost.json").write_text(json.dumps({**content, "precisions": ["float32", "float16"]}))
    report = make_report(tmp_path, [0])
    heads = cells(section(report, "cost").partition("<tbody>")[0])
    assert [head for head in heads if head.endswith(", float16")] == [
        "latency, ms, float16", "samples/s at batch 1, float16", "samples/s at batch 8, float16",
        "peak memory, MB, float16",
    ]  # fmt: skip
    assert "| 20.0 (1.00 ×) | 50.0 (1.00 ×) | 90.0 (1.00 ×) | 2.0 (1.00 ×) |" in report.markdown


def test_variants_are_compared_with_the_baseline_above_them(tmp_path: Path) -> None:
    make_study(tmp_path, [0, 1])
    report = make_report(tmp_path, [0, 1], baselines=["baseline", "xfd"])
    own, base = (
        [json.loads((tmp_path / f"metrics/{name}-{seed}.json").read_text())["mAP"] for seed in (0, 1)]
        for name in ("xod-<b>", "xfd")
    )
    gain = mean_interval([a - b for a, b in zip(own, base, strict=True)])
    assert gain is not None
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in report.markdown.splitlines()[:6]}
    assert rows["xod-<b>"][4] == f"{gain.mean:+.3f} ± {gain.half:.3f}"
    assert rows["baseline"][4] == rows["xfd"][4] == "–"
    assert "difference to the last of baseline, xfd above" in report.plain
    assert "| xod-<b> | 1.80 (1.12 ×) |" in report.markdown
    numbers = json.loads(report.summary)["variants"]
    assert [numbers[name]["baseline"] for name in VARIANTS] == ["baseline", "xfd", "xfd"]
    assert " to xfd</small>" in report.html  # the tile of the best


def test_compression_is_read_off_the_line_of_undistilled_models() -> None:
    """A student of 1 G beside a teacher of 16 G: half-way in NDS is 4 G, the square root."""
    alone, teacher = (1e9, 0.2), (16e9, 0.4)
    assert compression(0.3, alone, teacher) == Compression(pytest.approx(4.0))
    assert compression(0.25, alone, teacher) == Compression(pytest.approx(2.0))
    assert compression(0.4, alone, teacher) == Compression(pytest.approx(16.0))
    assert compression(0.2, alone, teacher) == compression(0.1, alone, teacher) == Compression(1.0)
    assert compression(0.41, alone, teacher) == Compression(16.0, bound=True)
    assert str(Compression(16.0, bound=True)) == "≥ 16.00 ×"
    assert compression(0.3, alone, (16e9, 0.2)) is None  # no better than the student alone
    assert compression(0.3, alone, (1e9, 0.4)) is None  # no dearer


@pytest.mark.parametrize(
    ("taught", "expected", "factor"),
    [(0.3, "2.00 ×", 2.0), (0.2, "1.00 ×", 1.0), (0.5, "≥ 4.00 ×", 4.0)],
)
def test_a_pair_of_teacher_and_student_is_compared_in_cost_and_accuracy(
    tmp_path: Path, taught: float, expected: str, factor: float
) -> None:
    make_study(tmp_path, [0, 1])
    add_large(tmp_path, 0.4, 0.2, taught)
    report = make_report(tmp_path, [0, 1], large=["giant"], pairs=[PAIR])
    text = section(report, "efficiency")
    costs, results = (cells(table.partition("</tbody>")[0]) for table in text.split("<tbody>")[1:])
    assert costs == [
        "params, M", "3.20", "1.60", "2.00", "multiply-adds, G", "10.00", "2.50", "4.00",
        "latency, ms", "160.0", "80.0", "2.00", "samples/s at batch 1", "6.2", "12.5", "0.50",
        "samples/s at batch 8", "12.5", "25.0", "0.50", "peak memory, MB", "16.0", "8.0", "2.00",
    ]  # fmt: skip
    assert [results[i].split(" ")[0] for i in (0, 4, 8)] == ["giant", "baseline", "xfd"]
    assert [results[i] for i in (3, 7, 11)] == ["–", "–", expected]
    assert results[10].startswith(f"{taught:.3f}± ")
    assert [line for line in report.markdown.splitlines() if line.startswith("| xfd ")][-1].endswith(f" | {expected} |")
    (numbers,) = json.loads(report.summary)["efficiency"]
    assert (numbers["teacher"], numbers["student"], numbers["alone"]) == ("giant", "camera", ["baseline"])
    assert numbers["teacher_over_student"]["multiply_adds"] == 4.0
    assert numbers["variants"]["xfd"]["compression"] == pytest.approx(factor)
    assert numbers["variants"]["xfd"]["at_least"] == expected.startswith("≥")
    assert "Compression at equal NDS" in text
    assert "giant (teacher)" in report.plain


def test_a_pair_without_a_line_says_so(tmp_path: Path) -> None:
    make_study(tmp_path, [0])
    assert '<section id="efficiency">' not in make_report(tmp_path, [0]).html
    add_large(tmp_path, 0.4, 0.2, 0.3)
    lonely = make_report(tmp_path, [0], large=["giant"], pairs=[Pair("giant", "camera", "A", [], ["xfd"])])
    assert "The study has no camera alone" in lonely.markdown
    assert 'class="undistilled"' not in section(lonely, "efficiency")
    add_large(tmp_path, 0.1, 0.2, 0.3, "former")
    weak = make_report(tmp_path, [0], large=["former"], pairs=[Pair("former", "camera", "A", ["baseline"], ["xfd"])])
    assert "former is not dearer and better in NDS than baseline" in section(weak, "efficiency")
    assert json.loads(weak.summary)["efficiency"][0]["variants"]["xfd"]["compression"] is None


def test_marks_stand_where_their_cost_and_accuracy_say(tmp_path: Path) -> None:
    """Ticks and marks are read off the drawing again: a point is where the axes' labels put it."""
    make_study(tmp_path, [0, 1])
    add_large(tmp_path, 0.4, 0.2, 0.3)
    add_large(tmp_path, 0.5, 0.2, 0.3, "former")
    others = [PAIR, Pair("former", "camera", "BEVFormer", ["baseline"], ["xfd"])]
    text = section(make_report(tmp_path, [0, 1], large=["giant", "former"], pairs=others), "efficiency")
    plot = text.partition('aria-label="NDS over multiply-adds"')[2].partition("</svg>")[0]
    x = {float(label): float(at) for at, label in re.findall(r'<text x="([\d.]+)" y="306.0"[^>]*>([\d.]+)<', plot)}
    y = {float(label): float(at) - 4 for at, label in re.findall(r'<text x="-7" y="([\d.]+)"[^>]*>([\d.]+)<', plot)}
    scale = np.polyfit(np.log(list(x)), list(x.values()), 1), np.polyfit(list(y), list(y.values()), 1)
    lines = re.findall(r'class="undistilled" d="M([\d.]+),([\d.]+) L([\d.]+),([\d.]+)"', plot)
    ends = np.array(lines, float)
    for (cost, score), column in (((2.5, 0.2), 0), ((10.0, 0.4), 2)):
        point = [np.polyval(scale[0], np.log(cost)), np.polyval(scale[1], score)]
        np.testing.assert_allclose(ends[0, column : column + 2], point, atol=0.2)
    assert ends[1, 3] == pytest.approx(np.polyval(scale[1], 0.5), abs=0.2)
    assert re.findall(r'class="mark (\w+)', plot) == ["teacher", "alone", "taught", "teacher"]
    assert plot.count('class="interval') == 2  # teachers are one run each
    assert "<title>giant: NDS 0.400, 10.00 G multiply-adds</title>" in plot
    shapes = dict(re.findall(r'class="mark teacher[^>]*d="[^ ]* ([ah])[^"]*"><title>(\w+):', plot))
    assert shapes == {"a": "giant", "h": "former"}  # arcs of a circle, sides of a square


def test_axes_enclose_what_they_show() -> None:
    for low, high in np.random.default_rng(0).uniform(0.01, 1.0, (50, 2)):
        low, high = sorted((float(low), float(high)))
        for ticks in (log_ticks(low * 1e9, high * 1e9), [1e9 * tick for tick in span_ticks(low, high)]):
            assert ticks[0] <= low * 1e9 * (1 + 1e-9)
            assert ticks[-1] >= high * 1e9 * (1 - 1e-9)
            assert 2 <= len(ticks) <= 9
    assert len(span_ticks(0.3, 0.3)) >= 2


def test_marks_of_one_cost_do_not_hide_each_other() -> None:
    assert side_by_side(4) == [0, 10, -10, 20]
    assert len(set(side_by_side(40))) == 40


LARGE = {"camera-large": {"camera": "start"}, "bevformer-large": {"camera": "start"}}


def test_pairs_are_read_off_the_parameters() -> None:
    raw = read_params(ROOT)
    raw["study"] |= {"teachers": ["start", "small"], "fusions": {}, "large": LARGE}
    raw["study"] |= {"stores": ["large", "former"], "segmenters": [], "featured": [], "baselines": []}
    raw["study"] |= {"variants": ["skd-alone", "skd-inherit", "skd", "former-alone", "former-spatial", "baseline"]}
    params = Params.model_validate(raw)
    assert pairs(params) == [
        Pair("camera-large", "camera-small", "CameraBEVDepth", ["skd-alone"], ["skd-inherit", "skd"]),
        Pair("bevformer-large", "bevformer-small", "BEVFormer", ["former-alone"], ["former-spatial"]),
    ]
    assert starts(params) == {"start", "small"}


def test_another_model_of_a_student_is_another_student() -> None:
    raw = read_params(ROOT)
    raw["study"] |= {"teachers": ["start", "small"], "fusions": {}, "stores": ["large"]}
    raw["study"] |= {"variants": ["skd-alone", "skd", "bare"], "segmenters": [], "featured": [], "baselines": []}
    raw["variants"]["bare"] = {**raw["variants"]["skd"], "model": {"image": [64, 176]}}
    assert [(pair.alone, pair.taught) for pair in pairs(Params.model_validate(raw))] == [
        (["skd-alone"], ["skd"]),
        ([], ["bare"]),
    ]


@pytest.mark.parametrize(
    ("mean_ap", "score", "verdict"),
    [
        (0.55, 0.61, "fusion is ahead of its parts lidar in mAP and NDS."),
        (0.55, 0.58, "fusion is not ahead of lidar in NDS (0.580 against 0.600)."),
        (0.5, 0.58, "fusion is not ahead of lidar in mAP (0.500 against 0.500), lidar in NDS (0.580 against 0.600)."),
    ],
)
def test_whether_fusion_is_ahead_of_its_parts_is_said(
    tmp_path: Path, mean_ap: float, score: float, verdict: str
) -> None:
    make_study(tmp_path, [0])
    assert '<section id="fusion">' not in make_report(tmp_path, [0]).html
    add_fusion(tmp_path, mean_ap, score)
    report = make_report(tmp_path, [0], fusions=FUSION)
    assert verdict in report.markdown
    assert verdict in report.plain
    text = section(report, "fusion")
    assert verdict in text
    assert cells(text.partition("<tbody>")[2]) == [
        *("fusion", "", f"{mean_ap:.3f}", "–", f"{score:.3f}", "–"),
        *("lidar", "lidar", "0.500", f"{mean_ap - 0.5:+.3f}", "0.600", f"{score - 0.6:+.3f}"),
    ]
    ahead = verdict.startswith("fusion is ahead")
    assert json.loads(report.summary)["fusions"] == {"fusion": {"parts": {"lidar": "lidar"}, "ahead": ahead}}
    assert "distilled from lidar, fusion, instance" in report.html


def test_simulated_features_are_shown_with_their_correlation(tmp_path: Path) -> None:
    make_study(tmp_path, [0, 1])
    assert '<section id="features">' not in make_report(tmp_path, [0, 1]).html
    add_features(tmp_path, [0, 1])
    report = make_report(tmp_path, [0, 1], featured=["xfd"])
    text = section(report, "features")
    half = scipy.stats.t.ppf(0.975, 1) * 0.05
    assert cells(text.partition("<tbody>")[2]) == [
        "xfd", "fusion", "0.200± 0.000", f"0.350± {half:.3f}", f"+0.150± {half:.3f}",
    ]  # fmt: skip
    assert text.count("<img") == 1
    assert "seed 0" in text
    assert json.loads(report.summary)["features"] == {"xfd": {"teacher": "fusion", "before": 0.2, "after": 0.35}}


def test_without_compensation_there_is_no_before(tmp_path: Path) -> None:
    make_study(tmp_path, [0])
    add_features(tmp_path, [0], before=None)
    text = section(make_report(tmp_path, [0], featured=["xfd"]), "features")
    assert cells(text.partition("<tbody>")[2]) == ["xfd", "fusion", "–", "0.300", "–"]


def test_rows_of_a_paper_have_a_column(tmp_path: Path) -> None:
    make_study(tmp_path, [0])
    rows = [line.split(" | ") for line in make_report(tmp_path, [0]).markdown.splitlines() if line.startswith("| ")]
    assert [row[1] for row in rows[:6]] == ["row", "---:", "", "A0", "A2", ""]
    plain = {name: {**entry, "row": None} for name, entry in VARIANTS.items()}
    assert " row " not in make_report(tmp_path, [0], variants=plain).markdown


def test_a_start_is_no_teacher(tmp_path: Path) -> None:
    report = make_report(make_study(tmp_path, [0]), [0], starts=["lidar"])
    assert "lidar (start)" in report.plain
    assert "(teacher)" not in report.plain
    assert "distilled from instance, scored" in report.html


def test_what_a_variant_overrides_is_said(tmp_path: Path) -> None:
    last = [
        row.split("</td>")[-2]
        for row in section(make_report(make_study(tmp_path, [0]), [0]), "recipes").split("</tr>")[1:-1]
    ]
    assert [re.sub(r"<[^>]*>", "", cell) for cell in last] == ["", "train.epochs 12", "no loss against labelled boxes"]


@pytest.mark.parametrize(
    ("sources", "seen", "expected"),
    [
        ({"lidar": "train", "students": "train"}, [], "students from train.\n"),
        (
            {"lidar": "val[:1]", "students": "val[1:]"},
            ["lidar", "students"],
            "The students have learned from scenes of",
        ),
        ({"lidar": "val[:-1]", "students": "val[-1:]"}, ["lidar"], "lidar learned from scenes of val[:1] too"),
    ],
)
def test_what_was_learned_from_the_scored_scenes_is_said(
    tmp_path: Path, city: Path, sources: dict[str, str], seen: list[str], expected: str
) -> None:
    build_index(city, "v1.0-trainval", ["train", "val"], tmp_path / "index")
    split = "val" if "students" in seen else "val[:1]"
    assert seen_by(Index.open(tmp_path / "index"), sources, split) == set(seen)
    make_study(tmp_path, [0, 1])
    for path in (tmp_path / "evaluations").glob("*/evaluation.json"):
        path.write_text(path.read_text().replace('"split": "val"', f'"split": "{split}"'))
    report = make_report(tmp_path, [0, 1], learned_from=sources, seen=seen)
    for text in (report.plain, report.markdown):
        assert "Profile demo, seeds 0, 1." in text
        assert f"Learned: lidar from {sources['lidar']}, students from {sources['students']}." in text
        assert expected in text
        assert ("learned from scenes" in text) == bool(seen)


def test_a_start_and_what_everybody_learns_from_are_read_off_the_parameters() -> None:
    raw = read_params(ROOT)
    changes: dict[str, Any] = {
        "data": {"splits": {"train": "train", "students": "train[:-16]"}},
        "students": {"camera": {"start": {"teacher": "start"}}},
        "study": {
            "teachers": ["lidar", "start"],
            "large": {},
            "stores": ["lidar", "fusion", "instance"],
            "variants": ["baseline", "x3kd", "simdistill"],
            "baselines": [],
        },
    }
    whole = merge(raw, changes)
    whole["study"]["large"] = {}
    params = Params.model_validate(whole)
    assert starts(params) == {"start"}
    splits = {name: raw["teachers"][name].get("split", "train") for name in ("lidar", "start", "fusion")}
    assert learned_from(params) == {**splits, "students": "train[:-16]"}
    params = Params.model_validate(merge(raw, {"data": {"splits": {"students": None}}}))
    assert learned_from(params)["students"] == raw["data"]["splits"]["train"]


def test_a_part_of_a_fusion_teacher_is_a_start_unless_students_learn_from_it() -> None:
    raw = read_params(ROOT)
    for student in raw["students"].values():
        student["start"] = None
    raw["study"] |= {"teachers": ["lidar", "start"], "large": {}}
    raw["study"] |= {"stores": ["lidar", "fusion", "instance"], "variants": ["baseline", "x3kd", "simdistill"]}
    raw["study"] |= {"baselines": []}
    assert starts(Params.model_validate(raw)) == {"start"}
    raw["study"] |= {"fusions": {}, "stores": ["lidar", "instance"], "variants": ["baseline"]}
    raw["study"] |= {"featured": []}
    assert starts(Params.model_validate(raw)) == set()


def test_the_summary_of_one_study_shows_another_how_its_weights_were_chosen(tmp_path: Path) -> None:
    make_study(tmp_path, [0, 1])
    sources = {"lidar": "train", "students": "train[:-16]"}
    report = make_report(tmp_path, [0, 1], profile="bench-cpu", learned_from=sources)
    summary = json.loads(report.summary)
    runs = [json.loads((tmp_path / f"metrics/xfd-{seed}.json").read_text())["mAP"] for seed in (0, 1)]
    assert summary["variants"]["xfd"]["mAP"] == pytest.approx(np.mean(runs), abs=5e-7)
    assert [run["mAP"] for run in summary["variants"]["xfd"]["runs"].values()] == runs
    assert summary["variants"]["xfd"]["terms"] == {"xfd": 0.3}
    assert (summary["profile"], summary["split"], summary["seeds"]) == ("bench-cpu", "val", [0, 1])
    (tmp_path / "weights.json").write_text(report.summary)
    other = {"baseline": PLAIN, "xfd": VARIANTS["xfd"], "xod-<b>": {**PLAIN, "terms": {"xod": {**TERM, "weight": 1.0}}}}
    text = section(make_report(tmp_path, [0], variants=other, search="weights"), "weights")
    rows = [cells(row) for row in text.split("<tr")[2:]]
    assert [row[:2] for row in rows] == [
        ["baseline", "no distillation"],
        ["xfd", "xfd 0.3"],
        ["xod-&lt;b&gt;", "xod 0.3"],
    ]
    gain = mean_interval([a - b for a, b in zip(runs, baseline_runs(tmp_path), strict=True)])
    assert gain is not None
    assert rows[1][3] == f"{gain.mean:+.3f}± {gain.half:.3f}"
    assert re.findall(r'class="used".*?class="name">([^<]*)', text) == ["xfd"]
    assert "students learn from train[:-16], scored on val (96 keyframes, 400 boxes), seeds 0, 1" in text


def baseline_runs(root: Path) -> list[float]:
    return [json.loads((root / f"metrics/baseline-{seed}.json").read_text())["mAP"] for seed in (0, 1)]


def test_weights_that_nobody_searched_are_said_to_be_so(tmp_path: Path) -> None:
    make_study(tmp_path, [0])
    assert '<section id="weights">' not in make_report(tmp_path, [0]).html
    text = section(make_report(tmp_path, [0], search="x3kd-weights"), "weights")
    assert "not in <code>studies/results</code> yet" in text
    for content in ("{", "[]", "{}", '{"variants": {"a": {}}}'):
        (tmp_path / "x3kd-weights.json").write_text(content)
        with pytest.raises(ReportError, match=r"x3kd-weights.json is not the summary of a study"):
            make_report(tmp_path, [0], search="x3kd-weights")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics/xfd-1.json", None, "is missing: run `dvc repro evaluate@xfd-1`"),
        ("metrics/lidar.json", None, "is missing: run `dvc repro evaluate_teacher@lidar`"),
        ("metrics/xfd-1.json", "{", "is not JSON"),
        ("metrics/xfd-1.json", "{}", "lacks mAP, NDS"),
        ("evaluations/xfd-1/evaluation.json", None, "is missing: run `dvc repro evaluate@xfd-1`"),
        (
            "evaluations/baseline-0/evaluation.json",
            "{}",
            "lacks kind, split, official, classes, scenes: it is of another",
        ),
        ("evaluations/xfd-0/pictures.json", None, "is missing: run `dvc repro evaluate@xfd-0`"),
        ("evaluations/xfd-0/00-bev.png", None, "is missing"),
        ("evaluations/lidar/metrics_details.json", None, "run `dvc repro evaluate_teacher@lidar`"),
        ("stores/lidar.json", None, "is missing: run `dvc repro extract@lidar`"),
        ("metrics/instance.json", None, "is missing: run `dvc repro evaluate_segmenter@instance`"),
        ("metrics/instance.json", "{", "is not JSON"),
        (
            "metrics/instance.json",
            '{"images": 3}',
            "is of another version: run `dvc repro evaluate_segmenter@instance`",
        ),
        ("evaluations/instance/pictures.json", None, "run `dvc repro evaluate_segmenter@instance`"),
        ("evaluations/instance/00.png", None, "is missing"),
        ("metrics/fusion.json", None, "is missing: run `dvc repro evaluate_fusion@fusion`"),
        ("cost.json", None, "is missing: run `dvc repro cost`"),
        ("metrics/giant.json", None, "is missing: run `dvc repro evaluate_large@giant`"),
        ("cost.json", "{", "is not JSON"),
        ("cost.json", json.dumps({"precision": "float32"}), "precisions"),
        ("cost.json", json.dumps({**COST, "variants": {}}), "does not fit the study (KeyError('baseline')): run"),
        ("film/film.json", None, "is missing: run `dvc repro film`"),
        ("film/film.json", "{}", "lacks keys, threshold, scene, keyframes, file, scenes: it is of another version"),
        ("film/film.webp", None, "is missing"),
        ("film/scene-0008.jpg", None, "is missing"),
        ("features/xfd-1/features.json", None, "is missing: run `dvc repro features@xfd-1`"),
        ("features/xfd-1/features.json", "{}", "lacks teacher, mean, keyframes: it is of another version"),
        ("features/xfd-0/00.png", None, "is missing"),
    ],
)
def test_what_is_missing_is_named_with_what_to_run(
    tmp_path: Path, file: str, content: str | None, message: str
) -> None:
    path = make_study(tmp_path, [0, 1]) / file
    add_fusion(tmp_path, 0.6, 0.6)
    add_large(tmp_path, 0.4, 0.2, 0.3)
    add_features(tmp_path, [0, 1])
    path.unlink()
    if content:
        path.write_text(content)
    with pytest.raises(ReportError, match=f"{re.escape(file)}.*{re.escape(message)}"):
        make_report(tmp_path, [0, 1], fusions=FUSION, large=["giant"], featured=["xfd"])


def test_runs_on_different_truth_are_not_compared(tmp_path: Path) -> None:
    path = make_study(tmp_path, [0]) / "metrics/xfd-0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "samples": 95}))
    with pytest.raises(ReportError, match="xfd-0: 95 samples of 'val'"):
        make_report(tmp_path, [0])


def test_metrics_of_other_studies_are_left_alone(tmp_path: Path) -> None:
    make_study(tmp_path, [0, 1])
    study = load_study(tmp_path / "metrics", tmp_path / "evaluations", [], {"baseline": ""}, [1])
    assert [list(arm.runs) for arm in study.arms] == [[1]]


class References(HTMLParser):
    """Collects what a page would load, and checks that its tags are balanced."""

    VOID = frozenset({"meta", "img", "line", "rect", "path", "br", "link", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "xlink:href", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag, tag


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    make_study(tmp_path, [0, 1])
    add_fusion(tmp_path, 0.6, 0.6)
    add_large(tmp_path, 0.4, 0.2, 0.3)
    add_features(tmp_path, [0, 1])
    report = make_report(
        tmp_path, [0, 1], search="x3kd-weights", fusions=FUSION, featured=["xfd"],
        large=["giant"], pairs=[PAIR],
    )  # fmt: skip
    text = report.html
    page = References()
    page.feed(text)
    assert page.open == []
    assert [value[:30] for value in page.loads if not value.startswith(("data:image/webp;base64,", "#"))] == []
    assert re.findall(r"https?://|@import|url\((?!#)", text) == []
    assert str(tmp_path) not in text + report.summary
    assert "xod-&lt;b&gt;" in text
    assert "xod-<b>" not in text
    for words in ("cannot prove", "top (k 5)", "epochs 12", "scene-0003"):
        assert words in text


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    make_study(tmp_path, [0, 1])
    assert make_report(tmp_path, [0, 1]) == make_report(tmp_path, [0, 1])


def test_the_report_imports_neither_torch_nor_the_rooms() -> None:
    code = "import sys, results.report; print([m for m in ('torch', 'data', 'models', 'stages') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_ticks_are_round_and_reach_the_top() -> None:
    assert round_ticks(0.5) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert round_ticks(0.137) == pytest.approx([0, 0.05, 0.1, 0.15])
    for top in np.random.default_rng(0).uniform(1e-3, 1, 50):
        ticks = round_ticks(float(top))
        assert ticks[-1] >= top - 1e-12
        assert 2 <= len(ticks) <= 7


def test_a_curve_ends_at_the_highest_recall() -> None:
    assert curve_path([0.0, 0.5, 1.0], [1.0, 0.5, 0.0]) == "M0.0,0.0 100.0,66.0"
    assert curve_path([0.0, 1.0], [0.0, 0.0]) == ""


def test_the_dag_goes_from_left_to_right() -> None:
    drawn = graph(STAGES, EDGES)
    x = {node.name: node.x for node in drawn.nodes}
    assert all(x[a] < x[b] for a, b in EDGES)
    assert ("prepare", "distill") not in reduced(EDGES)
    assert ("distill", "evaluate") in reduced(EDGES)


def test_instances_of_a_stage_are_counted() -> None:
    nodes = {
        "teacher@lidar": Node("teacher@lidar", "", {}, (), ()),
        "distill@a-0": Node("distill@a-0", "", {}, ("teacher@lidar",), ()),
        "distill@a-1": Node("distill@a-1", "", {}, ("teacher@lidar",), ()),
    }
    assert stage_graph(nodes) == ({"teacher": 1, "distill": 2}, [("teacher", "distill")])
