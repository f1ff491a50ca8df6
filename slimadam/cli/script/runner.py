"""Running somebody's script inside this process as ``python SCRIPT`` or ``python -m MODULE`` would."""

from __future__ import annotations

import builtins
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import Any, TypeVar

import click

SIGTERM_EXIT = 143
INTERRUPT_EXIT = 130

_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])


class StopScript(BaseException):
    """Ends the script from inside an optimizer step; no ``Exception``, so that scripts do not swallow it."""


class Terminated(BaseException):
    """SIGTERM arrived."""


@dataclass(frozen=True)
class Outcome:
    """How a script ended.

    Attributes:
        exit_code: What Python would have exited with.
        error: The exception that it ended by, with only the script's own frames, if it failed by one.
    """

    exit_code: int = 0
    error: BaseException | None = None

    def show_error(self) -> None:
        """Print what Python prints when a script fails."""
        if isinstance(self.error, SystemExit):
            print(self.error.code, file=sys.stderr)
        elif self.error is not None:
            sys.excepthook(type(self.error), self.error, self.error.__traceback__)


@dataclass(frozen=True)
class Script:
    """What to run.

    Attributes:
        target: Path of a script, or name of a module.
        arguments: Its command line.
        is_module: Whether ``target`` is a module.
    """

    target: str
    arguments: tuple[str, ...] = ()
    is_module: bool = False

    def run(self) -> Outcome:
        """Run it as ``__main__``.

        Raises:
            click.UsageError: There is no such script or module.
        """
        with _interpreter_state_restored():
            return self._run_module() if self.is_module else self._run_file()

    def _run_file(self) -> Outcome:
        path = Path(self.target)
        if not path.is_file():
            raise click.UsageError(f"cannot run {self.target!r}: no such file")
        module = ModuleType("__main__")
        module.__file__ = str(path.absolute())
        module.__loader__ = SourceFileLoader("__main__", module.__file__)
        sys.argv[:] = [self.target, *self.arguments]
        _set_first_path(os.path.dirname(os.path.realpath(path)))
        return _execute(module, lambda: compile(path.read_bytes(), str(module.__file__), "exec", dont_inherit=True))

    def _run_module(self) -> Outcome:
        _set_first_path(os.getcwd())
        spec = _find_module(self.target)
        loader = spec.loader
        module = ModuleType("__main__")
        module.__file__ = spec.origin
        module.__loader__ = loader
        module.__spec__ = spec
        module.__package__ = spec.parent
        sys.argv[:] = [str(spec.origin), *self.arguments]
        return _execute(module, lambda: loader.get_code(spec.name))  # type: ignore[union-attr]


def script_arguments(command: _Decorated) -> _Decorated:
    """Adds ``[-m] SCRIPT [ARGS...]`` to a click command made with ``SCRIPT_SETTINGS``."""
    command = click.argument("arguments", metavar="[ARGS]...", nargs=-1, type=click.UNPROCESSED)(command)
    command = click.argument("script", metavar="SCRIPT")(command)
    return click.option("-m", "is_module", is_flag=True, help="SCRIPT is a module, as in python -m.")(command)


SCRIPT_SETTINGS = {"allow_interspersed_args": False}
"""Context settings that leave everything after SCRIPT to the script."""


@contextmanager
def _interpreter_state_restored() -> Iterator[None]:
    main, argv, path = sys.modules["__main__"], list(sys.argv), list(sys.path)
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        sys.argv[:], sys.path[:] = argv, path


def _set_first_path(folder: str) -> None:
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = folder


def _find_module(name: str) -> ModuleSpec:
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except (ImportError, ValueError) as error:
        raise click.UsageError(f"cannot run module {name!r}: {error}") from error
    if spec is None or not hasattr(spec.loader, "get_code"):
        raise click.UsageError(f"cannot run module {name!r}: no such Python module")
    return spec


def _execute(module: ModuleType, load: Callable[[], CodeType]) -> Outcome:
    process = os.getpid()
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    code = None
    try:
        code = load()
        exec(code, module.__dict__)
        if os.getpid() != process:
            raise SystemExit(0)
    except BaseException as error:
        if os.getpid() != process:  # a child that the script forked ends on its own
            raise
        return _outcome(error, code)
    return Outcome()


def _outcome(error: BaseException, code: CodeType | None) -> Outcome:
    if isinstance(error, StopScript):
        return Outcome()
    if isinstance(error, Terminated):
        return Outcome(SIGTERM_EXIT)
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return Outcome(error.code or 0)
        return Outcome(1, error)
    error.__traceback__ = _from_script_on(error.__traceback__, code)
    return Outcome(INTERRUPT_EXIT if isinstance(error, KeyboardInterrupt) else 1, error)


def _from_script_on(traceback: TracebackType | None, code: CodeType | None) -> TracebackType | None:
    while traceback is not None and traceback.tb_frame.f_code is not code:
        traceback = traceback.tb_next
    return traceback
