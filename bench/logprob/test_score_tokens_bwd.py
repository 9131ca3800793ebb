"""score_tokens, forward and backward: gradients of log_prob, log_z and entropy at once.

Every gradient is compared with float64 on a few rows before it is timed. extra_info: the time as a
multiple of copying the logits once, measured next to it in the same run (a forward and a backward
read the logits twice and write them once: 1.5 copies), and the peak memory beyond the logits.
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
from powerkernels import score_tokens
from powerkernels.logprob import reference

ALPHA = 4.0
SHAPE, QUICK_SHAPE = (512, 151936), (32, 20000)
CHECKED_ROWS = 3
ROUNDS = 7


class Inputs:
    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        rows, vocab = shape
        self.logits = (3 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()
        self.copy = torch.empty(shape, dtype=dtype)
        self.targets = torch.randint(vocab, (rows,), generator=generator)
        self.weights = [torch.randn(rows, generator=generator) for _ in range(3)]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def inputs(request: pytest.FixtureRequest, quick: bool) -> Inputs:
    return Inputs(QUICK_SHAPE if quick else SHAPE, request.param)


def weighted(scores: Any, x: Inputs) -> Tensor:
    return sum((score * weight).sum() for score, weight in zip(scores, x.weights, strict=True))


def torch_expression(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log_prob, log_z and entropy as one writes them in torch."""
    log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    log_prob = log_p.gather(-1, targets[:, None]).squeeze(-1)
    log_z = torch.logsumexp(ALPHA * log_p, dim=-1)
    return log_prob, log_z, -(log_p.exp() * log_p).sum(-1)


@functools.cache
def compiled_expression() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(torch_expression, fullgraph=True)


def copy_once(x: Inputs) -> Tensor:
    with torch.no_grad():
        return x.copy.copy_(x.logits)


def torch_eager(x: Inputs) -> Tensor:
    scores = torch_expression(x.logits, x.targets)
    return torch.autograd.grad(weighted(scores, x), x.logits)[0]


def torch_compile(x: Inputs) -> Tensor:
    scores = compiled_expression()(x.logits, x.targets)
    return torch.autograd.grad(weighted(scores, x), x.logits)[0]


def torch_cross_entropy(x: Inputs) -> Tensor:
    """log_prob alone, for comparison."""
    nll = torch.nn.functional.cross_entropy(x.logits, x.targets, reduction="none")
    return torch.autograd.grad(-(nll * x.weights[0]).sum(), x.logits)[0]


def powerkernels_log_prob_only(x: Inputs) -> Tensor:
    scores = score_tokens(x.logits, x.targets)
    return torch.autograd.grad((scores.log_prob * x.weights[0]).sum(), x.logits)[0]


def powerkernels(x: Inputs) -> Tensor:
    scores = score_tokens(x.logits, x.targets, alpha=ALPHA, entropy=True)
    return torch.autograd.grad(weighted(scores, x), x.logits)[0]


def powerkernels_inplace(x: Inputs) -> Tensor:
    """As after a matmul, whose result nobody else needs: the copy stands for it."""
    logits = x.copy.detach().requires_grad_()
    scores = score_tokens(logits, x.targets, alpha=ALPHA, entropy=True, inplace_backward=True)
    return torch.autograd.grad(weighted(scores, x), logits)[0]


def check(name: str, got: Tensor, x: Inputs) -> None:
    rows = slice(CHECKED_ROWS)
    z = x.logits.detach()[rows].double().requires_grad_()
    scores = reference.score_tokens(
        z,
        x.targets[rows],
        alpha=ALPHA,
        temperature=1.0,
        entropy=True,
        softcap=None,
        ignore_index=-100,
    )
    last = 1 if name in ("torch_cross_entropy", "powerkernels_log_prob_only") else 3
    total = sum(
        (score * weight[rows]).sum()
        for score, weight in list(zip(scores, x.weights, strict=True))[:last]
    )
    (exact,) = torch.autograd.grad(total, z)
    tolerance = 1e-5 if got.dtype == torch.float32 else 2**-7
    error = (got[rows].double() - exact).abs().max() / exact.abs().max()
    assert error <= tolerance, (name, error)


CANDIDATES: list[Callable[[Inputs], Tensor]] = [
    copy_once,
    torch_cross_entropy,
    powerkernels_log_prob_only,
    torch_eager,
    torch_compile,
    powerkernels,
    powerkernels_inplace,
]


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda candidate: candidate.__name__)
def test_score_tokens_bwd(
    benchmark: Any, inputs: Inputs, candidate: Callable[[Inputs], Tensor]
) -> None:
    copy_once(inputs)
    result = candidate(inputs)
    if candidate is not copy_once:
        check(candidate.__name__, result, inputs)
    del result
    copy_once(inputs)
    peak = peak_bytes(lambda: candidate(inputs))
    dtype = str(inputs.logits.dtype).removeprefix("torch.")
    benchmark.group = f"forward + backward, {dtype} {list(inputs.logits.shape)}"
    ceiling: list[float] = []

    def copy_between() -> None:
        start = time.perf_counter()
        copy_once(inputs)
        ceiling.append(time.perf_counter() - start)

    benchmark.pedantic(
        candidate, args=(inputs,), setup=copy_between, rounds=ROUNDS, warmup_rounds=1, iterations=1
    )
    if benchmark.stats is None:  # --benchmark-disable
        return
    times = sorted(benchmark.stats.stats.data)
    median = benchmark.stats.stats.median
    benchmark.extra_info.update(
        shape=list(inputs.logits.shape),
        dtype=dtype,
        alpha=ALPHA,
        p20_ms=1e3 * times[len(times) // 5],
        p80_ms=1e3 * times[-1 - len(times) // 5],
        times_the_copy=median / statistics.median(ceiling),
        peak_megabytes=None if peak is None else peak / 1e6,
        logits_megabytes=inputs.logits.numel() * inputs.logits.element_size() / 1e6,
    )
