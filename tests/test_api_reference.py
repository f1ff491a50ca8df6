"""Every public name has a docstring, and the reference is built from them."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import slimadam

MODULES = ["slimadam", *(module.name for module in pkgutil.walk_packages(slimadam.__path__, "slimadam."))]


@pytest.mark.parametrize(
    "name", [name for name in MODULES if not name.endswith("__main__") and ".step_" not in name]
)  # shared libraries have the endings of modules
def test_every_public_name_has_a_docstring(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    for label, member in vars(module).items():
        if label.startswith("_") or getattr(member, "__module__", None) != name:
            continue
        if inspect.isfunction(member) or inspect.isclass(member):
            assert member.__doc__, f"{name}.{label}"
        if inspect.isclass(member):
            for method, value in vars(member).items():
                if not method.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                    assert inspect.getdoc(getattr(member, method)), f"{name}.{label}.{method}"


def test_public_names_are_exported_and_documented() -> None:
    for name in slimadam.__all__:
        assert getattr(slimadam, name).__doc__, name
    assert sorted(slimadam.__all__) == slimadam.__all__


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_reference_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pdoc", "--docformat", "google", "--output-directory", str(tmp_path), "slimadam"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "slimadam.html").read_text(encoding="utf-8")
    for name in slimadam.__all__:
        assert f'id="{name}"' in page, name
