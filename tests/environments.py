"""Find the Pythons that the package declares: ``python3 tests/environments.py oldest|middle|newest`` prints one's path.

The Makefile creates environments with it, so it needs nothing installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def declared() -> list[str]:
    """Return the versions that pyproject.toml declares, oldest first."""
    minors = re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', PROJECT.read_text())
    return [f"3.{minor}" for minor in sorted(minors, key=int)]


def find(version: str) -> str | None:
    """Return the path of a Python of this version that starts: on PATH, or where pyenv keeps its own."""
    on_path = [shutil.which(f"python{version}"), shutil.which("python3"), sys.executable]
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    pyenv = sorted(root.glob(f"versions/{version}.*/bin/python"))
    return next((str(path) for path in [*on_path, *pyenv] if path and _is_version(str(path), version)), None)


def _is_version(path: str, version: str) -> bool:
    command = [path, "-c", "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return ran.returncode == 0 and ran.stdout.strip() == version


ORDER = {"oldest": slice(None), "middle": slice(-2, None, -1), "newest": slice(None, None, -1)}
"""In which order the declared versions are looked for; the first that is found is taken."""


def main(wanted: str) -> int:
    """Print the path of the first Python found, and say on stderr which it is."""
    for version in declared()[ORDER[wanted]]:
        path = find(version)
        if path is not None:
            print(f"{wanted}: Python {version}, {path}", file=sys.stderr)
            print(path)
            return 0
    print(f"{wanted}: none of the declared Pythons {declared()} was found; put one on PATH", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]) if sys.argv[1:] and sys.argv[1] in ORDER else __doc__)
