"""Studies set the same parameters whatever was laid over it before, and lead back to the same bytes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from config.files import load_params
from config.graph import graph, select
from config.profiles import ProfileError, apply_profile
from config.studies import StudyError, apply_study, available, read_study
from tests.params_files import contents
from tests.pipeline.project import ROOT

STUDY = """\
about: one line
profile: smoke
params:
  # A comment.
  teachers:
    lidar:
      train:
        epochs: 7
        ema_decay: 0.5  # another
  input: {image: {size: [96, 320]}}
study: {variants: [baseline,
  xfd], baselines: [], featured: [], seeds: [3]}
"""


@pytest.fixture
def folder(folder: Path) -> Path:
    shutil.copytree(ROOT / "studies", folder / "studies")
    (folder / "studies/made.yaml").write_text(STUDY)
    return folder


@pytest.mark.parametrize("name", available(ROOT))
def test_demo_restores_what_a_study_changed(folder: Path, name: str) -> None:
    before = contents(folder)
    params = apply_study(name, folder)
    study = read_study(name, ROOT)
    assert params.profile == study.profile
    assert params.study.model_dump(include=set(study.study)) == study.study
    assert load_params(folder) == params
    apply_profile("demo", folder)
    assert contents(folder) == before


def test_a_study_is_the_same_whatever_was_there_before(folder: Path) -> None:
    def laid(name: str) -> dict[str, bytes]:
        apply_study(name, folder)
        return contents(folder)

    names = available(folder)
    first = {name: laid(name) for name in names}
    assert len({tuple(texts.values()) for texts in first.values()}) == len(names)
    apply_profile("real", folder)
    for name in reversed(names):
        assert laid(name) == first[name], name


def test_a_study_sets_what_it_says_over_its_profile_or_another(folder: Path) -> None:
    apply_profile("smoke", folder)
    smoke = load_params(folder)
    params = apply_study("made", folder)
    assert (params.profile, params.data.version) == ("smoke", smoke.data.version)
    assert (params.teachers["lidar"].train.epochs, params.teachers["lidar"].train.ema_decay) == (7, 0.5)
    assert params.teachers["lidar"].train.batch_size == smoke.teachers["lidar"].train.batch_size
    assert params.input.image.size == (96, 320)
    assert (params.study.variants, params.study.seeds) == (["baseline", "xfd"], [3])
    assert params.study.stores == smoke.study.stores
    params = apply_study("made", folder, "demo")
    assert (params.profile, params.data.version) == ("demo", "v1.0-trainval")
    assert params.teachers["lidar"].train.epochs == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("about: one line\n", ""), r"studies/made.yaml: about: field required; a study has the keys about, profile"),
        (("about:", "of: x\nabout:"), r"of: extra inputs are not permitted"),
        (("seeds: [3]", "seed: [3]"), r"studies/made.yaml: study.seed is not in params.yaml; keys there: name, "),
        (("  input:", "  inputs:"), r"studies/made.yaml: inputs is not in params.yaml or params/"),
        (
            ("xfd]", "xfdd]"),
            r"study made: the parameters are not valid:\n  params.yaml: study.variants: 'xfdd' is unknown",
        ),
        (("profile: smoke", "profile: huge"), r"profile 'huge' is unknown; allowed: .*demo"),
        (("profile: smoke", "profile: [smoke"), r"studies/made.yaml is not valid YAML"),
    ],
)
def test_a_wrong_study_is_named_and_changes_nothing(folder: Path, change: tuple[str, str], message: str) -> None:
    before = contents(folder)
    assert change[0] in STUDY
    (folder / "studies/made.yaml").write_text(STUDY.replace(*change))
    with pytest.raises((StudyError, ProfileError), match=message):
        apply_study("made", folder)
    assert contents(folder) == before


def test_an_unknown_study_is_named(folder: Path) -> None:
    with pytest.raises(StudyError) as error:
        apply_study("x4kd", folder)
    assert str(error.value) == f"study 'x4kd' is unknown; allowed: {', '.join(sorted(['made', *available(ROOT)]))}"


def test_the_documented_row_across_papers_is_four_lines_and_plans(folder: Path) -> None:
    text = (ROOT / "docs/studies.md").read_text()
    block = re.search(r"^## A row of your own$.*?^```yaml\n(.*?)^```$", text, re.M | re.S)
    assert block is not None
    row = block[1]
    assert row.count("\n") == 4
    name = row.strip().partition(":")[0]
    file = folder / "params/arms/combined.yaml"
    assert name not in file.read_text()
    file.write_text(file.read_text() + row)
    combined = folder / "studies/combined.yaml"
    combined.write_text(combined.read_text().replace("joint-skd, joint]", f"joint-skd, joint, {name}]"))
    params = apply_study("combined", folder)
    assert params.study.variants[-1] == name
    teachers = {term: settings.teacher for term, settings in params.variants[name].terms.items()}
    assert teachers == {
        "xfd": "lidar.bev_lift",
        "mmdf": "fusion-online.bev_fused",
        "skd_sp": "fusion-online.bev_view",
    }
    assert params.student(name).train.epochs == 3
    assert params.student(name).model == params.student("simdistill").model
    shutil.copy(ROOT / "dvc.yaml", folder)
    shutil.copytree(ROOT / ".dvc", folder / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    nodes = graph(folder)
    assert {"extract@lidar", "fusion@fusion", "teacher@start"} <= select(nodes, [f"distill@{name}-0"]).keys()
    assert f"evaluate@{name}-0" in nodes["report"].upstream


def test_the_command_lists_studies_and_lays_one_over(folder: Path) -> None:
    def study(*arguments: str) -> str:
        command = [sys.executable, "-m", "pipeline", "study", *arguments]
        environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout

    (folder / "dvc.yaml").write_text("stages: {}\n")
    assert "made: one line\n" in study()
    assert study("made") == "parameters: study made, profile smoke\n"
    assert load_params(folder).study.seeds == [3]
    assert study("made", "--profile", "demo") == "parameters: study made, profile demo\n"
