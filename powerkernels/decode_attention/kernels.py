"""The GPU kernels of decode attention, in Triton: pointers, sizes and strides.

A lane's positions are taken in chunks, a fixed number of chunks in splits, both counted from
position 0. A program attends to one split with the queries of one key/value head, which are padded
to 16 rows for the tensor cores, online over its chunks; of each query it leaves

    max,  total = Σ 2^(score - max),  sums = Σ 2^(score - max) · value,  scores in units of log2,

and PARTS splits at a time are merged in their order. Chunks, splits and that order depend on the
lane's length and the window alone, and what is masked enters as exact zeros. So a lane has the same
bits beside any other lanes and in a cache of any size; in one of a single split the first kernel
also finishes, for there the merge would multiply by 2^0 and add zeros.

Floor: the bytes of K and V in the lanes' windows at 4.3 TB/s, on an H200: 64 lanes of 2000
positions, 2 heads of 128, bfloat16, 131 MB in 30 µs. The partials add GROUP / 256 of them, written
once and read once. Programs past the end of their lane load its length and leave.

Not yet run on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from powerkernels.logprob.kernels import INFINITY, LOG2_E, centered, soft_capped

# Positions of a program: 64 KB of keys and values at a head size of 64 in bfloat16. Caches of 1000
# positions and 16 lanes of 3 heads give 192 programs, for 132 multiprocessors.
SPLIT = tl.constexpr(256)
# Splits merged at a time.
PARTS = tl.constexpr(16)


@triton.jit
def finished(max, total, sums, sink, SINKS: tl.constexpr):
    """The attention from sums, of the shape of max with a last dimension more, and total."""
    if SINKS:
        now = tl.maximum(max, sink)
        center = centered(now, 1.0)
        keep = tl.exp2(max - center)
        total = tl.fma(total, keep, tl.exp2(sink - center))
        sums = sums * tl.expand_dims(keep, -1)
    # + 0: no negative zeros, for the merge of several splits leaves none.
    return sums * tl.expand_dims(1.0 / total, -1) + 0.0


@triton.jit
def load_rows(ptr, stride, kept, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of rows of SIZE elements, zeros where there is nothing or it is not kept."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    return tl.load(ptr + row * stride + column, mask=kept[:, None] & (column < SIZE), other=0.0)


@triton.jit
def bounds_of(lengths_ptr, lane, num_positions, window):
    """The first position that is attended to, and the number of positions in use."""
    # A length cannot be checked on the device, but memory behind the cache is never read.
    length = tl.minimum(tl.load(lengths_ptr + lane), num_positions).to(tl.int32)
    return tl.maximum(length - window, 0), length


@triton.jit(do_not_specialize=["kv_heads", "num_positions", "window"])
def attend_kernel(
    query_ptr,  # [C, Hq, D]; all strides in units of UNIT elements
    query_stride_lane,
    query_stride_head,
    key_ptr,  # [C, H, S, D]
    key_stride_lane,
    key_stride_head,
    key_stride_position,
    value_ptr,  # [C, H, S, Dv]
    value_stride_lane,
    value_stride_head,
    value_stride_position,
    lengths_ptr,  # int64 [C]
    sinks_ptr,  # [Hq] or None
    kv_heads,
    num_positions,
    scale,  # with log2(e), unless there is a softcap
    softcap,
    window,
    stats_ptr,  # float32 [C · Hq, splits, 2]: max, total; None to finish
    sums_ptr,  # float32 [C · Hq, splits, Dv]; None to finish
    output_ptr,  # [C, Hq, Dv]
    GROUP: tl.constexpr,  # Hq / H
    HEAD_SIZE: tl.constexpr,  # D
    VALUE_SIZE: tl.constexpr,  # Dv
    SOFTCAP: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,  # positions at a time
    BLOCK_G: tl.constexpr,  # query heads of a program
    BLOCK_D: tl.constexpr,  # a power of 2, >= D
    BLOCK_DV: tl.constexpr,
):
    """One split of one lane and head. Grid: C · H · cdiv(GROUP, BLOCK_G) by splits."""
    BLOCKS: tl.constexpr = (GROUP + BLOCK_G - 1) // BLOCK_G
    head_block = tl.program_id(0) % BLOCKS
    kv_head = tl.program_id(0) // BLOCKS % kv_heads
    lane = (tl.program_id(0) // BLOCKS // kv_heads).to(tl.int64)
    split = tl.program_id(1)
    start, length = bounds_of(lengths_ptr, lane, num_positions, window)
    first = tl.maximum(split * SPLIT, start // CHUNK * CHUNK)
    end = tl.minimum(split * SPLIT + SPLIT, length)
    if first >= end:
        return

    row = head_block * BLOCK_G + tl.arange(0, BLOCK_G)
    first_head = (kv_head * GROUP + head_block * BLOCK_G).to(tl.int64)
    query_ptr += (lane * query_stride_lane + first_head * query_stride_head) * UNIT
    query = load_rows(query_ptr, query_stride_head * UNIT, row < GROUP, HEAD_SIZE, BLOCK_G, BLOCK_D)
    key_ptr += (lane * key_stride_lane + kv_head.to(tl.int64) * key_stride_head) * UNIT
    value_ptr += (lane * value_stride_lane + kv_head.to(tl.int64) * value_stride_head) * UNIT

    max = tl.zeros([BLOCK_G], tl.float32) - INFINITY
    total = tl.zeros([BLOCK_G], tl.float32)
    sums = tl.zeros([BLOCK_G, BLOCK_DV], tl.float32)
    for at in range(first, end, CHUNK):
        position = at + tl.arange(0, CHUNK)
        kept = (position >= start) & (position < length)
        wide_at = tl.cast(at, tl.int64)
        key = load_rows(
            key_ptr + wide_at * key_stride_position * UNIT,
            key_stride_position * UNIT,
            kept,
            HEAD_SIZE,
            CHUNK,
            BLOCK_D,
        )
        value = load_rows(
            value_ptr + wide_at * value_stride_position * UNIT,
            value_stride_position * UNIT,
            kept,
            VALUE_SIZE,
            CHUNK,
            BLOCK_DV,
        )
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        if SOFTCAP:
            scores = soft_capped(scores, softcap) * LOG2_E
        scores = tl.where(kept[None, :], scores, -INFINITY)
        now = tl.maximum(max, tl.max(scores, axis=1))
        center = centered(now, 1.0)
        weights = tl.exp2(scores - center[:, None])
        keep = tl.exp2(max - center)
        total = tl.fma(total, keep, tl.sum(weights, axis=1))
        sums = tl.dot(weights.to(value.dtype), value, sums * keep[:, None], input_precision="ieee")
        max = now

    head = lane * kv_heads * GROUP + first_head + tl.arange(0, BLOCK_G)
    column = tl.arange(0, BLOCK_DV)[None, :]
    kept = (row < GROUP)[:, None] & (column < VALUE_SIZE)
    if stats_ptr is None:
        sink = max
        if sinks_ptr is not None:
            sinks = tl.load(sinks_ptr + first_head + tl.arange(0, BLOCK_G), mask=row < GROUP)
            sink = sinks.to(tl.float32) * LOG2_E
        output = finished(max, total, sums, sink, sinks_ptr is not None)
        output = output.to(output_ptr.dtype.element_ty)
        tl.store(output_ptr + head[:, None] * VALUE_SIZE + column, output, mask=kept)
    else:
        part = head * tl.num_programs(1) + split
        tl.store(stats_ptr + 2 * part, max, mask=row < GROUP)
        tl.store(stats_ptr + 2 * part + 1, total, mask=row < GROUP)
        tl.store(sums_ptr + part[:, None] * VALUE_SIZE + column, sums, mask=kept)


@triton.jit(do_not_specialize=["num_heads", "num_positions", "num_splits", "window"])
def merge_kernel(
    stats_ptr,  # as above
    sums_ptr,
    num_splits,
    lengths_ptr,
    sinks_ptr,
    num_heads,  # Hq
    num_positions,
    window,
    output_ptr,
    VALUE_SIZE: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """The splits of one query head together. Grid: C · Hq programs."""
    row = tl.program_id(0).to(tl.int64)
    start, length = bounds_of(lengths_ptr, row // num_heads, num_positions, window)
    first = start // SPLIT
    end = (length + SPLIT - 1) // SPLIT
    column = tl.arange(0, BLOCK_DV)

    max = tl.zeros([1], tl.float32) - INFINITY
    total = tl.zeros([1], tl.float32)
    sums = tl.zeros([1, BLOCK_DV], tl.float32)
    for block in range(first // PARTS, (end + PARTS - 1) // PARTS):
        split = block * PARTS + tl.arange(0, PARTS)
        kept = (split >= first) & (split < end)
        part = row * num_splits + split
        max_b = tl.load(stats_ptr + 2 * part, mask=kept, other=-INFINITY)
        total_b = tl.load(stats_ptr + 2 * part + 1, mask=kept, other=0.0)
        sums_b = tl.load(
            sums_ptr + part[:, None] * VALUE_SIZE + column[None, :],
            mask=kept[:, None] & (column < VALUE_SIZE)[None, :],
            other=0.0,
        )
        now = tl.maximum(max, tl.max(max_b, axis=0))
        center = centered(now, 1.0)
        weights = tl.exp2(max_b - center)
        keep = tl.exp2(max - center)
        total = tl.fma(total, keep, tl.sum(weights * total_b, axis=0))
        added = tl.sum(weights[:, None] * sums_b, axis=0)
        sums = tl.fma(sums, keep[:, None], added[None, :])
        max = now

    sink = max
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + row % num_heads).to(tl.float32) * LOG2_E + tl.zeros_like(max)
    output = finished(max, total, sums, sink, sinks_ptr is not None)
    output = output.to(output_ptr.dtype.element_ty)
    at = output_ptr + row * VALUE_SIZE + column[None, :]
    tl.store(at, output, mask=(column < VALUE_SIZE)[None, :])
