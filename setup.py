"""Build the compiled step as plain shared libraries, without the headers of Python or torch.

One wheel then serves every Python and torch of a platform. Without a compiler the installation goes on without them.
"""

from __future__ import annotations

import os
import platform
import runpy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

BUILD = runpy.run_path(str(Path(__file__).parent / "kernels" / "cpp" / "build.py"))
MSVC_FLAGS = {"baseline": [], "avx2": ["/arch:AVX2"], "avx512": ["/arch:AVX512"]}
IS_X86 = platform.machine() in ("x86_64", "AMD64") and "arm64" not in os.environ.get("ARCHFLAGS", "")


class BuildLibraries(build_ext):
    """Build libraries for ctypes instead of modules of Python."""

    def finalize_options(self) -> None:
        """Build all levels at once."""
        super().finalize_options()
        self.parallel = self.parallel or len(self.extensions)

    def get_ext_filename(self, fullname: str) -> str:
        """Return a name that says nothing of the Python that builds it."""
        return os.path.join(*fullname.split(".")) + BUILD["SUFFIX"]

    def build_extension(self, ext: Extension) -> None:
        """Compile the one source with the flags of the compiler at hand, and those of the library's level."""
        level = ext.name.rpartition("_")[2]
        if self.compiler.compiler_type == "msvc":
            flags, link_flags = ["/std:c++17", "/O2", "/fp:precise", *MSVC_FLAGS[level]], []
        else:
            flags = [*BUILD["FLAGS"], "-g0", "-fno-wrapv", *(BUILD["LEVELS"][level] if IS_X86 else [])]
            link_flags = ["-pthread"]
        objects = self.compiler.compile(
            ext.sources,
            output_dir=os.path.join(self.build_temp, level),
            macros=ext.define_macros,
            extra_postargs=flags,
            depends=ext.depends,
        )
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=link_flags, target_lang="c++"
        )
        BUILD["seal"](Path(self.get_ext_fullpath(ext.name)))


class TagLibraries(bdist_wheel):
    """Tag wheels as made for a platform and any Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return Python, ABI and platform."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            f"slimadam.kernels.cpp.step_{level}",
            sources=["kernels/cpp/adamw.cpp"],
            depends=["kernels/cpp/threads.h"],
            define_macros=[("SLIMADAM_SOURCE", f'"{BUILD["source_digest"]()}"')],
            language="c++",
            optional=True,
        )
        for level in (BUILD["LEVELS"] if IS_X86 else ["baseline"])
    ],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": TagLibraries},
)
