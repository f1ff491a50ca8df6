"""The command lines of benchmarks that take nothing but a folder: asking for help runs nothing."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from benchmarks.harness import machine


@pytest.mark.parametrize("name", ["parity", "interop", "roles", "torch_properties", "walk"])
def test_help_runs_and_writes_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for needed in {"interop": ("transformers", "accelerate", "lightning"), "roles": ("transformers",)}.get(name, ()):
        pytest.importorskip(needed)
    monkeypatch.delattr(machine, "write")
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"benchmarks.{name}").main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert f"python -m benchmarks.{name}" in " ".join(printed.split())
    assert "--out" in printed


def test_the_folder_is_that_of_the_results_or_as_asked() -> None:
    assert machine.results_folder("", []) == machine.RESULTS
    assert machine.results_folder("", ["--out", "elsewhere"]) == Path("elsewhere")
