"""Triton without a GPU: its interpreter beside any numpy, and a driver that compiles but launches nothing."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any


class MockDriver:
    """A driver whose launches end where the GPU would begin; ``triton.runtime.driver.set_active(MockDriver())``.

    Args:
        backend: ``"cuda"`` or ``"hip"``.
        architecture: The one to compile for.

    Attributes:
        launched: Name and compile options of each launch.
    """

    def __init__(self, backend: str = "cuda", architecture: int | str = 90) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget(backend, architecture, 32 if backend == "cuda" else 64)
        self.launched: list[Any] = []
        self.utils = self
        self.launcher_cls = self._launcher

    def get_current_target(self) -> Any:
        """Return what kernels are compiled for."""
        return self._target

    def get_current_device(self) -> int:
        """Return the only device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return the default stream."""
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Return the limits that a compiled kernel is checked for."""
        return {"max_shared_mem": 1 << 18}

    def load_binary(self, *arguments: Any) -> tuple[Any, ...]:
        """Return module, function, registers, spills, and from Triton 3.4 on the most threads of a program."""
        return (object(), object(), 0, 0, 1 << 10)[: 4 if _release() < (3, 4) else 5]

    def unload_module(self, module: Any) -> None:
        """Let go of what :meth:`load_binary` returned."""

    def _launcher(self, source: Any, options: Any) -> Callable[..., None]:
        return lambda *arguments: self.launched.append(options)


def _release() -> tuple[int, ...]:
    return tuple(map(int, metadata.version("triton").split(".")[:2]))


def mend_interpreter() -> None:
    """Let the interpreter of Triton before 3.9 turn its numbers, arrays of one element, into ints.

    numpy from 1.25 on warns of it, and from 2.4 on refuses it.
    """
    try:
        release = _release()
    except metadata.PackageNotFoundError:
        return
    if release >= (3, 9):
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = _index

    interpreter._patch_lang_tensor = patch_and_mend


def _index(number: Any) -> int:
    return int(number.handle.data.item())
