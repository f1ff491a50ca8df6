"""Ranks that tests start by torchrun end in peace where this folder is on ``PYTHONPATH``.

gloo's threads free the tensors of the last collective a little later than it returns. Where the interpreter is
shutting down by then, taking its lock ends the thread inside a C++ destructor, and so the process: SIGABRT,
"terminate called without an active exception".
"""

from __future__ import annotations

import atexit
import os
import time

if "RANK" in os.environ:
    atexit.register(time.sleep, 0.3)
