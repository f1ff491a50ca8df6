"""What ``calibrate`` and ``run`` exit with; 2 is for wrong input."""

from typing import Final

DONE: Final = 0
SCRIPT_FAILED: Final = 1
NOTHING_DONE: Final = 3
