"""The fused forward of `linear_score_tokens` in Triton: a matmul that keeps sums of its result.

A program computes the logits of BLOCK_N rows and BLOCK_V vocabulary entries in its accumulators and
reduces them to the max, sum, pow_sum and dot of `powerkernels.logprob.kernels`; its merge_kernel
does the rest. Logits are float32 and never reach memory.

Floor at 8192/4096/151936 in bfloat16 on an H200: 10.2 TFLOP, 12.9 ms at 790 TFLOP/s. The epilogue
of a tile of 32768 logits is one exponential and 14 instructions for each: 2048 clocks of the
special-function units beside 3600 of issue, 2.05 us, after 45 us of matmul at D = 4096, and not
hidden by it: 96% of the matmul alone, 75% at D = 576 (predicted). Memory: hidden and weight, and 16
bytes for each row of a tile, 3.1% of what float32 logits would take where tiles are 128 wide.

Not yet run on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from powerkernels.logprob.kernels import (
    GENERAL,
    INFINITY,
    LOG2_E,
    LOWEST,
    centered,
    int_power,
    merged,
    soft_capped,
)


@triton.jit
def sums_of_tile(x, scale, alpha, ENTROPY: tl.constexpr, TWICE_ALPHA: tl.constexpr):
    """max, sum, pow_sum, dot [N] of float32 logits [N, V]; scale [N]."""
    max = tl.max(x, axis=1)
    center = centered(max, scale)
    HALVED: tl.constexpr = TWICE_ALPHA > 0 and TWICE_ALPHA % 2 == 1
    if HALVED:
        scale = 0.5 * scale
        center = 0.5 * center
    t = tl.fma(x, scale[:, None], -center[:, None])
    if HALVED:
        root = tl.exp2(t)
        e = root * root
        power = int_power(root, TWICE_ALPHA)
    else:
        e = tl.exp2(t)
        if TWICE_ALPHA == GENERAL:
            power = tl.exp2(alpha * t)
        elif TWICE_ALPHA == 0:
            power = tl.where(x > -INFINITY, 1.0, 0.0)
        else:
            power = int_power(e, TWICE_ALPHA // 2)
    sum = tl.sum(e, axis=1)
    pow_sum = sum if TWICE_ALPHA == 2 else tl.sum(power, axis=1)
    dot = tl.zeros_like(sum)
    if ENTROPY:
        finite = tl.maximum(t, LOWEST, propagate_nan=tl.PropagateNan.ALL)
        dot = tl.sum(e * finite, axis=1)
        if HALVED:
            dot = 2.0 * dot
    return max, sum, pow_sum, dot


@triton.jit
def part_of_tile(
    logits,
    entry,
    vocab,
    bias_ptr,
    rows,
    kept,
    of_target,
    target_logit_ptr,
    scales,
    alpha,
    softcap,
    ENTROPY: tl.constexpr,
    TWICE_ALPHA: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """max, sum, pow_sum, dot [N] of WIDTH columns; stores the target logits among them."""
    entries = entry + tl.arange(0, WIDTH)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + entries, mask=entries < vocab, other=0.0).to(tl.float32)
        logits += bias[None, :]
    if SOFTCAP:
        logits = soft_capped(logits, softcap)
    if entry + WIDTH > vocab:
        logits = tl.where((entries < vocab)[None, :], logits, -INFINITY)
    here = (of_target >= entry) & (of_target < entry + WIDTH) & (of_target < vocab)
    if tl.max(here.to(tl.int32), axis=0) > 0:  # few tiles hold a target
        is_target = entries[None, :] == of_target[:, None]
        target_logit = tl.sum(tl.where(is_target, logits, 0.0), axis=1)
        tl.store(target_logit_ptr + rows, target_logit, mask=kept & here)
    return sums_of_tile(logits, scales, alpha, ENTROPY, TWICE_ALPHA)


@triton.jit
def load_block(
    source,
    row,
    column,
    num_rows,
    num_columns,
    stride,
    DESCRIPTORS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """[ROWS, COLUMNS] at (row, column) of a row-major matrix, zeros beyond it."""
    if DESCRIPTORS:
        block = source.load([row, column])
    else:
        rows = row + tl.arange(0, ROWS)
        columns = column + tl.arange(0, COLUMNS)
        offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
        kept = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
        block = tl.load(source + offsets, mask=kept, other=0.0)
    return block


@triton.jit(do_not_specialize=["ignore_index"])
def linear_sums_kernel(
    hidden,  # [N, D]: a descriptor of blocks [BLOCK_N, BLOCK_D], or a pointer
    weight,  # [V, D]: of blocks [BLOCK_V, BLOCK_D]
    stride_hidden,
    stride_weight,
    num_rows,
    vocab,
    dim,
    bias_ptr,  # [V] or None
    targets_ptr,  # [N]; one outside [0, V) is on another shard
    ignore_index,
    scale,
    temperatures_ptr,  # float32 [N] or None
    alpha,
    softcap,
    partials_ptr,  # float32 [4, N, tiles of V]: max, sum, pow_sum, dot
    stride_plane,
    target_logit_ptr,  # float32 [N], -inf beforehand
    ENTROPY: tl.constexpr,
    TWICE_ALPHA: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr,
    SPLIT: tl.constexpr,  # halves of the columns in turn: fewer registers, more instructions
):
    """Grid: tiles of N times tiles of V programs, GROUP_N tiles of N at a time to share the L2."""
    tiles_n = tl.cdiv(num_rows, BLOCK_N)
    tiles_v = tl.cdiv(vocab, BLOCK_V)
    group = tl.program_id(0) // (GROUP_N * tiles_v)
    first_n = group * GROUP_N
    height = tl.minimum(tiles_n - first_n, GROUP_N)
    inside = tl.program_id(0) % (GROUP_N * tiles_v)
    tile_n = first_n + inside % height
    tile_v = inside // height
    row = tile_n * BLOCK_N
    entry = tile_v * BLOCK_V

    logits = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for k in range(0, dim, BLOCK_D):
        h = load_block(hidden, row, k, num_rows, dim, stride_hidden, DESCRIPTORS, BLOCK_N, BLOCK_D)
        w = load_block(weight, entry, k, vocab, dim, stride_weight, DESCRIPTORS, BLOCK_V, BLOCK_D)
        logits = tl.dot(h, w.T, logits)

    rows = row + tl.arange(0, BLOCK_N)
    kept = rows < num_rows
    target = tl.load(targets_ptr + rows, mask=kept, other=ignore_index)
    of_target = tl.where(target == ignore_index, -1, target)
    if temperatures_ptr is not None:
        heat = tl.load(temperatures_ptr + rows, mask=kept, other=1.0)
        scales = tl.fdiv(tl.zeros_like(heat) + LOG2_E, heat)
    else:
        scales = tl.zeros([BLOCK_N], tl.float32) + scale

    if SPLIT:
        # Columns 0..V/2 and the rest: half of the temporaries live at a time.
        halves = tl.permute(tl.reshape(logits, (BLOCK_N, 2, BLOCK_V // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        max, sum, pow_sum, dot = part_of_tile(
            left,
            entry,
            vocab,
            bias_ptr,
            rows,
            kept,
            of_target,
            target_logit_ptr,
            scales,
            alpha,
            softcap,
            ENTROPY,
            TWICE_ALPHA,
            SOFTCAP,
            BLOCK_V // 2,
        )
        max_b, sum_b, pow_b, dot_b = part_of_tile(
            right,
            entry + BLOCK_V // 2,
            vocab,
            bias_ptr,
            rows,
            kept,
            of_target,
            target_logit_ptr,
            scales,
            alpha,
            softcap,
            ENTROPY,
            TWICE_ALPHA,
            SOFTCAP,
            BLOCK_V // 2,
        )
        max, sum, pow_sum, dot = merged(
            max, sum, pow_sum, dot, max_b, sum_b, pow_b, dot_b, scales, alpha, ENTROPY, TWICE_ALPHA
        )
    else:
        max, sum, pow_sum, dot = part_of_tile(
            logits,
            entry,
            vocab,
            bias_ptr,
            rows,
            kept,
            of_target,
            target_logit_ptr,
            scales,
            alpha,
            softcap,
            ENTROPY,
            TWICE_ALPHA,
            SOFTCAP,
            BLOCK_V,
        )
    out = partials_ptr + rows.to(tl.int64) * tiles_v + tile_v
    tl.store(out, max, mask=kept)
    plane = tl.cast(stride_plane, tl.int64)
    tl.store(out + plane, sum, mask=kept)
    tl.store(out + 2 * plane, pow_sum, mask=kept)
    tl.store(out + 3 * plane, dot, mask=kept)
