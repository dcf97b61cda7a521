"""What a variant's students are trained on: their file changes with what they read, and with nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from config.params import Params
from config.sections import VariantParams
from data.hashing import MissingFileError
from stages.needs import needs
from tests.pipeline.project import params_values

FILES = (
    "outputs/teachers/lidar/model.safetensors",
    "outputs/teachers/start/model.safetensors",
    "outputs/teachers/instance/model.safetensors",
    "outputs/stores/lidar/manifest.json",
    "outputs/stores/instance/manifest.json",
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def params(**changes: Any) -> Params:
    """The repository's, with values set by dotted key (`__` for the dots)."""
    return Params.model_validate(params_values(**changes))


def test_what_a_variant_reads_is_in_it(root: Path) -> None:
    content = needs(root, params(), "xod")
    assert list(content["files"]) == [
        "outputs/stores/lidar/manifest.json",
        "outputs/teachers/lidar",
        "outputs/teachers/start",
    ]
    assert list(content["stores"]) == ["lidar"]
    assert content["student"] == params().student("xod").model_dump(mode="json")
    assert [name for name, _ in content["terms"]] == ["xod_cls", "xod_reg"]
    assert content["truth"] == [True, None]


@pytest.mark.parametrize(
    ("changed", "variants"),
    [
        ("outputs/teachers/lidar/model.safetensors", {"xod"}),
        ("outputs/teachers/start/model.safetensors", {"xod", "xis", "baseline"}),  # all begin with it
        ("outputs/stores/lidar/manifest.json", {"xod"}),
        ("outputs/stores/instance/manifest.json", {"xis"}),
        ("outputs/teachers/another/model.safetensors", set()),
        ("outputs/stores/another/manifest.json", set()),
    ],
)
def test_it_changes_with_the_files_that_are_read(root: Path, changed: str, variants: set[str]) -> None:
    before = {name: needs(root, params(), name) for name in ("baseline", "xod", "xis")}
    (root / changed).parent.mkdir(parents=True, exist_ok=True)
    (root / changed).write_text("something else")
    assert {name for name, content in before.items() if needs(root, params(), name) != content} == variants


@pytest.mark.parametrize(
    ("changes", "variants"),
    [
        ({"students__camera__train__lr": 0.5}, {"baseline", "xod", "xis"}),
        ({"students__simulated__train__lr": 0.5}, set()),
        ({"stores__lidar__score_threshold": 0.5}, {"xod"}),
        ({"stores__instance__score_threshold": 0.5}, {"xis"}),
        ({"store__calibration_samples": 3}, {"baseline", "xod", "xis"}),
        ({"study__teachers": ["lidar", "start", "small"]}, set()),
        ({"variants__xod__terms__xod_cls__weight": 0.5}, {"xod"}),
        ({"terms__xod_cls__weight": 0.5}, set()),  # what a variant names is in the variant here
        ({"variants__xod__truth": "train[::4]"}, {"xod"}),
        ({"variants__xod__row": "A7"}, set()),
    ],
)
def test_it_changes_with_the_values_that_are_used(root: Path, changes: dict[str, Any], variants: set[str]) -> None:
    changed = params(**changes)
    names = ("baseline", "xod", "xis")
    assert {name for name in names if needs(root, changed, name) != needs(root, params(), name)} == variants


def test_every_entry_of_a_variant_is_in_it_but_its_row(root: Path) -> None:
    """What is not would train nothing anew when it changes."""
    few = {"variants__xod__truth": "train[::4]"}
    changes = {
        "student": "radar",
        "terms": {},
        "model": {"depth_loss_weight": 1.0},
        "train": {"lr": 0.5},
        "start": {"teacher": "start", "only": ["images"]},
        "truth": "train[::2]",
        "truth_share": 0.5,
    }
    assert changes.keys() | {"row"} == VariantParams.model_fields.keys()
    before = needs(root, params(**few), "xod")
    for name, value in changes.items():
        changed = params(**few | {f"variants__xod__{name}": value})
        assert needs(root, changed, "xod") != before, name


def test_missing_weights_are_named(root: Path) -> None:
    (root / FILES[1]).unlink()
    (root / FILES[1]).parent.rmdir()
    with pytest.raises(MissingFileError, match=r"outputs/teachers/start does not exist"):
        needs(root, params(), "baseline")
