"""The command line in this process, with standard error apart from standard output in every release of click."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from click import testing

MIXES = "mix_stderr" in inspect.signature(testing.CliRunner).parameters


class CliRunner(testing.CliRunner):
    """Click's, which has kept both apart, and ``output`` as what a terminal shows, from 8.2 on."""

    def __init__(self) -> None:
        super().__init__(**({"mix_stderr": False} if MIXES else {}))

    @contextmanager
    def isolation(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with super().isolation(*args, **kwargs) as streams:
            if MIXES:  # which reads standard error without flushing it
                sys.stderr.reconfigure(write_through=True)
            yield streams

    def invoke(self, *args: Any, **kwargs: Any) -> testing.Result:
        result = super().invoke(*args, **kwargs)
        if MIXES:
            result.__class__ = _Result
        return result


class _Result(testing.Result):
    @property
    def output(self) -> str:
        return self.stdout + self.stderr
