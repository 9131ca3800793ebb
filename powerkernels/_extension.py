"""Finds the compiled part, and says which backend serves a device. Nothing else asks.

POWERKERNELS_BACKEND=auto|reference|cpp|triton chooses; auto, the default, takes the compiled one
where there is one. triton takes CPU tensors too where TRITON_INTERPRET=1, for tests.
POWERKERNELS_SIMD=baseline|avx2|avx512 lowers the instruction set of the C++ part.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["reference", "cpp", "triton"]
_CHOICES = ("auto", "reference", "cpp", "triton")

# What this version of the Python side calls; a module that lacks one is from another version.
_REQUIRED = (
    "philox4x32",
    "score_tokens",
    "row_sums",
    "score_tokens_bwd",
    "sample_tokens",
    "support_threshold",
    "sequence_log_likelihood",
    "decode_attention",
    "LaneTransition",
    "move_positions",
    "pack_linear",
    "packed_linear",
    "prefer_huge_pages",
    "DecoderStep",
    "cov_keys",
    "cov_moments",
    "cov_tokens",
    "KeyCandidates",
    "cov_narrow",
    "policy_loss_sums",
    "simd_level",
    "set_simd_level",
    "cuda_devices",
)

# DType of csrc/include/powerkernels/dtype.h
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def extension() -> ModuleType | None:
    """The compiled module `powerkernels._C`, or None."""
    return _load()[0]


def why_missing() -> str | None:
    """Why `extension()` is None, in a line; None if it is there."""
    return _load()[1]


def compiled() -> ModuleType:
    """The compiled module; for code that `backend_for` has sent to it."""
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"the compiled part of powerkernels is missing: {reason}")
    return module


def backend_for(device: torch.device | str) -> Backend:
    """The backend that serves tensors on `device`.

    Raises:
        ValueError: POWERKERNELS_BACKEND names no backend.
        RuntimeError: POWERKERNELS_BACKEND asks for one that cannot serve the device.
    """
    kind = torch.device(device).type
    choice = os.environ.get("POWERKERNELS_BACKEND") or "auto"
    if choice not in _CHOICES:
        raise ValueError(f"POWERKERNELS_BACKEND must be one of {_CHOICES}, got {choice!r}")
    if choice == "reference":
        return "reference"
    if choice != "triton" and kind == "cpu" and extension() is not None:
        return "cpp"
    if choice != "cpp" and kind == "cuda" and why_no_triton() is None:
        return "triton"
    if choice == "triton" and kind == "cpu" and interprets_triton():
        return "triton"
    if choice == "auto":
        return "reference"
    if choice == "cpp":
        reason = why_missing() if kind == "cpu" else f"it serves CPU tensors, not {kind}"
    else:
        reason = why_no_triton() or f"it serves CUDA tensors, not {kind}"
    raise RuntimeError(f"POWERKERNELS_BACKEND={choice}, but that backend is not there: {reason}")


@functools.cache
def why_no_triton() -> str | None:
    """Why the Triton kernels cannot be used, in a line; None if they can."""
    try:
        importlib.import_module("triton")
    except Exception as error:  # a triton for another Python or another C library
        return f"triton does not import: {error}"
    return None


def interprets_triton() -> bool:
    """Whether Triton kernels run in its interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1" and why_no_triton() is None


def num_threads() -> int:
    """Threads for the C++ part: torch's own count, whose thread team it borrows."""
    return torch.get_num_threads()


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module("powerkernels._C")
    except ModuleNotFoundError:
        return None, "it was not built (no C++ compiler when powerkernels was installed?)"
    except ImportError as error:  # built for another Python or another C++ runtime
        return None, f"it does not load: {error}"
    missing = [name for name in _REQUIRED if not hasattr(module, name)]
    if missing:
        return None, f"it is from another version: it lacks {', '.join(missing)}"
    try:
        module.simd_level()
    except ValueError as error:
        return None, f"POWERKERNELS_SIMD: {error}"
    return module, None
