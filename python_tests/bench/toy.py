"""A kernel of the suite that takes microseconds, with variants that are slow, wrong or fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench.harness import machine, results, runner
from bench.harness.cases import Call, Case, Kernel, Outputs, Size, Variant

CPU = torch.device("cpu")
SIZE = 2**16


def make(case: Case, device: torch.device) -> Tensor:
    return torch.randn(case.shape["n"], generator=torch.Generator().manual_seed(0))


def bound(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Call]:
    return lambda x: lambda: {"y": function(x)}


def doubled(x: Tensor) -> Tensor:
    return 2 * x


def repeated(times: int) -> Callable[[Tensor], Tensor]:
    def slow(x: Tensor) -> Tensor:
        for _ in range(times - 1):
            doubled(x)
        return doubled(x)

    return slow


def wrong(x: Tensor) -> Tensor:
    y = 2 * x
    y[3] += 0.01
    return y


def failing(x: Tensor) -> Tensor:
    raise RuntimeError("this peer does not like its input")


def kernel(variants: Sequence[Variant], sizes: Sequence[int] = (SIZE,)) -> Kernel:
    def cases(size: Size) -> list[Case]:
        return [
            Case(f"{n} numbers", {"n": n}, bytes=8 * n, memory=8 * n, sweep=("n",)) for n in sizes
        ]

    def expected(x: Tensor, found: Outputs) -> Outputs:
        return {"y": 2 * x.double()}

    return Kernel(
        name="toy",
        part="toys",
        summary="twice as much",
        cases=cases,
        inputs=make,
        few=lambda x: x,
        expected=expected,
        ceiling="copy",
        rotates=False,
        variants=variants,
    )


OURS = Variant("powerkernels", bound(doubled), ours=True)


def measure(
    kernel: Kernel, path: Path | None = None, *, size: Size = "quick", free_bytes: int | None = None
) -> results.Document:
    document = results.Document(machine.environment(CPU), "powerkernels bench toy", path)
    settings = runner.Settings(size, CPU, frozenset({"eager"}), free_bytes=free_bytes)
    document.suite["ceilings"] = {"copy, GB/s": 1.0, "matmul float32, TFLOP/s": 1.0}
    runner.run([kernel], settings, document, say=lambda text: None, show=lambda rows: None)
    return document
