"""A CUDA device for torch that is none: tensors without memory that say they are on it.

They are meta tensors. Python code outside of torch sees `device` cuda:1, while the current device
is cuda:0, and addresses aligned as on a GPU; torch itself sees the meta device, so that its shape
functions and its autograd work as they are. What would wait for a GPU to know a value (item,
tolist, a copy to the host) raises, and so does a launch that is given a tensor of the host. The ops
of this package run their own implementation and not their fake.

For a process of its own: what is replaced here stays replaced.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGE = "powerkernels"
# Another one than the current device: who launches without a guard is seen.
DEVICE = torch.device("cuda", 1)
# The alignment of what torch's allocator returns.
ALLOCATED_BYTES = 512

_device_of = torch.Tensor.device.__get__
_is_cuda = torch.Tensor.is_cuda.__get__
_address_of = torch.Tensor.data_ptr
_current = 0
_is_capturing = False


def is_on_device(tensor: torch.Tensor) -> bool:
    return _device_of(tensor).type == "meta"


def current_device() -> int:
    return _current


class StandInGpu(TorchDispatchMode):
    """While it is entered, tensors are made on the device, and ops of the package run."""

    def __init__(self) -> None:
        super().__init__()
        # Of the rows that an op looks for, how many it finds: all, unless a call says otherwise.
        self.share_found = 1.0
        # Copies from pageable memory of the host: each waits, and cannot be captured.
        self.copies_from_host = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == PACKAGE:
            implementation = OPDEFS[func._schema.name]._init_fn
            with self:
                return implementation(*args, **kwargs)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = torch.device("meta")
            if func is torch.ops.aten._to_copy.default and not is_on_device(args[0]):
                self.copies_from_host += 1
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False  # which takes a driver
        if func is torch.ops.aten.nonzero.default:
            rows = int(args[0].numel() * self.share_found)
            return torch.empty((rows, args[0].ndim), dtype=torch.int64, device="meta")
        if func is torch.ops.aten.addmm.dtype_out:  # CUDA's alone, without a shape function
            return kwargs["out"]
        if func is torch.ops.aten.copy_.default and args[2:] == (True,) and is_on_device(args[1]):
            return args[0]  # to the host, and not waited for
        return func(*args, **kwargs)


class _Properties:
    multi_processor_count = 132
    name = "stand-in"


class _Event:
    def record(self, stream: Any = None) -> None:
        _check_guarded("an event is recorded on")

    def query(self) -> bool:
        return False


def _capturing() -> bool:
    _check_guarded("asked about is")
    return _is_capturing


def _check_guarded(what: str) -> None:
    """A stream that is not named is the current device's, whatever device the tensors are on."""
    if _current != DEVICE.index:
        raise RuntimeError(f"{what} the stream of cuda:{_current}, for tensors on {DEVICE}")


@contextlib.contextmanager
def _guard(device: Any) -> Iterator[None]:
    global _current
    before = _current
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    _current = before if device.index is None else device.index
    try:
        yield
    finally:
        _current = before


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """While code of the package is to believe that its stream is captured."""
    global _is_capturing
    _is_capturing = True
    try:
        yield
    finally:
        _is_capturing = False


def _torch_asks() -> bool:
    """Whether the caller of the caller is a part of torch."""
    name = sys._getframe(2).f_globals.get("__name__", "")
    return name.partition(".")[0] == "torch"


def _device(tensor: torch.Tensor) -> torch.device:
    return DEVICE if is_on_device(tensor) and not _torch_asks() else _device_of(tensor)


def _on_cuda(tensor: torch.Tensor) -> bool:
    return (is_on_device(tensor) and not _torch_asks()) or _is_cuda(tensor)


def _data_ptr(tensor: torch.Tensor) -> int:
    if not is_on_device(tensor):
        return _address_of(tensor)
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return 0
    # Its own for each storage, and a multiple of what an allocation is aligned to.
    return storage._cdata * ALLOCATED_BYTES + tensor.storage_offset() * tensor.element_size()


def install(arch: int) -> None:
    """Replaces what this package asks torch about a CUDA device; `arch`: 80, 90, 100."""
    torch.Tensor.device = property(_device)  # type: ignore[assignment,method-assign]
    torch.Tensor.is_cuda = property(_on_cuda)  # type: ignore[assignment,method-assign]
    torch.Tensor.data_ptr = _data_ptr  # type: ignore[assignment,method-assign]
    replaced: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "device": _guard,
        "current_device": current_device,
        "get_device_capability": lambda device=None: divmod(arch, 10),
        "get_device_properties": lambda device=None: _Properties,
        "is_current_stream_capturing": _capturing,
        "Event": _Event,
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    # torch.tensor(list, device=...) would go past the mode to a device.
    torch._C._set_only_lift_cpu_tensors(True)
