"""linear_score_tokens, forward and backward, against the head's matmul and what one does in torch.

The ceiling is the four matmuls alone, of whole logits, measured next to each in the same run. Every
gradient is compared with the eager one in float32 before it is timed. extra_info: the time as a
multiple of the matmuls, and the peak memory beyond the inputs, which includes the gradients of
hidden and weight themselves.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.memory import peak_bytes
from powerkernels import linear_score_tokens, score_tokens

ALPHA = 4.0
# Rows, hidden size and vocabulary of SmolLM2; a quick one.
SHAPE, QUICK_SHAPE = (512, 576, 49152), (32, 64, 2000)
ROUNDS = 5


class Inputs:
    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        rows, dim, vocab = shape
        self.hidden = torch.randn(rows, dim, generator=generator).to(dtype).requires_grad_()
        weight = torch.randn(vocab, dim, generator=generator) * (2 * dim**-0.5)
        self.weight = weight.to(dtype).requires_grad_()
        self.targets = torch.randint(vocab, (rows,), generator=generator)
        self.weights = [torch.randn(rows, generator=generator) for _ in range(3)]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def inputs(request: pytest.FixtureRequest, quick: bool) -> Inputs:
    return Inputs(QUICK_SHAPE if quick else SHAPE, request.param)


Gradients = tuple[Tensor, Tensor]


def gradients(scores: Any, x: Inputs) -> Gradients:
    total = sum((score * weight).sum() for score, weight in zip(scores, x.weights, strict=True))
    return torch.autograd.grad(total, (x.hidden, x.weight))


def torch_expression(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    log_p = torch.log_softmax(hidden @ weight.T, dim=-1, dtype=torch.float32)
    log_prob = log_p.gather(-1, targets[:, None]).squeeze(-1)
    log_z = torch.logsumexp(ALPHA * log_p, dim=-1)
    return log_prob, log_z, -(log_p.exp() * log_p).sum(-1)


@functools.cache
def compiled_expression() -> Callable[..., tuple[Tensor, ...]]:
    return torch.compile(torch_expression, fullgraph=True)


def four_matmuls(x: Inputs) -> Gradients:
    """What no implementation without the logits in memory can leave out."""
    with torch.no_grad():
        for _ in range(2):
            logits = x.hidden @ x.weight.T
        return logits @ x.weight, logits.T @ x.hidden


def torch_eager(x: Inputs) -> Gradients:
    return gradients(torch_expression(x.hidden, x.weight, x.targets), x)


def torch_compile(x: Inputs) -> Gradients:
    return gradients(compiled_expression()(x.hidden, x.weight, x.targets), x)


def matmul_then_score_tokens(x: Inputs) -> Gradients:
    logits = x.hidden @ x.weight.T
    scores = score_tokens(logits, x.targets, alpha=ALPHA, entropy=True, inplace_backward=True)
    return gradients(scores, x)


def powerkernels(x: Inputs) -> Gradients:
    return gradients(
        linear_score_tokens(x.hidden, x.weight, x.targets, alpha=ALPHA, entropy=True), x
    )


def check(name: str, got: Gradients, x: Inputs) -> None:
    wide = Inputs.__new__(Inputs)
    wide.hidden = x.hidden.detach().float().requires_grad_()
    wide.weight = x.weight.detach().float().requires_grad_()
    wide.targets, wide.weights = x.targets, x.weights
    tolerance = 1e-4 if x.hidden.dtype == torch.float32 else 0.05
    for value, expected in zip(got, torch_eager(wide), strict=True):
        error = (value.float() - expected).abs().max() / expected.abs().max()
        assert error <= tolerance, (name, error)


CANDIDATES: list[Callable[[Inputs], Gradients]] = [
    four_matmuls,
    torch_eager,
    torch_compile,
    matmul_then_score_tokens,
    powerkernels,
]


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda candidate: candidate.__name__)
def test_linear_score_tokens(
    benchmark: Any, inputs: Inputs, candidate: Callable[[Inputs], Gradients]
) -> None:
    result = candidate(inputs)
    if candidate is not four_matmuls:
        check(candidate.__name__, result, inputs)
    del result
    peak = peak_bytes(lambda: candidate(inputs))
    dtype = str(inputs.hidden.dtype).removeprefix("torch.")
    shape = [*inputs.hidden.shape, inputs.weight.shape[0]]
    benchmark.group = f"forward + backward, {dtype} {shape}"
    ceiling: list[float] = []

    def matmuls_between() -> None:
        start = time.perf_counter()
        four_matmuls(inputs)
        ceiling.append(time.perf_counter() - start)

    benchmark.pedantic(
        candidate,
        args=(inputs,),
        setup=matmuls_between,
        rounds=ROUNDS,
        warmup_rounds=1,
        iterations=1,
    )
    if benchmark.stats is None:  # --benchmark-disable
        return
    times = sorted(benchmark.stats.stats.data)
    median = benchmark.stats.stats.median
    benchmark.extra_info.update(
        shape=shape,
        dtype=dtype,
        alpha=ALPHA,
        p20_ms=1e3 * times[len(times) // 5],
        p80_ms=1e3 * times[-1 - len(times) // 5],
        times_the_matmuls=median / statistics.median(ceiling),
        peak_megabytes=None if peak is None else peak / 1e6,
        logits_megabytes=shape[0] * shape[2] * inputs.hidden.element_size() / 1e6,
        gradients_megabytes=(shape[0] + shape[2]) * shape[1] * inputs.hidden.element_size() / 1e6,
    )
