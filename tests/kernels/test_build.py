"""How the compiled step's library is built, cached and loaded, each in a process of its own."""

from __future__ import annotations

import os
import shutil
import uuid
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from slimadam import SlimAdam
from slimadam.kernels.cpp import build, update
from tests.ranks import clean_processes

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")

STEP = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stdout)
import slimadam.kernels.cpp.build as build
build.FLAGS = ("-std=c++17", "-O0", "-pthread")
build._installed = lambda: None
from slimadam import SlimAdam

def step():
    weight = torch.ones(160, 160, requires_grad=True)
    weight.grad = torch.full((160, 160), 0.5)
    optimizer = SlimAdam([("w", weight)], plan="factored", lr=0.1, weight_decay=0.0)
    optimizer.step()
    torch.testing.assert_close(weight, torch.full((160, 160), 0.9))
    return optimizer.backend("w")
"""


def _start(script: str, cache: Path, **environment: str) -> tuple[BaseProcess, Path]:
    """A process of its own, where torch is already imported, that runs the script; and the file it prints to."""
    printed = cache.with_name(f"{uuid.uuid4()}.txt")
    process = clean_processes().Process(target=_run_script, args=(script, cache, environment, printed))
    process.start()
    return process, printed


def _run_script(script: str, cache: Path, environment: dict[str, str], printed: Path) -> None:
    os.environ.pop("CXX", None)
    os.environ.update({"SLIMADAM_CACHE_DIR": str(cache), **environment})
    with printed.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    exec(STEP + script, {"__name__": "__main__"})


def _output(process: BaseProcess, printed: Path) -> str:
    process.join(timeout=120)
    output = printed.read_text()
    assert process.exitcode == 0, output
    return output


def _run(script: str, cache: Path, **environment: str) -> str:
    return _output(*_start(script, cache, **environment))


def test_built_once_then_loaded_and_rebuilt_where_damaged(tmp_path: Path) -> None:
    racing = [_start("print(step())", tmp_path / "new") for _ in range(2)]
    for process, printed in racing:
        assert _output(process, printed).splitlines()[-1] == "compiled"
    (built,) = (tmp_path / "new").iterdir()
    assert "compiling" not in _run("print(step())", tmp_path / "new")
    content = built.read_bytes()
    built.write_bytes(content[: len(content) // 2])
    output = _run("print(step())", tmp_path / "new")
    assert output.count("WARNING the compiled step was not built with slimadam; compiling it with") == 1
    assert output.splitlines()[-1] == "compiled"
    assert [path.name for path in (tmp_path / "new").iterdir()] == [built.name]


def test_a_whole_file_that_is_no_library_is_rebuilt(tmp_path: Path) -> None:
    script = """
import hashlib
from pathlib import Path
compiler = build._compiler()
path = build._path(compiler)
path.parent.mkdir(parents=True, exist_ok=True)
path.write_bytes(b"not a library" + hashlib.sha256(b"not a library").digest())
print(step())
"""
    assert _run(script, tmp_path).splitlines()[-1] == "compiled"


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"PATH": ""}, "no C++ compiler on PATH; install one"),
        ({"CXX": "no-such-c++"}, "CXX='no-such-c++' is no program on PATH; name a C++17 compiler"),
        ({"CXX": "false", "PATH": "/bin:/usr/bin"}, "false failed (exit status 1); name a C++17 compiler"),
    ],
    ids=str,
)
def test_without_a_working_compiler_lists_are_taken_and_one_warning_says_why(
    tmp_path: Path, environment: dict[str, str], reason: str
) -> None:
    output = _run("print(step(), step())", tmp_path, **environment)
    assert output.count("WARNING") == 1
    assert reason in output
    assert output.splitlines()[-1] == "foreach foreach"


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("")
    output = _run("print(step())", occupied)
    assert "set SLIMADAM_CACHE_DIR to a folder that can be written" in output
    assert output.splitlines()[-1] == "foreach"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_steps_too(tmp_path: Path) -> None:
    """The threads of the parent do not exist in the child; waiting for them would never end.

    The tensors are large enough for this step to use threads, and too small for torch's own operations.
    """
    script = """
import os
torch.set_num_threads(2)
step()
child = os.fork()
if child == 0:
    os._exit(0 if step() == "compiled" else 1)
assert os.waitpid(child, 0)[1] == 0
print("both")
"""
    assert _run(script, tmp_path).splitlines()[-1] == "both"


def test_the_library_built_with_the_package_is_taken_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, level in (("AVX512", "avx512"), ("AVX2", "avx2"), ("DEFAULT", "baseline"), ("SVE256", "baseline")):
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda capability=capability: capability)
        assert build._level() == level
    monkeypatch.undo()
    assert build._installed() is not None
    monkeypatch.setattr(build, "source_digest", lambda: "of another source")
    assert build._installed() is None
    monkeypatch.undo()
    monkeypatch.setattr(build, "_level", lambda: "of no file")
    assert build._installed() is None


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=str)
def test_lists_take_what_they_can_where_there_is_no_library(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update, "library", lambda: None)
    found = {}
    for name, extra in (
        ("plain", {}),
        ("stored otherwise", {"momentum_dtype": torch.bfloat16}),
        ("codes", {"momentum_dtype": "int8"}),
        ("tensor", {"lr": torch.tensor(0.1)}),
    ):
        param = torch.nn.Parameter(torch.ones(6, 256))
        param.grad = torch.full((6, 256), 0.5)
        settings = {"lr": 0.1, "weight_decay": 0.0, "plan": "factored", **options, **extra}
        optimizer = SlimAdam([("w", param)], **settings)
        optimizer.step()
        torch.testing.assert_close(param.detach(), torch.full((6, 256), 0.9), rtol=0, atol=1e-3)
        found[name] = optimizer.backend("w")
    assert found == {"plain": "foreach", "stored otherwise": "reference", "codes": "foreach", "tensor": "reference"}


def test_a_damaged_library_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading half a library ends the process."""
    library = build.SOURCE.with_name(f"step_{build._level()}{build.SUFFIX}")
    whole, copied = library.read_bytes(), tmp_path / library.name
    for source in (build.SOURCE, build.HEADER):
        shutil.copy(source, tmp_path)
    monkeypatch.setattr(build, "SOURCE", tmp_path / build.SOURCE.name)
    monkeypatch.setattr(build, "HEADER", tmp_path / build.HEADER.name)
    for content in (whole[: len(whole) // 2], whole[:100_000] + bytes(60_000) + whole[160_000:], b"", whole[:-1]):
        copied.write_bytes(content)
        assert build._installed() is None
    copied.write_bytes(whole)
    assert build._installed() is not None


def test_a_compiler_may_be_named_with_options(tmp_path: Path) -> None:
    assert _run("print(step())", tmp_path, CXX="c++ -DNDEBUG").splitlines()[-1] == "compiled"
    output = _run("print(step())", tmp_path / "none", CXX="true")
    assert "has made nothing; name a C++17 compiler in CXX, such as g++" in output
    assert output.splitlines()[-1] == "foreach"
