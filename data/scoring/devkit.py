"""The nuScenes detection metrics, computed by the devkit's own DetectionEval: `evaluate.official: devkit`.

It reads all tables of the dataroot and makes an object of every box. data.scoring.nuscenes gives equal numbers without.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from nuscenes import NuScenes
from nuscenes.eval.common.config import config_factory
from nuscenes.eval.common.data_classes import EvalBoxes
from nuscenes.eval.detection.algo import accumulate, calc_ap
from nuscenes.eval.detection.evaluate import DetectionEval
from nuscenes.eval.detection.utils import category_to_detection_name
from nuscenes.utils.splits import get_scenes_of_split

from data.reading.classes import CLASSES
from data.reading.index import devkit_split, scenes_of_split
from data.scoring.evaluation import CONFIG, Evaluation, MetricsError, SceneScore, check_tokens, no_truth

_FAR_BOX: Final = {
    "translation": [1.0e6, 1.0e6, 0.0],
    "size": [1.0, 1.0, 1.0],
    "rotation": [1.0, 0.0, 0.0, 0.0],
    "velocity": [0.0, 0.0],
    "detection_name": "car",
    "detection_score": 0.0,
    "attribute_name": "",
}


def open_tables(dataroot: Path, version: str) -> NuScenes:
    """The devkit's tables of a dataroot. Raises MetricsError where a table is missing or is not JSON."""
    try:
        return NuScenes(version=version, dataroot=str(dataroot), verbose=False)
    except (AssertionError, OSError, json.JSONDecodeError) as error:
        raise MetricsError(
            f"the devkit cannot open version {version!r} in {dataroot}: {error}; check data.dataroot and data.version"
        ) from error


def split_tokens(nusc: NuScenes, split: str) -> list[str]:
    """Tokens of all keyframes of a devkit split or of a part of it, in the order of the sample table.

    Raises MetricsError where the split is unknown or the dataroot has none of its scenes.
    """
    try:
        whole, _ = devkit_split(split)
        official = set(get_scenes_of_split(whole, nusc))
    except ValueError as error:
        raise MetricsError(f"unknown split {split!r}: {error}") from error
    scenes = {scene["name"]: scene["token"] for scene in nusc.scene if scene["name"] in official}
    try:
        chosen = {scenes[name] for name in scenes_of_split(split, scenes)}
    except ValueError as error:
        raise MetricsError(
            f"version {nusc.version!r} in {nusc.dataroot}: {error} Check data.version too "
            "(v1.0-mini goes with mini_train and mini_val)"
        ) from error
    return [sample["token"] for sample in nusc.sample if sample["scene_token"] in chosen]


def evaluate_submission(nusc: NuScenes, submission: Path, split: str) -> Evaluation:
    """Score a submission file on a split, or on a part of it, with the devkit (detection_cvpr_2019).

    A submission without a single box scores 0: the devkit itself cannot read one, so it is given a box far out of
    every class's range, which its distance filter removes.

    Raises:
        MetricsError: tokens that do not fit the split, a split without truth, or the devkit's own refusal (more
            than 500 boxes in a sample, NaN in a field, a split of another version).
    """
    content = json.loads(submission.read_text())
    tokens = split_tokens(nusc, split)
    check_tokens(content["results"], tokens, split)
    _check_truth(nusc, tokens, split)
    if not any(content["results"].values()):
        content["results"][tokens[0]] = [{"sample_token": tokens[0], **_FAR_BOX}]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results_nusc.json"
        path.write_text(json.dumps(content))
        return _run_devkit(nusc, path, split, tokens)


class _SomeSamples:
    """The devkit's tables, of whose samples only some are listed; every record can still be looked up."""

    def __init__(self, nusc: NuScenes, tokens: Iterable[str]) -> None:
        self._nusc = nusc
        self.sample = [nusc.get("sample", token) for token in tokens]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._nusc, name)


def _run_devkit(nusc: NuScenes, path: Path, split: str, tokens: list[str]) -> Evaluation:
    config, tables = config_factory(CONFIG), _SomeSamples(nusc, tokens)
    whole, _ = devkit_split(split)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the devkit's progress bar cannot be turned off
            devkit = DetectionEval(tables, config, str(path), whole, output_dir=str(path.parent), verbose=False)
    except (AssertionError, ValueError) as error:
        raise MetricsError(f"the devkit refuses the submission for split {split!r}: {error}") from error
    metrics, details = devkit.evaluate()
    content = metrics.serialize()
    del content["eval_time"]
    return Evaluation(
        content,
        details.serialize(),
        _count(devkit.gt_boxes.all),
        _count(devkit.pred_boxes.all),
        len(devkit.sample_tokens),
        _scene_scores(nusc, devkit),
    )


def _scene_scores(nusc: NuScenes, devkit: DetectionEval) -> list[SceneScore]:
    """The devkit's AP on the boxes of each scene alone."""
    tokens: dict[str, list[str]] = {}
    for token in devkit.pred_boxes.sample_tokens:
        scene = nusc.get("scene", nusc.get("sample", token)["scene_token"])["name"]
        tokens.setdefault(scene, []).append(token)
    return [_scene_score(devkit, scene, tokens[scene]) for scene in sorted(tokens)]


def _scene_score(devkit: DetectionEval, scene: str, tokens: Sequence[str]) -> SceneScore:
    config, truth, found = devkit.cfg, _boxes_of(devkit.gt_boxes, tokens), _boxes_of(devkit.pred_boxes, tokens)
    aps = [
        calc_ap(
            accumulate(truth, found, name, config.dist_fcn_callable, distance), config.min_recall, config.min_precision
        )
        for name in sorted({box.detection_name for box in truth.all})
        for distance in config.dist_ths
    ]
    return SceneScore(scene, sum(aps) / len(aps) if aps else None, len(truth.all), len(tokens))


def _boxes_of(boxes: EvalBoxes, tokens: Sequence[str]) -> EvalBoxes:
    some = EvalBoxes()
    for token in tokens:
        some.add_boxes(token, boxes[token])
    return some


def _check_truth(nusc: NuScenes, tokens: list[str], split: str) -> None:
    annotations = (token for sample in tokens for token in nusc.get("sample", sample)["anns"])
    categories = (nusc.get("sample_annotation", token)["category_name"] for token in annotations)
    if not any(category_to_detection_name(name) for name in categories):
        raise no_truth(split)


def _count(boxes: Iterable[Any]) -> dict[str, int]:
    counts = Counter(box.detection_name for box in boxes)
    return {name: counts[name] for name in CLASSES}
