"""The vectorised nuScenes metrics beside the devkit: random and adversarial boxes, the city, the real keyframes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from nuscenes import NuScenes
from nuscenes.eval.common.config import config_factory
from nuscenes.eval.detection.constants import TP_METRICS
from pyquaternion import Quaternion

from data.preparing.build import build_index
from data.reading import flat_json
from data.reading.classes import ATTRIBUTES, CATEGORY_TO_CLASS, CLASSES
from data.reading.index import Index, IndexFormatError
from data.reading.truth import TRUTH_FILE, read_truth
from data.scoring import devkit, nuscenes, submitted
from data.scoring.evaluation import CONFIG, MEAN_ERRORS, SETTINGS, Evaluation, MetricsError, summary
from data.scoring.submission import SampleDetections, SubmissionError, build_submission, write_submission
from data.scoring.submitted import detections_of, read_submission
from tests.data.conftest import VERSION, DatarootMaker

SPLIT = "mini_val"
RACK = "static_object.bicycle_rack"
CATEGORY_OF = {label: category for category, label in CATEGORY_TO_CLASS.items()}
# Lattices, so that distances tie, are equal to a limit of matching, and lie at the edge of a range.
STEPS = st.integers(-10, 10).map(lambda step: step / 4)
SCORES = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.5, 0.5, 0.75, 1.0])
ANGLES = st.sampled_from([0.0, math.pi / 2, math.pi, -math.pi / 2, 0.3, 2.0])
SPEEDS = st.sampled_from([0.0, 1.0, -2.5, math.nan])
NAMES = st.sampled_from(["car", "car", "car", "pedestrian", "bicycle", "barrier", "traffic_cone", "trailer"])


@dataclass(frozen=True)
class Drawn:
    """A box of truth or of a submission, as an example has it."""

    sample: int
    name: str
    place: tuple[float, float]  # from the vehicle, metres
    size: tuple[float, float, float]
    angle: float
    speed: tuple[float, float]
    attribute: str
    score: float
    points: int


DRAWN = st.builds(
    Drawn,
    st.integers(0, 4),
    NAMES,
    st.one_of(
        st.tuples(STEPS, STEPS),
        st.sampled_from(
            [(50.0, 0.0), (0.0, 49.75), (30.0, 40.0), (24.0, 18.0), (0.0, -39.75), (29.75, 0.0), (60.0, 60.0)]
        ),
    ),
    st.tuples(*[st.sampled_from([0.5, 1.0, 2.0])] * 3),
    ANGLES,
    st.tuples(SPEEDS, SPEEDS),
    st.sampled_from(["", "vehicle.moving", "vehicle.parked", "cycle.with_rider"]),
    SCORES,
    st.sampled_from([0, 1, 1, 5]),
)
EXAMPLES = st.tuples(
    st.lists(DRAWN, min_size=1, max_size=25),
    st.lists(DRAWN, max_size=60),
    st.lists(st.tuples(st.integers(0, 4), st.tuples(STEPS, STEPS), ANGLES), max_size=3),
)
Example = tuple[list[Drawn], list[Drawn], list[tuple[int, tuple[float, float], float]]]


class Stage:
    """A dataroot of two scenes whose annotations are rewritten for each example."""

    def __init__(self, root: Path) -> None:
        self.maker = DatarootMaker(root, {"scene-0103": 3, "scene-0916": 2})
        self.maker.make()
        self.root, self.folder = root, root / VERSION
        self.samples = self.maker.tables["sample"]
        poses = {record["token"]: record["translation"] for record in self.maker.tables["ego_pose"]}
        lidar = next(record["token"] for record in self.maker.tables["sensor"] if record["channel"] == "LIDAR_TOP")
        sensor = {record["token"]: record["sensor_token"] for record in self.maker.tables["calibrated_sensor"]}
        self.ego = {
            record["sample_token"]: poses[record["ego_pose_token"]]
            for record in self.maker.tables["sample_data"]
            if record["is_key_frame"] and sensor[record["calibrated_sensor_token"]] == lidar
        }
        names = [*CATEGORY_OF.values(), RACK, "animal"]
        self.write("category", [{"token": name, "name": name, "description": ""} for name in names])
        self.write("attribute", [{"token": name, "name": name, "description": ""} for name in ATTRIBUTES if name])

    def write(self, table: str, records: list[dict[str, Any]]) -> None:
        (self.folder / f"{table}.json").write_text(json.dumps(records))

    def place(self, sample: int, place: tuple[float, float]) -> list[float]:
        x, y, _ = self.ego[self.samples[sample]["token"]]
        return [x + place[0], y + place[1], 1.0]

    def truth(self, boxes: list[Drawn], racks: list[tuple[int, tuple[float, float], float]]) -> None:
        """Every object is annotated once, but for those of speed: they have a neighbour half a second away."""
        records, instances = [], []

        def add(category: str, sample: int, **fields: Any) -> dict[str, Any]:
            token = f"box-{len(records):03d}"
            instances.append({"token": f"object-{token}", "category_token": category, "nbr_annotations": 1,
                              "first_annotation_token": token, "last_annotation_token": token})  # fmt: skip
            records.append(
                {"token": token, "sample_token": self.samples[sample]["token"], "instance_token": f"object-{token}",
                 "visibility_token": "1", "attribute_tokens": [], "num_radar_pts": 0, "prev": "", "next": "", **fields}
            )  # fmt: skip
            return records[-1]

        for box in boxes:
            place = self.place(box.sample, box.place)
            rotation = Quaternion(axis=[0, 0, 1], angle=box.angle).elements.tolist()
            record = add(
                CATEGORY_OF[box.name], box.sample, translation=place, size=list(box.size), rotation=rotation,
                attribute_tokens=[box.attribute] if box.attribute else [], num_lidar_pts=box.points,
            )  # fmt: skip
            if not math.isnan(box.speed[0]) and box.sample not in (2, 4):
                other = add(
                    "animal", box.sample + 1, translation=[place[0] + box.speed[0] / 2, place[1] + 0.5, 1.0],
                    size=[1, 1, 1], rotation=[1, 0, 0, 0], num_lidar_pts=1,
                )  # fmt: skip
                record["next"], other["prev"] = other["token"], record["token"]
        for sample, place, angle in racks:
            rotation = Quaternion(axis=[0, 0, 1], angle=angle + 0.1).elements.tolist()
            add(
                RACK,
                sample,
                translation=self.place(sample, place),
                size=[3.1, 1.7, 2.1],
                rotation=rotation,
                num_lidar_pts=1,
            )
        self.write("sample_annotation", records)
        self.write("instance", instances)

    def submission(self, boxes: list[Drawn], path: Path, *, points: bool = False) -> dict[str, Any]:
        """Keyframes from the last to the first, since the order of the file decides between equal scores."""
        results: dict[str, list[dict[str, Any]]] = {record["token"]: [] for record in reversed(self.samples)}
        for box in boxes:
            token = self.samples[box.sample]["token"]
            rotation = Quaternion(axis=[0.1, 0, 1], angle=box.angle).elements.tolist()
            results[token].append(
                {"sample_token": token, "translation": self.place(box.sample, box.place), "size": list(box.size),
                 "rotation": rotation, "velocity": list(box.speed), "detection_name": box.name,
                 "detection_score": box.score, "attribute_name": box.attribute}
                | ({"num_pts": box.points} if points else {})
            )  # fmt: skip
        content = {"meta": {"use_camera": True}, "results": results}
        path.write_text(json.dumps(content))
        return content

    def tables(self) -> NuScenes:
        return NuScenes(VERSION, str(self.root), verbose=False)

    def index(self, folder: Path) -> Index:
        build_index(self.root, VERSION, [SPLIT], folder)
        return Index.open(folder)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("stage"))


def differences(ours: Any, official: Any, path: str = "") -> list[str]:
    """Where two contents differ by more than 1e-12; NaN equals NaN."""
    if isinstance(official, dict):
        if ours.keys() != official.keys():
            return [f"{path}: {sorted(ours)} and {sorted(official)}"]
        return [text for key in official for text in differences(ours[key], official[key], f"{path}/{key}")]
    if isinstance(official, list) and official and isinstance(official[0], float):
        same = np.isclose(ours, official, rtol=0, atol=1e-12, equal_nan=True)
        return [] if same.all() else [f"{path}[{np.flatnonzero(~same)[0]}]"]
    if isinstance(official, float):
        same_number = math.isclose(ours, official, rel_tol=0, abs_tol=1e-12) or (
            math.isnan(ours) and math.isnan(official)
        )
        return [] if same_number else [f"{path}: {ours} and {official}"]
    return [] if ours == official else [f"{path}: {ours} and {official}"]


def content(evaluation: Evaluation) -> dict[str, Any]:
    return {**vars(evaluation), "scenes": {score.scene: vars(score) for score in evaluation.scenes}}


def both(stage: Stage, example: Example, folder: Path, *, points: bool = False) -> list[str]:
    truth, found, racks = example
    stage.truth(truth, racks)
    path = folder / "results.json"
    stage.submission(found, path, points=points)
    ours = nuscenes.evaluate_submission(stage.index(folder), read_submission(path), SPLIT)
    return differences(content(ours), content(devkit.evaluate_submission(stage.tables(), path, SPLIT)))


# Not shrunk: that takes minutes, as every example is a dataroot.
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(EXAMPLES, st.booleans())
def test_every_number_is_the_devkits(stage: Stage, tmp_path: Path, example: Example, points: bool) -> None:
    assert both(stage, example, tmp_path, points=points) == []


def box(name: str, place: tuple[float, float], sample: int = 0, **fields: Any) -> Drawn:
    plain = Drawn(sample, name, place, (1.0, 2.0, 1.0), 0.0, (1.0, 0.0), "", 0.5, 1)
    return replace(plain, **fields)


# Each rule of the metrics changes a number of this one.
RULED: Example = (
    [
        box("car", (0, 0), size=(1.0, 1.0, 1.0), attribute="vehicle.moving"),
        box("car", (1, 0), size=(2.0, 2.0, 2.0), attribute="vehicle.parked"),
        box("car", (49.75, 0), 1, attribute="vehicle.moving"),
        box("car", (50.0, 0), 1),
        box("car", (0, 20), 3, attribute=""),
        box("car", (10, 0), 2, points=0),
        box("car", (-10, 0), 2),
        box("car", (0, -5), 4),
        box("bicycle", (4, 4), 0),
        box("bicycle", (-4, 4), 0),
        box("barrier", (3, 3), 1),
        box("traffic_cone", (5, 5), 1),
        box("pedestrian", (4, 2), 1, size=(0.5, 0.5, 2.0)),
        box("pedestrian", (2, 2), 1),
    ],
    [
        box("car", (0.5, 0), attribute="vehicle.moving", score=0.75),
        box("car", (50.0, 0.25), 1, score=1.0),
        box("car", (49.75, 0.25), 1, attribute="vehicle.parked", score=0.25, speed=(math.nan, 1.0)),
        box("car", (0, 20.25), 3, score=0.5, attribute="vehicle.parked"),
        box("car", (9.75, 0), 2, score=1.0),
        box("car", (-9.5, 0), 2, score=0.5),
        box("car", (30, 0), 3, score=0.5),
        box("car", (0, -5), 4, score=0.1),
        box("bicycle", (4, 4.25), 0, score=0.75),
        box("bicycle", (-4, 4.25), 0, score=0.5),
        box("barrier", (3, 3), 1, angle=math.pi),
        box("traffic_cone", (5, 5), 1, speed=(0.0, 3.0), angle=2.0),
        box("pedestrian", (2.75, 2), 1, score=1.0),
        box("pedestrian", (2.5, 2), 1, score=0.75),
    ],
    [(0, (-4, 4), 0.0)],
)


def without_points(boxes: Any, truth: Any) -> Any:
    return COUNTED(replace(boxes, points=np.ones_like(boxes.points)), truth)


def limit_included(near: Any, limit: float, *rest: Any) -> Any:
    return TAKE_TURNS(near, np.nextafter(limit, math.inf), *rest)


def nothing_taken(near: Any, limit: float, group: Any, order: Any, truths: int) -> Any:
    """Every prediction takes the nearest box, free or not."""
    return TAKE_TURNS(near, limit, np.arange(len(group)), order, truths)


def plain_mean(values: Any) -> Any:
    return np.cumsum(np.nan_to_num(values)) / np.arange(1, len(values) + 1)


COUNTED, TAKE_TURNS = nuscenes._counted, nuscenes._take_turns
LEFT_OUT: dict[str, tuple[str, Any]] = {
    "the range of a class": ("_REACH", np.full(len(CLASSES), 1e9)),
    "points inside": ("_counted", without_points),
    "bicycle racks": ("_in_racks", lambda points, *_: np.zeros(len(points), dtype=bool)),
    "of equal scores the later": ("_best_first", lambda scores: np.argsort(-scores, kind="stable")),
    "the nearest": ("_nearest_first", lambda turn, rank, _, truth: np.lexsort((truth, rank, turn))),
    "of equal distances the first": (
        "_nearest_first",
        lambda turn, rank, distance, truth: np.lexsort((-truth, distance, rank, turn)),
    ),
    "nearer than the limit": ("_take_turns", limit_included),
    "a box is taken once": ("_take_turns", nothing_taken),
    "no front of barriers": ("_BARRIER", -1),
    "no errors of cones and barriers": ("_UNDEFINED", {}),
    "unknown values in means": ("_running_mean", plain_mean),
    "the least recall": ("_FIRST", 0),
}


def test_the_example_of_all_rules_is_scored_like_the_devkit(stage: Stage, tmp_path: Path) -> None:
    assert both(stage, RULED, tmp_path) == []


@pytest.mark.parametrize("rule", LEFT_OUT)
def test_a_rule_that_is_left_out_is_noticed(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    monkeypatch.setattr(nuscenes, *LEFT_OUT[rule])
    assert both(stage, RULED, tmp_path)


def test_the_settings_are_the_devkits() -> None:
    config = config_factory(CONFIG)
    assert config.serialize() == SETTINGS
    assert list(MEAN_ERRORS.values()) == TP_METRICS


def test_a_submission_without_boxes_scores_nothing(stage: Stage, tmp_path: Path) -> None:
    assert both(stage, (RULED[0], [], []), tmp_path) == []


def test_five_hundred_boxes_and_not_one_more(stage: Stage, tmp_path: Path) -> None:
    stage.truth(RULED[0], [])
    rng = np.random.default_rng(0)
    places, names = rng.integers(-20, 20, (500, 2)) / 4, rng.choice(["car", "pedestrian"], 500).tolist()
    scores = rng.choice([0.1, 0.5, 0.9], 500).tolist()
    many = [
        box(name, (float(x), float(y)), score=score) for name, (x, y), score in zip(names, places, scores, strict=True)
    ]
    path = tmp_path / "many.json"
    stage.submission(many, path)
    index = stage.index(tmp_path)
    ours = nuscenes.evaluate_submission(index, read_submission(path), SPLIT)
    assert differences(content(ours), content(devkit.evaluate_submission(stage.tables(), path, SPLIT))) == []
    stage.submission([*many, many[0]], path)
    with pytest.raises(MetricsError, match=r"500 boxes per sample.*sample-\d+ has 501, and 1 samples"):
        nuscenes.evaluate_submission(index, read_submission(path), SPLIT)


def test_what_the_devkit_refuses_is_refused(stage: Stage, tmp_path: Path) -> None:
    stage.truth(RULED[0], [])
    index, path = stage.index(tmp_path), tmp_path / "results.json"
    whole = stage.submission(RULED[1], path)["results"]
    first = next(token for token, boxes in whole.items() if boxes)

    def refused(error: type[Exception], match: str, results: Any) -> None:
        path.write_text(json.dumps({"results": results, "meta": {}}))
        with pytest.raises(error, match=match):
            nuscenes.evaluate_submission(index, read_submission(path), SPLIT)

    def changed(**fields: Any) -> Any:
        entry = {name: value for name, value in (whole[first][0] | fields).items() if value is not ...}
        return {**whole, first: [entry, *whole[first][1:]]}

    refused(MetricsError, "1 missing, 0 of other splits; first missing", {t: b for t, b in whole.items() if t != first})
    refused(MetricsError, "0 missing, 1 of other splits; first foreign zzz", {**whole, "zzz": []})
    for field in ("translation", "velocity", "attribute_name", "detection_score", "sample_token"):
        refused(SubmissionError, rf"box 0 of sample {first} lacks {field} \(1 such", changed(**{field: ...}))
    refused(SubmissionError, "has a size of other than 3 numbers", changed(size=[1.0, 2.0]))
    refused(SubmissionError, "has null in its rotation", changed(rotation=[1.0, None, 0.0, 0.0]))
    refused(SubmissionError, "has a translation that is not finite", changed(translation=[math.nan, 0.0, 0.0]))
    refused(SubmissionError, "has a velocity that is not finite", changed(velocity=[math.inf, 0.0]))
    refused(SubmissionError, "has a detection_score that is not finite", changed(detection_score=math.nan))
    refused(SubmissionError, "has a detection_score below 0", changed(detection_score=-1.0))
    refused(SubmissionError, "has an unknown detection_name", changed(detection_name="tram"))
    refused(SubmissionError, "has an unknown attribute_name", changed(attribute_name="flying"))
    refused(SubmissionError, "has the sample_token of another one", changed(sample_token="other"))
    refused(SubmissionError, "is no submission", changed(detection_score="high"))
    refused(SubmissionError, "is no submission", {**whole, first: [1.0]})
    flat = {token: [entry | {"size": [0.0, 1.0, 1.0]} for entry in boxes] for token, boxes in whole.items()}
    refused(MetricsError, "a matched box has a size of 0", flat)
    deep, huge = "[" * 100_000, '{"results": {"a": [{"sample_token": "a", "num_pts": 1%s}]}}' % ("0" * 400)
    for text in ("", "{}", "[]", '{"results": []}', '{"results": {"a": [', "no", "\xff", deep, huge):
        path.write_text(text)
        with pytest.raises(SubmissionError, match="is no submission"):
            nuscenes.evaluate_submission(index, read_submission(path), SPLIT)
    with pytest.raises(FileNotFoundError):
        nuscenes.evaluate_submission(index, read_submission(tmp_path / "nowhere.json"), SPLIT)


def test_the_box_that_is_wrong_is_named_wherever_a_block_ends(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat_json, "BLOCK", 300)
    content, path = stage.submission(RULED[1], tmp_path / "results.json"), tmp_path / "results.json"
    token, boxes = max(content["results"].items(), key=lambda entry: len(entry[1]))
    boxes[-1]["detection_name"] = "tram"
    path.write_text(json.dumps(content))
    with pytest.raises(SubmissionError, match=f"box {len(boxes) - 1} of sample {token} has an unknown detection_name"):
        read_submission(path)


def test_truth_that_the_devkit_refuses_is_refused(stage: Stage, tmp_path: Path) -> None:
    stage.truth(RULED[0][:2], [])
    stage.submission([], tmp_path / "none.json")
    path = stage.folder / "sample_annotation.json"
    records = json.loads(path.read_text())
    records[2]["attribute_tokens"] = ["vehicle.moving", "vehicle.parked"]
    path.write_text(json.dumps(records))
    with pytest.raises(MetricsError, match=r"1 annotations have more than one attribute.*such as box-002"):
        nuscenes.evaluate_submission(stage.index(tmp_path), read_submission(tmp_path / "none.json"), SPLIT)
    stage.truth([], RULED[2])
    with pytest.raises(MetricsError, match="has no annotated box of a detection class"):
        nuscenes.evaluate_submission(stage.index(tmp_path), read_submission(tmp_path / "none.json"), SPLIT)


WRITERS: dict[str, Callable[[Any], str]] = {
    "compact": lambda content: json.dumps(content, separators=(",", ":")),
    "usual": json.dumps,
    "indented": lambda content: json.dumps(content, indent=1).replace("\n", "\r\n"),
    "meta last": lambda content: json.dumps({"results": content["results"], "meta": content["meta"]}),
    "results in meta": lambda content: json.dumps({"meta": {"results": {}}, "results": content["results"]}),
    "braces in a text": lambda content: json.dumps({"results": content["results"], "meta": {"by": "{us}, {them}"}}),
    "not a number": lambda content: json.dumps(content).replace('"velocity": [1.0', '"velocity": [NaN'),
    "a token twice": lambda content: json.dumps(content).replace('"results": {', '"results": {"sample-00050": [], '),
}
FAST = {"compact", "usual", "indented", "meta last"}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("block", [300, 1 << 25])
def test_a_submission_is_read_like_json(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, block: int
) -> None:
    """Also where a block ends in the middle; what cannot be read fast is read all the same."""
    monkeypatch.setattr(flat_json, "BLOCK", block)
    path = tmp_path / "results.json"
    content = stage.submission(RULED[1], path)
    entry = next(boxes for boxes in content["results"].values() if boxes)[0]
    entry |= {"translation": [1, 2, 1e-3], "tracking_id": "a", "size": [0.1 + 0.2, 1e22, 3]}
    path.write_text(WRITERS[writer](content))
    if writer in FAST:
        monkeypatch.setattr(submitted, "_plain", None)
    read = read_submission(path)
    plain = json.loads(path.read_text())["results"]
    assert read.tokens == list(plain)
    entries = [entry for boxes in plain.values() for entry in boxes]
    assert [read.tokens[sample] for sample in read.boxes.sample] == [entry["sample_token"] for entry in entries]
    for name in ("translation", "size", "rotation", "velocity"):
        np.testing.assert_array_equal(getattr(read.boxes, name), [entry[name] for entry in entries])
    assert [CLASSES[label] for label in read.boxes.label] == [entry["detection_name"] for entry in entries]
    assert [ATTRIBUTES[label] for label in read.boxes.attribute] == [entry["attribute_name"] for entry in entries]
    assert read.scores.tolist() == [entry["detection_score"] for entry in entries]


def noisy(index: Index, split: str, seed: int) -> dict[str, SampleDetections]:
    """The truth three times, moved, resized, turned, with scores of two digits, so that some are equal."""
    rng, found = np.random.default_rng(seed), {}
    for token, row in zip(index.tokens(split), index.rows(split).tolist(), strict=True):
        truth = index.annotations(row)
        boxes, labels = np.repeat(truth.boxes, 3, axis=0), np.repeat(truth.labels, 3)
        boxes[:, :2] += rng.normal(0, 1, boxes[:, :2].shape)
        boxes[:, 3:6] *= np.exp(rng.normal(0, 0.2, (len(boxes), 3)))
        boxes[:, 6] += rng.normal(0, 0.5, len(boxes))
        boxes[:, 7:9] = np.nan_to_num(boxes[:, 7:9]) + rng.normal(0, 1, boxes[:, 7:9].shape)
        found[token] = SampleDetections(boxes, rng.uniform(0, 1, len(boxes)).round(2), labels)
    return found


@pytest.mark.parametrize(
    ("data", "tables", "split"),
    [
        ("city_index", "city_devkit", "val"),
        ("city_index", "city_devkit", "train[:1]"),
        ("real_index", "real_devkit", "mini_train"),
        ("real_index", "real_devkit", "mini_val"),
        ("made_index", "devkit", "mini_train"),
    ],
)
def test_noisy_truth_is_scored_like_the_devkit(
    data: str, tables: str, split: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    index, path = request.getfixturevalue(data), tmp_path / "noisy.json"
    found = noisy(index, split, 0)
    write_submission(build_submission(found, index, split, {"camera"}), path)
    ours = nuscenes.evaluate_submission(index, read_submission(path), split)
    official = devkit.evaluate_submission(request.getfixturevalue(tables), path, split)
    assert differences(content(ours), content(official)) == []
    assert summary(ours) == summary(official)
    assert 0 < summary(ours)["mAP_present"] < 1
    read = detections_of(read_submission(path), index, index.rows(split).tolist())
    assert read.keys() == found.keys()
    for token, one in read.items():
        best = np.argsort(-np.asarray(found[token].scores), kind="stable")[:500]
        wrapped = [np.asarray(boxes)[:, [0, 1, 2, 3, 4, 5, 7, 8]] for boxes in (one.boxes, found[token].boxes)]
        np.testing.assert_allclose(wrapped[0], wrapped[1][best], atol=1e-6)
        np.testing.assert_array_equal(one.labels, np.asarray(found[token].labels)[best])


def test_keyframes_that_the_index_left_out_are_scored(stage: Stage, tmp_path: Path) -> None:
    """Their truth counts, as the devkit demands an entry for each of them."""
    stage.truth(RULED[0], [])
    whole = stage.index(tmp_path / "whole")
    file = stage.root / whole.sample(0).cameras.files[0]
    content_of_file = file.read_bytes()
    file.write_bytes(b"")
    try:
        build_index(stage.root, VERSION, [SPLIT], tmp_path / "part", skip_broken=1)
    finally:
        file.write_bytes(content_of_file)
    part = Index.open(tmp_path / "part")
    path = tmp_path / "results.json"
    found = {token: SampleDetections(np.zeros((0, 9)), np.zeros(0), np.zeros(0)) for token in part.tokens(SPLIT)}
    write_submission(build_submission(found, part, SPLIT, {"camera"}), path)
    ours = nuscenes.evaluate_submission(part, read_submission(path), SPLIT)
    assert len(part) == len(whole) - 1
    assert differences(content(ours), content(devkit.evaluate_submission(stage.tables(), path, SPLIT))) == []


def test_a_missing_or_foreign_truth_is_named(stage: Stage, tmp_path: Path) -> None:
    stage.truth(RULED[0], [])
    stage.index(tmp_path)
    (tmp_path / TRUTH_FILE).write_bytes((tmp_path / "index.arrow").read_bytes())
    with pytest.raises(IndexFormatError, match=r"truth\.arrow has format 'bev-distillery index 3'.*prepare"):
        read_truth(tmp_path, ["scene-0103"])
    (tmp_path / TRUTH_FILE).write_bytes(b"truncated")
    with pytest.raises(IndexFormatError, match=r"truth\.arrow is not a whole truth"):
        read_truth(tmp_path, ["scene-0103"])
    (tmp_path / TRUTH_FILE).unlink()
    with pytest.raises(IndexFormatError, match=r"no truth at .*truth\.arrow: run the stage `prepare`"):
        read_truth(tmp_path, ["scene-0103"])
