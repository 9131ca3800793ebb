"""What the launches of Triton kernels share."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

# The order of a sum's roundings is part of the contract: no contraction but the written one.
EXACT: dict[str, Any] = {"enable_fp_fusion": False}


def power_of_2(n: int) -> int:
    return int(triton.next_power_of_2(n))


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()
