"""The compiled step as a library: built once by the system's C++ compiler, then loaded from a cache.

The cache is ``$SLIMADAM_CACHE_DIR``, else ``slimadam`` in the user's cache folder. A library's name is a hash of
everything that went into it; its bytes end with their own hash, so that a damaged file is rebuilt, not loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

logger = logging.getLogger("slimadam")

SOURCE = Path(__file__).with_name("compiled.cpp")
FLAGS = (
    "-std=c++17",
    "-O2",
    "-ftree-vectorize",
    "-fvect-cost-model=dynamic",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fopenmp",
    "-shared",
    "-fPIC",
)
DIGEST_BYTES = 32


class BuildError(Exception):
    """Why there is no library, with the remedy."""


@cache
def library() -> ctypes.CDLL | None:
    """The library, built if it is not in the cache; None, after one warning with the reason, if that is impossible."""
    try:
        return _load_or_build()
    except (BuildError, OSError) as error:
        logger.warning("fused=True: the compiled step cannot be built, so what fused=None picks runs: %s", error)
        return None


def _load_or_build() -> ctypes.CDLL:
    compiler = _compiler()
    path = _path(compiler)
    if not _is_intact(path):
        _build(compiler, path)
    try:
        return _load(path)
    except (OSError, AttributeError):
        _build(compiler, path)
        return _load(path)


def _compiler() -> str:
    asked_for = os.environ.get("CXX")
    for name in (asked_for,) if asked_for else ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found is not None:
            return found
    if asked_for:
        raise BuildError(f"CXX={asked_for!r} is no program on PATH; name a C++17 compiler with OpenMP, or unset CXX")
    raise BuildError("no C++ compiler on PATH; install one (Debian: apt install g++) or name it in CXX")


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    loaded.slimadam_step.restype = None
    return loaded


def _path(compiler: str) -> Path:
    return _folder() / f"step-{_key(compiler)}.so"


def _folder() -> Path:
    if chosen := os.environ.get("SLIMADAM_CACHE_DIR"):
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimadam"
    except RuntimeError as error:  # a user without an entry and without HOME, as in containers
        raise BuildError(f"{error}; set SLIMADAM_CACHE_DIR to a folder that can be written") from error


def _key(compiler: str) -> str:
    version = _run([compiler, "--version"])
    parts = [SOURCE.read_text(), " ".join(FLAGS), compiler, version, sys.platform, platform.machine(), _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _processor() -> str:
    """What ``-march=native`` depends on: the model and its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    told = {
        line for line in lines if line.partition("\t")[0].rstrip() in ("model name", "flags", "Features", "CPU part")
    }
    return "\n".join(sorted(told))


def _is_intact(path: Path) -> bool:
    """Whether the file is ours and whole: loading half a library would end the process."""
    try:
        content = path.read_bytes()
        owned = not hasattr(os, "getuid") or path.stat().st_uid in (os.getuid(), 0)
    except OSError:
        return False
    return owned and hashlib.sha256(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]


def _build(compiler: str, path: Path) -> None:
    """Compile into a file of this process's own, then put it in place in one move: several may race."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=path.parent, prefix="building-")  # in the same file system
    except OSError as error:
        raise BuildError(f"{error}; set SLIMADAM_CACHE_DIR to a folder that can be written") from error
    logger.info("compiling the step for fused=True with %s, once for this machine", compiler)
    start = time.perf_counter()
    with folder:
        made = Path(folder.name) / path.name
        _run([compiler, *FLAGS, "-o", str(made), str(SOURCE)])
        content = made.read_bytes()
        made.write_bytes(content + hashlib.sha256(content).digest())
        os.replace(made, path)
    logger.info("compiled in %.0f s: %s", time.perf_counter() - start, path)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run ({error}); name a C++17 compiler in CXX") from error
    if done.returncode:
        said = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()
        raise BuildError(
            f"{command[0]} failed ({'; '.join(said[:3])}); name a C++17 compiler with OpenMP in CXX, such as g++"
        )
    return done.stdout
