"""Philox4x32-10 in 64-bit integer arithmetic of torch, on any device.

Source: Salmon, Moraes, Dror, Shaw 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def philox4x32(counters: Tensor, seed: Tensor) -> Tensor:
    """counters int64 [..., 4], seed int64 [1] -> int64 [..., 4] in [0, 2^32)."""
    seed = seed.reshape(())
    c0, c1, c2, c3 = (counters & WORD).unbind(-1)
    key0, key1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(ROUNDS):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + WEYL[0]) & WORD, (key1 + WEYL[1]) & WORD
    return torch.stack((c0, c1, c2, c3), dim=-1)


def uniform53(hi: Tensor, lo: Tensor) -> Tensor:
    """((hi >> 5) * 2^26 + (lo >> 6)) / 2^53: every step is exact in float64."""
    return ((hi >> 5).double() * 2.0**26 + (lo >> 6).double()) * 2.0**-53


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a * b, by halves of b: the whole product would not fit in int64."""
    low_part = a * (b & 0xFFFF)
    upper = a * (b >> 16) + (low_part >> 16)
    return upper >> 16, ((upper & 0xFFFF) << 16) | (low_part & 0xFFFF)
