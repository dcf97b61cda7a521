"""Params and contexts of stages that deal with segmenters, on the city of `untrained.make_root`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from config.graph import StageSpec
from config.nested import merge
from config.params import Params
from data.store import Store
from models.detectors.segmenter import build_segmenter
from results.tracking.runs import NullTracker
from stages import extract
from stages.context import StageContext, Stop
from stages.inputs.segmenters import segmenter_config
from stages.inputs.weights import save_detector
from tests.models.test_segmenter import small_model
from tests.params_files import read_params
from tests.stages.untrained import make_root

ROOT = Path(__file__).resolve().parents[2]
SIZE = (32, 64)
INSTANCES = "outputs/city/instances"
TRAIN = {"epochs": 1, "batch_size": 4, "lr": 1e-3, "workers": 0}
OUTS = {
    "segmenter": ("outputs/teachers/instance",),
    "predict_segmenter": ("outputs/predictions/instance",),
    "evaluate_segmenter": ("outputs/evaluations/instance", "reports/metrics/instance.json"),
    "extract": ("outputs/stores/instance", "reports/stores/instance.json"),
}


def values(**changes: Any) -> dict[str, Any]:
    """The project's parameters with one small segmenter, one store of it, and no variants."""
    raw = read_params(ROOT)
    raw["segmenters"] = {"instance": {"image": list(SIZE), "model": small_model(), "train": TRAIN}}
    taps = {"inst2d": {"serve": "cached-exact"}}
    raw["stores"] = {"instance": {"teacher": "instance", "score_threshold": 0.0, "taps": taps}}
    raw["variants"] = {}
    raw["study"] |= {
        "segmenters": ["instance"],
        "stores": ["instance"],
        "variants": [],
        "featured": [],
        "baselines": [],
    }
    root = {"root": "outputs/city", "train": f"{INSTANCES}/train.json", "val": f"{INSTANCES}/val.json"}
    overlay = {
        "data": {"version": "v1.0-trainval", "splits": {"train": "train", "val": "val"}, "instances": root},
        "input": {"sweeps": 1, "image": {"size": list(SIZE)}},
        "store": {"shard_samples": 3, "calibration_samples": 4, "gap_samples": 2},
        "evaluate": {"pictures": 2, "batch_size": 4},
    }
    return merge(merge(raw, overlay), changes)


def parse(**changes: Any) -> Params:
    return Params.model_validate(values(**changes))


def context_of(root: Path, params: Params, stage: str, fingerprint: str = "f") -> StageContext:
    scratch = root / f".scratch/{stage}-instance/{fingerprint}"
    scratch.mkdir(parents=True, exist_ok=True)
    spec = StageSpec(stage, "instance", "", {}, {}, OUTS[stage])
    return StageContext(stage, "instance", params, spec, root, scratch, NullTracker(), Stop(), 0)


def publish_untrained(root: Path, params: Params) -> Path:
    """A segmenter with random weights, published as `instance`. Its heads are loud, so that it finds something."""
    torch.manual_seed(0)
    config = segmenter_config(params.segmenters["instance"])
    segmenter = build_segmenter(config)
    for part in (segmenter.detector.roi_head.bbox_head.fc_cls, segmenter.detector.roi_head.mask_head.conv_logits):
        torch.nn.init.normal_(part.weight, std=1.0)
    folder = root / "outputs/teachers/instance"
    save_detector(folder, config, segmenter.state_dict())
    return folder


def root_with_segmenter(folder: Path, train_keyframes: int) -> Path:
    """A project with a tiny city, its index, a LiDAR teacher and a segmenter, both untrained."""
    root = make_root(folder, train_keyframes=train_keyframes)
    publish_untrained(root, parse())
    return root


def extracted(root: Path, params: Params, fingerprint: str = "f") -> Store:
    extract.run(context_of(root, params, "extract", fingerprint))
    return Store.open(root / "outputs/stores/instance")
