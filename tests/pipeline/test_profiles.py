"""Profiles change only what they set, and lead back to the same bytes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from base.errors import PipelineError
from config.composing import gathered
from config.files import LAID, load_params, parse_yaml, read_texts
from config.nested import flatten
from config.params import ParamsError
from config.profiles import ProfileError, apply_profile, available, lay_over
from config.studies import apply_study
from tests.params_files import contents
from tests.pipeline.project import ROOT

BASE = """\
# head
size: 8                       # a comment
nested: {one: 1, two: [1, 2]}  # beside a flow dict
shared: &shared {cell: 0.5}   # metres
model:
  type: A                     # kept
  depth: 3
other:
  grid: *shared
  text: "a # b"               # not a comment inside
last: 1
"""


def laid(text: str, overlay: str) -> str:
    """The text of the one file params.yaml after an overlay."""
    return lay_over({"params.yaml": text}, overlay, "x")["params.yaml"]


@pytest.mark.parametrize("name", available(ROOT))
def test_demo_restores_what_any_profile_changed(folder: Path, name: str) -> None:
    before = contents(folder)
    params = apply_profile(name, folder)
    assert params.profile == name
    assert load_params(folder) == params
    apply_profile("demo", folder)
    assert contents(folder) == before


def test_smoke_keeps_comments_and_everything_it_does_not_set(folder: Path) -> None:
    before = "".join(read_texts(folder).values())
    apply_profile("smoke", folder)
    after = "".join(read_texts(folder).values())
    comments = [line.partition("#")[2] for line in before.splitlines() if "#" in line]
    assert [line.partition("#")[2] for line in after.splitlines() if "#" in line] == comments
    changed = sum(one != two for one, two in zip(before.splitlines(), after.splitlines(), strict=True))
    assert 5 < changed < 50


def test_values_anchors_and_comments() -> None:
    overlay = "size: 1000\nnested: {two: [3]}\nshared: {cell: 0.25}\nother: {text: 'c # d'}\n"
    result = laid(BASE, overlay)
    loaded = YAML(typ="safe").load(result)
    assert loaded["size"] == 1000
    assert loaded["nested"] == {"one": 1, "two": [3]}
    assert loaded["other"] == {"grid": {"cell": 0.25}, "text": "c # d"}
    assert "size: 1000                    # a comment\n" in result
    assert "shared: &shared {cell: 0.25}  # metres\n" in result
    back = 'size: 8\nnested: {two: [1, 2]}\nshared: {cell: 0.5}\nother: {text: "a # b"}\n'
    assert laid(result, back) == BASE


def test_replacing_a_dict_whole() -> None:
    result = laid(BASE, "model: !replace {type: B, width: 4}\n")
    assert YAML(typ="safe").load(result)["model"] == {"type": "B", "width": 4}
    block = laid(result, "model: !replace\n  type: A                     # kept\n  depth: 3\n")
    assert block == BASE


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ("sizes: 1\n", r"x: sizes is not in params.yaml; keys there: size, nested"),
        ("model: {width: 4}\n", r"x: model.width is not in params.yaml; keys there: type, depth"),
        ("other: {grid: {cell: 1}}\n", r"x: other.grid is an alias \(\*shared\)"),
        ("size: [1\n", "x is not valid YAML"),
    ],
)
def test_what_does_not_fit_is_named(overlay: str, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        laid(BASE, overlay)


def test_a_profile_that_breaks_the_schema_changes_nothing(folder: Path) -> None:
    before = contents(folder)
    (folder / "profiles" / "bad.yaml").write_text(
        "seed: 3\ninput: {frames: 7}\nstores: {lidar: {score_threshold: 0.7}}\n"
    )
    message = r"profile bad: the parameters are not valid:\n  params\.yaml: input\.frames: 7"
    with pytest.raises(ProfileError, match=message):
        apply_profile("bad", folder)
    with pytest.raises(ProfileError, match=r"profile 'smog' is unknown; allowed: .*smoke"):
        apply_profile("smog", folder)
    assert contents(folder) == before
    assert sorted(path.name for path in folder.iterdir()) == ["params", "params.yaml", "profiles"]


@pytest.mark.parametrize("name", [name for name in available(ROOT) if not name.startswith(("demo", "nuscenes"))])
def test_a_profile_says_only_what_differs(folder: Path, name: str) -> None:
    """From `demo`. Those of the papers say all that a paper does, whatever is right for a city."""
    whole, wrong = gathered({file: parse_yaml(text, file) for file, text in read_texts(folder).items()})
    assert wrong == []
    before, own = flatten(whole), flatten(parse_yaml((folder / f"profiles/{name}.yaml").read_text(), name))
    assert [key for key, value in own.items() if before.get(key, ...) == value] == []


def test_values_go_into_the_files_that_have_their_keys(folder: Path) -> None:
    """Of terms and variants each into that of its paper; what no file has is named with the files that might."""
    texts = read_texts(folder)
    overlay = "seed: 4\nterms: {xfd: {weight: 7.0}, cmd: {weight: 8.0}}\nvariants: {joint-alone: {terms: [xfd]}}\n"
    changed = lay_over(texts, overlay, "x")
    files = {"params.yaml", *(f"params/arms/{name}.yaml" for name in ("x3kd", "simdistill", "combined"))}
    assert {file for file, text in changed.items() if text != texts[file]} == files
    with pytest.raises(ProfileError, match=r"x: terms.xfdd is not in params/arms/simdistill.yaml or params/arms/"):
        lay_over(texts, "terms: {xfdd: {weight: 1.0}}\n", "x")


def test_second_steps_are_replaced_whole(folder: Path) -> None:
    text = "study: {fusions: %s}\n"
    other = laid(laid((folder / "params.yaml").read_text(), text % "{}"), text % "{two: {lidar: a, camera: b}}")
    assert YAML(typ="safe").load(other)["study"]["fusions"] == {"two": {"lidar": "a", "camera": "b"}}
    assert YAML(typ="safe").load(laid(other, text % "{}"))["study"]["fusions"] == {}


KILLED = """
import os, sys
from pathlib import Path
from config import files, profiles
moved = []
def replace(source, target):
    moved.append(target)
    if len(moved) > int(sys.argv[1]):
        os._exit(9)
    os.rename(source, target)
files.os.replace = replace
if sys.argv[1] == "-1":
    files.os.rename = lambda *names: os._exit(9)
profiles.apply_profile("nuscenes-simdistill", Path.cwd())
"""


@pytest.mark.parametrize("moves", [-1, 0, 1, 3])
def test_a_profile_is_laid_over_all_files_or_none(folder: Path, moves: int) -> None:
    """Also where its process is killed before the first, or between two of the files that it writes."""
    before = contents(folder)
    killed(folder, moves)
    if moves < 0:
        assert load_params(folder).profile == "demo"
        assert contents(folder) == before
        return
    params = load_params(folder)
    assert params.profile == "nuscenes-simdistill"
    assert not (folder / LAID).exists()
    assert apply_profile("nuscenes-simdistill", folder) == params
    apply_profile("demo", folder)
    assert contents(folder) == before


def killed(folder: Path, moves: int) -> None:
    """Lay a profile by a process that ends after so many of its files."""
    command, environment = [sys.executable, "-c", KILLED, str(moves)], {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr


def test_several_may_finish_what_a_killed_one_began(folder: Path) -> None:
    killed(folder, 1)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(load_params, [folder] * 8))
    assert all(params == found[0] for params in found)
    assert found[0].profile == "nuscenes-simdistill"


def test_what_a_person_edited_since_is_left(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    killed(folder, 0)
    text = (folder / "params.yaml").read_text().replace("seed: 0 ", "seed: 7 ", 1)
    (folder / "params.yaml").write_text(text)
    read_texts(folder)
    assert (folder / "params.yaml").read_text() == text
    assert "edited since, and left as they are: params.yaml: lay it again" in caplog.text
    assert apply_profile("demo", folder).profile == "demo"


def test_what_cannot_be_put_in_place_is_named_and_waits(folder: Path) -> None:
    killed(folder, 0)
    shutil.rmtree(folder / ".scratch")
    (folder / ".scratch").touch()  # where the lock would be
    with pytest.raises(ParamsError, match=r"was killed; what it left in .*params-laid cannot .*scratch: File exists"):
        load_params(folder)
    (folder / ".scratch").unlink()
    assert load_params(folder).profile == "nuscenes-simdistill"


@pytest.mark.parametrize("file", ["profiles/smoke.yaml", "studies/x3kd.yaml"])
def test_text_of_another_encoding_is_named(folder: Path, file: str) -> None:
    shutil.copytree(ROOT / "studies", folder / "studies")
    with (folder / file).open("ab") as opened:
        opened.write("# über\n".encode("latin-1"))
    before = contents(folder)
    with pytest.raises(PipelineError, match=rf"{file} is not UTF-8 text: .* at byte \d+"):
        apply_study("x3kd", folder) if file.startswith("studies") else apply_profile("smoke", folder)
    assert contents(folder) == before


def test_mode_links_and_ends_of_lines_stay(folder: Path) -> None:
    elsewhere = folder / "elsewhere.yaml"
    (folder / "params/stores.yaml").rename(elsewhere)
    (folder / "params/stores.yaml").symlink_to(elsewhere)
    (folder / "params.yaml").chmod(0o640)
    file = folder / "params/detectors.yaml"
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    before = contents(folder)
    apply_profile("nuscenes-simdistill", folder)
    assert (folder / "params/stores.yaml").is_symlink()
    assert (folder / "params.yaml").stat().st_mode & 0o777 == 0o640
    assert contents(folder)["params/stores.yaml"] != before["params/stores.yaml"]
    apply_profile("demo", folder)
    assert contents(folder) == before


def test_readers_see_all_of_a_profile_or_nothing(folder: Path) -> None:
    """While profiles are laid one after another, every reading is of one of them."""
    script = (
        "from pathlib import Path\nfrom config import profiles\n"
        "for name in ['nuscenes-simdistill', 'demo'] * 6:\n    profiles.apply_profile(name, Path.cwd())\n"
    )
    seen = set()
    with subprocess.Popen([sys.executable, "-c", script], cwd=folder, env={"PYTHONPATH": str(ROOT)}) as laying:
        while laying.poll() is None:
            texts = read_texts(folder)
            wide = "range: 54.0" in texts["params.yaml"]
            assert wide == ("halo: 20.4" in texts["params/stores.yaml"])
            seen.add(wide)
    assert laying.returncode == 0
    assert seen == {True, False}
