"""Commands that print the project's figures and write them, with the machine they came from, to ``results/``."""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent

COMMANDS = {
    "ablation": "equivalence/ablation.py",
    "architecture": "readme/architecture.py",
    "calibration.__main__": "calibration/run.py",
    "checkpoint_kills": "distributed/checkpoint_kills.py",
    "clipping": "speed/clipping.py",
    "demo": "training/demo.py",
    "distributed.__main__": "distributed/run.py",
    "equivalence.__main__": "equivalence/run.py",
    "expectation": "equivalence/expectation.py",
    "gpu.__main__": "gpu/run.py",
    "host_time": "speed/host_time.py",
    "interop": "correctness/interop.py",
    "kernels": "speed/kernels.py",
    "launches": "gpu/launches.py",
    "launch_settings": "speed/launch_settings.py",
    "memory": "speed/memory.py",
    "mix.__main__": "mix/run.py",
    "mixed_precision": "training/mixed_precision.py",
    "momentum": "training/momentum.py",
    "monitoring": "training/monitoring.py",
    "parity": "correctness/parity.py",
    "parts": "training/parts.py",
    "peak_memory": "peak/run.py",
    "readme.__main__": "readme/run.py",
    "roles": "correctness/roles.py",
    "scale": "distributed/scale.py",
    "sharpness.__main__": "sharpness/run.py",
    "sharpness_cost": "sharpness/cost.py",
    "slim_start": "training/slim_start.py",
    "snr_overhead": "speed/snr_overhead.py",
    "supported": "correctness/supported.py",
    "throughput": "speed/throughput.py",
    "torch_properties": "correctness/torch_properties.py",
    "transfer": "training/transfer.py",
    "walk": "correctness/walk.py",
    "warmup.__main__": "warmup/run.py",
}
"""The file of each command, ``python -m benchmarks.<name>``."""


class _Elsewhere:
    """Finds commands by their short names, and the kernels where only an installation puts them into the package."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return where a module lies that is not found by its name."""
        if name == "slimadam.kernels":
            folder = ROOT / "kernels"
            return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
        package, _, command = name.partition(".")
        if package != "benchmarks" or command not in COMMANDS:
            return None
        return spec_from_file_location(name, ROOT / "benchmarks" / COMMANDS[command])


if not any(finder.__name__ == "_Elsewhere" for finder in sys.meta_path if isinstance(finder, type)):
    sys.meta_path.append(_Elsewhere)
