"""A driver for Triton's JIT whose last call does nothing but look at what it was given.

Everything before it is Triton's own: arguments are bound and specialised, kernels compiled for the
target, the globals that they used compared, shared memory and threads held against the device's.
What the JIT leaves to the real launcher and to the CUDA driver, and what these refuse, is in
`violations`: the names of Triton that it goes by are the same in 3.6 and 3.7.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver
from triton.runtime import driver

WARP = 32
# Of a block, when the kernel opts in: CUDA C++ Programming Guide, technical specifications by
# compute capability.
MAX_SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MAX_THREADS = 1024
MAX_GRID = (2**31 - 1, 65535, 65535)
# Triton's launcher multiplies the grid's sizes as ints, and launches nothing unless that is > 0.
MAX_PROGRAMS = 2**31 - 1
# Of all arguments, on every driver that serves these devices.
MAX_ARGUMENT_BYTES = 4096
# cuTensorMapEncodeTiled: alignment of addresses and strides, bounds of sizes.
TMA_ALIGNED, MAX_BOX, MAX_TMA_STRIDE, MAX_TMA_SIZE = 16, 256, 2**40, 2**32
SWIZZLED_BYTES = {1: 32, 2: 64, 3: 128}

INTEGERS = {
    f"{sign}{bits}": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if sign == "i" else (0, 2**bits - 1)
    for sign in "iu"
    for bits in (8, 16, 32, 64)
} | {"i1": (0, 1), "u1": (0, 1)}
FLOATS = {"fp16": 2, "bf16": 2, "fp32": 4, "f32": 4, "fp64": 8}


class LaunchError(RuntimeError):
    """What a GPU would not have taken."""


@dataclass
class Variant:
    """A kernel as it was compiled, and how often it was launched."""

    kernel: str
    signature: str
    shared_bytes: int
    num_warps: int
    launches: int = 0


@dataclass
class Launches:
    """Of a process."""

    variants: list[Variant] = field(default_factory=list)
    # Kernels that may have scratch memory in global memory, which Triton asks an allocator for.
    with_scratch: frozenset[str] = frozenset()

    @property
    def counts(self) -> dict[str, int]:
        counts: collections.Counter[str] = collections.Counter()
        for variant in self.variants:
            counts[variant.kernel] += variant.launches
        return dict(sorted(counts.items()))


def activate(
    arch: int,
    *,
    launches: Launches,
    current_device: Callable[[], int] = lambda: 0,
    device_of: Callable[[Tensor], int | None],
) -> None:
    """Makes Triton launch here, on a device of `arch`.

    device_of: the index of the CUDA device that a tensor is on, None on the host.
    """
    driver.set_active(_Driver(arch, launches, current_device, device_of))


class _Driver(GPUDriver):
    def __init__(
        self,
        arch: int,
        launches: Launches,
        current_device: Callable[[], int],
        device_of: Callable[[Tensor], int | None],
    ) -> None:
        # No super().__init__: it asks torch for a CUDA device.
        self.utils = _Utils(arch)
        self.target = GPUTarget("cuda", arch, WARP)
        self.get_current_device = current_device
        self.get_current_stream = lambda device: 0
        self.get_device_capability = lambda device=0: divmod(arch, 10)
        self.launcher_cls = lambda src, metadata: _Launcher(
            src, metadata, launches, current_device, device_of
        )

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


class _Utils:
    def __init__(self, arch: int) -> None:
        self.max_shared = MAX_SHARED_BYTES[arch]

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": self.max_shared,
            "max_num_regs": 65536,
            "multiprocessor_count": 132,
            "warpSize": WARP,
        }

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[int, int, int, int, int]:
        """module, function, registers, spills, the most threads."""
        if not binary.startswith(b"\x7fELF"):
            raise LaunchError(f"{name}: what was compiled is no cubin")
        return 1, 1, 0, 0, MAX_THREADS


class _Launcher:
    """In the place of triton.backends.nvidia.driver.CudaLauncher."""

    def __init__(
        self,
        src: Any,
        metadata: Any,
        launches: Launches,
        current_device: Callable[[], int],
        device_of: Callable[[Tensor], int | None],
    ) -> None:
        self.src, self.metadata = src, metadata
        self.launches = launches
        self.current_device, self.device_of = current_device, device_of
        self.variant: Variant | None = None

    def __call__(
        self,
        grid_x: int,
        grid_y: int,
        grid_z: int,
        stream: int,
        function: int,
        packed_metadata: Any,
        launch_metadata: Any,
        enter_hook: Any,
        exit_hook: Any,
        *args: Any,
    ) -> None:
        wrong = [
            *grid_violations((grid_x, grid_y, grid_z)),
            *resource_violations(self.metadata, self.launches.with_scratch),
            *argument_violations(
                self.src.signature,
                args,
                getattr(self.metadata, "tensordesc_meta", None) or [],
                self.current_device(),
                self.device_of,
            ),
        ]
        if wrong:
            raise LaunchError(f"{self.metadata.name}: {'; '.join(wrong)}")
        self.count()

    def count(self) -> None:
        if self.variant is None:
            self.variant = Variant(
                kernel=f"{self.src.fn.module}:{self.src.fn.__name__}",
                signature=", ".join(f"{k}: {v}" for k, v in self.src.signature.items()),
                shared_bytes=self.metadata.shared,
                num_warps=self.metadata.num_warps,
            )
            self.launches.variants.append(self.variant)
        self.variant.launches += 1


def grid_violations(grid: Sequence[int]) -> Iterator[str]:
    for name, size, most in zip("xyz", grid, MAX_GRID, strict=True):
        if type(size) is not int:
            yield f"grid {name} must be an int, got {size!r}"
            return
        if not 0 < size <= most:
            yield f"grid {name} must be 1 to {most}, got {size}"
            return
    if math.prod(grid) > MAX_PROGRAMS:
        yield f"a grid must have at most {MAX_PROGRAMS} programs, got {math.prod(grid)}"


def resource_violations(metadata: Any, with_scratch: frozenset[str]) -> Iterator[str]:
    """Beyond shared memory, tensor memory and threads, which Triton compares itself."""
    for name in ("global_scratch_size", "profile_scratch_size"):
        size = getattr(metadata, name, 0)
        if size and metadata.name not in with_scratch:
            yield f"{name} must be 0 where none is declared, got {size} bytes a program"
    if getattr(metadata, "num_ctas", 1) != 1:
        yield f"num_ctas must be 1, got {metadata.num_ctas}"


def argument_violations(
    signature: dict[str, Any],
    args: Sequence[Any],
    descriptors: Sequence[Any],
    current_device: int,
    device_of: Callable[[Tensor], int | None],
) -> Iterator[str]:
    """What a launcher made for `signature` refuses of the arguments, or passes on wrongly."""
    if len(args) != len(signature):
        yield f"{len(signature)} arguments must be given, got {len(args)}"
        return
    size = 0
    waiting = iter(descriptors)
    for name, kind, arg in _flat(signature, args):
        if kind == "constexpr":
            continue
        if kind.startswith("tensordesc"):
            size += 128
            tensor, meta = arg.base, next(waiting, None)
            if meta is not None:
                yield from (f"{name}: {what}" for what in descriptor_violations(arg, meta))
            yield from _pointer_violations(name, tensor, current_device, device_of)
        elif kind.startswith("*"):
            size += 8
            yield from _pointer_violations(name, arg, current_device, device_of)
        elif kind in INTEGERS:
            low, high = INTEGERS[kind]
            size += 8
            if not isinstance(arg, int):
                yield f"{name} must be an int for {kind}, got {arg!r}"
            elif not low <= arg <= high:
                yield f"{name} must fit in {kind}, got {arg}"
        elif kind in FLOATS:
            size += FLOATS[kind]
            if not isinstance(arg, (int, float)):
                yield f"{name} must be a number for {kind}, got {arg!r}"
        else:
            yield f"{name} is of a type that no launcher knows: {kind}"
    if size > MAX_ARGUMENT_BYTES:
        yield f"arguments must take at most {MAX_ARGUMENT_BYTES} bytes, got {size}"


def _pointer_violations(
    name: str, arg: Any, current_device: int, device_of: Callable[[Tensor], int | None]
) -> Iterator[str]:
    if arg is None:
        return
    if not isinstance(arg, Tensor):
        yield f"{name} must be a tensor or None, got {arg!r}"
        return
    device = device_of(arg)
    if device is None:
        yield f"{name} is a tensor of the host's memory"
    elif device != current_device:
        yield f"{name} is on device {device}, launched on {current_device}"


def descriptor_violations(descriptor: Any, meta: dict[str, Any]) -> Iterator[str]:
    """What cuTensorMapEncodeTiled refuses."""
    box, element = meta["block_size"], meta["elem_size"]
    if descriptor.base.data_ptr() % TMA_ALIGNED:
        yield f"its address must be a multiple of {TMA_ALIGNED}"
    for stride in descriptor.strides[:-1]:
        if stride * element % TMA_ALIGNED or not 0 <= stride * element < MAX_TMA_STRIDE:
            yield f"a stride of {stride * element} bytes"
    if descriptor.strides[-1] != 1:
        yield "its last dimension must be contiguous"
    for extent in descriptor.shape:
        if not 0 < extent <= MAX_TMA_SIZE:
            yield f"a size of {extent}"
    if any(not 0 < extent <= MAX_BOX for extent in box):
        yield f"a box of {list(box)}"
    row = box[-1] * element
    if row % TMA_ALIGNED or row > SWIZZLED_BYTES.get(meta["swizzle"], row):
        yield f"rows of {row} bytes in a box with swizzle {meta['swizzle']}"


def _flat(signature: dict[str, Any], args: Sequence[Any]) -> Iterator[tuple[str, str, Any]]:
    for (name, kind), arg in zip(signature.items(), args, strict=True):
        if isinstance(kind, tuple):
            parts = {f"{name}[{i}]": part for i, part in enumerate(kind)}
            yield from _flat(parts, arg)
        else:
            yield name, kind, arg
