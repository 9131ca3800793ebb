"""Which operator of torch, in which layer, a call fails at: for errors that name the offender."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

# What a person wrote where torch's own name of the operator does not tell.
_SPOKEN = {"aten._local_scalar_dense.default": "a tensor's value read by Python, as in .item()"}


class Site(NamedTuple):
    """An operator and the layers it was called in, the outermost first."""

    operator: str
    layers: tuple[nn.Module, ...]

    def __str__(self) -> str:
        spoken = _SPOKEN.get(self.operator)
        operator = f"{self.operator} ({spoken})" if spoken else self.operator
        return f"{operator} in {layer_name(self.layers)}" if self.layers else operator


class OperatorWatch(TorchDispatchMode):
    """Inside `with`, notes every operator that torch runs and the layers it runs in.

    It stands in torch's way: compiled code runs uncompiled, and slowly. For a second look at what
    has failed.

    Args:
        device: whose random numbers to watch besides the CPU's. None watches no random numbers,
            which is what a capture allows.

    Attributes:
        last: the last operator begun; None before the first.
        failed: the last operator that an exception came out of.
        random: the first operator that drew from torch's default generators.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.last: Site | None = None
        self.failed: Site | None = None
        self.random: Site | None = None
        self._device = device
        self._layers: list[nn.Module] = []
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> OperatorWatch:
        self._hooks = [
            register_module_forward_pre_hook(self._enter_layer),
            register_module_forward_hook(self._leave_layer, always_call=True),
        ]
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.last = Site(str(func), tuple(self._layers))
        # Attention has the tag whether it drops out or not: only the generators tell.
        draws = self._device is not None and torch.Tag.nondeterministic_seeded in func.tags
        before = random_states(self._device) if draws else None
        try:
            result = func(*args, **(kwargs or {}))
        except BaseException:
            self.failed = self.last
            raise
        if before is not None and not same_states(before, random_states(self._device)):
            self.random = self.random or self.last
        return result

    def _enter_layer(self, module: nn.Module, args: Any) -> None:
        self._layers.append(module)

    def _leave_layer(self, module: nn.Module, args: Any, output: Any) -> None:
        if module in self._layers:  # not of a call that began before the watch
            while self._layers.pop() is not module:
                pass


def layer_name(layers: Sequence[nn.Module]) -> str:
    """`LlamaForCausalLM.model.layers.0.mlp (LlamaMLP)`: the innermost layer by its path."""
    outermost, innermost = layers[0], layers[-1]
    root = type(outermost).__name__
    if innermost is outermost:
        return root
    for name, module in outermost.named_modules():
        if module is innermost:
            return f"{root}.{name} ({type(innermost).__name__})"
    return " > ".join(type(layer).__name__ for layer in layers)


def watched(
    call: Callable[[], object], device: torch.device | None = None
) -> tuple[OperatorWatch, Exception | None]:
    """Makes the call under a watch; returns the watch and what the call raised, if it did."""
    watch = OperatorWatch(device)
    try:
        with watch:
            call()
    except Exception as error:
        return watch, error
    return watch, None


def random_states(device: torch.device | None) -> list[Tensor]:
    """The states of torch's default generators: the CPU's and that of a CUDA device."""
    states = [torch.get_rng_state()]
    if device is not None and device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def same_states(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
