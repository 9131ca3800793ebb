"""`powerkernels doctor`: what is on this machine, which backend runs where, and what to do about
what is missing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

Status = Literal["ok", "missing", "broken"]

OLDEST_PYTHON = (3, 10)
_COMMAND_SECONDS = 10  # a compiler answers --version in milliseconds; one that hangs is no use

REBUILD = (
    "reinstall powerkernels: pip install --force-reinstall --no-deps powerkernels "
    "(in a checkout: pip install -e .)"
)
_ENVIRONMENT = (
    "POWERKERNELS_BACKEND",
    "POWERKERNELS_SIMD",
    "POWERKERNELS_CUDA",
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
)


@dataclass(frozen=True)
class Check:
    """One line of the report. `missing` is fine to live with, `broken` is not."""

    name: str
    status: Status
    detail: str
    advice: str | None = None


def examine() -> list[Check]:
    """Look at everything; never raises for something absent."""
    checks: list[Callable[[], list[Check]]] = [
        _python,
        _torch,
        _triton,
        _numpy,
        _extension,
        _backends,
        _build_tools,
        _cuda,
        _device_loop,
        _demo_packages,
        _environment,
    ]
    return [check for group in checks for check in group()]


def is_healthy(checks: list[Check]) -> bool:
    return all(check.status != "broken" for check in checks)


def report_json(checks: list[Check]) -> dict[str, Any]:
    return {"ok": is_healthy(checks), "checks": [asdict(check) for check in checks]}


def report_text(checks: list[Check]) -> str:
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.status:<7}  {check.name:<{width}}  {check.detail}")
        if check.advice:
            lines.append(f"{'':<7}  {'':<{width}}  -> {check.advice}")
    broken = [check.name for check in checks if check.status == "broken"]
    lines.append("")
    lines.append(
        f"broken: {', '.join(broken)}"
        if broken
        else "everything that powerkernels requires is here"
    )
    return "\n".join(lines)


def _python() -> list[Check]:
    detail = (
        f"{platform.python_version()} at {sys.executable}, {platform.system()} {platform.machine()}"
    )
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return [Check("python", "broken", detail, f"use Python {oldest} or newer")]
    return [Check("python", "ok", detail)]


def _torch() -> list[Check]:
    try:
        import torch
    except Exception as error:  # a torch with a missing library raises OSError
        return [Check("torch", "broken", _first_line(error), "pip install torch")]
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return [Check("torch", "ok", f"{torch.__version__}, {cuda}, {torch.get_num_threads()} threads")]


def _numpy() -> list[Check]:
    version = _version("numpy")
    return [
        Check("numpy", "ok", version)
        if version
        else Check("numpy", "broken", "not installed", "pip install numpy")
    ]


def _triton() -> list[Check]:
    version = _version("triton")
    if version:
        return [Check("triton", "ok", version)]
    advice = (
        "pip install triton"
        if sys.platform == "linux"
        else "needed for the GPU kernels only, which run on Linux"
    )
    return [Check("triton", "missing", "not installed", advice)]


def _extension() -> list[Check]:
    finder = _finder()
    if finder is None:
        return [Check("compiled part", "missing", "cannot be looked at without torch")]
    module = finder.extension()
    if module is None:
        why = finder.why_missing() or "not built"
        return [
            Check(
                "compiled part",
                "missing",
                f"{why}; the reference in torch is used",
                f"get a C++ compiler, then {REBUILD}",
            )
        ]
    try:
        level = module.simd_level()
    except Exception as error:
        return [Check("compiled part", "broken", _first_line(error), REBUILD)]
    return [Check("compiled part", "ok", f"{Path(str(module.__file__)).name}, SIMD {level}")]


def _backends() -> list[Check]:
    finder = _finder()
    checks: list[Check] = []
    if finder is None:
        return checks
    for device in _devices():
        try:
            checks.append(Check(f"backend on {device}", "ok", str(finder.backend_for(device))))
        except Exception as error:  # POWERKERNELS_BACKEND asks for what is not there
            checks.append(
                Check(
                    f"backend on {device}",
                    "broken",
                    _first_line(error),
                    "unset POWERKERNELS_BACKEND, or set it to auto",
                )
            )
    return checks


def _finder() -> ModuleType | None:
    """`powerkernels._extension`; None without a torch that imports, which `_torch` reports."""
    try:
        return importlib.import_module("powerkernels._extension")
    except Exception:
        return None


def _devices() -> list[Any]:
    import torch

    names = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [torch.device(name) for name in names]


def _build_tools() -> list[Check]:
    compiler = os.environ.get("CXX") or next(
        (c for c in ("c++", "g++", "clang++") if shutil.which(c)), None
    )
    checks = [
        _program(
            "C++ compiler",
            compiler,
            "install g++ or clang++ to build the compiled part (a wheel needs none)",
        )
    ]
    for name in ("cmake", "ninja"):
        checks.append(
            _program(
                name, name, f"pip install {name} (pip does so itself when it builds powerkernels)"
            )
        )
    return checks


def _cuda() -> list[Check]:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc") or (str(Path(home) / "bin" / "nvcc") if home else None)
    checks = [
        _program(
            "nvcc",
            nvcc,
            "needed to build the CUDA part only: install the CUDA toolkit, put nvcc on PATH, "
            "and reinstall",
            version_line=-2,
        )
    ]
    try:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        names = [torch.cuda.get_device_name(i) for i in range(count)]
        built_with_cuda = torch.version.cuda is not None
        driver = _driver_version()
    except Exception as error:  # a driver that does not answer must not end the report
        return [
            *checks,
            Check("CUDA device", "missing", _first_line(error), "check the driver with nvidia-smi"),
        ]
    driver_text = f", driver {driver}" if driver else ""
    if names:
        checks.append(Check("CUDA device", "ok", f"{', '.join(names)}{driver_text}"))
    elif not built_with_cuda:
        advice = "with a GPU: install a torch build that has CUDA (pip install torch)"
        checks.append(
            Check("CUDA device", "missing", f"torch is built without CUDA{driver_text}", advice)
        )
    else:
        advice = "with a GPU: check the driver with nvidia-smi, and CUDA_VISIBLE_DEVICES"
        checks.append(Check("CUDA device", "missing", f"torch sees none{driver_text}", advice))
    return checks


def _device_loop() -> list[Check]:
    """Whether the sampler can leave its loop to the GPU; without it the host drives each step."""
    try:
        from powerkernels.power_sampling.graph_loop import why_no_graph_loop

        why = why_no_graph_loop("cuda")
    except Exception as error:  # without torch, or with a driver that does not answer
        why = _first_line(error)
    if why is None:
        return [Check("device loop", "ok", "the sampler's loop runs in one CUDA graph")]
    return [Check("device loop", "missing", f"{why}; the host drives the sampler's steps")]


def _driver_version() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    answer = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return answer.splitlines()[0].strip() if answer else None


def _demo_packages() -> list[Check]:
    from powerkernels.integrations.smollm2 import (
        INSTALL_PACKAGE,
        INSTALL_TRANSFORMERS,
        PACKAGE,
        converted_folder,
    )

    checks = []
    for name, purpose in (
        ("transformers", "models"),
        ("gguf", "converting SmolLM2"),
        ("accelerate", "converting SmolLM2"),
        ("matplotlib", "the demo's picture"),
    ):
        version = _version(name)
        if version:
            checks.append(Check(name, "ok", version))
        else:
            checks.append(
                Check(name, "missing", f"not installed; for {purpose}", INSTALL_TRANSFORMERS)
            )
    version = _version(PACKAGE)
    folder = converted_folder()
    state = f"converted in {folder}" if folder.is_dir() else "converted on first use"
    if version:
        checks.append(Check("smollm2", "ok", f"{PACKAGE} {version}, {state}"))
    elif folder.is_dir():
        checks.append(Check("smollm2", "ok", state))
    else:
        checks.append(
            Check(
                "smollm2",
                "missing",
                f"{PACKAGE} is not installed; the bundled model",
                INSTALL_PACKAGE,
            )
        )
    return checks


def _environment() -> list[Check]:
    present = [f"{name}={os.environ[name]}" for name in _ENVIRONMENT if name in os.environ]
    return [Check("environment", "ok", " ".join(present))] if present else []


def _program(name: str, command: str | None, advice: str, *, version_line: int = 0) -> Check:
    path = shutil.which(command.split()[0]) if command else None
    if path is None:
        return Check(name, "missing", f"{command} not found" if command else "not found", advice)
    answer = _output([path, "--version"])
    if not answer:
        return Check(name, "missing", f"{path} does not answer --version", advice)
    lines = answer.splitlines()
    line = lines[version_line] if len(lines) >= abs(version_line) else lines[0]
    return Check(name, "ok", f"{line.strip()} at {path}")


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
