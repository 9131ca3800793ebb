"""Ceilings: what this machine does at most, measured in the same run.

Beside each case its ceiling is one more variant, taken in turn with the others: a copy or a read of
as many bytes, or its matrix products alone. For the roofline the run measures all three once, at
sizes that fill the machine.
"""

from __future__ import annotations

import torch

from bench.harness import timing
from bench.harness.cases import Call, Size

# Bytes of the roofline's copy and read, N of its N x N x N product.
BYTES: dict[Size, int] = {"device": 2**31, "host": 2**28, "quick": 2**26}
MATMUL: dict[Size, int] = {"device": 8192, "host": 512, "quick": 128}
SECONDS: dict[Size, float] = {"device": 2.0, "host": 4.0, "quick": 0.1}
DTYPES = (torch.bfloat16, torch.float32)


def copy_of(num_bytes: int, device: torch.device) -> Call:
    """A call that reads half of the bytes and writes half of them."""
    words = max(1, num_bytes // 16)
    source = torch.zeros(words, dtype=torch.float64, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def read_of(num_bytes: int, device: torch.device) -> Call:
    """A call that reads the bytes: a sum of float32, of 16-byte words and no conversions."""
    source = torch.zeros(max(1, num_bytes // 4), dtype=torch.float32, device=device)
    return lambda: source.sum()


def measure(device: torch.device, size: Size) -> dict[str, float]:
    """GB/s of copy and read, TFLOP/s of a product in each dtype."""
    num_bytes, n = BYTES[size], MATMUL[size]
    calls = {"copy": copy_of(num_bytes, device), "read": read_of(num_bytes, device)}
    for dtype in DTYPES:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        calls[f"matmul {str(dtype).removeprefix('torch.')}"] = lambda a=a, b=b: a @ b
    samples = timing.interleaved(
        {name: [call] for name, call in calls.items()},
        device,
        timing.Plan(SECONDS[size], evict=False),
    )
    found = {}
    for name, taken in samples.items():
        median = timing.median(taken.sustained or taken.cold)
        if name.startswith("matmul"):
            found[f"{name}, TFLOP/s"] = 2 * n**3 / median / 1e12
        else:
            found[f"{name}, GB/s"] = num_bytes / median / 1e9
    return found
