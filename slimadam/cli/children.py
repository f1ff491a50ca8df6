"""Processes that a script starts itself, which the commands do not follow."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

from rich.console import Console

# The modules of what libraries run in processes of their own, to load data or to share objects.
_HELPERS = ("torch.utils.data.", "torch.multiprocessing.queue", "torch._inductor.", "multiprocessing.managers")


class Children:
    """Notices the processes that a script starts by ``multiprocessing``, and says once what that means.

    Args:
        console: Where to say it.
        remedy: What to do instead.
        follows_fork: Whether forked processes need no remedy, because they have what this one has.

    Attributes:
        unfollowed: Whether a process was started that nothing is known of.
    """

    def __init__(self, console: Console, remedy: str, *, follows_fork: bool = False) -> None:
        self.unfollowed = False
        self._console = console
        self._remedy = remedy
        self._follows_fork = follows_fork

    @property
    def elsewhere(self) -> str:
        """Where to look if nothing was found: what a message adds to say that it is about this process alone."""
        return " in this process" + ("; those that the script started were not followed" if self.unfollowed else "")

    @contextmanager
    def noticed(self) -> Iterator[None]:
        """Notice the processes that are started within the block, by this process."""
        start, parent = BaseProcess.start, os.getpid()

        @functools.wraps(start)
        def start_noticed(process: BaseProcess) -> None:
            if os.getpid() == parent:
                self._note(process)
            start(process)

        BaseProcess.start = start_noticed  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            BaseProcess.start = start  # type: ignore[method-assign]

    def _note(self, process: BaseProcess) -> None:
        method = getattr(process, "_start_method", None) or multiprocessing.get_start_method()
        if self.unfollowed or _is_helper(process) or (self._follows_fork and method == "fork"):
            return
        self.unfollowed = True
        self._console.print(
            f"slimadam: the script starts processes of its own (multiprocessing, {method!r}), which slimadam does not "
            f"follow: an optimizer that is built there is torch's, and not measured. {self._remedy}"
        )


def _is_helper(process: BaseProcess) -> bool:
    target: Callable[..., Any] | None = getattr(process, "_target", None)
    owner = target if getattr(target, "__module__", None) else type(target)
    modules = (getattr(owner, "__module__", None) or "", type(process).__module__)
    return any(module.startswith(_HELPERS) for module in modules)
