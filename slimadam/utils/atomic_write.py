"""Atomic writing of files."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: str | Path, text: str) -> None:
    """Write UTF-8 text in one move: readers see the old file or the new one, never half of it.

    A symbolic link is followed; a device or pipe is written to as it is.

    Args:
        path: The file.
        text: Its new content.

    Raises:
        OSError: The file cannot be written; nothing is left behind.
    """
    path = Path(path).resolve()
    content = text.encode("utf-8", errors="xmlcharrefreplace")
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    temporary = path.with_name(f".slimadam-{os.getpid()}.part")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
