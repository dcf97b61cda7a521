"""Pictures of keyframes: six cameras, bird's-eye view and feature maps with boxes, instances in camera images,
and precision-recall curves.

Panels are RGB arrays [H, W, 3] of uint8, drawn with matplotlib's Agg canvas, so the same input gives the same bytes.
A class has one colour everywhere; the truth of a predictions' panel is dashed and grey.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from PIL import Image

from data.reading.blobs import BlobError
from data.reading.boxes import box_corners
from data.reading.classes import CLASSES
from data.reading.coco_json import InstanceArrays
from data.reading.geometry import inverse
from data.reading.index import CAMERAS, Index
from data.reading.sensors import read_points

Array = NDArray[np.float64]
Picture = NDArray[np.uint8]
Size = tuple[int, int]  # pixels: width and height, or to the right and down

COLOURS: Final[dict[str, str]] = {
    "car": "#4ea3ff",
    "truck": "#ff9a3c",
    "construction_vehicle": "#d8b26e",
    "bus": "#ffe14d",
    "trailer": "#a98bff",
    "barrier": "#ff5d5d",
    "motorcycle": "#ff7ac2",
    "bicycle": "#2fd6c3",
    "pedestrian": "#6fe36f",
    "traffic_cone": "#c8f04a",
}
CAMERA_GRID: Final = (
    ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT"),
    ("CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT"),
)
NEAR: Final = 0.1  # metres before the image plane: what is nearer is cut off
BEV_RANGE: Final = 51.2

# Share of the size, and WebP's quality.
FILM_QUALITIES: Final = ((1.0, 80), (1.0, 60), (0.75, 60), (0.75, 40), (0.5, 40), (0.5, 20))

_BACKGROUND: Final = "#10151c"
_INK: Final = "#e8ecf1"
_SOFT: Final = "#8d99a6"
_GRID: Final = "#27303b"
_ABSENT: Final = "#6b7178"
_DPI: Final = 100
_CELL: Final = 480  # pixels, width of one camera
_BEV: Final = 600
_GAP: Final = 4
HALF: Final = (3 * _CELL) // 2  # pixels, width of one of two panels below the cameras, with a gap between them
_STRIP: Final = 30  # pixels, height of the title strip
_COLUMN: Final = 446  # pixels, width of a model's column
_BETWEEN: Final = 16  # pixels between two of them

_BOTTOM: Final = ((0, 1), (1, 2), (2, 3), (3, 0))
_EDGES: Final = np.array([*_BOTTOM, *((a + 4, b + 4) for a, b in _BOTTOM), *((a, a + 4) for a in range(4))])
_FRONT: Final = np.array([0, 3, 7, 4])  # corners of the face at +length / 2
_CASING: Final = (withStroke(linewidth=2.4, foreground=(0, 0, 0, 0.45)),)
_STRENGTH: Final = LinearSegmentedColormap.from_list(
    "strength", ["#1c2431", "#3a2a6d", "#b23a78", "#f6a04d", "#ffffff"]
)
_HEIGHT: Final = LinearSegmentedColormap.from_list("height", ["#33424f", "#5f7b8f", "#9db8c9", "#dfe9ef"])


@dataclass(frozen=True)
class Boxes:
    """Boxes to draw: [K, 9] in the LiDAR frame (data.reading.boxes) and their classes [K]."""

    boxes: Array
    labels: NDArray[np.int64]

    def colours(self) -> list[str]:
        """One colour per box."""
        return [COLOURS[CLASSES[label]] for label in self.labels]

    def above(self, scores: Array, threshold: float) -> Boxes:
        """The boxes whose score is at least the threshold."""
        keep = scores >= threshold
        return Boxes(self.boxes[keep], self.labels[keep])


@dataclass(frozen=True)
class View:
    """A keyframe as it is drawn."""

    token: str
    caption: str
    images: Mapping[str, Picture]  # camera name -> [H, W, 3] RGB
    camera_SE3_lidar: Mapping[str, Array]  # camera name -> [4, 4]
    intrinsics: Mapping[str, Array]  # camera name -> [3, 3], raw pixels
    points: NDArray[np.float32]  # [P, >= 3] LiDAR frame, metres
    truth: Boxes


def load_view(index: Index, row: int, dataroot: Path) -> View:
    """Images, the keyframe's LiDAR sweep and the truth that a point has seen, of a row of the index.

    Raises:
        BlobError: a file is missing or broken; names file and token.
    """
    record = index.sample(row)
    cameras, annotations = record.cameras, record.annotations
    images = [read_image(dataroot / file, record.token) for file in cameras.files]
    camera_SE3_lidar = inverse(cameras.global_SE3_camera) @ record.global_SE3_lidar
    return View(
        record.token,
        f"{record.scene}, keyframe {record.token}",
        dict(zip(CAMERAS, images, strict=True)),
        dict(zip(CAMERAS, camera_SE3_lidar, strict=True)),
        dict(zip(CAMERAS, cameras.intrinsics, strict=True)),
        read_points(dataroot / record.lidar.files[0], record.token),
        Boxes(annotations.boxes[annotations.valid], annotations.labels[annotations.valid]),
    )


def read_image(path: Path, token: str) -> Picture:
    """An image [H, W, 3] RGB.

    Raises:
        BlobError: it is missing or broken; names file and sample.
    """
    try:
        return np.asarray(Image.open(path).convert("RGB"))
    except OSError as error:
        raise BlobError(f"{path} cannot be read: {error} (sample {token}).") from error


def draw_cameras(view: View, shown: Boxes, title: str) -> Picture:
    """The six cameras in two rows with the boxes projected into them, under a strip with the title and a legend."""
    return _cameras(view, title, shown.labels, partial(_project, view=view, shown=shown))


def draw_camera_instances(view: View, shown: Mapping[str, InstanceArrays], title: str) -> Picture:
    """The six cameras as in `draw_cameras`, with masks and boxes [K, 4] of instances in raw pixels by camera name."""
    labels = np.concatenate([instances.labels for instances in shown.values()])
    return _cameras(view, title, labels, lambda axes, name: _masks(axes, shown[name]))


def _cameras(view: View, title: str, labels: NDArray[np.int64], draw: Callable[[Axes, str], None]) -> Picture:
    """The six cameras under a strip; `draw` puts what is shown over the image of a camera."""
    size = (3 * _CELL + 2 * _GAP, _STRIP + _camera_rows(view, _CELL))
    figure = _figure(size)
    _strip(figure, size, title, labels)
    _put_cameras(figure, size, (0, _STRIP), _CELL, view, draw)
    return _render(figure)


def _camera_rows(view: View, cell: int) -> int:
    """Pixels, height of two rows of cameras `cell` pixels wide."""
    height, width = view.images[CAMERA_GRID[0][0]].shape[:2]
    return 2 * round(cell * height / width) + _GAP


def _put_cameras(
    figure: Figure, size: Size, corner: Size, cell: int, view: View, draw: Callable[[Axes, str], None]
) -> None:
    """The six cameras in two rows, `cell` pixels wide each; `corner` is their top left one."""
    height = (_camera_rows(view, cell) - _GAP) // 2
    for row, names in enumerate(CAMERA_GRID):
        for column, name in enumerate(names):
            place = (corner[0] + column * (cell + _GAP), corner[1] + row * (height + _GAP))
            axes = _axes(figure, size, place, (cell, height))
            _photograph(axes, view.images[name], cell)
            draw(axes, name)
            label = name.removeprefix("CAM_").replace("_", " ").lower()
            text = axes.text(0.012, 0.965, label, transform=axes.transAxes, color="white", fontsize=8, va="top")
            text.set_path_effects([withStroke(linewidth=2.2, foreground=(0, 0, 0, 0.6))])


def _photograph(axes: Axes, image: Picture, width: int) -> None:
    """An image over all of the axes, `width` pixels wide; the centre of its first pixel is at (0, 0)."""
    size = image.shape[:2]
    small = Image.fromarray(image).resize((width, round(width * size[0] / size[1])), Image.Resampling.LANCZOS)
    left, right, bottom, top = _frame(size)
    axes.imshow(np.asarray(small), extent=(left, right, bottom, top), interpolation="nearest", aspect="auto")
    axes.set(xlim=(left, right), ylim=(bottom, top))


def _frame(size: tuple[int, ...]) -> tuple[float, float, float, float]:
    """Left, right, bottom and top of an image of a height and width."""
    height, width = size
    return -0.5, width - 0.5, height - 0.5, -0.5


def _project(axes: Axes, name: str, view: View, shown: Boxes) -> None:
    """Boxes in one camera."""
    segments, faces, owner, facing = project_boxes(shown.boxes, view.camera_SE3_lidar[name], view.intrinsics[name])
    colours = np.array(shown.colours(), dtype=object)
    axes.add_collection(PolyCollection(list(faces), facecolors=list(colours[facing]), alpha=0.22, linewidths=0))
    lines = LineCollection(list(segments), colors=list(colours[owner]), linewidths=1.1, capstyle="round")
    lines.set_path_effects(list(_CASING))
    axes.add_collection(lines)


def draw_instances(image: Picture, shown: InstanceArrays, title: str, *, scores: bool) -> Picture:
    """A camera image with masks and boxes in the colours of their classes, under a strip with the title.

    Args:
        image: [H, W, 3] RGB.
        shown: in pixels of the image.
        title: the line above.
        scores: whether they stand beside the names of the classes.
    """
    height = round(HALF * image.shape[0] / image.shape[1])
    size = (HALF, _STRIP + height)
    figure = _figure(size)
    figure.text(8 / size[0], 1 - _STRIP / 2 / size[1], title, color=_INK, fontsize=9.5, va="center")
    axes = _axes(figure, size, (0, _STRIP), (HALF, height))
    _photograph(axes, image, HALF)
    _masks(axes, shown)
    for (left, top, _, _), label, score in zip(shown.boxes.tolist(), shown.labels.tolist(), shown.scores, strict=True):
        words = CLASSES[label].replace("_", " ") + (f" {score:.2f}" if scores else "")
        text = axes.text(left, top - 1, words, color=COLOURS[CLASSES[label]], fontsize=6.5, va="bottom", clip_on=True)
        text.set_path_effects(list(_CASING))
    return _render(figure)


def _masks(axes: Axes, shown: InstanceArrays) -> None:
    """Masks and outlines of boxes over an image; where masks overlap, the one of the better score is seen."""
    colours = [COLOURS[CLASSES[label]] for label in shown.labels.tolist()]
    layer = np.zeros((*shown.masks.shape[1:], 4), np.uint8)
    for number in shown.scores.argsort(kind="stable").tolist():
        layer[shown.masks[number] > 0] = [*_rgb(colours[number]), 120]
    axes.imshow(layer, extent=_frame(layer.shape[:2]), interpolation="nearest", aspect="auto")
    boxes = shown.boxes.astype(np.float64) - 0.5  # which count from pixels' edges
    corners = boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3]]]
    outlines = PolyCollection(list(corners), facecolors="none", edgecolors=colours, linewidths=0.9)
    outlines.set_path_effects(list(_CASING))
    axes.add_collection(outlines)


def project_boxes(
    boxes: Array, camera_SE3_lidar: Array, intrinsics: Array
) -> tuple[Array, Array, NDArray[np.int64], NDArray[np.int64]]:
    """Edges of boxes [K, 9] in one camera, cut at NEAR metres before the image plane.

    Returns:
        Segments [S, 2, 2] in pixels, front faces [F, 4, 2] of the boxes that lie wholly before the camera, and the
        box that each segment [S] and each face [F] belongs to. Far boxes come first, so near ones are drawn over them.
    """
    corners = box_corners(boxes) @ camera_SE3_lidar[:3, :3].T + camera_SE3_lidar[:3, 3]
    order = np.argsort(-corners[..., 2].mean(axis=1), kind="stable")
    edges = corners[order][:, _EDGES]  # [K, 12, 2, 3]
    owner = np.repeat(order, len(_EDGES))
    edges = edges.reshape(-1, 2, 3)
    depth = edges[..., 2]
    seen = (depth > NEAR).any(axis=1)
    segments = _pinhole(_cut(edges[seen]), intrinsics)
    facing = order[(corners[order][..., 2] > NEAR).all(axis=1)]
    return segments, _pinhole(corners[facing][:, _FRONT], intrinsics), owner[seen], facing


def _cut(edges: Array) -> Array:
    """Segments [S, 2, 3] of the camera frame with the part behind the near plane taken off."""
    start, end = edges[:, 0], edges[:, 1]
    rise = end[:, 2] - start[:, 2]
    part = (NEAR - start[:, 2]) / np.where(rise == 0, 1.0, rise)
    crossing = start + part[:, None] * (end - start)
    behind = edges[..., 2] <= NEAR
    return np.where(behind[..., None], crossing[:, None], edges)


def _pinhole(points: Array, intrinsics: Array) -> Array:
    homogeneous = points @ intrinsics.T
    return homogeneous[..., :2] / homogeneous[..., 2:]


def draw_bev(
    view: View, shown: Boxes, title: str, beneath: Boxes | None = None, reach: float = BEV_RANGE, side: int = _BEV
) -> Picture:
    """Bird's-eye view of +-reach metres, forward up, with the LiDAR points; `beneath` is drawn dashed and grey."""
    figure, axes = _bev_axes(title, reach, side)
    _put_bev(axes, view, shown, beneath)
    return _render(figure)


def _put_bev(axes: Axes, view: View, shown: Boxes, beneath: Boxes | None) -> None:
    _rings(axes)
    points = view.points
    axes.scatter(points[:, 0], points[:, 1], c=points[:, 2], cmap=_HEIGHT, vmin=-2, vmax=3, s=0.55, linewidths=0)
    if beneath is not None:
        _footprints(axes, beneath, ["#b8c2cc"] * len(beneath.boxes), (0, (3, 2)), 0.0)
    _footprints(axes, shown, shown.colours(), "solid", 0.25)
    axes.add_collection(PolyCollection([_EGO], facecolors=_INK, edgecolors=_BACKGROUND, linewidths=0.8, zorder=5))


def draw_columns(view: View, columns: Sequence[tuple[str, Boxes]], title: str, labels: NDArray[np.int64]) -> Picture:
    """A keyframe as several models see it, side by side: cameras above the bird's-eye view, where truth is dashed.

    Args:
        view: the keyframe.
        columns: title and boxes of each model.
        title: the line above.
        labels: classes of the legend, so that the keyframes of a film have the same one.
    """
    cell = (_COLUMN - 2 * _GAP) // 3
    rows = _camera_rows(view, cell)
    size = (len(columns) * (_COLUMN + _BETWEEN) - _BETWEEN, 2 * _STRIP + rows + _GAP + _COLUMN)
    figure = _figure(size)
    _strip(figure, size, title, labels)
    for place, (name, shown) in enumerate(columns):
        left, top = place * (_COLUMN + _BETWEEN), 2 * _STRIP
        figure.text((left + 8) / size[0], 1 - 1.5 * _STRIP / size[1], name, color=_INK, fontsize=11, va="center")
        _put_cameras(figure, size, (left, top), cell, view, partial(_project, view=view, shown=shown))
        axes = _axes(figure, size, (left, top + rows + _GAP), (_COLUMN, _COLUMN))
        axes.set(xlim=(-BEV_RANGE, BEV_RANGE), ylim=(-BEV_RANGE, BEV_RANGE))
        _put_bev(axes, view, shown, view.truth)
    return _render(figure)


def draw_map(
    colours: Picture,
    extent: float,
    shown: Boxes,
    title: str,
    beneath: Boxes,
    reach: float = BEV_RANGE,
    side: int = _BEV,
) -> Picture:
    """A feature map with outlines of boxes in white, at the scale and in the orientation of `draw_bev`.

    Args:
        colours: [H, W, 3] of the cells, H along y and W along x of the LiDAR frame (`feature_colours`).
        extent: half the side of the map, metres.
        shown: boxes to outline.
        title: the line above.
        beneath: boxes to outline in dashes.
        reach: half the side of what is shown, metres.
        side: of the panel, pixels.
    """
    figure, axes = _bev_axes(title, reach, side)
    axes.imshow(colours, extent=(-extent, extent, -extent, extent), origin="lower", interpolation="nearest", zorder=0)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach))
    for boxes, style in ((beneath, (0, (3, 2))), (shown, "solid")):
        _footprints(axes, boxes, ["#ffffff"] * len(boxes.boxes), style, 0.0, _CASING)
    axes.add_collection(PolyCollection([_EGO], facecolors=_INK, edgecolors=_BACKGROUND, linewidths=0.8, zorder=5))
    return _render(figure)


def draw_strength(strength: NDArray[np.float32], extent: float, shown: Boxes, title: str, side: int = _BEV) -> Picture:
    """How strong a feature map is in each cell, from dark to the white of its 99th percentile, with outlines of boxes.

    Args:
        strength: [H, W], not negative, H along y and W along x of the LiDAR frame.
        extent: half the side of the map, metres; all of it is shown.
        shown: boxes to outline.
        title: the line above.
        side: of the panel, pixels.
    """
    white = np.percentile(strength, 99)
    colours = (_STRENGTH(strength / (white or 1.0))[..., :3] * 255).round().astype(np.uint8)
    nothing = Boxes(np.empty((0, 9)), np.empty(0, np.int64))
    return draw_map(colours, extent, shown, title, nothing, extent, side)


def feature_colours(features: NDArray[np.float32], present: NDArray[np.bool_] | None = None) -> Picture:
    """Colours of a feature map: its three principal components as red, green and blue.

    The components are those of the cells of this map that are there and not all zero; a cell that is all zero is dark,
    one that is not there is grey.

    Args:
        features: [H, W, C].
        present: [H, W], the cells that are there; None: all.

    Returns:
        [H, W, 3] uint8.
    """
    there = np.ones(features.shape[:2], np.bool_) if present is None else present
    told = there & features.any(axis=-1)
    colours = np.empty((*features.shape[:2], 3), np.uint8)
    colours[:] = _rgb(_BACKGROUND)
    colours[~there] = _rgb(_ABSENT)
    if told.any():
        colours[told] = _principal(features[told].astype(np.float64))
    return colours


def _principal(values: Array) -> Picture:
    """Rows [N, C] as colours [N, 3]: each component from dark to bright between its outer percents."""
    values = values - values.mean(axis=0)
    _, vectors = np.linalg.eigh(values.T @ values)
    axes = vectors[:, ::-1][:, :3]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])  # either sign is an eigenvector
    parts = np.zeros((len(values), 3))
    parts[:, : axes.shape[1]] = values @ axes
    low, high = np.percentile(parts, [2, 98], axis=0)
    scaled = ((parts - low) / np.where(high > low, high - low, 1.0)).clip(0, 1)
    return (60 + 195 * scaled).round().astype(np.uint8)


def _bev_axes(title: str, reach: float, side: int) -> tuple[Figure, Axes]:
    """A square panel of +-reach metres under a strip with its title."""
    size = (side, side + _STRIP)
    figure = _figure(size)
    figure.text(8 / size[0], 1 - _STRIP / 2 / size[1], title, color=_INK, fontsize=9.5, va="center")
    axes = _axes(figure, size, (0, _STRIP), (side, side))
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), facecolor=_BACKGROUND)
    return figure, axes


_EGO: Final = np.array([(0.0, 2.6), (1.3, -2.0), (0.0, -1.1), (-1.3, -2.0)])


def _rings(axes: Axes) -> None:
    turn = np.linspace(0, 2 * np.pi, 181)
    for radius in (10, 20, 30, 40, 50):
        axes.plot(radius * np.cos(turn), radius * np.sin(turn), color=_GRID, linewidth=0.8, zorder=0)
        if radius % 20 == 0:
            axes.text(0.6, radius + 0.4, f"{radius} m", color=_SOFT, fontsize=7, zorder=0)


def _footprints(
    axes: Axes,
    shown: Boxes,
    colours: Sequence[str],
    style: str | tuple,
    fill: float,
    casing: Sequence[withStroke] = (),
) -> None:
    """Outlines seen from above, with a tick from the centre through the front."""
    corners = box_corners(shown.boxes)[:, :4, :2]
    centre, front = corners.mean(axis=1), corners[:, [0, 3]].mean(axis=1)
    ticks = np.stack([(centre + front) / 2, front], axis=1)
    if fill:
        axes.add_collection(PolyCollection(list(corners), facecolors=colours, alpha=fill, linewidths=0, zorder=2))
    width = 1.3 if fill else 1.0
    outline = PolyCollection(
        list(corners), facecolors="none", edgecolors=colours, linewidths=width, linestyles=[style], zorder=3
    )
    front_ticks = LineCollection(list(ticks), colors=colours, linewidths=width, zorder=3)
    for lines in (outline, front_ticks):
        lines.set_path_effects(list(casing))
        axes.add_collection(lines)


def compose(truth: tuple[Picture, Picture], predicted: tuple[Picture, Picture], caption: str) -> Picture:
    """One picture of a keyframe: the cameras of truth and predictions in a column, the bird's-eye views beside them.

    Args:
        truth: cameras and bird's-eye view of the truth.
        predicted: the same of the predictions.
        caption: the line below.
    """
    views = [truth[1], predicted[1]]
    tall = views[0].shape[0] <= 1.2 * truth[0].shape[0]  # the bird's-eye views fit on top of one another
    columns = [_stack([truth[0], predicted[0]]), *([_stack(views)] if tall else views)]
    height = max(column.shape[0] for column in columns)
    parts = [part for column in columns for part in (_lengthen(column, height), _blank(height, 3 * _GAP))][:-1]
    body = np.concatenate(parts, axis=1)
    return np.concatenate([body, _caption(caption, body.shape[1])])


def compose_instances(truth: Picture, predicted: Picture, caption: str) -> Picture:
    """One picture of a camera image: the panel of the truth, that of the predictions beside it, the caption below."""
    return compose_row([truth, predicted], caption)


def compose_row(panels: Sequence[Picture], caption: str) -> Picture:
    """One picture: panels of one height side by side, then the caption."""
    parts = [part for panel in panels for part in (panel, _blank(panel.shape[0], _GAP))][:-1]
    body = np.concatenate(parts, axis=1)
    return np.concatenate([body, _caption(caption, body.shape[1])])


def compose_cameras(panels: Sequence[Picture], caption: str) -> Picture:
    """One picture: panels of cameras one below the other, then the caption."""
    body = _stack(panels)
    return np.concatenate([body, _caption(caption, body.shape[1])])


def compose_maps(cameras: Picture, panels: Sequence[Picture], caption: str) -> Picture:
    """One picture: the cameras, below them panels of HALF pixels two to a row, then the caption."""
    height, width = panels[0].shape[0], cameras.shape[1]
    gap = _blank(height, width - 2 * HALF)
    rows = [[*panels[i : i + 2], _blank(height, HALF)][:2] for i in range(0, len(panels), 2)]
    body = _stack([cameras, *(np.concatenate([left, gap, right], axis=1) for left, right in rows)])
    return np.concatenate([body, _caption(caption, width)])


def _stack(panels: Sequence[Picture]) -> Picture:
    return np.concatenate([part for panel in panels for part in (panel, _blank(2 * _GAP, panel.shape[1]))][:-1])


def _lengthen(panel: Picture, height: int) -> Picture:
    return np.concatenate([panel, _blank(height - panel.shape[0], panel.shape[1])])


def _blank(height: int, width: int) -> Picture:
    return np.full((height, width, 3), _rgb(_BACKGROUND), dtype=np.uint8)


def _rgb(colour: str) -> list[int]:
    return [int(colour[index : index + 2], 16) for index in (1, 3, 5)]


def _caption(text: str, width: int) -> Picture:
    figure = _figure((width, _STRIP))
    figure.text(8 / width, 0.5, text, color=_SOFT, fontsize=9, va="center")
    return _render(figure)


def draw_curves(
    curves: Mapping[str, Mapping[float, tuple[Array, Array]]], average: Mapping[str, float | None], title: str
) -> Figure:
    """Precision over recall, one plot per class, one line per match distance.

    Args:
        curves: class -> match distance in metres -> recall [R], precision [R].
        average: class -> average precision.
        title: of the whole figure.
    """
    figure = Figure(figsize=(12, 5.2), dpi=_DPI)
    # By hand, as matplotlib's own layout draws all text once more to find room for it.
    figure.subplots_adjust(left=0.045, right=0.988, top=0.9, bottom=0.11, wspace=0.11, hspace=0.22)
    figure.suptitle(title, fontsize=12)
    shades = ["#9ec5ff", "#5e9df5", "#2a68c8", "#12397c"]
    for axes, (name, lines) in zip(figure.subplots(2, 5, sharex=True, sharey=True).flat, curves.items(), strict=True):
        for shade, (distance, (recall, precision)) in zip(shades, sorted(lines.items()), strict=False):
            reached = precision > 0
            axes.plot(recall[reached], precision[reached], color=shade, linewidth=1.5, label=f"{distance:g} m")
        ap = average[name]
        axes.set_title(f"{name.replace('_', ' ')}   AP {'–' if ap is None else f'{ap:.3f}'}", fontsize=9.5)
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(color="#e3e6ea", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.supxlabel("recall", fontsize=9, y=0.015)
    figure.supylabel("precision", fontsize=9, x=0.004)
    figure.legend(*axes.get_legend_handles_labels(), loc="lower right", ncols=4, frameon=False, fontsize=8.5)
    return figure


def save(picture: Picture, path: Path) -> None:
    """Write a panel as PNG, or as JPEG (for photographs) where the name says so; equal panels give equal bytes."""
    settings = {"optimize": True} if path.suffix == ".png" else {"quality": 90, "subsampling": 0}
    Image.fromarray(picture).save(path, **settings)


def save_film(frames: Sequence[Picture], path: Path, milliseconds: int, limit: int) -> None:
    """Write frames of one size as an animated WebP without an end, each for so many milliseconds.

    It is made at the best of FILM_QUALITIES at which it has no more than `limit` bytes, or else at the last of them.
    """
    images = [Image.fromarray(frame) for frame in frames]
    for share, quality in FILM_QUALITIES:
        size = round(images[0].width * share), round(images[0].height * share)
        first, *rest = (image.resize(size, Image.Resampling.LANCZOS) for image in images)
        first.save(path, "WEBP", save_all=True, append_images=rest, duration=milliseconds, quality=quality, method=4)
        if path.stat().st_size <= limit:
            return


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, without matplotlib's version in it."""
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", metadata={"Software": None})


def _figure(size: Size) -> Figure:
    return Figure(figsize=(size[0] / _DPI, size[1] / _DPI), dpi=_DPI, facecolor=_BACKGROUND)


def _axes(figure: Figure, size: Size, corner: Size, extent: Size) -> Axes:
    """Axes over a rectangle given in pixels from the top left corner."""
    left, top = corner
    width, height = extent
    box = (left / size[0], 1 - (top + height) / size[1], width / size[0], height / size[1])
    axes = figure.add_axes(box)
    axes.set_axis_off()
    return axes


def _strip(figure: Figure, size: Size, title: str, labels: NDArray[np.int64]) -> None:
    """A title, and a legend of the classes that are shown."""
    middle = 1 - _STRIP / 2 / size[1]
    figure.text(8 / size[0], middle, title, color=_INK, fontsize=9.5, va="center")
    names = [CLASSES[label] for label in np.unique(labels)]
    handles = [Line2D([], [], color=COLOURS[name], linewidth=2.2, label=name.replace("_", " ")) for name in names]
    legend = figure.legend(
        handles=handles, loc="center right", bbox_to_anchor=(1.0, middle), ncols=10, frameon=False, fontsize=8.5,
        handlelength=1.1, handletextpad=0.5, columnspacing=1.3, borderaxespad=0.4, labelcolor=_SOFT,
    )  # fmt: skip
    legend.set_zorder(1)


def _render(figure: Figure) -> Picture:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
