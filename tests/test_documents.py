"""Every snippet in the README and the docs runs, in the order in which it stands there."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.readme.run import filled
from tests.ranks import environment_of_ranks

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"# (\w+\.py)\n")
SHELL_ONLY_HERE = ("source .venv/bin/activate",)


def _snippets(document: Path) -> list[tuple[str, str]]:
    return FENCE.findall(document.read_text(encoding="utf-8"))


# Lightning 2.6 asks torch's pytree in a way that torch 2.13 deprecates; a few numbers need no loader processes.
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
# What torch says of a distributed checkpoint that one process saves or loads.
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_snippets_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "snippet"}
    for language, text in _snippets(document):
        if language == "python" and (named := FILE_NAME.match(text)):
            Path(named[1]).write_text(text)
        elif language == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(text, f"{document.name}: {text[:40]!r}", "exec"), namespace)
        elif language == "console":
            for command in (line[2:] for line in text.splitlines() if line.startswith("$ ")):
                _run(command)
        else:
            assert language in {"text", "json"}, f"{document.name}: nobody runs a {language} snippet"


def _run(command: str) -> None:
    """Run one shell line of a document; `make` targets must exist, and run as part of the gate themselves."""
    if command.startswith(SHELL_ONLY_HERE):
        return
    if command.startswith("make "):
        target = shlex.split(command)[1]
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
        return
    words = shlex.split(command, comments=True)
    if words[0] == "slimadam":
        words = [sys.executable, "-m", *words]
    elif words[0] == "python":
        words[0] = sys.executable
        if words[1:2] == ["-m"] and words[2].startswith("benchmarks."):
            found = find_spec(words[2])
            assert found is not None, command
            assert found.submodule_search_locations is None or find_spec(f"{words[2]}.__main__"), command
            return
    else:
        pytest.fail(f"nobody knows how to run {command!r}")
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, env=environment_of_ranks())
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_documents_link_to_files_that_exist() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_show_the_committed_figures(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert filled(text) == text, "run python -m benchmarks.readme"
