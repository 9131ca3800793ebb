"""Kernels that compile, and that the launch path must refuse on one count each."""

from __future__ import annotations

import triton
import triton.language as tl

NAN = tl.constexpr(float("nan"))
FACTOR = tl.constexpr(2.0)


@triton.jit
def good_kernel(x_ptr, n, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < n)
    tl.store(x_ptr + index, helper(x), mask=index < n)


@triton.jit
def helper(x):
    return x + 1.0


@triton.jit
def nan_kernel(x_ptr):
    tl.store(x_ptr, NAN)


@triton.jit
def changed_kernel(x_ptr):
    tl.store(x_ptr, FACTOR)


@triton.jit
def shared_kernel(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr):
    """Two operands of a tensor core in shared memory."""
    row = tl.arange(0, SIZE)
    a = tl.load(a_ptr + row[:, None] * SIZE + row[None, :])
    b = tl.load(b_ptr + row[:, None] * SIZE + row[None, :])
    tl.store(c_ptr + row[:, None] * SIZE + row[None, :], tl.dot(a, b).to(tl.float16))


@triton.jit
def scratch_kernel(x_ptr, n, BLOCK: tl.constexpr):
    """A descriptor that is made on the device lies in scratch memory."""
    rows = tl.make_tensor_descriptor(x_ptr, [n, BLOCK], [BLOCK, 1], [1, BLOCK])
    rows.store([0, 0], rows.load([0, 0]) + 1.0)


@triton.jit
def descriptor_kernel(rows, BLOCK: tl.constexpr):
    rows.store([0, 0], rows.load([0, 0]) + 1.0)


@triton.jit
def forgotten_kernel(x_ptr):
    """Nobody launches it."""
    tl.store(x_ptr, forgotten_helper())


@triton.jit
def forgotten_helper():
    return 0.0


@triton.jit
def ordered_kernel(x_ptr):
    tl.atomic_add(x_ptr, 1)
