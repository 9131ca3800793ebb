"""Philox4x32-10 as a torch op, and uniforms from its words."""

from __future__ import annotations

import torch
from torch import Tensor

from powerkernels import _extension
from powerkernels._arguments import check_tensor, described, seed_tensor
from powerkernels.philox import reference


@torch.library.custom_op("powerkernels::philox4x32", mutates_args=())
def _philox4x32(counters: Tensor, seed: Tensor) -> Tensor:
    if _extension.backend_for(counters.device) == "cpp":
        counters = counters.contiguous()
        words = torch.empty_like(counters)
        _extension.compiled().philox4x32(
            counters=counters.data_ptr(),
            seed=int(seed.item()) % 2**64,
            count=counters.numel() // 4,
            out=words.data_ptr(),
        )
        return words
    return reference.philox4x32(counters, seed)


@_philox4x32.register_fake
def _(counters: Tensor, seed: Tensor) -> Tensor:
    return torch.empty(counters.shape, dtype=counters.dtype, device=counters.device)


def philox4x32(counters: Tensor, *, seed: int | Tensor) -> Tensor:
    """Philox4x32-10: four random 32-bit words per counter.

    Args:
        counters: int64 [..., 4], the words c0..c3 = (index, position, step, chain); the low 32 bits
            of each count.
        seed: the 64-bit key, an int or an int64 tensor of one element; its low word is k0.

    Returns:
        int64 [..., 4], values in [0, 2^32).

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype or device.

    Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", section 3.3.
    """
    check_tensor("counters", counters, (torch.int64,))
    if counters.ndim == 0 or counters.shape[-1] != 4:
        raise ValueError(f"counters must have 4 as its last size, got {described(counters)}")
    return _philox4x32(counters, seed_tensor(seed, counters.device))


def uniform53(hi: Tensor, lo: Tensor) -> Tensor:
    """A float64 uniform in [0, 1) with 53 random bits from two words.

    Args:
        hi: int64 [...], values in [0, 2^32), as `philox4x32` returns them; its upper 27 bits are
            the upper bits of the result.
        lo: int64 [...], the same; its upper 26 bits are the lower ones.

    Returns:
        float64 [...]: ((hi >> 5) * 2^26 + (lo >> 6)) / 2^53.
    """
    return reference.uniform53(hi, lo)
