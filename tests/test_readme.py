"""What README.md says is there is there; tests/e2e/test_smoke.py runs its commands."""

from __future__ import annotations

import re

import pytest

from config import graph, profiles, studies
from config.files import parse, read_texts
from config.profiles import lay_over
from tests.readme import NOT_RUN, ROOT, TEXT, commands, runnable


@pytest.fixture(scope="module")
def demo() -> dict[str, graph.Node]:
    """The DAG of the parameters as they are in git: profile demo."""
    return graph.graph(ROOT)


def test_links_lead_to_files() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", TEXT) if not link.startswith("http")]
    assert len(links) > 20
    assert not [link for link in links if not (ROOT / link).exists()]


def test_commands_name_stages_of_the_demo(demo: dict[str, graph.Node]) -> None:
    text = "\n".join(commands())
    stages = re.findall(r"dvc repro (\S+)", text)
    students, stores = (re.findall(rf"{verb} ([\w-]+)", text) for verb in ("export", "cache look"))
    assert stages
    assert students
    assert stores
    named = {*stages, *(f"distill@{name}" for name in students), *(f"extract@{name}" for name in stores)}
    assert named <= demo.keys()


def test_studies_and_profiles_are_there_and_all_profiles_are_named() -> None:
    text = "\n".join(commands())
    assert set(re.findall(r"(?i)study=([\w-]+)", text)) <= set(studies.available(ROOT))
    assert set(re.findall(r"PROFILE=([\w-]+)", text)) <= set(profiles.available(ROOT))
    assert not [name for name in profiles.available(ROOT) if f"`{name}`" not in TEXT]


def test_what_is_not_run_is_said_once() -> None:
    assert not NOT_RUN.keys() - set(commands()), "take out what README.md no longer has"
    assert len(runnable()) >= 6


def test_the_example_of_a_variant_is_valid() -> None:
    example = re.search(r"```yaml\n(variants:.*?)```\n\n```yaml\n(study:.*?)```", TEXT, re.DOTALL)
    assert example
    variant, study = example.groups()
    texts = read_texts(ROOT) | {"params/arms/own.yaml": variant}
    params = parse(lay_over(texts, study, "README"))
    assert params.variants["xod-strong"].terms["xod_cls"].weight == 2.0
    assert params.study.variants == ["baseline", "xod-strong"]
