"""What is measured: a kernel has cases (sizes) and variants (implementations)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Outputs = dict[str, Tensor]
Call = Callable[[], Any]

# Sizes: `device` those of a training step on a GPU, `host` those that a CPU does in seconds,
# `quick` small ones, to see that everything runs.
Size = Literal["device", "host", "quick"]
SIZES: tuple[Size, ...] = ("device", "host", "quick")


@dataclass(frozen=True)
class Model:
    """The sizes of a published model's head and attention."""

    name: str
    hidden: int
    vocab: int
    heads: int
    kv_heads: int
    head_size: int


# From the models' own config.json. DESIGN's table has the vocabulary of the smaller Qwen2.5.
QWEN_7B = Model("Qwen2.5-7B", 3584, 152064, 28, 4, 128)
QWEN_1B = Model("Qwen2.5-1.5B", 1536, 151936, 12, 2, 128)
LLAMA_8B = Model("Llama-3-8B", 4096, 128256, 32, 8, 128)
SMOLLM2 = Model("SmolLM2-135M", 576, 49152, 9, 3, 64)


@dataclass(frozen=True)
class Case:
    """One size of a kernel.

    bytes and flops are the floor: what any implementation must move, and multiply and add in
    matrix products. memory is what one set of inputs and one result take.
    """

    label: str
    shape: dict[str, int]
    dtype: torch.dtype = torch.float32
    bytes: int = 0
    flops: int = 0
    memory: int = 0
    sweep: tuple[str, ...] = ()  # axes of the plots that it is a point of
    main: bool = False  # variants that take long to prepare run here only

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def title(self) -> str:
        return f"{self.label}, {self.dtype_name}"


@dataclass(frozen=True)
class Variant:
    """One implementation.

    Args:
        name: as the tables have it.
        bind: inputs -> a call without arguments that does the work once and returns its outputs. On
            a GPU both are made on the stream that is captured.
        peer: what must be installed, a name of `peers.PEERS`; None for torch itself and ours.
        ours: whether `compare` holds it against us when it becomes slower.
        extra_memory: bytes at its peak beyond the case's memory.
        main_only: it runs in a kernel's main cases only, since it takes long to prepare.
        on_host: on a GPU part of its work is the host's: no graph, and the wall clock.
        metrics: figures of the last call besides its time, from the inputs and the median seconds.
    """

    name: str
    bind: Callable[[Any], Call]
    peer: str | None = None
    ours: bool = False
    extra_memory: Callable[[Case], int] = field(default=lambda case: 0)
    main_only: bool = False
    on_host: bool = False
    metrics: Callable[[Any, float], dict[str, float]] | None = None


@dataclass(frozen=True)
class Kernel:
    """An op, or a whole job.

    Args:
        name, part: the part is the folder it is in.
        summary: what is timed, in a line.
        cases: the sizes by `Size`.
        inputs: case, device -> a pytree of tensors, or any object if `rotates` is False.
        few: the part of the inputs that is checked.
        expected: few inputs, outputs of a variant -> the same in float64. Outputs of other names
            are not compared.
        picked: outputs -> those that belong to the few inputs.
        yardstick: as expected, by plain torch in the same dtype; its error sets the tolerance.
            None: rounding of the outputs' dtype alone.
        by_outcome: expected and yardstick depend on what a variant drew or chose, and are computed
            for each variant anew.
        variants: ours first.
        ceiling: "read" or "copy" of the case's bytes, or case, inputs -> (name, call).
        rotates: several copies of the inputs are used in turn, larger than the caches together.
        whole_job: seconds a call: few rounds, and nothing is evicted from the caches.
    """

    name: str
    part: str
    summary: str
    cases: Callable[[Size], Sequence[Case]]
    inputs: Callable[[Case, torch.device], Any]
    few: Callable[[Any], Any]
    expected: Callable[[Any, Outputs], Outputs]
    variants: Sequence[Variant]
    picked: Callable[[Outputs], Outputs] = field(default=lambda outputs: outputs)
    yardstick: Callable[[Any, Outputs], Outputs] | None = None
    by_outcome: bool = False
    ceiling: Literal["read", "copy"] | Callable[[Case, Any], tuple[str, Call]] | None = None
    rotates: bool = True
    whole_job: bool = False
