"""The demo's text: the Python standard library's own source, or a file of the user's."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

TRAIN_BYTES = 4_000_000
HELD_OUT_BYTES = 400_000
FILE_BYTES = 64_000_000
_HELD_OUT_SHARE = 0.1
# Tests, packages that are not the library's own, and folders of generated tables.
_SKIPPED_FOLDERS = frozenset(
    (
        *("test", "tests", "idlelib", "lib2to3", "ensurepip", "turtledemo", "pydoc_data", "encodings"),
        *("site-packages", "dist-packages", "__pycache__"),
    )
)


class DataError(ValueError):
    """The demo's text cannot be had; the message says from where, why, and what to do about it."""


@dataclass(frozen=True)
class ByteData:
    """Text as bytes.

    Attributes:
        train: What batches are drawn from, ``uint8``, one dimension.
        held_out: What the model never trains on, likewise.
        source: Where it comes from, in words.
    """

    train: Tensor
    held_out: Tensor
    source: str

    def batches(self, steps: int, batch_size: int, context: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Random windows of the training text, the same ones for the same seed.

        Yields:
            ``steps`` pairs of inputs and targets (the inputs moved on by one byte), each ``int64`` of shape
            ``[batch_size, context]``.
        """
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            starts = torch.randint(len(self.train) - context, (batch_size,), generator=generator)
            yield _windows(self.train, starts, context)

    def held_out_windows(self, count: int, context: int) -> tuple[Tensor, Tensor]:
        """At most ``count`` windows that do not overlap, spread evenly over the held-out text.

        Returns:
            Inputs and targets as :meth:`batches` gives them, of shape ``[windows, context]``.
        """
        available = (len(self.held_out) - 1) // context
        windows = min(count, available)
        starts = torch.arange(windows) * available // windows * context
        return _windows(self.held_out, starts, context)


def load(path: Path | None, context: int) -> ByteData:
    """Read a file, of which the last tenth is held out, or the standard library where there is none.

    Args:
        path: Any file; at most its first 64 MB are read. None: Python's standard library.
        context: Bytes in a window; either part has to hold at least one and the byte after it.

    Raises:
        DataError: The file cannot be read, or there is too little text.
    """
    data = read_standard_library() if path is None else read_file(path)
    if min(len(data.train), len(data.held_out)) <= context:
        needed = round((context + 1) / _HELD_OUT_SHARE)
        raise DataError(
            f"{data.source} has {len(data.train) + len(data.held_out):,} bytes, too few to train on windows "
            f"of {context} and hold a tenth out; choose a text of at least {needed:,} bytes"
        )
    return data


def read_file(path: Path) -> ByteData:
    """The bytes of a file, the last tenth held out.

    Raises:
        DataError: The file is missing, a folder, or not readable.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder; choose a single file")
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); choose a file that exists") from error
    split = len(content) - int(len(content) * _HELD_OUT_SHARE)
    return ByteData(_tensor(content[:split]), _tensor(content[split:]), str(path))


def read_standard_library(root: Path | None = None) -> ByteData:
    """Python source files of the standard library, split by file.

    Hashes of the files' names decide which one in ten is held out and which come first where there are more
    than 4 MB to train on, so the choice depends on neither machine nor seed.

    Args:
        root: Folder of the standard library; default: that of the running interpreter.

    Raises:
        DataError: There are no source files, as in interpreters that keep them in an archive.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    files = sorted(source_files(root), key=lambda file: name_hash(file.relative_to(root)))
    train = [file for file in files if not is_held_out(file.relative_to(root))]
    held_out = [file for file in files if is_held_out(file.relative_to(root))]
    if not train or not held_out:
        raise DataError(f"no standard library source in {root}; choose a text with --data FILE")
    return ByteData(
        _tensor(_concatenate(train, TRAIN_BYTES)),
        _tensor(_concatenate(held_out, HELD_OUT_BYTES)),
        "Python's standard library",
    )


def source_files(root: Path) -> list[Path]:
    """The ``.py`` files below ``root``, without tests, third-party packages and generated tables."""
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return found


def name_hash(name: Path) -> int:
    """A number that depends on the name alone, relative to the library's folder."""
    return int(hashlib.sha256(name.as_posix().encode()).hexdigest(), 16)


def is_held_out(name: Path) -> bool:
    """Whether the file of this name, relative to the library's folder, is held out: one in ten."""
    return name_hash(name) % 10 == 0


def _concatenate(files: list[Path], limit: int) -> bytes:
    content = bytearray()
    for file in files:
        if len(content) >= limit:
            break
        content += file.read_bytes()
    return bytes(content[:limit])


def _tensor(content: bytes) -> Tensor:
    if not content:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _windows(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    windows = text[starts[:, None] + torch.arange(context + 1)].long()
    return windows[:, :-1], windows[:, 1:]
