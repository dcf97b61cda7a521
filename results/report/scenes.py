"""Where a variant gains and loses most against its baseline: the scenes of the split, each by its own score."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from results.report.results import Arm, Study
from results.report.statistics import Interval, mean_interval, paired_difference

SHOWN = 3  # of the best, and of the worst


@dataclass(frozen=True)
class SceneGain:
    """One scene: mAP of a variant and of its baseline over the seeds, and their difference, paired by seed."""

    scene: str
    boxes: int  # of truth
    own: Interval
    base: Interval
    gain: Interval


def scene_gains(study: Study, arm: Arm) -> list[SceneGain]:
    """The scenes that have truth, the one with the greatest gain first."""
    own, base = (_scores(other) for other in (arm, study.baseline_of(arm)))
    gains = []
    for entry in scenes_of(arm):
        name = entry["scene"]
        difference = paired_difference(own[name], base[name])
        means = [mean_interval(list(scores[name].values())) for scores in (own, base)]
        if difference and means[0] and means[1]:
            gains.append(SceneGain(name, entry["boxes"], means[0], means[1], difference))
    return sorted(gains, key=lambda scene: (-scene.gain.mean, scene.scene))


def extremes(gains: Sequence[SceneGain]) -> tuple[list[SceneGain], list[SceneGain]]:
    """The scenes of the greatest gains, and those of the smallest, the smallest first; none is in both."""
    best = list(gains[: min(SHOWN, (len(gains) + 1) // 2)])
    return best, list(gains[len(best) :][::-1][:SHOWN])


def fullest(arm: Arm, names: Collection[str]) -> str:
    """Of some scenes the one with the most boxes of truth; the first of them."""
    found = [entry for entry in scenes_of(arm) if entry["scene"] in names]
    name: str = max(found, key=lambda entry: entry["boxes"])["scene"]
    return name


def scenes_of(arm: Arm, seed: int | None = None) -> list[dict[str, Any]]:
    """What evaluation says of each scene, for one seed or the first."""
    found: list[dict[str, Any]] = (arm.first if seed is None else arm.runs[seed])["scenes"]
    return found


def _scores(arm: Arm) -> dict[str, dict[int, float | None]]:
    """Scene -> seed -> mAP."""
    scores: dict[str, dict[int, float | None]] = {}
    for seed in arm.runs:
        for entry in scenes_of(arm, seed):
            scores.setdefault(entry["scene"], {})[seed] = entry["mAP"]
    return scores
