"""Linear layers of a CPU model with their weights packed once.

torch hands a plain weight to oneDNN or MKL on every call. For the few rows of a lane step, packing
costs as much as the product: measured on two cores, 16 rows of SmolLM2's layers, bf16, the packed
product takes about half the time. It is the packing that torch's own compiler uses when it freezes
a model.

A CPU whose bfloat16 oneDNN does not know (AVX2 alone) has a bfloat16 product whose time grows with
the rows. There the product is ours (csrc/cpu/packed_linear.cpp): weights widened in registers, so
that bfloat16 is what memory is read for; every product exact and summed in float32, the result
rounded once. Without the compiled part the packed copy is float32: the same rounding for twice the
memory and the time of reading it. A model that a `DecoderStep` runs has our panels for all layers,
float32 too, since the step reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from powerkernels import _extension


class PackedLinears:
    """Packs the plain `nn.Linear` layers of a model on a CPU; on other devices does nothing.

    The layers themselves are not changed: packed copies stand in for their forward inside
    `in_use()`. Costs as much memory again as the layers' weights, twice that where a float32 copy
    stands for bfloat16.

    Args:
        model: the model.
        own: use our product for every layer, whatever the CPU.

    Attributes:
        panels: of each layer whose product is ours, its weight [ceil(N / P), K, P] (see `pack`).
            Their addresses stay.
    """

    def __init__(self, model: nn.Module, *, own: bool = False) -> None:
        self._forwards: dict[nn.Linear, Callable[[Tensor], Tensor]] = {}
        self._packed_from: dict[nn.Linear, Fingerprint] = {}
        self.panels: dict[nn.Linear, Tensor] = {}
        if not (own or _available()):
            return
        # A subclass or a hook may do more than the product.
        linears = [
            module for module in model.modules() if type(module) is nn.Linear and _packable(module)
        ]
        self.panels = _new_panels([module for module in linears if own or _ours(module)])
        for module in linears:
            self._pack(module)

    def _pack(self, module: nn.Linear) -> None:
        self._packed_from[module] = _fingerprint(module)
        if module in self.panels:
            pack(module.weight.detach(), self.panels[module])
            self._forwards[module] = _panels_forward(module, self.panels[module])
        else:
            self._forwards[module] = _packed_forward(module)

    def refresh(self) -> None:
        """Pack again what has changed since, in whatever way: a version counter misses some."""
        for module, before in self._packed_from.items():
            if _fingerprint(module) != before:
                self._pack(module)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The model's linear layers replaced by their packed copies."""
        for module, forward in self._forwards.items():
            module.forward = forward  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            for module in self._forwards:
                del module.forward


def _available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(
        torch.ops.mkldnn, "_reorder_linear_weight"
    )


def _packable(module: nn.Linear) -> bool:
    weight = module.weight
    if weight.device.type != "cpu" or "forward" in module.__dict__:
        return False
    return weight.dtype in (torch.bfloat16, torch.float32)


# Address, and the sum of the bits as integers, of the weight and of the bias.
Fingerprint = tuple[tuple[int, int], ...]


def _fingerprint(module: nn.Linear) -> Fingerprint:
    tensors = (module.weight, module.bias)
    return tuple(
        (tensor.data_ptr(), _sum_of_bits(tensor)) for tensor in tensors if tensor is not None
    )


def _sum_of_bits(tensor: Tensor) -> int:
    flat = tensor.detach().contiguous().flatten()
    words = flat.numel() * flat.element_size() // 8 * 8 // flat.element_size()
    total = int(flat[:words].view(torch.int64).sum()) if words else 0
    integer = {2: torch.int16, 4: torch.int32}[flat.element_size()]
    return total + int(flat[words:].view(integer).sum())


def _ours(module: nn.Linear) -> bool:
    return (
        module.weight.dtype == torch.bfloat16
        and not multiplies_bfloat16()
        and _extension.backend_for(module.weight.device) == "cpp"
    )


def _new_panels(modules: list[nn.Linear]) -> dict[nn.Linear, Tensor]:
    """Room for each layer's panels: one piece of memory, so that it can have large pages."""
    shapes = {module: panels_shape(*module.weight.shape) for module in modules}
    sizes = [math.prod(shape) * module.weight.element_size() for module, shape in shapes.items()]
    memory = torch.empty(sum(sizes), dtype=torch.uint8)
    if sizes:
        _extension.compiled().prefer_huge_pages(memory.data_ptr(), memory.numel())
    pieces = zip(shapes.items(), memory.split(sizes), strict=True)
    return {
        module: piece.view(module.weight.dtype).view(shape) for (module, shape), piece in pieces
    }


def _packed_forward(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    if module.weight.dtype == torch.bfloat16 and not multiplies_bfloat16():
        return _float32_copy_forward(module)
    bias = None if module.bias is None else module.bias.detach()
    return _onednn_forward(module.weight.detach(), bias)


def _onednn_forward(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    packed: Any = torch.ops.mkldnn._reorder_linear_weight(weight)

    def forward(input: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(input, packed, bias, "none", [], "")

    return forward


def _float32_copy_forward(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    """A bfloat16 layer by a float32 copy of its weight."""
    bias = None if module.bias is None else module.bias.detach().float()
    forward = _onednn_forward(module.weight.detach().float(), bias)
    return lambda input: forward(input.float()).bfloat16()


def _panels_forward(module: nn.Linear, panels: Tensor) -> Callable[[Tensor], Tensor]:
    """A layer by our own product."""
    weight = module.weight.detach()
    bias = None if module.bias is None else module.bias.detach().contiguous()

    def forward(input: Tensor) -> Tensor:
        if input.dtype != weight.dtype:
            return nn.functional.linear(input, weight, bias)
        return packed_linear(input, panels, weight.shape[0], bias)

    return forward


def panels_shape(columns: int, depth: int) -> tuple[int, int, int]:
    """Shape of the panels of a weight [N, K]: [ceil(N / P), K, P]."""
    width = _extension.compiled().PANEL_COLUMNS
    return -(-columns // width), depth, width


def pack(weight: Tensor, out: Tensor | None = None) -> Tensor:
    """bfloat16 or float32 [N, K] on a CPU as panels [ceil(N / P), K, P] of P columns."""
    columns, depth = weight.shape
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    if out is None:
        out = weight.new_empty(panels_shape(columns, depth))
    _extension.compiled().pack_linear(
        weight=weight.data_ptr(),
        dtype=_extension.DTYPE_CODES[weight.dtype],
        stride=weight.stride(0),
        columns=columns,
        depth=depth,
        packed=out.data_ptr(),
        num_threads=_extension.num_threads(),
    )
    return out


def packed_linear(input: Tensor, packed: Tensor, columns: int, bias: Tensor | None) -> Tensor:
    """input [..., K] times the weight that `pack` made of [N, K], plus bias [N]: [..., N].

    All bfloat16 or all float32. Sums are float32 in the order of K, rounded once; a row's result
    does not depend on the other rows nor on the number of threads.
    """
    depth = packed.shape[1]
    rows = input.reshape(-1, depth)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    output = input.new_empty(*input.shape[:-1], columns)
    _extension.compiled().packed_linear(
        input=rows.data_ptr(),
        packed=packed.data_ptr(),
        bias=_extension.address(bias),
        output=output.data_ptr(),
        dtype=_extension.DTYPE_CODES[input.dtype],
        rows=rows.shape[0],
        columns=columns,
        depth=depth,
        input_stride=rows.stride(0),
        num_threads=_extension.num_threads(),
    )
    return output


def multiplies_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
