"""Checks at the public boundary: each names the argument, what it must be and what came."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from powerkernels._cuda_graph import moved

LOGIT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)
MASK_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    *LOGIT_DTYPES,
)
MAX_SEED = 2**64 - 1


def described(value: object) -> str:
    """A tensor as `float32 [2, 3] on cpu`, anything else as its type and value."""
    if isinstance(value, Tensor):
        return f"{_name(value.dtype)} {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def check_tensor(
    name: str, value: object, dtypes: Sequence[torch.dtype], device: torch.device | None = None
) -> None:
    """A dense tensor of one of `dtypes`, on `device` if given."""
    wanted = " or ".join(_name(dtype) for dtype in dtypes)
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor of {wanted}, got {described(value)}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be {wanted}, got {described(value)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device}, got {described(value)}")


def check_shape(name: str, value: Tensor, shape: Sequence[int]) -> None:
    if value.shape != torch.Size(shape):
        raise ValueError(f"{name} must have shape {list(shape)}, got {described(value)}")


def check_vocab(name: str, logits: Tensor, num_dims: int | None = None) -> None:
    """logits [..., V] with V >= 1, of exactly `num_dims` dimensions if given."""
    if logits.ndim == 0 or (num_dims is not None and logits.ndim != num_dims):
        wanted = "at least 1 dimension" if num_dims is None else f"{num_dims} dimensions"
        raise ValueError(
            f"{name} must have {wanted}, the last the vocabulary, got {described(logits)}"
        )
    if logits.shape[-1] == 0:
        raise ValueError(f"{name} must have a vocabulary of at least 1, got {described(logits)}")


def check_number(
    name: str, value: object, *, low: float, open_low: bool = False, high: float = math.inf
) -> None:
    """A finite real number >= low (> low if open_low) and <= high."""
    wanted = f"a finite number {'>' if open_low else '>='} {low:g}"
    if high < math.inf:
        wanted = f"{wanted} and <= {high:g}"
    real = (numbers.Real, torch.SymFloat, torch.SymInt)
    if isinstance(value, bool) or not isinstance(value, real):
        raise TypeError(f"{name} must be {wanted}, got {described(value)}")
    number = float(value)
    too_low = number < low or (open_low and number == low)
    # Compared, and not asked of math.isfinite: torch.compile may trace a number.
    if not -math.inf < number < math.inf or too_low or number > high:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def check_count(name: str, value: object, *, low: int) -> None:
    """An int >= low."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int >= {low}, got {described(value)}")
    if value < low:
        raise ValueError(f"{name} must be an int >= {low}, got {value}")


def check_cu_seqlens(cu_seqlens: object, device: torch.device) -> None:
    """int32 or int64 [B + 1]; what it holds is checked by `check_bounds`."""
    check_tensor("cu_seqlens", cu_seqlens, INDEX_DTYPES, device)
    assert isinstance(cu_seqlens, Tensor)
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens must have shape [B + 1], got {described(cu_seqlens)}")


def check_bounds(cu_seqlens: Tensor | None, log_prob: Tensor) -> None:
    """cu_seqlens from 0, never falling, to the length of flat log_prob; only on a CPU."""
    if cu_seqlens is None or cu_seqlens.device.type != "cpu":
        return
    bounds = cu_seqlens.long()
    count = log_prob.shape[0]
    if bounds[0] != 0 or bounds[-1] != count or (bounds.diff() < 0).any():
        raise ValueError(
            f"cu_seqlens must start at 0, never fall and end at the {count} entries of log_prob, "
            f"got {bounds.tolist()}"
        )


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """The 64 bits of a seed as int64 [1] on `device`."""
    expected = "seed must be an int or an int64 tensor of one element"
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(f"{expected}, got {described(seed)}")
        return moved("seed", seed.reshape(1), device)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{expected}, got {described(seed)}")
    value = int(seed)
    if not -(2**63) <= value <= MAX_SEED:
        raise ValueError(f"seed must fit in 64 bits, got {value}")
    wrapped = value - 2**64 if value >= 2**63 else value
    # Filled on the device: a copy from the host would wait for it, and cannot be captured.
    return torch.full((1,), wrapped, dtype=torch.int64, device=device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
