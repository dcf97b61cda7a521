"""Which class is taken for which: against a plain loop, and against the devkit's own counts of the truth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from nuscenes.eval.common.config import config_factory

from data.preparing.build import build_index
from data.reading.classes import CLASSES
from data.reading.index import Index
from data.scoring.confusion import DISTANCE, confusion, draw
from data.scoring.devkit import evaluate_submission, open_tables
from data.scoring.evaluation import CONFIG
from data.scoring.submission import SampleDetections, build_submission, write_submission

CAR, BUS = CLASSES.index("car"), CLASSES.index("bus")
LAST = len(CLASSES)


@pytest.fixture(scope="module")
def index(city: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("index")
    build_index(city, "v1.0-trainval", ("train", "val"), folder / "index")
    return Index.open(folder / "index")


def truth(index: Index, split: str = "val") -> dict[str, SampleDetections]:
    """The truth as if it were found, with scores from 0.5 to 1."""
    found = {}
    for token, row in zip(index.tokens(split), index.rows(split).tolist(), strict=True):
        boxes = index.annotations(row)
        valid, count = boxes.valid, int(boxes.valid.sum())
        found[token] = SampleDetections(
            np.nan_to_num(boxes.boxes[valid]), np.linspace(0.5, 1.0, count), boxes.labels[valid]
        )
    return found


def changed(found: dict[str, SampleDetections], seed: int) -> dict[str, SampleDetections]:
    """Three times as many boxes, moved by metres, a third of them with other classes."""
    rng, result = np.random.default_rng(seed), {}
    for token, one in found.items():
        boxes, labels = np.repeat(np.asarray(one.boxes), 3, axis=0), np.repeat(np.asarray(one.labels), 3)
        boxes[:, :2] += rng.normal(0, 1.2, (len(boxes), 2))
        other = rng.random(len(labels)) < 0.3
        labels[other] = rng.integers(0, LAST, other.sum())
        result[token] = SampleDetections(boxes, rng.random(len(labels)), labels)
    return result


def plain(index: Index, found: dict[str, SampleDetections], score: float) -> NDArray[np.int64]:
    """The same counts, box by box."""
    counts = np.zeros((LAST + 1, LAST + 1), dtype=np.int64)
    reach = [config_factory(CONFIG).class_range[name] for name in CLASSES]
    for token, row in zip(index.tokens("val"), index.rows("val").tolist(), strict=True):
        record, boxes, one = index.sample(row), index.annotations(row), found[token]
        ego = (np.linalg.inv(record.global_SE3_lidar) @ record.global_SE3_ego)[:2, 3]
        free = [
            (box[:2], label)
            for box, label, valid in zip(boxes.boxes, boxes.labels, boxes.valid, strict=True)
            if valid and np.hypot(*(box[:2] - ego)) < reach[label]
        ]
        for best in np.argsort(-np.asarray(one.scores), kind="stable"):
            centre, label = np.asarray(one.boxes)[best, :2], np.asarray(one.labels)[best]
            if np.asarray(one.scores)[best] < score or np.hypot(*(centre - ego)) >= reach[label]:
                continue
            distances = [np.hypot(*(centre - other)) for other, _ in free]
            if distances and min(distances) < DISTANCE:
                counts[free.pop(int(np.argmin(distances)))[1], label] += 1
            else:
                counts[LAST, label] += 1
        for _, label in free:
            counts[label, LAST] += 1
    return counts


@pytest.mark.parametrize("score", [0.0, 0.6])
def test_counts_are_those_of_a_plain_loop(index: Index, score: float) -> None:
    found = changed(truth(index), seed=int(score * 10))
    counts = confusion(found, index, "val", score).counts
    assert (counts == plain(index, found, score)).all()
    assert all((counts[:LAST, :LAST].sum(), counts[LAST].sum(), counts[:, LAST].sum()))
    assert counts[:LAST, :LAST].trace() < counts[:LAST, :LAST].sum()


def test_the_truth_is_taken_for_itself_and_is_all_that_the_devkit_counts(
    index: Index, city: Path, tmp_path: Path
) -> None:
    found = truth(index)
    counts = confusion(found, index, "val", 0.5).counts
    assert counts.trace() == counts.sum() > 0
    write_submission(build_submission(found, index, "val", {"camera"}), tmp_path / "results_nusc.json")
    devkit = evaluate_submission(open_tables(city, "v1.0-trainval"), tmp_path / "results_nusc.json", "val")
    assert dict(zip(CLASSES, counts.sum(axis=1).tolist(), strict=False)) == devkit.truth


def test_a_truth_is_taken_once_and_by_the_best(index: Index) -> None:
    token = index.tokens("val")[0]
    nothing = {name: SampleDetections(np.empty((0, 9)), [], []) for name in index.tokens("val")}
    truths = truth(index)[token]
    cars = np.asarray(truths.boxes)[np.asarray(truths.labels) == CAR]
    car = min(cars, key=lambda box: np.hypot(*box[:2]))
    twice = SampleDetections(np.stack([car, car]), [0.7, 0.9], [CAR, BUS])
    counts = confusion({**nothing, token: twice}, index, "val", 0.5).counts
    assert counts[CAR, BUS] == 1
    assert counts[LAST, CAR] == 1
    assert counts[:, CAR].sum() == 1
    none = confusion(nothing, index, "val", 0.5).counts
    assert none[:, :LAST].sum() == 0
    assert none[:, LAST].sum() == counts[:LAST].sum()


def test_the_table_is_drawn_and_kept(index: Index) -> None:
    found = confusion(changed(truth(index), seed=1), index, "val", 0.3)
    content = found.content
    assert content["truth"][-1] == "nothing"
    assert content["predicted"][-1] == "missed"
    assert content["counts"] == found.counts.tolist()
    shown = {text.get_text() for text in draw(found, "xod-0").axes[0].texts}
    assert {str(count) for count in found.counts.ravel() if count} == shown
