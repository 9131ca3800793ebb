"""Calls that a GPU would not take, each for one reason, and one that it would."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from python_tests.launch_path import toy_kernels as kernels
from python_tests.launch_path.calls import Call
from python_tests.launch_path.stand_in_gpu import DEVICE, StandInGpu


def jit_modules() -> list[ModuleType]:
    return [importlib.import_module("python_tests.launch_path.toy_kernels")]


def floats(*shape: int) -> Tensor:
    return torch.empty(shape, device=DEVICE)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    with torch.cuda.device(DEVICE):
        kernel[grid](*args, **options)


def good(size: int = 5003, *, num_warps: int = 4, **grid: int) -> None:
    sizes = {"x": triton.cdiv(size, 128), "y": 1, "z": 1, **grid}
    launch(
        kernels.good_kernel, tuple(sizes.values()), floats(size), size, BLOCK=128,
        num_warps=num_warps,
    )  # fmt: skip


def multiply(size: int) -> None:
    a, b, c = (torch.empty(size, size, dtype=torch.float16, device=DEVICE) for _ in range(3))
    launch(kernels.shared_kernel, (1,), a, b, c, SIZE=size, num_warps=8)


def change_global() -> None:
    launch(kernels.changed_kernel, (1,), floats(1))
    kernels.FACTOR = triton.language.constexpr(kernels.FACTOR.value + 1.0)


def describe(columns: int, offset: int = 0) -> None:
    """Of rows that TMA takes, unless their stride or address is odd."""
    rows = floats(8 * columns + 16)[offset : offset + 8 * columns].view(8, columns)
    descriptor = TensorDescriptor(rows, [8, 32], [columns, 1], [1, 32])
    launch(kernels.descriptor_kernel, (1,), descriptor, BLOCK=32)


def without_guard() -> None:
    kernels.good_kernel[(1,)](floats(5), 5, BLOCK=128)


def look(x: Tensor) -> None:
    if x.sum().item() > 0:
        good()


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "NaN global": (
        lambda: launch(kernels.nan_kernel, (1,), floats(1)),
        "Global variable NAN has changed",
    ),
    "changed global": (change_global, "Global variable FACTOR has changed"),
    "empty grid": (lambda: good(x=0), "grid x must be 1 to 2147483647, got 0"),
    "grid x": (lambda: good(x=2**31), "grid x must be 1 to 2147483647, got 2147483648"),
    "grid y": (lambda: good(y=65536), "grid y must be 1 to 65535, got 65536"),
    "grid z": (lambda: good(z=65536), "grid z must be 1 to 65535, got 65536"),
    "programs": (lambda: good(x=2**20, y=2**12), "at most 2147483647 programs, got 4294967296"),
    "grid of floats": (lambda: good(x=40.0), "grid x must be an int, got 40.0"),  # type: ignore[arg-type]
    "shared memory": (lambda: multiply(256), "out of resource: shared memory"),
    "threads": (lambda: good(num_warps=64), "threads"),
    "scratch": (
        lambda: launch(kernels.scratch_kernel, (1,), floats(8, 32), 8, BLOCK=32),
        "global_scratch_size must be 0 where none is declared",
    ),
    "descriptor stride": (lambda: describe(33), "strides must be 16-byte aligned"),
    "descriptor address": (lambda: describe(32, 1), "base must be 16-byte aligned"),
    "host tensor": (
        lambda: launch(kernels.good_kernel, (1,), torch.zeros(5), 5, BLOCK=128),
        "x_ptr is a tensor of the host's memory",
    ),
    "no guard": (without_guard, "x_ptr is on device 1, launched on 0"),
    "unknown option": (
        lambda: launch(kernels.good_kernel, (1,), floats(5), 5, BLOCK=128, no_such=1),
        "no_such was specified but unrecognised",
    ),
    "item": (lambda: look(floats(5)), "cannot be called on meta tensors"),
    "copy from the host": (
        lambda: (good(), torch.tensor([1, 2], device=DEVICE)),
        "1 copies from the host",
    ),
    "no launch": (lambda: None, "launches made: 0"),
}
GOOD: dict[str, Callable[[], object]] = {
    "good": good,
    "good matmul": lambda: multiply(64),
    "good descriptor": lambda: describe(32),
    "good atomic": lambda: launch(
        kernels.ordered_kernel, (1,), torch.empty(1, dtype=torch.int32, device=DEVICE)
    ),
}


def _call(name: str, function: Callable[[], object]) -> Call:
    def call(gpu: StandInGpu) -> object:
        return function()

    return Call(name, call, full=False, launches=True, copies_from_host=False)


CALLS = [
    *(_call(name, function) for name, (function, _) in BAD.items()),
    *(_call(name, function) for name, function in GOOD.items()),
]
