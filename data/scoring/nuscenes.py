"""The nuScenes detection metrics (Caesar et al., CVPR 2020, section 3) from the index and a submission, vectorised.

Every number equals the devkit's to 1e-12: average precision per class and distance, the five errors, NDS, the curves,
scores of single scenes and counts. So do its rules, in this order: a box counts inside the range of its class around
the vehicle; unless it holds no LiDAR or RADAR point; a bicycle or motorcycle unless its centre is in a bicycle rack.
From the best score down (of equal scores the later in the file first), a prediction takes the nearest box of truth of
its keyframe and class that is free (of equally near ones the first annotated), if it is nearer than the distance.

Matching knows no order but that within a keyframe and class. All of those take their turn together: their best
predictions, then their second ones, and so on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from data.reading.classes import CLASSES
from data.reading.geometry import Float64, rotation_matrices
from data.reading.index import Index
from data.reading.truth import SEVERAL, GlobalBoxes, Int64, Racks, Truth, read_truth
from data.scoring.evaluation import (
    MEAN_ERRORS,
    SETTINGS,
    Evaluation,
    MetricsError,
    SceneScore,
    check_tokens,
    no_truth,
)
from data.scoring.submitted import Submitted

ELEMENTS: Final = 101  # of a curve, at recalls from 0 to 1
ERRORS: Final = ("trans_err", "vel_err", "scale_err", "orient_err", "attr_err")  # in the devkit's order
_REACH: Final = np.array([SETTINGS["class_range"][name] for name in CLASSES], dtype=np.float64)
_DISTANCES: Final[list[float]] = SETTINGS["dist_ths"]
_FIRST: Final = round(100 * SETTINGS["min_recall"]) + 1  # element of a curve behind the least recall
_CYCLES: Final = [CLASSES.index(name) for name in ("bicycle", "motorcycle")]
_BARRIER: Final = CLASSES.index("barrier")
_UNDEFINED: Final = {"traffic_cone": {"attr_err", "vel_err", "orient_err"}, "barrier": {"attr_err", "vel_err"}}
_PAIRS: Final = 1 << 21  # pairs of a prediction and a box of truth that are looked at together

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class _Scored:
    """The boxes that count, and how they were matched."""

    truth: GlobalBoxes
    found: GlobalBoxes
    scores: Float64  # [P]
    order: Int64  # [P], of the predictions, the best first
    matches: dict[float, Int64]  # distance -> for each prediction the box of truth that it took, or -1


def evaluate_submission(index: Index, submitted: Submitted, split: str) -> Evaluation:
    """Score a submission on a split, or on a part of it (detection_cvpr_2019).

    Raises:
        MetricsError: tokens that do not fit the split, a split without truth, more than 500 boxes in a sample; truth
            with several attributes, a matched box without a size, as the devkit refuses.
        ValueError: the split is not in the index.
    """
    truth = read_truth(index.path.parent, index.scenes(split))
    _check(truth, submitted, split)
    scored = _match(truth, submitted)
    labels = {"truth": scored.truth.label, "predicted": scored.found.label}
    counts = {name: np.bincount(label, minlength=len(CLASSES)).tolist() for name, label in labels.items()}
    curves = _curves(scored, counts["truth"])
    details = {f"{CLASSES[label]}:{distance}": curve for (label, distance), curve in curves.items()}
    return Evaluation(
        _metrics(curves),
        {name: {key: values.tolist() for key, values in curve.items()} for name, curve in details.items()},
        dict(zip(CLASSES, counts["truth"], strict=True)),
        dict(zip(CLASSES, counts["predicted"], strict=True)),
        len(truth.tokens),
        _scene_scores(truth, scored),
    )


def _check(truth: Truth, submitted: Submitted, split: str) -> None:
    check_tokens(submitted.tokens, truth.tokens, split)
    if not len(truth.boxes):
        raise no_truth(split)
    several = np.flatnonzero(truth.boxes.attribute == SEVERAL)
    if len(several):
        raise MetricsError(
            f"{len(several)} annotations have more than one attribute, or one that nuScenes does not have, such as "
            f"{truth.box_tokens[several[0]]}: the official metrics allow one. Mend sample_annotation.json, run prepare"
        )
    counts = np.bincount(submitted.boxes.sample, minlength=len(submitted.tokens))
    most = SETTINGS["max_boxes_per_sample"]
    if (counts > most).any():
        raise MetricsError(
            f"no more than {most} boxes per sample are allowed: sample {submitted.tokens[counts.argmax()]} has "
            f"{counts.max()}, and {(counts > most).sum()} samples have too many. Submit the best {most}"
        )


def _match(truth: Truth, submitted: Submitted) -> _Scored:
    """Keep what counts, and match it at every distance."""
    position = {token: number for number, token in enumerate(truth.tokens)}
    to_truth = np.array([position[token] for token in submitted.tokens], dtype=np.int64)
    submitted_boxes = replace(submitted.boxes, sample=to_truth[submitted.boxes.sample])
    kept = _counted(submitted_boxes, truth)
    found, scores = submitted_boxes.take(kept), submitted.scores[kept]
    true = truth.boxes.take(_counted(truth.boxes, truth))
    order = _best_first(scores)
    groups = [boxes.sample * len(CLASSES) + boxes.label for boxes in (found, true)]
    near = _near(found.translation, true.translation, *groups)
    matches = {distance: _take_turns(near, distance, groups[0], order, len(true)) for distance in _DISTANCES}
    return _Scored(true, found, scores, order, matches)


def _best_first(scores: Float64) -> Int64:
    """Positions of predictions, of equal scores the later one first, which is the devkit's order."""
    return np.lexsort((np.arange(len(scores)), scores))[::-1]


def _counted(boxes: GlobalBoxes, truth: Truth) -> Int64:
    """Positions of the boxes that count; their `sample` is a position in the truth's tokens."""
    offset = boxes.translation[:, :2] - truth.ego[boxes.sample, :2]
    with np.errstate(invalid="ignore"):  # of keyframes without a LiDAR record, where nothing is in range
        near = np.sqrt((offset**2).sum(axis=1)) < _REACH[boxes.label]
    kept = np.flatnonzero(near & (boxes.points != 0))
    cycles = kept[np.isin(boxes.label[kept], _CYCLES)]
    parked = cycles[_in_racks(boxes.translation[cycles], boxes.sample[cycles], truth.racks)]
    return np.setdiff1d(kept, parked, assume_unique=True)


def _in_racks(points: Float64, sample: Int64, racks: Racks) -> Bools:
    """Which points [P, 3] are inside, or on the surface of, a bicycle rack of their keyframe."""
    point, rack = _pairs(sample, racks.sample)
    turn, half = rotation_matrices(racks.rotation[rack]), racks.size[rack][:, [1, 0, 2]] / 2
    axes = np.swapaxes(turn, 1, 2) * -2 * half[:, :, None]  # from the corner in front, on the left, on top
    corner = racks.translation[rack] + np.einsum("pij,pj->pi", turn, half)
    along = np.einsum("pij,pj->pi", axes, points[point] - corner)
    inside = ((along >= 0) & (along <= (axes**2).sum(axis=2))).all(axis=1)
    found = np.zeros(len(points), dtype=bool)
    found[point[inside]] = True
    return found


def _pairs(left: Int64, right: Int64) -> tuple[Int64, Int64]:
    """Positions of all pairs with equal values; `right` is sorted."""
    first, last = np.searchsorted(right, left, "left"), np.searchsorted(right, left, "right")
    counts = last - first
    ends = np.cumsum(counts)
    return np.repeat(np.arange(len(left)), counts), np.arange(counts.sum()) + np.repeat(first - ends + counts, counts)


@dataclass(frozen=True)
class _Near:
    """Pairs of a prediction and a box of truth, of one keyframe and class, within the largest distance."""

    found: Int64  # [N]
    truth: Int64  # [N]
    distance: Float64  # [N], metres


def _near(found: Float64, truth: Float64, found_group: Int64, truth_group: Int64) -> _Near:
    """The pairs of centres [P, 3] and [M, 3] in equal groups."""
    by_group = np.argsort(truth_group, kind="stable")
    sorted_group = truth_group[by_group]
    partners = np.searchsorted(sorted_group, found_group, "right") - np.searchsorted(sorted_group, found_group, "left")
    chunk = np.cumsum(partners) // _PAIRS
    limit = max(_DISTANCES) * (1 + 1e-9)
    parts = []
    for start, stop in _slices(chunk):
        first, second = _pairs(found_group[start:stop], sorted_group)
        first, second = first + start, by_group[second]
        offset = found[first, :2] - truth[second, :2]
        close = np.flatnonzero((offset**2).sum(axis=1) < limit**2)
        parts.append((first[close], second[close], _norms(offset[close])))
    return _Near(*(np.concatenate(columns) for columns in zip(*parts, strict=True))) if parts else _no_pairs()


def _no_pairs() -> _Near:
    empty = np.zeros(0, dtype=np.int64)
    return _Near(empty, empty, np.zeros(0))


def _slices(values: Int64) -> list[tuple[int, int]]:
    """Where each run of equal values starts and stops."""
    cuts = np.flatnonzero(np.diff(values)) + 1
    return [(start, stop) for start, stop in pairwise([0, *cuts.tolist(), len(values)]) if stop > start]


def _norms(vectors: Float64) -> Float64:
    """Lengths of [N, 2], to the bit `np.linalg.norm` of each: from a dot product, which may round its sum once only."""
    return np.sqrt(np.matmul(vectors[:, None, :], vectors[:, :, None])[:, 0, 0])


def _take_turns(near: _Near, limit: float, group: Int64, order: Int64, truths: int) -> Int64:
    """For each prediction the box of truth that it takes at a distance, or -1.

    A pair is written down per prediction and box within the distance. A turn is that of one prediction of every group,
    so no two of a turn can want the same box.
    """
    chosen = np.flatnonzero(near.distance < limit)
    found, truth, distance = near.found[chosen], near.truth[chosen], near.distance[chosen]
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    wanting = np.unique(rank[found])  # ranks of the predictions that are near a box
    turn_of_rank = np.zeros(len(order), dtype=np.int64)
    turn_of_rank[wanting] = _numbered(group[order[wanting]])
    turn = turn_of_rank[rank[found]]
    sequence = _nearest_first(turn, rank[found], distance, truth)
    found, truth, turn = found[sequence], truth[sequence], turn[sequence]
    taken, matches = np.zeros(truths, dtype=bool), np.full(len(order), -1)
    for start, stop in _slices(turn):
        free = start + np.flatnonzero(~taken[truth[start:stop]])
        own = found[free]
        nearest = free[np.append(True, own[1:] != own[:-1])[: len(free)]]
        matches[found[nearest]] = truth[nearest]
        taken[truth[nearest]] = True
    return matches


def _nearest_first(turn: Int64, rank: Int64, distance: Float64, truth: Int64) -> Int64:
    """Positions of pairs by turn, prediction and distance, of equally near boxes the first annotated first."""
    return np.lexsort((truth, distance, rank, turn))


def _numbered(groups: Int64) -> Int64:
    """For each entry, how many of its group stand before it."""
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.append(True, np.diff(groups[order]) != 0)[: len(order)])
    lengths = np.diff([*starts.tolist(), len(order)])
    numbers = np.empty_like(groups)
    numbers[order] = np.arange(len(order)) - np.repeat(starts, lengths)
    return numbers


def _curves(scored: _Scored, positives: list[int]) -> dict[tuple[int, float], dict[str, Float64]]:
    """Class and distance -> recall, precision, confidence and the five errors [101], as the devkit names them."""
    labels = scored.found.label[scored.order]
    curves = {}
    for label, count in enumerate(positives):
        own = scored.order[labels == label]
        for distance in _DISTANCES:
            curves[label, distance] = _curve(scored, own, scored.matches[distance][own], count)
    return curves


def _curve(scored: _Scored, own: Int64, matches: Int64, positives: int) -> dict[str, Float64]:
    """The curves of one class at one distance.

    Args:
        scored: all boxes.
        own: [P] the class's predictions, the best first.
        matches: [P] what they took.
        positives: how many boxes of truth there are.
    """
    hit = matches >= 0
    recall = np.linspace(0, 1, ELEMENTS)
    if not hit.any():
        nothing = {"precision": np.zeros(ELEMENTS), "confidence": np.zeros(ELEMENTS)}
        return {"recall": recall, **nothing, **{name: np.ones(ELEMENTS) for name in ERRORS}}
    found, scores = own[hit], scored.scores[own]
    reached, precision = _precision(hit, positives)
    confidence = np.interp(recall, reached, scores, right=0)
    errors = _errors(scored.found.take(found), scored.truth.take(matches[hit]))
    means = {name: _running_mean(values)[::-1] for name, values in errors.items()}
    # From the last match to the first, because np.interp wants scores that grow.
    at = {name: np.interp(confidence[::-1], scores[hit][::-1], mean)[::-1] for name, mean in means.items()}
    curve = {"precision": np.interp(recall, reached, precision, right=0), "confidence": confidence}
    return {"recall": recall, **curve, **{name: at[name] for name in ERRORS}}


def _precision(hit: Bools, positives: int) -> tuple[Float64, Float64]:
    """Recall and precision [P] after each of the predictions, the best first."""
    hits, misses = np.cumsum(hit).astype(np.float64), np.cumsum(~hit).astype(np.float64)
    return hits / float(positives), hits / (misses + hits)


def _errors(found: GlobalBoxes, truth: GlobalBoxes) -> dict[str, Float64]:
    """The five errors [K] of matched boxes, NaN where the truth says nothing of it."""
    if (found.size <= 0).any() or (truth.size <= 0).any():
        raise MetricsError("a matched box has a size of 0 or less: the official metrics allow none")
    smaller, volumes = (
        np.minimum(truth.size, found.size).prod(axis=1),
        (truth.size.prod(axis=1), found.size.prod(axis=1)),
    )
    differs = (truth.attribute != found.attribute).astype(np.float64)
    return {
        "trans_err": _norms(found.translation[:, :2] - truth.translation[:, :2]),
        "vel_err": _norms(found.velocity - truth.velocity),
        "scale_err": 1 - smaller / (volumes[0] + volumes[1] - smaller),
        "orient_err": _turns(truth, found),
        "attr_err": np.where(truth.attribute == 0, np.nan, differs),
    }


def _turns(truth: GlobalBoxes, found: GlobalBoxes) -> Float64:
    """Angles [K] between headings; a barrier has no front."""
    period = np.where(truth.label == _BARRIER, np.pi, 2 * np.pi)
    angle = (_headings(truth.rotation) - _headings(found.rotation) + period / 2) % period - period / 2
    return np.abs(np.where(angle > np.pi, angle - 2 * np.pi, angle))


def _headings(rotation: Float64) -> Float64:
    """Angles [K] of the x-axis in the global plane, of quaternions [K, 4]; 0 of one that is 0."""
    w, x, y, z = rotation.T
    return np.arctan2(2 * (x * y + w * z), w * w + x * x - y * y - z * z)


def _running_mean(values: Float64) -> Float64:
    """Means [K] of all values so far that are not NaN: 0 as long as there is none, ones if there is none at all."""
    known = ~np.isnan(values)
    if not known.any():
        return np.ones(len(values))
    sums, counts = np.nancumsum(values), np.cumsum(known)
    return np.divide(sums, counts, out=np.zeros_like(sums), where=counts != 0)


def _metrics(curves: dict[tuple[int, float], dict[str, Float64]]) -> dict[str, Any]:
    """The content of the devkit's metrics_summary.json."""
    aps = {
        name: {distance: _area(curves[label, distance]["precision"]) for distance in _DISTANCES}
        for label, name in enumerate(CLASSES)
    }
    errors = {
        name: {key: _error(name, key, curves[label, SETTINGS["dist_th_tp"]]) for key in MEAN_ERRORS.values()}
        for label, name in enumerate(CLASSES)
    }
    means = {name: float(np.mean(list(values.values()))) for name, values in aps.items()}
    mean_ap = float(np.mean(list(means.values())))
    tp_errors = {key: float(np.nanmean([errors[name][key] for name in CLASSES])) for key in MEAN_ERRORS.values()}
    tp_scores = {key: max(0.0, 1.0 - error) for key, error in tp_errors.items()}
    weight = SETTINGS["mean_ap_weight"]
    nd_score = float(weight * mean_ap + np.sum(list(tp_scores.values()))) / float(weight + len(tp_scores))
    return {
        "label_aps": aps,
        "mean_dist_aps": means,
        "mean_ap": mean_ap,
        "label_tp_errors": errors,
        "tp_errors": tp_errors,
        "tp_scores": tp_scores,
        "nd_score": nd_score,
        "cfg": SETTINGS,
    }


def _area(precision: Float64) -> float:
    """Average precision of a curve, without its low recalls and low precisions."""
    least = SETTINGS["min_precision"]
    return float(np.mean(np.maximum(precision[_FIRST:] - least, 0))) / (1.0 - least)


def _error(name: str, key: str, curve: dict[str, Float64]) -> float:
    """Mean of an error over the recalls that were reached, 1 if they are too low; NaN if a class has no such error."""
    if key in _UNDEFINED.get(name, ()):
        return float("nan")
    reached = np.flatnonzero(curve["confidence"])
    last = int(reached[-1]) if len(reached) else 0
    return 1.0 if last < _FIRST else float(np.mean(curve[key][_FIRST : last + 1]))


def _scene_scores(truth: Truth, scored: _Scored) -> list[SceneScore]:
    """Each scene by itself, with the matches that were found: they cross no keyframe."""
    names = sorted(set(truth.scenes))
    scene = np.searchsorted(names, truth.scenes)  # of a keyframe
    positives = np.bincount(scene[scored.truth.sample] * len(CLASSES) + scored.truth.label, minlength=_keys(names))
    keys = (scene[scored.found.sample] * len(CLASSES) + scored.found.label)[scored.order]
    by_key = scored.order[np.argsort(keys, kind="stable")]
    edges = np.cumsum([0, *np.bincount(keys, minlength=_keys(names))])
    alphabetical = np.argsort(CLASSES)
    scores = []
    for number, name in enumerate(names):
        present = [key for key in (number * len(CLASSES) + alphabetical).tolist() if positives[key]]
        aps = [
            _scene_ap(scored.matches[distance][by_key[edges[key] : edges[key + 1]]] >= 0, int(positives[key]))
            for key in present
            for distance in _DISTANCES
        ]
        mean = sum(aps) / len(aps) if aps else None
        boxes = positives[number * len(CLASSES) : (number + 1) * len(CLASSES)].sum()
        scores.append(SceneScore(name, mean, int(boxes), int((scene == number).sum())))
    return scores


def _keys(scenes: list[str]) -> int:
    """How many pairs of a scene and a class there are."""
    return len(scenes) * len(CLASSES)


def _scene_ap(hit: Bools, positives: int) -> float:
    """Average precision of a class's predictions [P], the best first, of which some hit."""
    if not hit.any():
        return 0.0
    recall, precision = _precision(hit, positives)
    return _area(np.interp(np.linspace(0, 1, ELEMENTS), recall, precision, right=0))
