"""Bar charts as small SVG files, and the machine's description; shared by the benchmarks of the store."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import torch

COLOURS = ("#2f6f9f", "#8fbcd8", "#d08b3c", "#7a7a7a")
WIDTH, LEFT, RIGHT = 860, 230, 190  # pixels: the picture, room for labels and for notes
BAR, GAP = 13, 9  # pixels: height of a bar, space between groups


class Bar(NamedTuple):
    """A bar with a note at its end; `series` picks the colour."""

    value: float
    note: str
    series: int = 0


class Panel(NamedTuple):
    """Bars by label, under a title; a line at `reference`."""

    title: str
    groups: Mapping[str, Sequence[Bar]]
    reference: float | None = None


def machine() -> dict[str, str | float]:
    """What was measured on, and how busy it was in the last five minutes."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "device": device,
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[1], 2),
    }


def draw(path: Path, title: str, panels: Sequence[Panel], series: Sequence[str] = ()) -> None:
    """Write a picture of horizontal bars, the panels one below the other; `series` names the colours."""
    parts = [_text(16, 26, title, size=17, weight="bold")]
    x, y = LEFT, 50
    for number, name in enumerate(series):
        parts.append(f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="{COLOURS[number]}"/>')
        parts.append(_text(x + 17, y, name))
        x += 35 + 8 * len(name)
    y += 14
    for panel in panels:
        y += 22
        parts.append(_text(16, y, panel.title, weight="bold"))
        y = _panel(parts, panel, y + 10)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 10}" width="{WIDTH}" height="{y + 10}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="12.5">'
    )
    background = f'<rect width="{WIDTH}" height="{y + 10}" fill="white"/>'
    path.write_text("\n".join([head, background, *parts, "</svg>"]) + "\n")


def _panel(parts: list[str], panel: Panel, top: int) -> int:
    """Add a panel's bars; returns where it ends."""
    largest = max([bar.value for bars in panel.groups.values() for bar in bars] + [panel.reference or 0.0])
    scale = (WIDTH - LEFT - RIGHT) / largest
    y = top
    if panel.reference is not None:
        x = LEFT + panel.reference * scale
        bars_end = top + sum(BAR * len(bars) + GAP for bars in panel.groups.values())
        place = f'x1="{x:.1f}" x2="{x:.1f}" y1="{top - 4}" y2="{bars_end - 5}"'
        parts.append(f'<line {place} stroke="#666" stroke-dasharray="4 3"/>')
    for label, bars in panel.groups.items():
        parts.append(_text(LEFT - 10, y + BAR * len(bars) / 2 + 4, label, anchor="end"))
        for bar in bars:
            length = max(bar.value * scale, 1.0)
            colour = COLOURS[bar.series % len(COLOURS)]
            parts.append(f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR - 2}" fill="{colour}"/>')
            parts.append(_text(LEFT + length + 6, y + BAR - 3, bar.note, size=11))
            y += BAR
        y += GAP
    return y


def _text(x: float, y: float, text: str, *, size: float = 12.5, weight: str = "normal", anchor: str = "start") -> str:
    """A text with a white edge, to be read across lines."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="#222" stroke="white" stroke-width="3" paint-order="stroke">{escape(text)}</text>'
    )
