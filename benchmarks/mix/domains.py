"""Two domains of text that every installation has: prose from numpy's documentation, and Python source."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy
import torch
from torch import Tensor

from slimadam.demo.data import ByteData, is_held_out, name_hash, read_standard_library

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def prose() -> ByteData:
    """Return the docstrings of numpy, one file in ten held out; the choice depends on neither machine nor seed."""
    root = Path(numpy.__file__).parent
    files = [file.relative_to(root) for file in root.rglob("*.py") if "tests" not in file.parts]
    train: list[str] = []
    held_out: list[str] = []
    for name in sorted(files, key=name_hash):
        (held_out if is_held_out(name) else train).append(_docstrings(root / name))
    return ByteData(_bytes(train), _bytes(held_out), f"docstrings of numpy {numpy.__version__}")


def code() -> ByteData:
    """Return Python's standard library, as in the demo."""
    return read_standard_library()


def batch(text: Tensor, seed: int, windows: int, context: int) -> tuple[Tensor, Tensor]:
    """Return random windows of a text: inputs and the bytes after them, each of shape ``[windows, context]``.

    Args:
        text: Bytes of the text.
        seed: Seed of the windows' places.
        windows: Number of windows.
        context: Bytes in a window.
    """
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - context, (windows,), generator=generator)
    found = text[starts[:, None] + torch.arange(context + 1)].long()
    return found[:, :-1], found[:, 1:]


def _docstrings(file: Path) -> str:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, _DOCUMENTED))
    return "\n\n".join(text for text in found if text)


def _bytes(texts: list[str]) -> Tensor:
    return torch.frombuffer(bytearray("\n\n".join(filter(None, texts)).encode()), dtype=torch.uint8)
