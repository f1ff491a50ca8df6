"""Holding signals back while parameters are elsewhere, so that no Ctrl-C leaves them there."""

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
        """From now on signals wait."""
        if threading.current_thread() is threading.main_thread():
            self._holding = True
            for number in signal.valid_signals():
                handler = signal.getsignal(number)
                if callable(handler) and handler != self._receive:
                    self._handlers[number] = handler
                    signal.signal(number, self._receive)

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Within the block signals arrive, up to the first: its handler may raise, and the rest waits again."""
        self._open = True
        try:
            if self._waiting:
                self._receive(*self._waiting.pop(0))
            yield
        finally:
            self._open = False

    def release(self) -> None:
        """Put the handlers back, and deliver what has waited."""
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
        """All that waits, also when a handler raises."""
        while self._waiting:
            try:
                number, frame = self._waiting.pop(0)
                self._handlers[number](number, frame)
            finally:
                self._deliver()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._holding:
            self._handlers[number](number, frame)
            return
        if not self._open:
            self._waiting.append((number, frame))
            return
        self._open = False
        self._handlers[number](number, frame)
        self._open = True
