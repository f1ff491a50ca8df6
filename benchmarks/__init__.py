"""Commands that print the project's figures and write them, with the machine they came from, to ``results/``."""

import importlib
import sys

try:
    import slimadam  # noqa: F401
except ModuleNotFoundError as missing:
    # Only an installation puts the kernels' folder into the package; a machine may have the repository alone.
    if missing.name != "slimadam.kernels":
        raise
    sys.modules["slimadam.kernels"] = importlib.import_module("kernels")
