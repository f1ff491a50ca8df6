"""Triton's interpreter, which runs kernels on a CPU, beside any numpy."""

from __future__ import annotations

from importlib import metadata
from typing import Any


def mend_interpreter() -> None:
    """Let the interpreter of Triton before 3.9 turn its numbers, arrays of one element, into ints.

    numpy from 1.25 on warns of it, and from 2.4 on refuses it.
    """
    try:
        release = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return
    if tuple(map(int, release.split(".")[:2])) >= (3, 9):
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = _index

    interpreter._patch_lang_tensor = patch_and_mend


def _index(number: Any) -> int:
    return int(number.handle.data.item())
