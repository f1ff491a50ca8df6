"""Commands that print the project's figures and write them, with the machine they came from, to ``results/``."""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType


class _Kernels:
    """Finds ``slimadam.kernels`` where nothing else does: only an installation puts that folder into the package."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Point at the repository's folder, under the one name that its modules import each other by."""
        if name != "slimadam.kernels":
            return None
        folder = Path(__file__).resolve().parent.parent / "kernels"
        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


sys.meta_path.append(_Kernels)
