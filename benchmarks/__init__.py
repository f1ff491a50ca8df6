"""Commands that print the project's figures and write them, with the machine they came from, to ``results/``."""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


class _Kernels:
    """Finds ``slimadam.kernels`` beside this folder: only an installation puts it into the package."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Point at the repository's folder, under the one name that its modules import each other by."""
        if name != "slimadam.kernels":
            return None
        folder = ROOT / "kernels"
        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


def _is_of_this_repository() -> bool:
    package = find_spec("slimadam")
    return package is not None and package.origin is not None and Path(package.origin).parent.parent == ROOT


if not any(finder.__name__ == "_Kernels" for finder in sys.meta_path if isinstance(finder, type)):
    # Before an installation of another checkout, whose kernels these are not.
    sys.meta_path.insert(0 if _is_of_this_repository() else len(sys.meta_path), _Kernels)
