"""Names and import paths of earlier versions keep working."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import slimadam
from slimadam.utils.moved_modules import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_a_module_is_found_under_its_earlier_name(old: str) -> None:
    assert importlib.import_module(old) is importlib.import_module(MOVED[old])


def test_names_are_imported_from_earlier_modules() -> None:
    code = (
        "from slimadam.sharpness.rows import read_csv\n"
        "from slimadam.parts import Part\n"
        "import slimadam.warmup\n"
        "import slimadam\n"
        "assert slimadam.warmup.CatapultWarmup is slimadam.CatapultWarmup\n"
        "assert slimadam.parts.Split is slimadam.Split\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("module", ["slimadam", "slimadam.parts"])
def test_parts_are_now_called_a_split(module: str) -> None:
    with pytest.warns(DeprecationWarning, match=r"slimadam\.Parts is now called slimadam\.Split"):
        assert importlib.import_module(module).Parts is slimadam.Split


def test_a_module_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'slimadam\.sharpnes'"):
        importlib.import_module("slimadam.sharpnes")
