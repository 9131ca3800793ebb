"""Launches the Triton kernels of decode attention: sizes, strides and blocks."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from powerkernels._triton import EXACT, device_of, power_of_2
from powerkernels.decode_attention import kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPLIT = kernels.SPLIT.value
LOG2_E = kernels.LOG2_E.value

# A larger head would take more registers and shared memory than there are.
MAX_SIZE = 256
# Query heads of a program, at least those that a tensor core multiplies at a time. Float32 has none
# and would spill with more, and with larger tiles.
MIN_GROUP, MAX_GROUP, MAX_GROUP_FLOAT32 = 16, 32, 16
# Keys, and values, that a program takes at a time; two of both are on their way in 64 KB.
TILE_BYTES, TILE_BYTES_FLOAT32 = 16384, 8192
MIN_CHUNK, MAX_CHUNK = 16, 64
# Unaligned rows pass through registers: no tile may lie there ahead of its turn.
WARPS, STAGES, UNALIGNED_STAGES = 4, 3, 1
VECTOR_BYTES = 16
# Columns that a warp merges, four a thread.
MERGED_COLUMNS = 128


def serves(query: Tensor, value: Tensor) -> bool:
    return query.dtype in DTYPES and max(query.shape[2], value.shape[3]) <= MAX_SIZE


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """See the reference; the last dimensions are contiguous."""
    lanes, heads, head_size = query.shape
    kv_heads, num_positions, value_size = value.shape[1:]
    output = query.new_empty(lanes, heads, value_size)
    if output.numel() == 0:
        return output
    lengths = lengths.contiguous()
    sinks = None if sinks is None else sinks.contiguous()
    window = num_positions if window is None else min(window, num_positions)
    group = heads // kv_heads
    blocks = blocks_for(query.dtype, group, head_size, value_size)
    num_splits = triton.cdiv(num_positions, SPLIT)
    stats = sums = None
    if num_splits > 1:
        floats: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
        stats = torch.empty((lanes * heads, num_splits, 2), **floats)
        sums = torch.empty((lanes * heads, num_splits, value_size), **floats)
    strides = (*query.stride()[:2], *key.stride()[:3], *value.stride()[:3])
    unit = _unit((query, key, value), strides)
    strides = tuple(stride // unit for stride in strides)
    programs = lanes * kv_heads * triton.cdiv(group, blocks["BLOCK_G"])
    with device_of(query):
        kernels.attend_kernel[(programs, num_splits)](
            query,
            *strides[:2],
            key,
            *strides[2:5],
            value,
            *strides[5:],
            lengths,
            sinks,
            kv_heads,
            num_positions,
            scale if softcap else scale * LOG2_E,
            softcap or 0.0,
            window,
            stats,
            sums,
            output,
            GROUP=group,
            HEAD_SIZE=head_size,
            VALUE_SIZE=value_size,
            SOFTCAP=bool(softcap),
            UNIT=unit,
            **blocks,
            num_warps=WARPS,
            num_stages=STAGES if unit > 1 else UNALIGNED_STAGES,
            **EXACT,
        )
        if num_splits > 1:
            kernels.merge_kernel[(lanes * heads,)](
                stats,
                sums,
                num_splits,
                lengths,
                sinks,
                heads,
                num_positions,
                window,
                output,
                VALUE_SIZE=value_size,
                BLOCK_DV=blocks["BLOCK_DV"],
                num_warps=max(1, blocks["BLOCK_DV"] // MERGED_COLUMNS),
                **EXACT,
            )
    return output


def blocks_for(dtype: torch.dtype, group: int, head_size: int, value_size: int) -> dict[str, int]:
    """Of static sizes only: the chunks decide about a result's bits."""
    is_float32 = dtype == torch.float32
    tile_bytes = TILE_BYTES_FLOAT32 if is_float32 else TILE_BYTES
    max_group = MAX_GROUP_FLOAT32 if is_float32 else MAX_GROUP
    block_d, block_dv = (max(16, power_of_2(size)) for size in (head_size, value_size))
    chunk = tile_bytes // (max(block_d, block_dv) * dtype.itemsize)
    return {
        "CHUNK": min(max(chunk, MIN_CHUNK), MAX_CHUNK),
        "BLOCK_G": min(max(power_of_2(group), MIN_GROUP), max_group),
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
    }


def _unit(tensors: tuple[Tensor, ...], strides: tuple[int, ...]) -> int:
    """Elements of which all strides are multiples: 16 bytes of them if all is aligned to that."""
    unit = VECTOR_BYTES // tensors[0].element_size()
    aligned = all(tensor.data_ptr() % VECTOR_BYTES == 0 for tensor in tensors)
    return unit if aligned and all(stride % unit == 0 for stride in strides) else 1
