"""Builds powerkernels._C with CMake: for setup.py, and in place by hand.

    python csrc/build.py                                  # CUDA where there is an nvcc
    python csrc/build.py --cuda on --architectures 90     # for a Hopper GPU alone

In place it needs a C++ compiler, cmake, ninja and pybind11, and neither pip nor setuptools: a
checkout on a machine that cannot install anything runs from where it is. Nothing here asks for a
GPU. CMAKE_ARGS is passed on.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "powerkernels"
CUDA = ("auto", "on", "off")
# What a build that cannot be raises; each says why.
BuildError = (OSError, ImportError, RuntimeError, subprocess.CalledProcessError)


def build(
    target: Path,
    *,
    version: str,
    cuda: bool,
    debug: bool = False,
    architectures: str | None = None,
) -> None:
    """Compile the extension and put it at `target`.

    Args:
        target: the module's file, with its ABI suffix; replaced only by a build that went well.
        version: what the module says it is.
        cuda: with the CUDA part.
        debug: without optimisation.
        architectures: of the CUDA part, as CMake takes them, e.g. "90"; None is CMakeLists.txt's.

    Raises:
        RuntimeError: a tool is missing; the message names it.
        subprocess.CalledProcessError: the compiler failed.
    """
    import pybind11

    nvcc = find_nvcc() if cuda else None
    if cuda and nvcc is None:
        raise RuntimeError("nvcc is neither on PATH nor under CUDA_HOME or CUDA_PATH")
    cmake = find_tool("cmake")
    # One folder per Python and choice of CUDA: rebuilds in the tree compile only what changed.
    folder = folder_of(f"cmake-{sys.implementation.cache_tag}-{'cuda' if nvcc else 'cpu'}")
    folder.mkdir(parents=True, exist_ok=True)
    configure = [
        cmake,
        "-S",
        str(ROOT),
        "-B",
        str(folder),
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
        f"-DCMAKE_BUILD_TYPE={'Debug' if debug else 'Release'}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPOWERKERNELS_CUDA={'ON' if nvcc else 'OFF'}",
        f"-DPOWERKERNELS_VERSION={version}",
        f"-DPOWERKERNELS_MODULE_NAME={target.name}",
    ]
    if nvcc:
        configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
    if architectures:
        configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
    configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
    subprocess.run(configure, check=True)
    chosen = "CMAKE_BUILD_PARALLEL_LEVEL" in os.environ
    jobs = [] if chosen else ["-j", str(os.cpu_count() or 1)]
    subprocess.run([cmake, "--build", str(folder), *jobs], check=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Replaced, not overwritten: a running process may have the old file mapped.
    fresh = target.with_name(target.name + ".new")
    shutil.copy2(folder / target.name, fresh)
    fresh.replace(target)


def folder_of(tag: str) -> Path:
    """What the compiler writes."""
    return ROOT / "build" / tag


def in_place() -> Path:
    """The file of the extension of this Python in the checkout."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return PACKAGE / f"_C{suffix}"


def version() -> str:
    """The package's, read and not imported: torch need not be there."""
    text = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if found is None:
        raise RuntimeError("powerkernels/__init__.py names no version")
    return found[1]


def find_tool(name: str) -> str:
    """The program of that name: on PATH, else from its Python package."""
    found = shutil.which(name)
    if found is None:
        try:
            module = __import__(name)
        except ModuleNotFoundError as error:
            raise RuntimeError(f"{name} was not found (pip install {name})") from error
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cuda", choices=CUDA, default=os.environ.get("POWERKERNELS_CUDA", "auto"))
    parser.add_argument("--architectures", help='of the CUDA part, e.g. "90"')
    parser.add_argument("--version", action="version", version=version())
    options = parser.parse_args(argv)
    cuda = options.cuda == "on" or (options.cuda == "auto" and find_nvcc() is not None)
    try:
        build(in_place(), version=version(), cuda=cuda, architectures=options.architectures)
    except BuildError as error:
        print(f"csrc/build.py: powerkernels._C was not built: {error}", file=sys.stderr)
        return 1
    print(f"csrc/build.py: {in_place()}, {'with' if cuda else 'without'} CUDA")
    return 0


if __name__ == "__main__":
    sys.exit(main())
