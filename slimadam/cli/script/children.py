"""Processes that a script starts itself, which the commands do not follow."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any
from unittest.mock import patch

# The modules of what libraries run in processes of their own, to load data or to share objects.
_HELPERS = ("torch.utils.data.", "torch.multiprocessing.queue", "torch._inductor.", "multiprocessing.managers")


@dataclass
class Children:
    """Notices the processes that a script starts by ``multiprocessing``, and says once what that means.

    Attributes:
        say: Shows a message to the user.
        remedy: The sentence that tells what to do instead.
        follows_fork: Leave forked processes out, since they have what this one has.
        unfollowed: True once a process was started that nothing is known of.
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


def _is_helper(process: BaseProcess) -> bool:
    target: Any = getattr(process, "_target", None)
    modules = (getattr(target, "__module__", None) or type(target).__module__, type(process).__module__)
    return any(module.startswith(_HELPERS) for module in modules)
