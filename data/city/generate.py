"""Generate a city: scenes in parallel, each published whole; then the tables; then the dataroot, by rename."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from data.city.config import CityConfig, ScenePlan
from data.city.schema import SHARED, TABLES, Record, coco_categories, shared_tables
from data.preparing.splits import official_splits

Progress = Callable[[int, str], None]  # called with the number of scenes done and the name of the latest

_SPLITS = {"v1.0-mini": ("mini_train", "mini_val"), "v1.0-trainval": ("train", "val")}


def plan_scenes(config: CityConfig, version: str) -> list[ScenePlan]:
    """Name the scenes: v1.0-mini has the devkit's ten, v1.0-trainval the first of its train and val splits.

    Raises:
        ValueError: the version is not one of the two.
    """
    if version not in _SPLITS:
        raise ValueError(f"no city can be made for version {version!r}; allowed: {', '.join(_SPLITS)}")
    names = official_splits()
    counts = (config.train_scenes, config.val_scenes) if version == "v1.0-trainval" else (None, None)
    plans: list[ScenePlan] = []
    for split, source, count in zip(("train", "val"), _SPLITS[version], counts, strict=True):
        keyframes = config.train_keyframes if split == "train" else config.val_keyframes
        for name in sorted(names[source])[:count]:
            plans.append(ScenePlan(name, split, keyframes, len(plans)))
    return plans


def generate(
    config: CityConfig,
    out_dir: Path,
    version: str,
    workers: int = 1,
    progress: Progress | None = None,
    scratch: Path | None = None,
) -> None:
    """Generate a city as a nuScenes dataroot.

    Scenes that an earlier, interrupted call with the same settings and code has finished are kept.

    Args:
        config: what decides the bytes.
        out_dir: the dataroot; it must not exist, and appears whole.
        version: "v1.0-mini" or "v1.0-trainval".
        workers: processes; they do not change the bytes.
        progress: told of every finished scene.
        scratch: folder for finished scenes, on the file system of out_dir; beside out_dir when None.

    Raises:
        FileExistsError: out_dir exists.
        ValueError: unknown version.
    """
    if out_dir.exists():
        raise FileExistsError(f"{out_dir} exists; remove it, or choose another folder for the city")
    plans = plan_scenes(config, version)
    scratch = scratch or out_dir.with_name(f".{out_dir.name}.partial")
    store = scratch / _identity(config, version)
    _keep_only(store)
    done = [plan for plan in plans if (store / plan.name).is_dir()]
    report = progress or (lambda *_: None)
    if done:
        report(len(done), "kept from an earlier run")
    todo = [plan for plan in plans if plan not in done]
    for count, name in enumerate(_make_scenes(todo, config, store, workers), len(done) + 1):
        report(count, name)
    _publish(plans, store, out_dir, version)
    shutil.rmtree(scratch)


def _identity(config: CityConfig, version: str) -> str:
    """Return a name for what decides the bytes: settings, version and the code of this package."""
    digest = hashlib.sha256(json.dumps([config.model_dump(), version]).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _keep_only(store: Path) -> None:
    """Make the folder of finished scenes; clear what other settings or killed processes left beside and in it."""
    store.mkdir(parents=True, exist_ok=True)
    for other in store.parent.iterdir():
        if other != store:
            shutil.rmtree(other)
    for partial in store.glob(".*"):
        shutil.rmtree(partial)


def _make_scenes(plans: list[ScenePlan], config: CityConfig, store: Path, workers: int) -> Iterator[str]:
    """Make scenes in any order; yield the name of each when it is published."""
    if workers <= 1 or len(plans) <= 1:
        for plan in plans:
            yield make_scene(plan, config, store)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(plans)), context, _die_with_parent, (os.getpid(),)) as pool:
        futures = [pool.submit(make_scene, plan, config, store) for plan in plans]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _die_with_parent(parent: int) -> None:
    """Have the kernel kill this worker when the process that started it is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def make_scene(plan: ScenePlan, config: CityConfig, store: Path) -> str:
    """Make one scene below a hidden folder and rename it into place; return its name."""
    from data.city.scene import SceneWriter  # late: ray caster, OpenCV and scipy, which only the workers need

    partial = Path(tempfile.mkdtemp(prefix=f".{plan.name}-", dir=store))
    SceneWriter(plan, config, partial).write()
    partial.chmod(0o755)
    partial.rename(store / plan.name)
    return plan.name


def _publish(plans: list[ScenePlan], store: Path, out_dir: Path, version: str) -> None:
    """Link the scenes' files into one dataroot, write its tables, rename it into place."""
    root = Path(tempfile.mkdtemp(prefix=".dataroot-", dir=store))
    root.chmod(0o755)
    tables: dict[str, list[Record]] = {name: [] for name in TABLES} | shared_tables()
    coco: dict[str, dict[str, Any]] = {
        split: {"info": {"identity": store.name}, "images": [], "annotations": [], "categories": coco_categories()}
        for split in ("train", "val")
    }
    for plan in plans:
        unit = store / plan.name
        records = json.loads((unit / "records.json").read_text())
        for name in set(TABLES) - set(SHARED):
            tables[name] += records["tables"][name]
        _append_coco(coco[plan.split], records["images"], records["objects"])
        for folder in ("samples", "sweeps", "maps"):
            _link(unit / folder, root / folder)
    (root / version).mkdir()
    for name in TABLES:
        (root / version / f"{name}.json").write_text(json.dumps(tables[name], indent=0))
    # Other paint or weather changes pictures and no table. Whoever watches the tables folder sees it here, and whoever
    # watches the instances in their `info`.
    (root / version / "city.json").write_text(json.dumps({"identity": store.name}))
    (root / "instances").mkdir()
    for split, content in coco.items():
        (root / "instances" / f"{split}.json").write_text(json.dumps(content))
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    root.rename(out_dir)


def _append_coco(coco: dict[str, Any], images: list[Record], objects: list[Record]) -> None:
    """Append one scene's pictures and objects, numbered on from what is there."""
    first = len(coco["images"]) + 1
    coco["images"] += [{"id": first + k, **image} for k, image in enumerate(images)]
    start = len(coco["annotations"]) + 1
    for k, item in enumerate(objects):
        coco["annotations"].append({"id": start + k, "image_id": first + item.pop("image"), **item})


def _link(source: Path, target: Path) -> None:
    """Hard-link a tree; copy where links are not possible."""

    def link(a: str, b: str) -> None:
        try:
            os.link(a, b)
        except OSError:
            shutil.copy2(a, b)

    with contextlib.suppress(FileNotFoundError):
        shutil.copytree(source, target, copy_function=link, dirs_exist_ok=True)
