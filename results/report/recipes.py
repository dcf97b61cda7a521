"""Variants and profiles in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_TERM_KEYS = ("student", "teacher", "mask", "adapter", "distance", "weight")

PROFILES = {
    "smoke": "Checks that every stage runs. Nothing has been trained long enough for a number to mean anything.",
    "demo": (
        "Shows the whole DAG on a small synthetic city within minutes on two cores. It can show that the LiDAR teacher "
        "is ahead of the camera baseline. It cannot prove that one variant is better than another: the students see "
        "the data a few times and stop far from convergence."
    ),
    "bench-cpu": (
        "Students trained further from one common start on the small synthetic city, over several seeds, so that a "
        "difference of about 0.01 mAP can be seen. Gains here are gains on this city; they do not carry over to "
        "nuScenes by themselves."
    ),
    "stores": (
        "Feature distillation from differently encoded teacher outputs, all students from one start, on the small "
        "synthetic city: it resolves differences of about 0.008 mAP, and compares encodings, not methods."
    ),
    "real": (
        "One real nuScenes keyframe that the models were fitted to and are scored on: it shows that boxes land on real "
        "objects, and nothing about other scenes."
    ),
    "nuscenes": "Real nuScenes: these numbers can be compared with published ones of the same split and input size.",
}


def profile_note(profile: str, seeds: int) -> str:
    """What a profile can show and what it cannot."""
    known = PROFILES.get("nuscenes" if profile.startswith("nuscenes") else profile)
    text = known or "A profile of your own: judge the size of its training and validation sets before its numbers."
    return text if seeds > 1 else f"{text} One seed per variant: differences between seeds are unknown."


@dataclass(frozen=True)
class Term:
    """One distillation term, each part as text."""

    name: str
    student: str
    teacher: str
    mask: str
    adapter: str
    distance: str
    weight: str
    rest: str


@dataclass(frozen=True)
class Recipe:
    """A variant: the student it trains, its terms, its overrides."""

    name: str
    student: str
    terms: list[Term]
    overrides: str


def recipes(variants: Mapping[str, Mapping[str, Any]]) -> list[Recipe]:
    """The entries of `variants` as text."""
    return [
        Recipe(
            name,
            str(entry["student"]),
            [_term(term, parts) for term, parts in entry.get("terms", {}).items()],
            _overrides(entry),
        )
        for name, entry in variants.items()
    ]


def _overrides(entry: Mapping[str, Any]) -> str:
    """What a variant changes of its student's settings, and which labelled boxes it learns from if not from all."""
    truth = entry.get("truth", True)
    labels = f"labelled boxes of {truth} alone" if isinstance(truth, str) else "no loss against labelled boxes"
    share = f"{entry['truth_share']:.0%} of each step labelled" if entry.get("truth_share") else ""
    changed = _words({key: entry[key] for key in ("model", "train") if entry.get(key)})
    return "; ".join(filter(None, ["" if truth is True else labels, share, changed]))


def _term(name: str, parts: Mapping[str, Any]) -> Term:
    texts = {key: _words(parts.get(key, "")) for key in _TERM_KEYS}
    return Term(name=name, rest=_words({k: v for k, v in parts.items() if k not in _TERM_KEYS}), **texts)


def _words(value: Any) -> str:
    """`{kind: balanced}` -> `balanced`; `{kind: top, k: 5}` -> `top (k 5)`; nested keys joined by dots."""
    if not isinstance(value, Mapping):
        return "" if value is None else str(value)
    flat = _flat(value)
    kind = flat.pop("kind", None)
    rest = ", ".join(f"{key} {item}" for key, item in flat.items() if item is not None)
    if kind is None:
        return rest
    return f"{kind} ({rest})" if rest else str(kind)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(_flat(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item})
    return flat
