"""Install slimadam from its wheel and from its source archive into empty environments, and take a step in each.

The wheel holds the compiled step; where the source archive is installed, no compiler is to be found. torch and the
other dependencies are borrowed from the running environment, so that nothing is downloaded twice; slimadam itself can
only come from the archives.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = """
import pathlib, sys
import slimadam, slimadam.kernels.cpp.update, slimadam.report
root = pathlib.Path(slimadam.__file__).parent
assert root.is_relative_to(sys.prefix), root
files = ("py.typed", "plans/plan.schema.json", "report/report.html.j2", "report/style.css")
for file in (*files, "kernels/cpp/adamw.cpp", "kernels/cpp/threads.h"):
    assert (root / file).is_file(), file

import torch
param = torch.nn.Parameter(torch.ones(8, 8))
param.grad = torch.ones(8, 8)
optimizer = slimadam.SlimAdam([("w", param)], plan="factored", lr=0.5, weight_decay=0.0)
optimizer.step()
torch.testing.assert_close(param.detach(), torch.full((8, 8), 0.5))
backend = optimizer.backend("w")
assert backend == sys.argv[1], backend
print(f"{sys.argv[2]}: slimadam {slimadam.__version__} imports from the installed package, steps are {backend}")
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        subprocess.run([sys.executable, "-m", "build", "--outdir", work, ROOT], check=True, stdout=subprocess.DEVNULL)
        (wheel,), (archive,) = work.glob("*.whl"), work.glob("*.tar.gz")
        assert wheel.name.split("-")[2:4] == ["py3", "none"], wheel.name
        without = work / "no compiler"
        without.mkdir()
        environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
        environment |= {"PATH": str(without), "SLIMADAM_CACHE_DIR": str(work / "cache")}
        _check(work / "from wheel", wheel, "compiled", environment)
        _check(work / "from source", archive, "foreach", environment)


def _check(place: Path, package: Path, backend: str, environment: dict[str, str]) -> None:
    """Install a package where there is no compiler, and take a step with it."""
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    command = [python, "-m", "pip", "install", "--quiet", "--no-deps", package]
    subprocess.run(command, check=True, env=environment)
    purelib = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    # A plain path entry: the .pth files there, editable installs among them, are not followed.
    Path(purelib, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([python, "-c", IMPORTS, backend, place.name], check=True, cwd=place, env=environment)
    subprocess.run([place / "bin" / "slimadam", "--help"], check=True, cwd=place, stdout=subprocess.DEVNULL)
    print(f"{place.name}: slimadam --help works")


if __name__ == "__main__":
    main()
