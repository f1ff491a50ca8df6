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

_TRAIN_BYTES = 4_000_000
_HELD_OUT_BYTES = 400_000
_FILE_BYTES = 64_000_000
_HELD_OUT_SHARE = 0.1
# Tests, packages that are not the library's own, and folders of generated tables.
_SKIPPED_FOLDERS = {
    "test", "tests", "idlelib", "lib2to3", "ensurepip", "turtledemo", "pydoc_data", "encodings", "site-packages",
    "dist-packages", "__pycache__",
}  # fmt: skip


class DataError(ValueError):
    """The demo's text cannot be read, or is too short."""


@dataclass(frozen=True)
class ByteData:
    """Text as bytes, ``uint8`` of one dimension: what batches are drawn from, what is held out, and its name."""

    train: Tensor
    held_out: Tensor
    source: str

    def batches(self, steps: int, batch_size: int, context: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pairs of random windows of the training text and the same moved on by one byte, both ``int64``.

        Args:
            steps: Number of pairs.
            batch_size: Windows in each.
            context: Length of a window in bytes.
            seed: Seed of the choice.
        """
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            starts = torch.randint(len(self.train) - context, (batch_size,), generator=generator)
            yield _windows(self.train, starts, context)

    def held_out_windows(self, count: int, context: int) -> tuple[Tensor, Tensor]:
        """Return windows, and targets as in :meth:`batches`, spread evenly over the held-out text without overlap.

        Args:
            count: Number of windows; fewer where the text is short.
            context: Length of each in bytes.
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
    data = read_standard_library() if path is None else _read_file(path)
    if min(len(data.train), len(data.held_out)) <= context:
        needed = round((context + 1) / _HELD_OUT_SHARE)
        raise DataError(
            f"{data.source} has {len(data.train) + len(data.held_out):,} bytes, too few to train on windows "
            f"of {context} and hold a tenth out; choose a text of at least {needed:,} bytes"
        )
    return data


def _read_file(path: Path) -> ByteData:
    if path.is_dir():
        raise DataError(f"{path} is a folder; choose a single file")
    try:
        with path.open("rb") as file:
            content = file.read(_FILE_BYTES)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); choose a file that exists") from error
    split = len(content) - int(len(content) * _HELD_OUT_SHARE)
    return ByteData(_tensor(content[:split]), _tensor(content[split:]), str(path))


def read_standard_library(root: Path | None = None) -> ByteData:
    """Read the Python source files of the standard library in ``root``, split by file.

    Hashes of the files' names decide which one in ten is held out and which come first where there are more
    than 4 MB to train on, so the choice depends on neither machine nor seed.

    Raises:
        DataError: There are no source files, as in interpreters that keep them in an archive.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    names = sorted((file.relative_to(root) for file in source_files(root)), key=name_hash)
    train = [root / name for name in names if not is_held_out(name)]
    held_out = [root / name for name in names if is_held_out(name)]
    if not train or not held_out:
        raise DataError(f"no standard library source in {root}; choose a text with --data FILE")
    return ByteData(_read(train, _TRAIN_BYTES), _read(held_out, _HELD_OUT_BYTES), "Python's standard library")


def source_files(root: Path) -> list[Path]:
    """Return the ``.py`` files below ``root``, without tests, third-party packages and generated tables."""
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return found


def name_hash(name: Path) -> int:
    """Return a number that depends on the name alone, relative to the library's folder."""
    return int(hashlib.sha256(name.as_posix().encode()).hexdigest(), 16)


def is_held_out(name: Path) -> bool:
    """Return whether the file of this name, relative to the library's folder, is held out: one in ten."""
    return name_hash(name) % 10 == 0


def _read(files: list[Path], limit: int) -> Tensor:
    content = bytearray()
    for file in files:
        if len(content) < limit:
            content += file.read_bytes()
    return _tensor(content[:limit])


def _tensor(content: bytes | bytearray) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


def _windows(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    windows = text[starts[:, None] + torch.arange(context + 1)].long()
    return windows[:, :-1], windows[:, 1:]
