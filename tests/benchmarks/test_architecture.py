"""The page on the architecture: its picture is that of the source, and the files that it names exist."""

from __future__ import annotations

import re

import pytest
from PIL import Image

from benchmarks import ROOT
from benchmarks.readme import architecture
from tests.test_architecture import SOURCES, _package


def test_the_picture_shows_the_imports_of_the_source() -> None:
    with Image.open(architecture.PICTURE) as picture:
        drawn = picture.info["Description"]
    assert drawn == architecture.description(), "run python -m benchmarks.architecture"
    assert architecture.PACKAGES.keys() == {_package(file) for file in SOURCES}


def test_packages_stand_above_what_they_import_and_long_ways_round_are_left_out() -> None:
    graph = {"top": {"middle", "bottom"}, "middle": {"bottom"}, "bottom": set[str](), "other": set[str]()}
    assert architecture.floors(graph) == {"top": 2, "middle": 1, "bottom": 0, "other": 0}
    assert architecture.reduced(graph) == {**graph, "top": {"middle"}}
    with pytest.raises(RecursionError):
        architecture.floors({"one": {"other"}, "other": {"one"}})


def test_the_page_names_files_that_exist() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w./]+/[\w./]*)`", page))
    assert len(named) > 10
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
