"""Builds powerkernels._C with CMake (csrc/build.py); the metadata is in pyproject.toml.

POWERKERNELS_CUDA=auto|on|off decides about the CUDA part: auto (the default) builds it where there
is an nvcc, on fails without one, off leaves it out. Nothing here asks for a GPU.

The extension is optional: with auto or off, a machine without C++ compiler, CMake or ninja, or a
build that fails, still installs powerkernels as pure Python, and says so on stderr. CMAKE_ARGS is
passed on, e.g. CMAKE_ARGS="-DCMAKE_CUDA_ARCHITECTURES=90".
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def builder() -> ModuleType:
    """csrc/build.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("csrc_build", ROOT / "csrc" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


csrc_build = builder()


class CMakeExtension(Extension):
    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[], optional=True)


class CMakeBuild(build_ext):
    def run(self) -> None:
        for extension in self.extensions:
            self.build_extension(extension)

    def build_extension(self, ext: Extension) -> None:
        cuda = os.environ.get("POWERKERNELS_CUDA", "auto").lower()
        if cuda not in csrc_build.CUDA:
            raise SystemExit(f"POWERKERNELS_CUDA must be auto, on or off, got {cuda!r}")
        has_nvcc = csrc_build.find_nvcc() is not None
        try:
            self._build(ext, cuda == "on" or (cuda == "auto" and has_nvcc))
            return
        except csrc_build.BuildError as error:
            if cuda == "on":
                raise SystemExit(f"POWERKERNELS_CUDA=on, and the build failed: {error}") from error
            reason = error
        if cuda == "auto" and has_nvcc:
            warn(f"the build with CUDA failed ({reason}); trying without")
            try:
                self._build(ext, False)
                return
            except csrc_build.BuildError as error:
                reason = error
        # A stale module must not pass for the one that failed to build.
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        warn(
            f"the compiled part was not built ({reason}).\n"
            "  powerkernels is installed as pure Python and uses its torch reference.\n"
            "  For the compiled part: install g++ or clang++, then install powerkernels again."
        )

    def _build(self, ext: Extension, cuda: bool) -> None:
        csrc_build.build(
            Path(self.get_ext_fullpath(ext.name)).resolve(),
            version=self.distribution.get_version(),
            cuda=cuda,
            debug=bool(self.debug),
        )

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


def warn(text: str) -> None:
    print(f"powerkernels: WARNING: {text}", file=sys.stderr, flush=True)


setup(
    ext_modules=[CMakeExtension("powerkernels._C")],
    cmdclass={"build_ext": CMakeBuild},
)
