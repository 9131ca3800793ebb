"""The caches of all layers, as one call moves positions in all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from powerkernels._arguments import described


class LaneCaches:
    """Keys and values of all layers, two copies of each, and a table of where they are.

    To be made before a CUDA graph is captured: the table is copied to the device.

    Args:
        copies: [2, C · S, W] each, of any dtypes and W and on one device: position p of lane l is
            row l · S + p of either copy. The two last dimensions contiguous.
        num_positions: S.

    Raises:
        TypeError, ValueError: an argument, by name.
    """

    def __init__(self, copies: Sequence[Tensor], num_positions: int) -> None:
        self.copies = tuple(copies)
        _check(self.copies, num_positions)
        self.device = self.copies[0].device
        self.num_positions = num_positions
        self.num_lanes = self.copies[0].shape[1] // num_positions
        rows = [
            (copy.data_ptr(), other.data_ptr(), copy.shape[1] * copy.element_size())
            for copy, other in self.copies
            if copy.numel()
        ]
        # int64 [T, 3]: addresses of copy 0 and of copy 1, bytes of a row.
        self.table = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3).to(self.device)
        self.num_tensors = len(rows)
        self.max_row_bytes = max((row[2] for row in rows), default=0)
        # What all addresses and rows are multiples of: 1, 2, 4, 8 or 16 bytes.
        self.word_bytes = math.gcd(16, *(number for row in rows for number in row))


def _check(copies: tuple[Tensor, ...], num_positions: int) -> None:
    if num_positions < 1:
        raise ValueError(f"num_positions must be >= 1, got {num_positions!r}")
    if not copies:
        raise ValueError("copies must hold at least one tensor, got none")
    for tensor in copies:
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise TypeError(f"copies must be dense tensors, got {described(tensor)}")
        if tensor.ndim != 3 or tensor.shape[0] != 2 or tensor.shape[1] % num_positions:
            raise ValueError(
                f"copies must be [2, C · S, W] with S = {num_positions}, got {described(tensor)}"
            )
        if not tensor[0].is_contiguous():
            raise ValueError(f"copies must have contiguous rows, got strides {tensor.stride()}")
        if tensor.shape[1] != copies[0].shape[1] or tensor.device != copies[0].device:
            raise ValueError(
                f"copies must agree in C · S and device, got {described(tensor)} beside "
                f"{described(copies[0])}"
            )
