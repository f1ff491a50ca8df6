"""The library of the compiled step: the one that was built with the package, or one that is built at its first use.

The bytes of either end with their own hash, so that a damaged file is not loaded. A library that is built later lies in
``$SLIMADAM_CACHE_DIR``, else in ``slimadam`` in the user's cache folder. Its name is a hash of all that went into it.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

logger = logging.getLogger("slimadam")

SOURCE = Path(__file__).with_name("adamw.cpp")
HEADER = SOURCE.with_name("threads.h")
SUFFIX = ".dll" if sys.platform == "win32" else ".so"
FLAGS = (
    "-std=c++17",
    "-O2",
    "-ftree-vectorize",
    "-fvect-cost-model=dynamic",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fopenmp-simd",
    "-fvisibility=hidden",
    "-pthread",
)
LEVELS = {
    "baseline": ("-msse4.2", "-mpopcnt"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
}
"""Instructions that a library built with the package may use on x86, as torch's own kernels of these levels do."""


class _BuildError(Exception):
    """The reason that there is no library, with the remedy."""


@cache
def library() -> ctypes.CDLL | None:
    """Return the library, built if need be; None, after one warning with the reason, if that is impossible."""
    try:
        loaded = _installed() or _load_or_build()
    except (_BuildError, OSError) as error:
        logger.warning(
            "the compiled step was not built with slimadam and cannot be built now, so slower ones run: %s", error
        )
        return None
    loaded.slimadam_step.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p, ctypes.c_int64)
    loaded.slimadam_step.restype = None
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=loaded.slimadam_forked)
    return loaded


def source_digest() -> str:
    """Return a hash of the source, by which a library is known to fit it."""
    return hashlib.sha256(SOURCE.read_bytes() + HEADER.read_bytes()).hexdigest()[:32]


def seal(path: Path) -> None:
    """Add a hash of its bytes to a library, by which damage is seen before it is loaded."""
    content = path.read_bytes()
    path.write_bytes(content + hashlib.sha256(content).digest())


def _installed() -> ctypes.CDLL | None:
    """Return the library that was built with the package for this processor; None if there is none of this source."""
    return _found(SOURCE.with_name(f"step_{_level()}{SUFFIX}"))


def _found(path: Path) -> ctypes.CDLL | None:
    try:
        return _load(path) if _is_intact(path) else None
    except (OSError, AttributeError):
        return None


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    loaded.slimadam_source.restype = ctypes.c_char_p
    if loaded.slimadam_source() != source_digest().encode():
        raise OSError(f"{path} was built of another source")
    return loaded


def _level() -> str:
    import torch  # not needed to build

    capability = torch.backends.cpu.get_cpu_capability().lower()
    return capability if capability in LEVELS else "baseline"


def _load_or_build() -> ctypes.CDLL:
    compiler = _compiler()
    path = _path(compiler)
    loaded = _found(path)
    if loaded is None:
        _build(compiler, path)
        loaded = _load(path)
    return loaded


def _compiler() -> list[str]:
    """Return the program and the options that it is always called with."""
    asked_for = os.environ.get("CXX")
    for name, *options in (shlex.split(asked_for),) if asked_for else (["c++"], ["g++"], ["clang++"]):
        found = shutil.which(name)
        if found is not None:
            return [found, *options]
    if asked_for:
        raise _BuildError(f"CXX={asked_for!r} is no program on PATH; name a C++17 compiler, or unset CXX")
    raise _BuildError("no C++ compiler on PATH; install one (Debian: apt install g++) or name it in CXX")


def _path(compiler: list[str]) -> Path:
    """Return the file of the library that this compiler builds on this machine, named by all that goes into it."""
    version = _run([*compiler, "--version"])
    parts = [source_digest(), " ".join(FLAGS), *compiler, version, sys.platform, platform.machine(), _processor()]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    name = f"step-{digest}{SUFFIX}"
    if chosen := os.environ.get("SLIMADAM_CACHE_DIR"):
        return Path(chosen, name)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "slimadam", name)
    except RuntimeError as error:  # a user without an entry and without HOME, as in containers
        raise _BuildError(f"{error}; set SLIMADAM_CACHE_DIR to a folder that can be written") from error


def _processor() -> str:
    """Return the model and its instruction sets, on which ``-march=native`` depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    keys = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.partition("\t")[0].rstrip() in keys}))


def _is_intact(path: Path) -> bool:
    """Return whether the file is ours and complete: loading half a library would end the process."""
    try:
        content = path.read_bytes()
        owned = not hasattr(os, "getuid") or path.stat().st_uid in (os.getuid(), 0)
    except OSError:
        return False
    return owned and hashlib.sha256(content[:-32]).digest() == content[-32:]


def _build(compiler: list[str], path: Path) -> None:
    """Compile into a file of this process's own, then move it into place: several processes may race."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=path.parent, prefix="building-")  # in the same file system
    except OSError as error:
        raise _BuildError(f"{error}; set SLIMADAM_CACHE_DIR to a folder that can be written") from error
    logger.warning(
        "the compiled step was not built with slimadam; compiling it with %s, once for this machine",
        shlex.join(compiler),
    )
    start = time.perf_counter()
    with folder:
        made = Path(folder.name) / path.name
        source = f'-DSLIMADAM_SOURCE="{source_digest()}"'
        _run([*compiler, *FLAGS, "-march=native", source, "-shared", "-fPIC", "-o", str(made), str(SOURCE)])
        if not made.is_file():
            raise _BuildError(f"{compiler[0]} has made nothing; name a C++17 compiler in CXX, such as g++")
        seal(made)
        os.replace(made, path)
    logger.info("compiled in %.0f s: %s", time.perf_counter() - start, path)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise _BuildError(f"{command[0]} cannot be run ({error}); name a C++17 compiler in CXX") from error
    if done.returncode:
        said = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()
        raise _BuildError(f"{command[0]} failed ({'; '.join(said[:3])}); name a C++17 compiler in CXX, such as g++")
    return done.stdout
