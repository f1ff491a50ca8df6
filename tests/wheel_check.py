"""Build the wheel, install it into an empty environment, import it and ask the command line for help.

torch and the other dependencies are borrowed from the running environment, so that nothing is downloaded twice;
slimadam itself can only come from the wheel.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = """
import pathlib, sys
import slimadam, slimadam.kernels.blocked, slimadam.report
root = pathlib.Path(slimadam.__file__).parent
assert root.is_relative_to(sys.prefix), root
for file in ("py.typed", "plan.schema.json", "report/report.html.j2", "report/style.css", "kernels/compiled.cpp"):
    assert (root / file).is_file(), file
print("wheel: slimadam", slimadam.__version__, "imports from the installed package")
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        subprocess.run(
            [sys.executable, "-m", "build", "--wheel", "--outdir", work, ROOT], check=True, stdout=subprocess.DEVNULL
        )
        (wheel,) = work.glob("*.whl")
        venv.create(work / "env", with_pip=True)
        python = work / "env" / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
        purelib = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        # A plain path entry: the .pth files there, editable installs among them, are not followed.
        Path(purelib, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([python, "-c", IMPORTS], check=True, cwd=work)
        subprocess.run([work / "env" / "bin" / "slimadam", "--help"], check=True, cwd=work, stdout=subprocess.DEVNULL)
        print("wheel: slimadam --help works")


if __name__ == "__main__":
    main()
