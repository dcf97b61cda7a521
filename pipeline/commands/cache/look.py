"""`cache look`: one sample of a store as a picture: the scene, and beside it what the teacher made of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from base.errors import PipelineError
from config.files import load_params
from config.params import Params
from data.drawing import pictures
from data.reading.coco_json import InstanceArrays
from data.reading.index import CAMERAS, Index
from data.reading.instances import StoredInstances, in_image, unpack
from data.store import Store
from pipeline.commands.cache.builds import STORES, actionable, chosen, published
from stages.context import INDEX

TOKEN_LETTERS: Final = 8  # of a token in a file's name


@actionable()
def run(root: Path, name: str, sample: str | None, out: Path | None) -> int:
    """Draw a sample (default: the store's first) and print where the picture is."""
    params = load_params(root)
    chosen(params, [name], published(root))
    store = Store.open(root / STORES / name)
    token = _token(store, sample)
    path = out or Path("reports") / f"look-{name}-{token[:TOKEN_LETTERS]}.png"
    if path.suffix != ".png":
        raise PipelineError(f"--out {path}: a picture is written as PNG, so the name must end in .png")
    picture = draw(_view(root, params, token), store, name, params.evaluate.score_threshold)
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures.save(picture, path)
    print(path)
    return 0


def draw(view: pictures.View, store: Store, name: str, threshold: float) -> pictures.Picture:
    """What a store holds of a sample, and the truth."""
    arrays = store.read(view.token)
    if "inst2d" in arrays:
        return _draw_instances(view, unpack(arrays["inst2d"]), name, threshold)
    return _draw_maps(view, store, arrays, name, threshold)


def _draw_instances(view: pictures.View, stored: StoredInstances, name: str, threshold: float) -> pictures.Picture:
    """The cameras with the true boxes, and below them again with the teacher's masks and boxes above a score."""
    height, width = next(iter(view.images.values())).shape[:2]
    found = in_image(stored, np.stack([np.eye(3)] * len(CAMERAS)), (height, width), least_left=0.0, least_area=1)
    shown = [InstanceArrays.of(camera).above(threshold) for camera in found]
    count = sum(len(camera.boxes) for camera in shown)
    panels = (
        pictures.draw_cameras(view, view.truth, f"truth, {len(view.truth.boxes)} boxes"),
        pictures.draw_camera_instances(
            view,
            dict(zip(CAMERAS, shown, strict=True)),
            f"{name}.inst2d: the teacher's {count} instances, score ≥ {threshold:g}",
        ),
    )
    return pictures.compose_cameras(panels, f"store {name}, {view.caption}")


def _draw_maps(
    view: pictures.View, store: Store, arrays: Mapping[str, Any], name: str, threshold: float
) -> pictures.Picture:
    """The scene with its true boxes, and every dense tap of the store with the teacher's boxes above a score."""
    boxes, found = _boxes(arrays.get("boxes"), threshold)
    extents = {tap: spec.extent for tap, spec in store.taps.items() if spec.extent is not None}
    reach = max(extents.values(), default=pictures.BEV_RANGE)
    truth = f"truth, {len(view.truth.boxes)} boxes"
    cameras = pictures.draw_cameras(view, view.truth, truth)
    panels = [pictures.draw_bev(view, view.truth, f"LiDAR points and {truth}", None, reach, pictures.HALF)]
    for tap, extent in extents.items():
        spec = store.taps[tap]
        features = store.calibration(tap).expand(spec.tensor(arrays[tap])).numpy()
        colours = pictures.feature_colours(features, arrays.get(f"{tap}.present"))
        title = f"{name}.{tap}: {spec.encoding} | {found}"
        panels.append(pictures.draw_map(colours, extent, boxes, title, view.truth, reach, pictures.HALF))
    if not extents:
        panels.append(pictures.draw_bev(view, boxes, f"{name}: {found}", view.truth, reach, pictures.HALF))
    caption = (
        f"store {name}, {view.caption} | dashed: truth | colours: the first three principal components of this map; "
        "dark: all zero; grey: not stored"
    )
    return pictures.compose_maps(cameras, panels, caption)


def _boxes(rows: np.ndarray | None, threshold: float) -> tuple[pictures.Boxes, str]:
    """The teacher's boxes of [K, 11] above a score, and how many those are in words."""
    if rows is None:
        return pictures.Boxes(np.empty((0, 9)), np.empty(0, np.int64)), "no boxes stored"
    boxes = pictures.Boxes(rows[:, :9].astype(np.float64), rows[:, 10].astype(np.int64))
    shown = boxes.above(rows[:, 9], threshold)
    return shown, f"solid: the teacher's {len(shown.boxes)} boxes, score ≥ {threshold:g}"


def _token(store: Store, sample: str | None) -> str:
    """The stored sample whose token begins so."""
    if sample is None:
        return store.tokens[0]
    matches = [token for token in store.tokens if token.startswith(sample)]
    if len(matches) != 1:
        some = ", ".join(matches[:3] or store.tokens[:3])
        fits = f"{len(matches)} tokens begin so" if matches else "no token begins so"
        raise PipelineError(f"--sample {sample!r}: {fits}; store {store.folder} has {len(store)} samples: {some}, ...")
    return matches[0]


def _view(root: Path, params: Params, token: str) -> pictures.View:
    index = Index.open(root / INDEX)
    try:
        row = index.row(token)
    except (KeyError, ValueError):
        raise PipelineError(
            f"sample {token} is in the store and not in {INDEX}: the store is stale; `cache ls` says in what"
        ) from None
    return pictures.load_view(index, row, root / params.data.dataroot)
