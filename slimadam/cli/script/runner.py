"""Run somebody's script inside this process as ``python SCRIPT`` would, and notice processes that it starts."""

from __future__ import annotations

import builtins
import importlib.util
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, TypeVar
from unittest.mock import patch

import click
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from slimadam.utils.torch_private import disable_dynamo

SIGTERM_EXIT = 143
SCRIPT_SETTINGS = {"allow_interspersed_args": False}
"""Context settings that leave everything after SCRIPT to the script."""

# The modules of what libraries run in processes of their own, to load data or to share objects.
_HELPERS = ("torch.utils.data.", "torch.multiprocessing.queue", "torch._inductor.", "multiprocessing.managers")
_INTERRUPT_EXIT = 130
_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])
_Hook = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]
_Loaded = tuple[ModuleType, Callable[[], CodeType]]


class StopScript(BaseException):
    """Ends the script from inside an optimizer step; no ``Exception``, so that scripts do not swallow it."""


@dataclass(frozen=True)
class Outcome:
    """How a script ended: as Python's exit code, and by which exception, if it failed, with the script's own frames."""

    exit_code: int = 0
    error: BaseException | None = None

    def show_error(self) -> None:
        """Print what Python prints when a script fails."""
        if isinstance(self.error, SystemExit):
            print(self.error.code, file=sys.stderr)
        elif self.error is not None:
            sys.excepthook(type(self.error), self.error, self.error.__traceback__)


def script_arguments(command: _Decorated) -> _Decorated:
    """Add ``[-m] SCRIPT [ARGS...]`` to a click command made with ``SCRIPT_SETTINGS``."""
    command = click.argument("arguments", metavar="[ARGS]...", nargs=-1, type=click.UNPROCESSED)(command)
    command = click.argument("script", metavar="SCRIPT")(command)
    return click.option("-m", "is_module", is_flag=True, help="SCRIPT is a module, as in python -m.")(command)


def run_script(script: str, arguments: Sequence[str] = (), is_module: bool = False) -> Outcome:
    """Run a script or module as ``__main__``.

    Args:
        script: Path of a script, or name of a module.
        arguments: Its command line.
        is_module: True where ``script`` is a module.

    Raises:
        click.UsageError: There is no such script or module.
    """
    before = sys.modules["__main__"], list(sys.argv), list(sys.path)
    process = os.getpid()
    code = None
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.getcwd() if is_module else os.path.dirname(os.path.realpath(script))
    try:
        module, load = _find_module(script) if is_module else _find_file(script)
        sys.argv[:] = [str(module.__file__) if is_module else script, *arguments]
        vars(module)["__builtins__"] = builtins
        sys.modules["__main__"] = module
        try:
            code = load()
            exec(code, vars(module))
            if os.getpid() != process:
                raise SystemExit(0)
        except BaseException as error:
            if os.getpid() != process:  # a child that the script forked ends on its own
                raise
            return _outcome(error, code)
        return Outcome()
    finally:
        sys.modules["__main__"], sys.argv[:], sys.path[:] = before


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

    with (
        register_optimizer_step_pre_hook(in_this_process(before)),
        register_optimizer_step_post_hook(in_this_process(after)),
    ):
        yield


@dataclass
class Children:
    """Notices the processes that a script starts by ``multiprocessing``, and says once what to do instead.

    With ``follows_fork`` those that it forks do not count, since they have what this one has.
    """

    say: Callable[[str], None]
    remedy: str
    follows_fork: bool = False
    unfollowed: bool = False

    @property
    def elsewhere(self) -> str:
        """The end of a message that nothing was found: it is about this process alone."""
        return " in this process" + ("; those that the script started were not followed" if self.unfollowed else "")

    @contextmanager
    def noticed(self) -> Iterator[None]:
        """Notice the processes that this process starts within the block."""
        start, parent = BaseProcess.start, os.getpid()

        def start_noticed(process: BaseProcess) -> None:
            method = getattr(process, "_start_method", None) or multiprocessing.get_start_method()
            is_followed = self.follows_fork and method == "fork"
            if os.getpid() == parent and not (self.unfollowed or is_followed or _is_helper(process)):
                self.unfollowed = True
                self.say(
                    f"the script starts processes of its own (multiprocessing, {method!r}), which slimadam does not "
                    f"follow: an optimizer that is built there is torch's, and not measured. {self.remedy}"
                )
            start(process)

        with patch.object(BaseProcess, "start", start_noticed):
            yield


def _find_file(target: str) -> _Loaded:
    path = Path(target)
    if not path.is_file():
        raise click.UsageError(f"cannot run {target!r}: no such file")
    module = ModuleType("__main__")
    module.__file__ = file = str(path.absolute())
    module.__loader__ = SourceFileLoader("__main__", file)
    return module, lambda: compile(path.read_bytes(), file, "exec", dont_inherit=True)


def _find_module(name: str) -> _Loaded:
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


def _outcome(error: BaseException, code: CodeType | None) -> Outcome:
    if isinstance(error, StopScript):
        return Outcome()
    if isinstance(error, SystemExit):
        return Outcome(error.code or 0) if isinstance(error.code, int | None) else Outcome(1, error)
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_frame.f_code is not code:
        traceback = traceback.tb_next
    error.__traceback__ = traceback
    return Outcome(_INTERRUPT_EXIT if isinstance(error, KeyboardInterrupt) else 1, error)


def _is_helper(process: BaseProcess) -> bool:
    target: Any = getattr(process, "_target", None)
    modules = (getattr(target, "__module__", None) or type(target).__module__, type(process).__module__)
    return any(module.startswith(_HELPERS) for module in modules)
