"""Kernels of known machine code, good and bad, to try the gate on."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exp_sum(x_ptr, out_ptr, n, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Σ 2^x of every row; one exponential an element."""
    row = tl.program_id(0)
    x_ptr += row * n
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for i in tl.range(0, n // BLOCK, num_stages=STAGES):
        sums += tl.exp2(tl.load(x_ptr + i * BLOCK + lane).to(tl.float32))
    tl.store(out_ptr + row, tl.sum(sums, axis=0))


@triton.jit
def two_exps(x_ptr, out_ptr, n, alpha, BLOCK: tl.constexpr):
    """One tile, no loop; two exponentials an element."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (tl.exp2(x) + tl.exp2(alpha * x)).to(tl.bfloat16), mask=at < n)


@triton.jit
def normalize_twice(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Keeps a whole tile in registers."""
    lane = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lane)
    y = x / tl.sum(x, axis=0)
    tl.store(out_ptr + lane, x + y / tl.sum(y * y * y, axis=0))


@triton.jit
def matmul_exp_sum(
    a, b, out_ptr, n, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr
):
    """Σ 2^(a bᵀ) of every row, by host-side tensor descriptors; a loop within a loop."""
    m0 = tl.program_id(0) * M
    sums = tl.zeros([M], tl.float32)
    for n0 in range(0, n, N):
        product = tl.zeros([M, N], tl.float32)
        for k0 in tl.range(0, k, K, num_stages=STAGES):
            product = tl.dot(a.load([m0, k0]), b.load([n0, k0]).T, product)
        sums += tl.sum(tl.exp2(product), axis=1)
    tl.store(out_ptr + m0 + tl.arange(0, M), sums)


@triton.jit
def matmul_by_pointers(a_ptr, b_ptr, out_ptr, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """a bᵀ, both contiguous along k."""
    row, column, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a_at = a_ptr + row[:, None] * k + inner[None, :]
    b_at = b_ptr + column[None, :] * k + inner[:, None]
    product = tl.zeros([M, N], tl.float32)
    for _ in range(0, k, K):
        product = tl.dot(tl.load(a_at), tl.load(b_at), product)
        a_at += K
        b_at += K
    tl.store(out_ptr + row[:, None] * N + column[None, :], product)
