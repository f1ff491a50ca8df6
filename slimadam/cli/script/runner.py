"""Run somebody's script inside this process as ``python SCRIPT`` or ``python -m MODULE`` would."""

from __future__ import annotations

import builtins
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, TypeVar

import click
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from slimadam.utils.torch_private import disable_dynamo

SIGTERM_EXIT = 143
SCRIPT_SETTINGS = {"allow_interspersed_args": False}
"""Context settings that leave everything after SCRIPT to the script."""

_INTERRUPT_EXIT = 130
_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])
_Hook = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]


class StopScript(BaseException):
    """Ends the script from inside an optimizer step; no ``Exception``, so that scripts do not swallow it."""


class Terminated(BaseException):
    """SIGTERM arrived."""


@dataclass(frozen=True)
class Outcome:
    """How a script ended.

    Attributes:
        exit_code: The code that Python would have exited with.
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
    """A script or module and its command line.

    Attributes:
        target: Path of a script, or name of a module.
        arguments: Its command line.
        is_module: True where ``target`` is a module.
    """

    target: str
    arguments: tuple[str, ...] = ()
    is_module: bool = False

    def run(self) -> Outcome:
        """Run it as ``__main__``.

        Raises:
            click.UsageError: There is no such script or module.
        """
        main, argv, path = sys.modules["__main__"], list(sys.argv), list(sys.path)
        try:
            module, load = self._find_module() if self.is_module else self._find_file()
            sys.argv[:] = [str(module.__file__) if self.is_module else self.target, *self.arguments]
            return _execute(module, load)
        finally:
            sys.modules["__main__"] = main
            sys.argv[:], sys.path[:] = argv, path

    def _find_file(self) -> tuple[ModuleType, Callable[[], CodeType]]:
        path = Path(self.target)
        if not path.is_file():
            raise click.UsageError(f"cannot run {self.target!r}: no such file")
        _set_first_path(os.path.dirname(os.path.realpath(path)))
        module = ModuleType("__main__")
        module.__file__ = file = str(path.absolute())
        module.__loader__ = SourceFileLoader("__main__", file)
        return module, lambda: compile(path.read_bytes(), file, "exec", dont_inherit=True)

    def _find_module(self) -> tuple[ModuleType, Callable[[], CodeType]]:
        _set_first_path(os.getcwd())
        name = self.target
        try:
            spec = importlib.util.find_spec(name)
            if spec is not None and spec.submodule_search_locations is not None:
                spec = importlib.util.find_spec(f"{name}.__main__")
        except (ImportError, ValueError) as error:
            raise click.UsageError(f"cannot run module {name!r}: {error}") from error
        loader: Any = None if spec is None else spec.loader
        if spec is None or not hasattr(loader, "get_code"):
            raise click.UsageError(f"cannot run module {name!r}: no such Python module")
        module = ModuleType("__main__")
        module.__file__, module.__loader__ = str(spec.origin), loader
        module.__spec__, module.__package__ = spec, spec.parent
        return module, lambda: loader.get_code(spec.name)


def script_arguments(command: _Decorated) -> _Decorated:
    """Add ``[-m] SCRIPT [ARGS...]`` to a click command made with ``SCRIPT_SETTINGS``."""
    command = click.argument("arguments", metavar="[ARGS]...", nargs=-1, type=click.UNPROCESSED)(command)
    command = click.argument("script", metavar="SCRIPT")(command)
    return click.option("-m", "is_module", is_flag=True, help="SCRIPT is a module, as in python -m.")(command)


@contextmanager
def step_hooks(before: _Hook, after: _Hook) -> Iterator[None]:
    """Call hooks around each optimizer step of this process, and of none that the script forks.

    Args:
        before: Called before each step, as by ``register_optimizer_step_pre_hook``.
        after: Called after it.
    """
    process = os.getpid()

    def in_this_process(hook: _Hook) -> _Hook:
        def call(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if os.getpid() == process:
                hook(optimizer, args, kwargs)

        return disable_dynamo(call)

    handles = (
        register_optimizer_step_pre_hook(in_this_process(before)),
        register_optimizer_step_post_hook(in_this_process(after)),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _set_first_path(folder: str) -> None:
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = folder


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
        return Outcome(error.code or 0) if isinstance(error.code, int | None) else Outcome(1, error)
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_frame.f_code is not code:
        traceback = traceback.tb_next
    error.__traceback__ = traceback
    return Outcome(_INTERRUPT_EXIT if isinstance(error, KeyboardInterrupt) else 1, error)
