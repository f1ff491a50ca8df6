"""Signals are held back while parameters are elsewhere, so that no Ctrl-C leaves them there."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class HeldSignals:
    """Holds back every signal that Python handles; delivers them at the end, or where a block allows it.

    Only the main thread receives signals: elsewhere nothing happens.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._waiting: list[tuple[int, FrameType | None]] = []
        self._open = False
        self._holding = False

    def hold(self) -> None:
        """Make signals wait from now on."""
        if threading.current_thread() is threading.main_thread():
            self._holding = True
            for number in signal.valid_signals():
                handler = signal.getsignal(number)
                if callable(handler) and handler != self._receive:
                    self._handlers[number] = handler
                    signal.signal(number, self._receive)

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Deliver signals within the block, up to the first: its handler may raise, and the rest waits again."""
        self._open = True
        try:
            if self._waiting:
                self._receive(*self._waiting.pop(0))
            yield
        finally:
            self._open = False

    def release(self) -> None:
        """Put the handlers back, and deliver the signals that have waited."""
        try:
            self._put_back()
        finally:
            self._put_back()  # a handler that was back already may have raised
            self._holding = False
            self._deliver()

    def _put_back(self) -> None:
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._receive:
                signal.signal(number, handler)

    def _deliver(self) -> None:
        """Deliver all that wait, also when a handler raises."""
        while self._waiting:
            try:
                number, frame = self._waiting.pop(0)
                self._handlers[number](number, frame)
            finally:
                self._deliver()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._holding and not self._open:
            self._waiting.append((number, frame))
        else:
            was_open, self._open = self._open, False
            self._handlers[number](number, frame)
            self._open = was_open
