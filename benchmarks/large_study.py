"""A study of 40 arms and a store of 20 GB, for `benchmarks/scale.py`: what people wait for beside training.

Nothing is trained: the results of the arms are made up, with the files and the sizes that evaluations have.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import yaml
from numpy.typing import NDArray

from config.files import load_params
from config.params import Params
from data.reading.classes import CLASSES
from data.reading.index import Index
from data.scoring.evaluation import MEAN_ERRORS
from results.report.results import EVALUATION
from stages.context import INDEX

ARMS: Final = 40
STUDENTS: Final = ("camera", "simulated", "camera-small")
STORES: Final = ["lidar", "fusion", "instance", "large"]
SEEDS: Final = [0, 1, 2]
DISTANCES: Final = (0.5, 1.0, 2.0, 4.0)
PICTURES: Final = {"truth-cameras": (440, 1080), "truth-bev": (440, 440), "cameras": (440, 1080), "bev": (440, 440)}
DVC: Final = (sys.executable, "-m", "dvc")
SHARD: Final = 64_000_000  # bytes of a file of the store


def workspace(root: Path, source: Path, dataroot: Path, index: Path, arms: int) -> None:
    """A workspace with the code of `source` and a study of so many arms on a dataroot and its index."""
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=source, check=True, stdout=-1
    )
    for name in files.stdout.decode().split("\0"):
        if (source / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, root / name)
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    params = load_params(root)
    variants = [name for name, variant in params.variants.items() if variant.student in STUDENTS]
    chosen = [name for name in variants if read_stores(params, name) <= set(STORES)][:arms]
    study = {
        "about": "of the size of a large one",
        "profile": "demo",
        "params": {"data": {"worlds": [], "dataroot": str(dataroot)}},
        "study": {
            "variants": chosen,
            "baselines": [],
            "seeds": SEEDS,
            "stores": STORES,
            "featured": [],
        },
    }
    (root / "studies/large.yaml").write_text(yaml.safe_dump(study))
    subprocess.run([sys.executable, "-m", "pipeline", "study", "large"], cwd=root, check=True, stdout=-1)
    (root / INDEX).parent.mkdir(parents=True)
    (root / INDEX).symlink_to(index)


def read_stores(params: Params, variant: str) -> set[str]:
    """The stores that a variant's terms read."""
    return {term.teacher.store for term in params.variants[variant].terms.values()}


def publish(root: Path, index: Index) -> int:
    """Made-up results of the workspace's study; returns the number of evaluations."""
    params, rng = load_params(root), np.random.default_rng(0)
    (root / "reports/metrics").mkdir(parents=True)
    teachers = [*params.study.teachers, *params.study.fusions, *params.study.large]
    runs = dict.fromkeys(teachers, "teacher")
    runs |= {f"{name}-{seed}": "student" for name in params.study.variants for seed in SEEDS}
    pictures = {name: _picture(rng, size) for name, size in PICTURES.items()}
    for key, kind in runs.items():
        _publish_run(root, key, _metrics(rng, kind, index), rng, pictures)
    for name in params.study.segmenters:
        _publish_segmenter(root, name)
    for name in params.study.stores:
        _write(root / f"reports/stores/{name}.json", {"store": name, "taps": {}})
    cost = {"parameters": 1.6e6, "multiply_adds": 2.5e9, "latency_ms": 80.0, "throughput_1": 12.0,
            "throughput_8": 20.0, "peak_memory": 2e8}  # fmt: skip
    conditions = {"device": "none", "threads": 1, "torch": "", "precisions": ["float32"], "image": [128, 352]}
    conditions |= {"frames": 1, "repeats": {"1": 1, "8": 1}}
    models = {"teachers": dict.fromkeys(teachers, cost), "variants": dict.fromkeys(params.study.variants, cost)}
    _write(root / "reports/cost.json", conditions | models)
    _publish_film(root, [*teachers, *(f"{name}-{SEEDS[0]}" for name in params.study.variants)], index, pictures)
    return len(runs)


def _picture(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Shades and lines, which compress about as well as drawn boxes do."""
    picture = cv2.resize(rng.integers(60, 200, (6, 12, 3), dtype=np.uint8), size[::-1], interpolation=cv2.INTER_CUBIC)
    for x, y, width, height in rng.integers(0, 400, (60, 4)).tolist():
        cv2.rectangle(picture, (x, y), (x + width // 4, y + height // 4), (20, 90, 240), 1)
    return picture.astype(np.uint8)


def _metrics(rng: np.random.Generator, kind: str, index: Index) -> dict[str, Any]:
    classes: dict[str, Any] = {}
    for name in CLASSES:
        errors = {error[1:]: float(rng.uniform(0.2, 1.0)) for error in MEAN_ERRORS}
        aps = {f"AP@{distance}": float(rng.uniform()) for distance in DISTANCES}
        classes[name] = {"AP": float(rng.uniform()), **aps, **errors, "truth": 4000, "predicted": 5500}
    scenes = [
        {"scene": scene, "mAP": float(rng.uniform()), "boxes": 1400, "samples": 40} for scene in index.scenes("val")
    ]
    errors = {error: float(rng.uniform(0.3, 1.0)) for error in MEAN_ERRORS}
    mean_ap = float(np.mean([values["AP"] for values in classes.values()]))
    return {
        "kind": kind, "split": "val", "official": "vectorised", "parameters": 1_650_000, "mAP": mean_ap,
        "NDS": mean_ap, **errors, "mAP_present": mean_ap, "samples": len(index.rows("val")), "classes": classes,
        "boxes": {"truth": 40_000, "predicted": 55_000}, "scenes": scenes,
    }  # fmt: skip


def _publish_run(
    root: Path, key: str, metrics: dict[str, Any], rng: np.random.Generator, pictures: Mapping[str, Any]
) -> None:
    folder = root / "outputs/evaluations" / key
    _write(root / f"reports/metrics/{key}.json", {k: v for k, v in metrics.items() if k not in EVALUATION})
    _write(folder / "evaluation.json", {name: metrics[name] for name in EVALUATION})
    curves = ("recall", "precision", "confidence", "trans_err", "vel_err", "scale_err", "orient_err", "attr_err")
    details = {
        f"{name}:{distance}": {curve: np.sort(rng.uniform(size=101)).tolist() for curve in curves}
        for name in CLASSES
        for distance in DISTANCES
    }
    _write(folder / "metrics_details.json", details)
    scenes = []
    for number in range(4):
        files = {name: f"{number:02d}-{name}.{'jpg' if 'cameras' in name else 'png'}" for name in pictures}
        for name, file in files.items():
            cv2.imwrite(str(folder / file), pictures[name])
        scenes.append({"token": f"token-{number}", "caption": f"keyframe {number}", "files": files})
    _write(folder / "pictures.json", {"threshold": 0.2, "scenes": scenes})


def _publish_segmenter(root: Path, name: str) -> None:
    scores = {"AP": 0.3, "AP50": 0.5, "AP75": 0.3, "AP_small": 0.1, "AP_medium": 0.4, "AP_large": 0.5, "AR": 0.4}
    classes = {label: {"truth": 900, "bbox": scores, "mask": scores} for label in CLASSES}
    _write(root / f"reports/metrics/{name}.json", {
        "kind": "segmenter", "key": name, "images": 576, "parameters": 2_100_000, "bbox": scores, "mask": scores,
        "classes": classes,
    })  # fmt: skip
    _write(root / f"outputs/evaluations/{name}/pictures.json", {"threshold": 0.2, "images": []})


def _publish_film(root: Path, keys: list[str], index: Index, pictures: Mapping[str, Any]) -> None:
    folder, scenes = root / "outputs/film", index.scenes("val")
    stills = [{"scene": scene, "token": scene, "file": "still.jpg"} for scene in scenes]
    _write(folder / "film.json", {
        "keys": keys, "threshold": 0.2, "scene": scenes[0], "keyframes": 1, "file": "film.webp", "scenes": stills,
    })  # fmt: skip
    cv2.imwrite(str(folder / "still.jpg"), pictures["cameras"])
    cv2.imwrite(str(folder / "film.webp"), pictures["cameras"])


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def store(root: Path, gigabytes: float) -> int:
    """A DVC repository with a folder `store` of that size, in files as large as shards; returns their number."""
    rng, count = np.random.default_rng(0), max(1, round(gigabytes * 1e9 / SHARD))
    (root / "store").mkdir(parents=True)
    block = rng.bytes(SHARD)
    for number in range(count):
        with (root / f"store/{number:05d}.arrow").open("wb") as file:
            file.write(number.to_bytes(8, "little"))  # no two are equal
            file.write(block[8:])
    environment = os.environ | {"DVC_NO_ANALYTICS": "1"}
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    subprocess.run([*DVC, "init", "--quiet"], cwd=root, check=True, env=environment)
    subprocess.run(
        [*DVC, "config", "cache.type", "hardlink,reflink,symlink,copy"], cwd=root, check=True, env=environment
    )
    return count
