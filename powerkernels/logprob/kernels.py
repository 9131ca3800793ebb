"""The GPU kernels of the scores, in Triton: pointers, sizes and strides.

A row of V logits is read in slices of SLICE_V. Of each slice the sums

    max,  sum = Σ e,  pow_sum = Σ e^alpha,  dot = Σ e*t,    t = log2(e) = z * scale - max * scale

are kept, scale = log2(e)/temperature; GROUP slices are merged in their order, then the groups of a
row. The order is fixed by the column alone, and contraction of a*b + c is written out and not left
to the compiler, so a row has the same bits in every variant, batch and place.

Floors, by the compiled code, for bfloat16 logits on an H200 (4.3 TB/s copied, 132 multiprocessors
at 1.75 GHz, each with 16 exponentials and 128 lanes of issue a clock):

    forward   2 bytes an element, so 9.3 elements a clock and multiprocessor. For a power that is a
              product 1.06 exponentials and 12.6 instructions an element: 62% of what there is of
              the former, 91% of the latter; memory is the floor. For any other power two
              exponentials would take 116%; with a quarter of the second ones as polynomials it is
              1.88 and 15.9: 109% and 115%, the instructions are the floor.
    backward  4 bytes, 4.7 elements a clock; 1.06 exponentials and 24.4 instructions: 31% and 89%.
    draw      one read in slices, 16 bytes of sums a slice, one slice again; at 64 rows launches
              and latency are the floor.
    threshold of a support: up to 17 passes over the row for top_k and 18 for top_p, from the second
              cache, for bfloat16 half as many; then the slices that hold an entry of it once.

Not yet run on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from powerkernels.logprob import reference

SLICE_V = tl.constexpr(reference.SLICE_V)
# A slice is taken as four tiles, so that three of them can hide the fourth one's polynomial.
TILE = tl.constexpr(reference.SLICE_V // 4)
# Slices that one program of the many-row variant merges.
GROUP = tl.constexpr(8)
# TWICE_ALPHA of a power that is not computed by products.
GENERAL = tl.constexpr(-1)

NO_TOKEN = tl.constexpr(reference.NO_TOKEN)
INFINITY = tl.constexpr(float("inf"))
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Of the smallest finite float32; see key_of.
LOWEST_KEY = tl.constexpr(-0x7F800000)
# 2^t is 0 below this; it stands for -inf where 0 * t must be 0.
LOWEST = tl.constexpr(-150.0)
# Adding it to |x| < 2^22 rounds x to an integer, which is then in the low bits.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def soft_capped(x, softcap):
    """softcap * tanh(x / softcap); -inf is a masked entry and stays one."""
    u = x / softcap
    square = u * u
    p = tl.fma(square, -5.70498872745e-3, 2.06390887954e-2)
    p = tl.fma(p, square, -5.37397155531e-2)
    p = tl.fma(p, square, 1.33314422036e-1)
    p = tl.fma(p, square, -3.33332819422e-1)
    near = tl.fma(p * square, u, u)
    # From 10 on tanh is 1 in float32.
    size = tl.minimum(tl.abs(u), 10.0, propagate_nan=tl.PropagateNan.ALL)
    far = 1.0 - 2.0 / (tl.exp2(size * (2.0 * LOG2_E)) + 1.0)
    far = tl.where(u < 0.0, -far, far)
    return tl.where(x == -INFINITY, x, softcap * tl.where(tl.abs(u) < 0.625, near, far))


@triton.jit
def exp2_polynomial(s):
    """2^s for s <= 1, within 2 ulp; what is below 2^-126 is near 2^-126."""
    s = tl.maximum(s, -126.0, propagate_nan=tl.PropagateNan.ALL)
    shifted = s + ROUNDER
    r = s - (shifted - ROUNDER)
    p = tl.fma(r, 1.3264591e-3, 9.6716191e-3)
    p = tl.fma(p, r, 5.5507350e-2)
    p = tl.fma(p, r, 2.4022240e-1)
    p = tl.fma(p, r, 6.9314698e-1)
    p = tl.fma(p, r, 1.0)
    exponent = shifted.to(tl.int32, bitcast=True) << 23
    return (p.to(tl.int32, bitcast=True) + exponent).to(tl.float32, bitcast=True)


@triton.jit
def int_power(x, N: tl.constexpr):
    """x^N by products, 1 <= N <= 16."""
    x2 = x * x
    x4 = x2 * x2
    x8 = x4 * x4
    if N == 16:
        power = x8 * x8
    elif N >= 8:
        power = x8
        if N & 4:
            power = power * x4
        if N & 2:
            power = power * x2
        if N & 1:
            power = power * x
    elif N >= 4:
        power = x4
        if N & 2:
            power = power * x2
        if N & 1:
            power = power * x
    elif N >= 2:
        power = x2
        if N & 1:
            power = power * x
    else:
        power = x
    return power


@triton.jit
def add_int_power(total, x, N: tl.constexpr):
    """total + x^N."""
    return total + x if N == 1 else tl.fma(int_power(x, N // 2), int_power(x, N - N // 2), total)


@triton.jit
def centered(max, scale):
    """The exponent that is taken off: max * scale, and 0 where there is nothing above -inf."""
    center = max * scale
    return tl.where(center == -INFINITY, 0.0, center)


@triton.jit
def add_exponentials(
    sums,
    pow_sums,
    dots,
    x,
    center,
    scale,
    alpha,
    ENTROPY: tl.constexpr,
    TWICE_ALPHA: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
):
    """Adds e, e^alpha and e*t of the logits x to the accumulators of the same shape.

    For a half-integer power scale and center are halved, and so is what is added of e*t.
    """
    t = tl.fma(x, scale, -center)
    if TWICE_ALPHA > 0 and TWICE_ALPHA % 2 == 1:
        root = tl.exp2(t)
        e = root * root
        pow_sums = add_int_power(pow_sums, root, TWICE_ALPHA)
    else:
        e = tl.exp2(t)
        if TWICE_ALPHA == GENERAL:
            s = alpha * t
            pow_sums += exp2_polynomial(s) if POLYNOMIAL else tl.exp2(s)
        elif TWICE_ALPHA == 0:
            pow_sums += tl.where(x > -INFINITY, 1.0, 0.0)
        elif TWICE_ALPHA != 2:
            pow_sums = add_int_power(pow_sums, e, TWICE_ALPHA // 2)
    sums += e
    if ENTROPY:
        finite = tl.maximum(t, LOWEST, propagate_nan=tl.PropagateNan.ALL)
        dots = tl.fma(e, finite, dots)
    return sums, pow_sums, dots


@triton.jit
def sums_of_slice(
    x0,
    x1,
    x2,
    x3,
    scale,
    alpha,
    ENTROPY: tl.constexpr,
    TWICE_ALPHA: tl.constexpr,
):
    """max, sum, pow_sum, dot of a slice given as four float32 tiles."""
    max = tl.max(tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3)), axis=0)
    center = centered(max, scale)
    HALVED: tl.constexpr = TWICE_ALPHA > 0 and TWICE_ALPHA % 2 == 1
    if HALVED:
        scale = 0.5 * scale
        center = 0.5 * center
    sums = tl.zeros_like(x0)
    pow_sums = tl.zeros_like(x0)
    dots = tl.zeros_like(x0)
    sums, pow_sums, dots = add_exponentials(
        sums, pow_sums, dots, x0, center, scale, alpha, ENTROPY, TWICE_ALPHA, True
    )
    sums, pow_sums, dots = add_exponentials(
        sums, pow_sums, dots, x1, center, scale, alpha, ENTROPY, TWICE_ALPHA, False
    )
    sums, pow_sums, dots = add_exponentials(
        sums, pow_sums, dots, x2, center, scale, alpha, ENTROPY, TWICE_ALPHA, False
    )
    sums, pow_sums, dots = add_exponentials(
        sums, pow_sums, dots, x3, center, scale, alpha, ENTROPY, TWICE_ALPHA, False
    )
    sum = tl.sum(sums, axis=0)
    pow_sum = sum if TWICE_ALPHA == 2 else tl.sum(pow_sums, axis=0)
    dot = tl.sum(dots, axis=0) if ENTROPY else 0.0
    if HALVED:
        dot = 2.0 * dot
    return max, sum, pow_sum, dot


@triton.jit
def pow_factor(f, difference, alpha, TWICE_ALPHA: tl.constexpr):
    """f^alpha for f = 2^difference <= 1."""
    if TWICE_ALPHA == 0:
        power = tl.zeros_like(f) + 1.0
    elif TWICE_ALPHA > 0 and TWICE_ALPHA % 2 == 0:
        power = int_power(f, TWICE_ALPHA // 2)
    else:
        power = tl.exp2(alpha * difference)
    return power


@triton.jit
def scaled_sums(
    max, sum, pow_sum, dot, center, scale, alpha, ENTROPY: tl.constexpr, TWICE_ALPHA: tl.constexpr
):
    """The sums relative to another, larger center."""
    # Nothing above -inf: no mass, whatever the center; a NaN in the sum stays.
    difference = tl.where(max == -INFINITY, -INFINITY, max * scale - center)
    f = tl.exp2(difference)
    moved_dot = dot
    if ENTROPY:
        moved_dot = tl.where(f > 0.0, f * tl.fma(difference, sum, dot), 0.0)
    moved_pow = pow_sum
    if TWICE_ALPHA != 2:
        moved_pow = pow_factor(f, difference, alpha, TWICE_ALPHA) * pow_sum
    moved_sum = f * sum
    if TWICE_ALPHA == 2:
        moved_pow = moved_sum
    return moved_sum, moved_pow, moved_dot


@triton.jit
def merged(
    max_a,
    sum_a,
    pow_a,
    dot_a,
    max_b,
    sum_b,
    pow_b,
    dot_b,
    scale,
    alpha,
    ENTROPY: tl.constexpr,
    TWICE_ALPHA: tl.constexpr,
):
    """The sums of two parts together, elementwise."""
    max = tl.maximum(max_a, max_b)
    center = centered(max, scale)
    sum_a, pow_a, dot_a = scaled_sums(
        max_a, sum_a, pow_a, dot_a, center, scale, alpha, ENTROPY, TWICE_ALPHA
    )
    sum_b, pow_b, dot_b = scaled_sums(
        max_b, sum_b, pow_b, dot_b, center, scale, alpha, ENTROPY, TWICE_ALPHA
    )
    return max, sum_a + sum_b, pow_a + pow_b, dot_a + dot_b


@triton.jit
def row_offset(row, inner, outer_stride, inner_stride):
    """Elements before a row; see `functional._rows`."""
    outer = (row // inner).to(tl.int64) * outer_stride
    return outer + (row % inner).to(tl.int64) * inner_stride


@triton.jit
def load_half(slice_ptr, K: tl.constexpr, WORDS: tl.constexpr):
    """Half K of a whole slice as it is stored: two tiles."""
    if WORDS:
        word = K * TILE + tl.arange(0, TILE)
        first = tl.load(slice_ptr.to(tl.pointer_type(tl.int32)) + word)
        second = first
    else:
        even, odd = half_index(slice_ptr, K)
        first = tl.load(slice_ptr + even)
        second = tl.load(slice_ptr + odd)
    return first, second


@triton.jit
def half_index(slice_ptr, K: tl.constexpr):
    """Which entries the two tiles of a half hold.

    Those of bfloat16 are the even and the odd entries: two of them are unpacked from a word by
    one instruction each, where four would be needed for entries that were loaded one by one.
    """
    lane = tl.arange(0, TILE)
    if slice_ptr.dtype.element_ty == tl.bfloat16:
        even = 2 * (K * TILE + lane)
        odd = even + 1
    else:
        even = 2 * K * TILE + lane
        odd = even + TILE
    return even, odd


@triton.jit
def unpacked(first, second, softcap, SOFTCAP: tl.constexpr, WORDS: tl.constexpr):
    """Two float32 tiles of what `load_half` returned."""
    if WORDS:
        second = (first & -65536).to(tl.float32, bitcast=True)
        first = (first << 16).to(tl.float32, bitcast=True)
    return capped(first, softcap, SOFTCAP), capped(second, softcap, SOFTCAP)


@triton.jit
def load_masked_half(slice_ptr, left, softcap, K: tl.constexpr, SOFTCAP: tl.constexpr):
    """Half K of a slice of `left` entries as two float32 tiles, -inf beyond."""
    even, odd = half_index(slice_ptr, K)
    first = tl.load(slice_ptr + even, mask=even < left, other=-INFINITY)
    second = tl.load(slice_ptr + odd, mask=odd < left, other=-INFINITY)
    return capped(first, softcap, SOFTCAP), capped(second, softcap, SOFTCAP)


@triton.jit
def capped(x, softcap, SOFTCAP: tl.constexpr):
    x = x.to(tl.float32)
    if SOFTCAP:
        x = soft_capped(x, softcap)
    return x


@triton.jit
def row_scale(row, scale, temperatures_ptr):
    """log2(e) / temperature of a row."""
    if temperatures_ptr is not None:
        scale = tl.fdiv(tl.full([], LOG2_E, tl.float32), tl.load(temperatures_ptr + row))
    return scale


@triton.jit
def store_part(partials_ptr, stride_plane, offset, max, sum, pow_sum, dot):
    plane = tl.cast(stride_plane, tl.int64)
    tl.store(partials_ptr + offset, max)
    tl.store(partials_ptr + plane + offset, sum)
    tl.store(partials_ptr + 2 * plane + offset, pow_sum)
    tl.store(partials_ptr + 3 * plane + offset, dot)


@triton.jit(do_not_specialize=["num_parts", "ignore_index"])
def row_sums_kernel(
    logits_ptr,  # rows of V logits, see row_offset
    inner,
    outer_stride,
    inner_stride,
    vocab,
    targets_ptr,  # [N]
    ignore_index,
    scale,
    temperatures_ptr,  # float32 [N] or None
    alpha,
    softcap,
    partials_ptr,  # float32 [4, N, P]: max, sum, pow_sum, dot
    stride_plane,
    stride_row,
    num_parts,
    target_logit_ptr,  # float32 [N]
    ENTROPY: tl.constexpr,
    TWICE_ALPHA: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SLICES: tl.constexpr,  # a part: GROUP slices, or one
    WORDS: tl.constexpr,  # bfloat16, every row at a multiple of 4 bytes
):
    """The sums of every part of every row, from one read. Grid: N * num_parts programs."""
    row = tl.program_id(0) // num_parts
    part = tl.program_id(0) % num_parts
    partials_ptr += row.to(tl.int64) * stride_row + part
    target = tl.load(targets_ptr + row)
    if target == ignore_index:
        store_part(partials_ptr, stride_plane, 0, -INFINITY, 0.0, 0.0, 0.0)
        if part == 0:
            tl.store(target_logit_ptr + row, -INFINITY)
        return
    scale = row_scale(row, scale, temperatures_ptr)
    row_ptr = logits_ptr + row_offset(row, inner, outer_stride, inner_stride)

    is_here = (target >= 0) & (target < vocab)
    if is_here:
        if target // (SLICES * SLICE_V) == part:
            tl.store(target_logit_ptr + row, capped(tl.load(row_ptr + target), softcap, SOFTCAP))
    elif part == 0:
        tl.store(target_logit_ptr + row, -INFINITY)

    max = -INFINITY
    sum = 0.0
    pow_sum = 0.0
    dot = 0.0
    first = part * SLICES
    last_whole = tl.minimum(first + SLICES, vocab // SLICE_V)
    if first < last_whole:
        slice_ptr = row_ptr + first.to(tl.int64) * SLICE_V
        next0, next1 = load_half(slice_ptr, 0, WORDS)
        next2, next3 = load_half(slice_ptr, 1, WORDS)
        for index in range(first, last_whole):
            x0, x1 = unpacked(next0, next1, softcap, SOFTCAP, WORDS)
            x2, x3 = unpacked(next2, next3, softcap, SOFTCAP, WORDS)
            if SLICES > 1:
                # The next slice is on its way while this one is summed; at the end, once more
                # the last, which is near.
                ahead = tl.minimum(index + 1, last_whole - 1).to(tl.int64)
                slice_ptr = row_ptr + ahead * SLICE_V
                next0, next1 = load_half(slice_ptr, 0, WORDS)
                next2, next3 = load_half(slice_ptr, 1, WORDS)
            max_b, sum_b, pow_b, dot_b = sums_of_slice(
                x0, x1, x2, x3, scale, alpha, ENTROPY, TWICE_ALPHA
            )
            max, sum, pow_sum, dot = merged(
                max,
                sum,
                pow_sum,
                dot,
                max_b,
                sum_b,
                pow_b,
                dot_b,
                scale,
                alpha,
                ENTROPY,
                TWICE_ALPHA,
            )
    # The end of the row, if it is in this part and no whole slice.
    tail = vocab // SLICE_V
    if (vocab % SLICE_V != 0) & (tail >= first) & (tail < first + SLICES):
        slice_ptr = row_ptr + tail.to(tl.int64) * SLICE_V
        left = vocab % SLICE_V
        x0, x1 = load_masked_half(slice_ptr, left, softcap, 0, SOFTCAP)
        x2, x3 = load_masked_half(slice_ptr, left, softcap, 1, SOFTCAP)
        max_b, sum_b, pow_b, dot_b = sums_of_slice(
            x0, x1, x2, x3, scale, alpha, ENTROPY, TWICE_ALPHA
        )
        max, sum, pow_sum, dot = merged(
            max,
            sum,
            pow_sum,
            dot,
            max_b,
            sum_b,
            pow_b,
            dot_b,
            scale,
            alpha,
            ENTROPY,
            TWICE_ALPHA,
        )
    store_part(partials_ptr, stride_plane, 0, max, sum, pow_sum, dot)


@triton.jit
def merge_row(
    partials_ptr,
    stride_plane,
    stride_part,
    num_parts,
    scale,
    alpha,
    ENTROPY: tl.constexpr,
    TWICE_ALPHA: tl.constexpr,
    PARTS: tl.constexpr,  # parts per group
    BLOCK: tl.constexpr,  # a power of 2, >= the number of groups
):
    """The sums of a row from those of its parts: in order within a group, then the groups."""
    first = tl.arange(0, BLOCK) * PARTS
    plane = tl.cast(stride_plane, tl.int64)
    max = tl.zeros([BLOCK], tl.float32) - INFINITY
    sum = tl.zeros([BLOCK], tl.float32)
    pow_sum = tl.zeros([BLOCK], tl.float32)
    dot = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(PARTS):
        kept = first + k < num_parts
        at = partials_ptr + (first + k).to(tl.int64) * stride_part
        max_b = tl.load(at, mask=kept, other=-INFINITY)
        sum_b = tl.load(at + plane, mask=kept, other=0.0)
        pow_b = tl.load(at + 2 * plane, mask=kept, other=0.0)
        dot_b = tl.load(at + 3 * plane, mask=kept, other=0.0)
        if PARTS == 1:
            max = max_b
            sum = sum_b
            pow_sum = pow_b
            dot = dot_b
        else:
            max, sum, pow_sum, dot = merged(
                max,
                sum,
                pow_sum,
                dot,
                max_b,
                sum_b,
                pow_b,
                dot_b,
                scale,
                alpha,
                ENTROPY,
                TWICE_ALPHA,
            )
    row_max = tl.max(max, axis=0)
    center = centered(row_max, scale)
    sum, pow_sum, dot = scaled_sums(
        max, sum, pow_sum, dot, center, scale, alpha, ENTROPY, TWICE_ALPHA
    )
    return row_max, tl.sum(sum, axis=0), tl.sum(pow_sum, axis=0), tl.sum(dot, axis=0)


@triton.jit
def finish_row(
    max,
    sum,
    pow_sum,
    dot,
    target_logit,
    scale,
    alpha,
    ENTROPY: tl.constexpr,
    TWICE_ALPHA: tl.constexpr,
):
    """log_prob, log_z, entropy, row_max, log_sum in nats; NaN for a row without a softmax."""
    bad = (max == -INFINITY) | (sum != sum) | (sum == 0.0)
    # No global: at each launch Triton compares those with themselves, which a NaN is not equal to.
    nan = float("nan")
    log_sum2 = tl.log2(sum)
    log_prob = (tl.fma(target_logit, scale, -centered(max, scale)) - log_sum2) * LN_2
    log_z = sum * 0.0
    if TWICE_ALPHA != 2:
        log_z = (tl.log2(pow_sum) - alpha * log_sum2) * LN_2
        # Of one sign by Jensen's inequality; rounding must not say otherwise.
        log_z = tl.where(alpha > 1.0, tl.minimum(log_z, 0.0), tl.maximum(log_z, 0.0))
    entropy = dot
    if ENTROPY:
        entropy = (log_sum2 - dot / sum) * LN_2
    return (
        tl.where(bad, nan, log_prob),
        tl.where(bad, nan, log_z),
        tl.where(bad, nan, entropy),
        tl.where(bad, nan, max),
        tl.where(bad, nan, log_sum2 * LN_2),
    )


@triton.jit(do_not_specialize=["num_parts", "num_target_parts", "ignore_index", "stride_row"])
def merge_kernel(
    partials_ptr,  # float32 [4, N, P] by the strides
    stride_plane,
    stride_row,
    stride_part,
    num_parts,
    target_logit_ptr,  # float32 [N, num_target_parts] by the strides: the largest counts
    target_stride_row,
    target_stride_part,
    num_target_parts,
    targets_ptr,  # [N]
    ignore_index,
    scale,
    temperatures_ptr,
    alpha,
    out0_ptr,  # float32 [N], as the next: log_prob, log_z, entropy, row_max, log_sum
    out1_ptr,
    out2_ptr,
    out3_ptr,
    out4_ptr,
    ENTROPY: tl.constexpr,
    TWICE_ALPHA: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    FINISH: tl.constexpr,
):
    """From parts to log_prob, log_z, entropy, row_max, log_sum; grid: N programs.

    Without FINISH, to max, sum, pow_sum, dot, target_logit: what other shards are merged with.
    """
    row = tl.program_id(0).to(tl.int64)
    scale = row_scale(row, scale, temperatures_ptr)
    max, sum, pow_sum, dot = merge_row(
        partials_ptr + row * stride_row,
        stride_plane,
        stride_part,
        num_parts,
        scale,
        alpha,
        ENTROPY,
        TWICE_ALPHA,
        PARTS,
        BLOCK,
    )
    part = tl.arange(0, BLOCK)
    target_logits = tl.load(
        target_logit_ptr + row * target_stride_row + part.to(tl.int64) * target_stride_part,
        mask=part < num_target_parts,
        other=-INFINITY,
    )
    target_logit = tl.max(target_logits, axis=0)
    if FINISH:
        log_prob, log_z, entropy, row_max, log_sum = finish_row(
            max, sum, pow_sum, dot, target_logit, scale, alpha, ENTROPY, TWICE_ALPHA
        )
        ignored = tl.load(targets_ptr + row) == ignore_index
        tl.store(out0_ptr + row, tl.where(ignored, 0.0, log_prob))
        tl.store(out1_ptr + row, tl.where(ignored, 0.0, log_z))
        if ENTROPY:
            tl.store(out2_ptr + row, tl.where(ignored, 0.0, entropy))
        tl.store(out3_ptr + row, tl.where(ignored, 0.0, row_max))
        tl.store(out4_ptr + row, tl.where(ignored, 0.0, log_sum))
    else:
        tl.store(out0_ptr + row, max)
        tl.store(out1_ptr + row, sum)
        tl.store(out2_ptr + row, pow_sum)
        tl.store(out3_ptr + row, dot)
        tl.store(out4_ptr + row, target_logit)


@triton.jit
def load_or_zero(ptr, row):
    return 0.0 if ptr is None else tl.load(ptr + row)


@triton.jit(do_not_specialize=["num_blocks", "ignore_index"])
def score_bwd_kernel(
    logits_ptr,
    inner,
    outer_stride,
    inner_stride,
    vocab,
    targets_ptr,  # [N]; one outside [0, V) is on another shard
    ignore_index,
    scale,
    temperatures_ptr,
    alpha,
    softcap,
    row_max_ptr,  # float32 [N], as the next
    log_sum_ptr,
    log_prob_ptr,
    log_z_ptr,
    entropy_ptr,
    grad_log_prob_ptr,  # float32 [N] or None, as the next
    grad_log_z_ptr,
    grad_entropy_ptr,
    dlogits_ptr,  # may be logits_ptr: in place
    dlogits_inner,
    dlogits_outer_stride,
    dlogits_inner_stride,
    num_blocks,
    TWICE_ALPHA: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dlogits = e * (A + B*t) + C * e^alpha, plus the one-hot. Grid: N * num_blocks programs.

    Rows that are ignored, or whose gradients are all zero, get zeros and are not read.
    """
    row = tl.program_id(0) // num_blocks
    block = tl.program_id(0) % num_blocks
    index = block * BLOCK_V + tl.arange(0, BLOCK_V)
    kept = index < vocab
    dlogits_ptr += row_offset(row, dlogits_inner, dlogits_outer_stride, dlogits_inner_stride)
    target = tl.load(targets_ptr + row)

    grad_log_prob = load_or_zero(grad_log_prob_ptr, row)
    grad_entropy = load_or_zero(grad_entropy_ptr, row)
    grad_log_z = 0.0
    if TWICE_ALPHA != 0 and TWICE_ALPHA != 2:  # there log_z is constant
        grad_log_z = load_or_zero(grad_log_z_ptr, row)
    nothing = (grad_log_prob == 0.0) & (grad_log_z == 0.0) & (grad_entropy == 0.0)
    if (target == ignore_index) | nothing:
        zeros = tl.zeros([BLOCK_V], dlogits_ptr.dtype.element_ty)
        tl.store(dlogits_ptr + index, zeros, mask=kept)
        return
    # An impossible target's log_prob is a constant.
    grad_log_prob = tl.where(tl.load(log_prob_ptr + row) == -INFINITY, 0.0, grad_log_prob)

    scale = row_scale(row, scale, temperatures_ptr)
    center = centered(tl.load(row_max_ptr + row), scale)
    log_sum = tl.load(log_sum_ptr + row)
    log_pow_sum = tl.load(log_z_ptr + row) + alpha * log_sum
    over_temperature = scale * LN_2
    over_sum = over_temperature * tl.exp2(log_sum * -LOG2_E)
    of_power = over_temperature * alpha * grad_log_z * tl.exp2(log_pow_sum * -LOG2_E)
    surprise = log_sum
    if grad_entropy_ptr is not None:
        surprise = log_sum - tl.load(entropy_ptr + row)
    constant = over_sum * (grad_entropy * surprise - grad_log_prob - alpha * grad_log_z)
    slope = over_sum * grad_entropy * -LN_2

    x = tl.load(
        logits_ptr + row_offset(row, inner, outer_stride, inner_stride) + index,
        mask=kept,
        other=-INFINITY,
    )
    x = capped(x, softcap, SOFTCAP)
    t = tl.fma(x, scale, -center)
    factor = constant + tl.zeros_like(t)
    if grad_entropy_ptr is not None:
        factor = tl.fma(tl.maximum(t, LOWEST, propagate_nan=tl.PropagateNan.ALL), slope, factor)
    if TWICE_ALPHA > 0 and TWICE_ALPHA % 2 == 1:
        root = tl.exp2(0.5 * t)
        power = int_power(root, TWICE_ALPHA)
        e = root * root
    else:
        e = tl.exp2(t)
        if TWICE_ALPHA == GENERAL:
            power = tl.exp2(alpha * t)
        elif TWICE_ALPHA == 0:
            power = tl.zeros_like(t)
        else:
            power = int_power(e, TWICE_ALPHA // 2)
    dlogits = e * factor
    if grad_log_z_ptr is not None:
        dlogits = tl.fma(power, of_power, dlogits)
    dlogits = tl.where(index == target, dlogits + over_temperature * grad_log_prob, dlogits)
    if SOFTCAP:
        tanh = x / softcap
        dlogits = tl.where(x == -INFINITY, 0.0, dlogits * (1.0 - tanh * tanh))
    tl.store(dlogits_ptr + index, dlogits.to(dlogits_ptr.dtype.element_ty), mask=kept)


@triton.jit
def uniform53(hi, lo):
    """A float64 in [0, 1) of two words."""
    upper = (hi.to(tl.int64) & 0xFFFFFFFF) >> 5
    lower = (lo.to(tl.int64) & 0xFFFFFFFF) >> 6
    return (upper.to(tl.float64) * 67108864.0 + lower.to(tl.float64)) * 1.1102230246251565e-16


@triton.jit
def inverse_cdf(mass, u, BLOCK: tl.constexpr):
    """The first index with mass where the cumulative mass exceeds u * total, or the last."""
    mass = mass.to(tl.float64)
    index = tl.arange(0, BLOCK)
    cumulative = tl.cumsum(mass, axis=0)
    threshold = u * tl.max(cumulative, axis=0)
    first = tl.min(tl.where((cumulative > threshold) & (mass > 0.0), index, BLOCK), axis=0)
    last = tl.max(tl.where(mass > 0.0, index, 0), axis=0)
    return tl.minimum(first, last)


@triton.jit
def masses(x, center, scale, alpha, TWICE_ALPHA: tl.constexpr):
    """e^alpha of logits relative to a center."""
    if TWICE_ALPHA == 0:
        mass = tl.where(x > -INFINITY, 1.0, 0.0)
    else:
        mass = tl.exp2(alpha * tl.fma(x, scale, -center))
    return mass


@triton.jit
def masses_of_slice(x, scale, alpha, TWICE_ALPHA: tl.constexpr):
    """max, and e^alpha of every entry relative to it, from all float32 logits of a slice."""
    max = tl.max(x, axis=0)
    return max, masses(x, centered(max, scale), scale, alpha, TWICE_ALPHA)


@triton.jit
def masses_of_slices(slice_max, mass, max, scale, alpha, TWICE_ALPHA: tl.constexpr):
    """Masses of slices, each relative to its maximum, relative to another, larger one."""
    difference = slice_max * scale - centered(max, scale)
    factor = pow_factor(tl.exp2(difference), difference, alpha, TWICE_ALPHA)
    return tl.where(slice_max == -INFINITY, 0.0, factor * mass)


@triton.jit
def key_of(x):
    """An int32 that is ordered as the float32 x is."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def logit_of(key, SHIFT: tl.constexpr):
    """The float32 of the lowest key that begins with int64 `key`."""
    key = (key << SHIFT).to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def weights_from(
    row_ptr,
    vocab,
    a,
    b,
    c,
    center,
    scale,
    alpha,
    MASS: tl.constexpr,
    TWICE_ALPHA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The number, or with MASS the mass, of the entries of a row that are >= a, b, c."""
    index = tl.arange(0, BLOCK)
    # What a thread counts in float32 is exact, and takes fewer instructions than integers.
    from_a = tl.zeros([BLOCK], tl.float32)
    from_b = from_a
    from_c = from_a
    for start in range(0, vocab, BLOCK):
        here = start + index
        x = tl.load(row_ptr + here, mask=here < vocab, other=-INFINITY).to(tl.float32)
        weight = masses(x, center, scale, alpha, TWICE_ALPHA) if MASS else 1.0
        from_a += tl.where(x >= a, weight, 0.0)
        from_b += tl.where(x >= b, weight, 0.0)
        from_c += tl.where(x >= c, weight, 0.0)
    if not MASS:
        from_a = from_a.to(tl.int32)
        from_b = from_b.to(tl.int32)
        from_c = from_c.to(tl.int32)
    return tl.sum(from_a, axis=0), tl.sum(from_b, axis=0), tl.sum(from_c, axis=0)


@triton.jit
def highest_key(
    row_ptr,
    vocab,
    low,
    high,
    wanted,
    center,
    scale,
    alpha,
    MASS: tl.constexpr,
    TWICE_ALPHA: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A key in [low, high] at which the entries at or above weigh at least `wanted`.

    The highest one, or one with just that weight; low where there is none. A pass over the row
    leaves a quarter of the keys.
    """
    found = wanted - 1
    while (low < high) & (found != wanted):
        width = high - low
        a = low + (width + 3) // 4
        b = low + (width + 1) // 2
        c = low + (3 * width + 3) // 4
        from_a, from_b, from_c = weights_from(
            row_ptr,
            vocab,
            logit_of(a, SHIFT),
            logit_of(b, SHIFT),
            logit_of(c, SHIFT),
            center,
            scale,
            alpha,
            MASS,
            TWICE_ALPHA,
            BLOCK,
        )
        if from_a >= wanted:
            if from_c >= wanted:
                low = c
                found = from_c
            elif from_b >= wanted:
                low = b
                high = c - 1
                found = from_b
            else:
                low = a
                high = b - 1
                found = from_a
        else:
            high = a - 1
    return low


@triton.jit(do_not_specialize=["stride_row", "num_slices", "top_k"])
def threshold_kernel(
    logits_ptr,  # [C, V]
    stride_logits,
    vocab,
    alpha,
    top_k,
    top_p,
    top_p_drop,  # nothing that top_p keeps is further below the largest logit
    min_p_drop,  # the same for min_p
    partials_ptr,  # float32 [C, slices]: max of every slice
    stride_row,
    num_slices,
    threshold_ptr,  # float32 [C]
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    TWICE_ALPHA: tl.constexpr,
    SHIFT: tl.constexpr,  # low bits of a logit's key that its dtype says nothing about
    SLICES: tl.constexpr,  # a power of 2, >= num_slices
    BLOCK: tl.constexpr,
):
    """The logit from which on a row's entries may be drawn. Grid: C programs.

    Searches among all floats, not among the entries: the threshold need not be one of them.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits
    index = tl.arange(0, SLICES)
    slice_max = tl.load(
        partials_ptr + row * stride_row + index, mask=index < num_slices, other=-INFINITY
    )
    max = tl.max(slice_max, axis=0)
    scale = LOG2_E
    center = centered(max, scale)
    # From the largest finite negative number: -inf is never in.
    low = tl.full([], LOWEST_KEY >> SHIFT, tl.int64)
    high = key_of(max).to(tl.int64) >> SHIFT
    if TOP_K:
        low = highest_key(
            row_ptr,
            vocab,
            low,
            high,
            top_k,
            center,
            scale,
            alpha,
            False,
            TWICE_ALPHA,
            SHIFT,
            BLOCK,
        )
    if TOP_P:
        lowest = logit_of(low, SHIFT)
        total, _, _ = weights_from(
            row_ptr,
            vocab,
            lowest,
            lowest,
            lowest,
            center,
            scale,
            alpha,
            True,
            TWICE_ALPHA,
            BLOCK,
        )
        low = tl.maximum(low, key_of(max + top_p_drop).to(tl.int64) >> SHIFT)
        low = highest_key(
            row_ptr,
            vocab,
            low,
            high,
            top_p * total,
            center,
            scale,
            alpha,
            True,
            TWICE_ALPHA,
            SHIFT,
            BLOCK,
        )
    tl.store(threshold_ptr + row, tl.maximum(logit_of(low, SHIFT), max + min_p_drop))


@triton.jit(do_not_specialize=["stride_row", "num_slices"])
def support_sums_kernel(
    logits_ptr,  # [C, V]
    stride_logits,
    vocab,
    alpha,
    threshold_ptr,  # float32 [C]
    partials_ptr,  # float32 [4, C, slices]: max, sum, pow_sum, dot of every slice
    stride_plane,
    stride_row,
    num_slices,
    TWICE_ALPHA: tl.constexpr,
):
    """Replaces pow_sum by what is at or above the threshold. Grid: C * num_slices programs."""
    row = (tl.program_id(0) // num_slices).to(tl.int64)
    index = tl.program_id(0) % num_slices
    partials_ptr += row * stride_row + index
    pow_sum_ptr = partials_ptr + 2 * tl.cast(stride_plane, tl.int64)
    threshold = tl.load(threshold_ptr + row)
    if tl.load(partials_ptr) < threshold:
        tl.store(pow_sum_ptr, 0.0)
        return
    here = index * SLICE_V + tl.arange(0, SLICE_V)
    x = tl.load(logits_ptr + row * stride_logits + here, mask=here < vocab, other=-INFINITY)
    x = x.to(tl.float32)
    _, mass = masses_of_slice(tl.where(x < threshold, -INFINITY, x), LOG2_E, alpha, TWICE_ALPHA)
    tl.store(pow_sum_ptr, tl.sum(mass, axis=0))


@triton.jit(do_not_specialize=["stride_row"])
def draw_kernel(
    logits_ptr,  # [C, V]
    stride_logits,
    vocab,
    seed_ptr,  # int64 [1]
    counters_ptr,  # int64 [C, 4]
    banned_ptr,  # int64 [C] or None
    threshold_ptr,  # float32 [C] or None: no entry below is drawn; pow_sum is that of the others
    alpha,
    partials_ptr,  # float32 [4, C, slices]: max, sum, pow_sum, dot of every slice
    stride_plane,
    stride_row,
    token_ptr,  # int64 [C]
    log_prob_ptr,  # float32 [C], as the next
    log_z_ptr,
    entropy_ptr,
    ENTROPY: tl.constexpr,
    TWICE_ALPHA: tl.constexpr,
    GROUPS: tl.constexpr,  # a power of 2, >= the number of groups
    SLICES: tl.constexpr,  # a power of 2, >= the number of slices
):
    """Draws a token by inverse CDF, slice first, and scores it. Grid: C programs.

    Reads again only the slice that was drawn, and a banned token's: its mass without the token
    is summed anew, since subtracting would leave nothing where the token has nearly all.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits
    partials_ptr += row * stride_row
    scale = LOG2_E
    num_slices = tl.cdiv(vocab, SLICE_V)
    max, sum, pow_sum, dot = merge_row(
        partials_ptr,
        stride_plane,
        1,
        num_slices,
        scale,
        alpha,
        ENTROPY,
        TWICE_ALPHA,
        GROUP,
        GROUPS,
    )
    c0 = tl.load(counters_ptr + 4 * row).to(tl.uint32)
    c1 = tl.load(counters_ptr + 4 * row + 1).to(tl.uint32)
    c2 = tl.load(counters_ptr + 4 * row + 2).to(tl.uint32)
    c3 = tl.load(counters_ptr + 4 * row + 3).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), c0, c1, c2, c3)

    index = tl.arange(0, SLICES)
    kept = index < num_slices
    slice_max = tl.load(partials_ptr + index, mask=kept, other=-INFINITY)
    plane = tl.cast(stride_plane, tl.int64)
    mass = tl.load(partials_ptr + 2 * plane + index, mask=kept, other=0.0)
    entry = tl.arange(0, SLICE_V)
    if threshold_ptr is not None:
        threshold = tl.load(threshold_ptr + row)
        slice_max = tl.where(slice_max < threshold, -INFINITY, slice_max)
        support_mass = tl.sum(
            masses_of_slices(slice_max, mass, max, scale, alpha, TWICE_ALPHA), axis=0
        )
    banned = -1
    if banned_ptr is not None:
        banned = tl.load(banned_ptr + row).to(tl.int32)
        if banned >= 0:
            start = banned // SLICE_V * SLICE_V
            left = entry + start < vocab
            x = tl.load(row_ptr + start + entry, mask=left, other=-INFINITY).to(tl.float32)
            x = tl.where(entry + start == banned, -INFINITY, x)
            if threshold_ptr is not None:
                x = tl.where(x < threshold, -INFINITY, x)
            rest_max, rest = masses_of_slice(x, scale, alpha, TWICE_ALPHA)
            is_rest = index == banned // SLICE_V
            slice_max = tl.where(is_rest, rest_max, slice_max)
            mass = tl.where(is_rest, tl.sum(rest, axis=0), mass)
    best = tl.max(slice_max, axis=0)
    mass = masses_of_slices(slice_max, mass, best, scale, alpha, TWICE_ALPHA)
    picked = inverse_cdf(mass, uniform53(w0, w1), SLICES)

    start = picked * SLICE_V
    here = start + entry
    x = tl.load(row_ptr + here, mask=here < vocab, other=-INFINITY).to(tl.float32)
    x = tl.where(here == banned, -INFINITY, x)
    if threshold_ptr is not None:
        x = tl.where(x < threshold, -INFINITY, x)
    _, mass = masses_of_slice(x, scale, alpha, TWICE_ALPHA)
    token = start + inverse_cdf(mass, uniform53(w2, w3), SLICE_V)
    # Nothing but the banned token has mass.
    token = tl.where((best == -INFINITY) & (banned >= 0), banned, token)
    target_logit = tl.load(row_ptr + token).to(tl.float32)
    log_prob, log_z, entropy, row_max, _ = finish_row(
        max, sum, pow_sum, dot, target_logit, scale, alpha, ENTROPY, TWICE_ALPHA
    )
    if threshold_ptr is not None:
        log_z = (tl.log2(support_mass) - alpha * tl.log2(sum)) * LN_2
        # Below 1 a sum over a part may have either sign.
        log_z = tl.where(alpha >= 1.0, tl.minimum(log_z, 0.0), log_z)
        log_z = tl.where(row_max == row_max, log_z, float("nan"))
    tl.store(token_ptr + row, tl.where(row_max == row_max, token, NO_TOKEN).to(tl.int64))
    tl.store(log_prob_ptr + row, log_prob)
    tl.store(log_z_ptr + row, log_z)
    if ENTROPY:
        tl.store(entropy_ptr + row, entropy)
