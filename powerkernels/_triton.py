"""What the launches of Triton kernels share."""

from __future__ import annotations

import contextlib
from typing import Any

import triton
from torch import Tensor

from powerkernels._cuda_graph import on_device

# The order of a sum's roundings is part of the contract: no contraction but the written one.
EXACT: dict[str, Any] = {"enable_fp_fusion": False}


def power_of_2(n: int) -> int:
    return int(triton.next_power_of_2(n))


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    return on_device(tensor.device)
