"""Where the Triton kernels run in a test: on a GPU, or interpreted on the CPU where there is none.

The interpreter is chosen before any kernel is defined, so the two do not mix in one process.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np
import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

DEVICES = [
    pytest.param(
        "cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here")
    ),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not HAS_GPU or INTERPRETED, reason="needs a CUDA device"),
        ],
    ),
]


def let_old_interpreters_index() -> None:
    """Triton 3.6 makes an int of an array of one element, which numpy 2.5 refuses; 3.7 does not."""
    import triton
    from triton.runtime import interpreter

    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
        return
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: type, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


def let_interpreters_splat_conditions() -> None:
    """A condition has the type of what it compares in the interpreter, so that a block made of it
    holds integers, which Triton 3.9 refuses as a mask; here it holds conditions, as on a GPU.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    create_splat = interpreter.InterpreterBuilder.create_splat

    def splat(self: Any, block_type: Any, scalar: Any) -> Any:
        if scalar.data.dtype == np.bool_:
            scalar = interpreter.TensorHandle(scalar.data, tl.int1)
        return create_splat(self, block_type, scalar)

    interpreter.InterpreterBuilder.create_splat = splat


if INTERPRETED and importlib.util.find_spec("triton") is not None:
    let_old_interpreters_index()
    let_interpreters_splat_conditions()


def make_interpreter_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: fma rounds once, and a product of bfloat16 matrices is that of their values.

    numpy has neither fma nor bfloat16; the interpreter rounds an fma's product and multiplies the
    matrices' bits as integers.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    create_dot = builder.create_dot

    def create_fma(self, x, y, z):
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(x.data.dtype), z.dtype.scalar)

    def widened(block):
        if block.dtype.scalar != tl.bfloat16:
            return block
        bits = block.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot_of_values(self, a, b, *arguments):
        return create_dot(self, widened(a), widened(b), *arguments)

    monkeypatch.setattr(builder, "create_fma", create_fma)
    monkeypatch.setattr(builder, "create_dot", create_dot_of_values)
