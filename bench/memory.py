"""How much memory a call takes at its peak, beyond what it began with."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"


def peak_bytes(call: Callable[[], object], device: torch.device | str = "cpu") -> int | None:
    """Peak memory of `call()` above that before it; None where the system does not tell."""
    gc.collect()
    place = torch.device(device)
    if place.type == "cuda":
        torch.cuda.synchronize(place)
        torch.cuda.reset_peak_memory_stats(place)
        before = torch.cuda.memory_allocated(place)
        result = call()
        torch.cuda.synchronize(place)
        del result
        return torch.cuda.max_memory_allocated(place) - before
    try:
        _give_back_what_is_free()
        CLEAR_REFS.write_text(RESET_PEAK)
        before = _kilobytes("VmRSS")
        result = call()
        peak = _kilobytes("VmHWM")
    except OSError:
        return None
    del result
    return 1024 * (peak - before)


def _give_back_what_is_free() -> None:
    """Freed memory that the C library keeps would hide as much of the call's own."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _kilobytes(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise OSError(f"{STATUS} has no {field}")
