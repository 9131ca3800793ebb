"""Builds powerkernels._C with CMake; the metadata is in pyproject.toml.

POWERKERNELS_CUDA=auto|on|off decides about the CUDA part: auto (the default) builds it where there
is an nvcc, on fails without one, off leaves it out. Nothing here asks for a GPU.

The extension is optional: with auto or off, a machine without C++ compiler, CMake or ninja, or a
build that fails, still installs powerkernels as pure Python, and says so on stderr. CMAKE_ARGS is
passed on, e.g. CMAKE_ARGS="-DCMAKE_CUDA_ARCHITECTURES=90".
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeExtension(Extension):
    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[], optional=True)


class CMakeBuild(build_ext):
    def run(self) -> None:
        for extension in self.extensions:
            self.build_extension(extension)

    def build_extension(self, ext: Extension) -> None:
        cuda = os.environ.get("POWERKERNELS_CUDA", "auto").lower()
        if cuda not in ("auto", "on", "off"):
            raise SystemExit(f"POWERKERNELS_CUDA must be auto, on or off, got {cuda!r}")
        try:
            self._build(ext, cuda)
            return
        except (OSError, ImportError, RuntimeError, subprocess.CalledProcessError) as error:
            if cuda == "on":
                raise SystemExit(f"POWERKERNELS_CUDA=on, and the build failed: {error}") from error
            reason = error
        if cuda == "auto" and find_nvcc():
            warn(f"the build with CUDA failed ({reason}); trying without")
            try:
                self._build(ext, "off")
                return
            except (OSError, ImportError, RuntimeError, subprocess.CalledProcessError) as error:
                reason = error
        # A stale module must not pass for the one that failed to build.
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        warn(
            f"the compiled part was not built ({reason}).\n"
            "  powerkernels is installed as pure Python and uses its torch reference.\n"
            "  For the compiled part: install g++ or clang++, then install powerkernels again."
        )

    def _build(self, ext: Extension, cuda: str) -> None:
        import pybind11

        nvcc = None if cuda == "off" else find_nvcc()
        if cuda == "on" and nvcc is None:
            raise RuntimeError("nvcc is neither on PATH nor under CUDA_HOME or CUDA_PATH")
        cmake = find_tool("cmake")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # One folder per Python and choice of CUDA: rebuilds in the tree compile only what changed.
        tag = f"{sys.implementation.cache_tag}-{'cuda' if nvcc else 'cpu'}"
        build = ROOT / "build" / f"cmake-{tag}"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPOWERKERNELS_CUDA={'ON' if nvcc else 'OFF'}",
            f"-DPOWERKERNELS_VERSION={self.distribution.get_version()}",
            f"-DPOWERKERNELS_MODULE_NAME={target.name}",
        ]
        if nvcc:
            configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        subprocess.run(configure, check=True)
        chosen = "CMAKE_BUILD_PARALLEL_LEVEL" in os.environ
        jobs = [] if chosen else ["-j", str(os.cpu_count() or 1)]
        subprocess.run([cmake, "--build", str(build), *jobs], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Replaced, not overwritten: a running process may have the old file mapped.
        fresh = target.with_name(target.name + ".new")
        shutil.copy2(build / target.name, fresh)
        fresh.replace(target)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


def find_tool(name: str) -> str:
    """The program of that name: on PATH, else from its Python package."""
    found = shutil.which(name)
    if found is None:
        module = __import__(name)
        suffix = ".exe" if sys.platform == "win32" else ""
        directory = getattr(module, "CMAKE_BIN_DIR", None) or getattr(module, "BIN_DIR", "")
        found = shutil.which(str(Path(directory) / f"{name}{suffix}"))
    if found is None:
        raise RuntimeError(f"{name} was not found")
    return found


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    inside = shutil.which(str(Path(home) / "bin" / "nvcc")) if home else None
    return inside or shutil.which("nvcc")


def warn(text: str) -> None:
    print(f"powerkernels: WARNING: {text}", file=sys.stderr, flush=True)


setup(
    ext_modules=[CMakeExtension("powerkernels._C")],
    cmdclass={"build_ext": CMakeBuild},
)
