"""Entry point of the ``slimadam`` command and of ``python -m slimadam``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say in one line which extra it needs."""
    try:
        from slimadam.cli import cli

        cli(prog_name="slimadam")
    except ModuleNotFoundError as error:
        if error.name not in {"click", "rich", "jinja2", "matplotlib"}:
            raise
        sys.exit(f"slimadam: the command line needs {error.name}: pip install 'slimadam[cli]'")


if __name__ == "__main__":
    main()
