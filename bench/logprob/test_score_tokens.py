"""score_tokens and sample_tokens against reading the logits once, and against torch.

Every result is compared with the reference on a few rows before it is timed. extra_info of each
figure: the shape, bytes of the logits, GB/s, and the time as a multiple of `logits.sum()` measured
next to it in the same run, which is the ceiling: it reads everything once and computes nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from powerkernels import sample_tokens, score_tokens
from powerkernels.logprob import reference

ALPHA = 4.0
# Rows times vocabulary of a small RL batch on a CPU; a quick one; both with an odd tail slice.
SHAPE, QUICK_SHAPE = (512, 151936), (32, 20000)
CHECKED_ROWS = 4
ROUNDS = 15


class Inputs:
    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        rows, vocab = shape
        self.logits = (3 * torch.randn(shape, generator=generator)).to(dtype)
        self.targets = torch.randint(vocab, (rows,), generator=generator)
        index = torch.arange(rows)
        self.counters = torch.stack((index * 0, index, index * 0, index), dim=-1)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def inputs(request: pytest.FixtureRequest, quick: bool) -> Inputs:
    return Inputs(QUICK_SHAPE if quick else SHAPE, request.param)


def torch_sum(x: Inputs) -> Tensor:
    return x.logits.sum()


def torch_log_softmax_gather(x: Inputs) -> Tensor:
    log_p = torch.log_softmax(x.logits, dim=-1, dtype=torch.float32)
    return log_p.gather(-1, x.targets[:, None]).squeeze(-1)


def torch_cross_entropy(x: Inputs) -> Tensor:
    return -torch.nn.functional.cross_entropy(x.logits, x.targets, reduction="none")


def torch_all_three(x: Inputs) -> Tensor:
    """log_prob, log_z and entropy as one writes them in torch."""
    log_p = torch.log_softmax(x.logits, dim=-1, dtype=torch.float32)
    log_prob = log_p.gather(-1, x.targets[:, None]).squeeze(-1)
    log_z = torch.logsumexp(ALPHA * log_p, dim=-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return torch.stack((log_prob, log_z, entropy))


def score(x: Inputs) -> Tensor:
    return torch.stack(score_tokens(x.logits, x.targets, alpha=ALPHA, entropy=True))


def score_log_prob_only(x: Inputs) -> Tensor:
    return score_tokens(x.logits, x.targets).log_prob


def sample(x: Inputs) -> Tensor:
    return sample_tokens(x.logits, alpha=ALPHA, seed=0, counters=x.counters, entropy=True).token


def exact(x: Inputs, rows: slice) -> tuple[Tensor, ...]:
    scores = reference.score_tokens(
        x.logits[rows].double(),
        x.targets[rows],
        alpha=ALPHA,
        temperature=1.0,
        entropy=True,
        softcap=None,
        ignore_index=-100,
    )
    return tuple(value for value in scores if value is not None)


def check(name: str, result: Tensor, x: Inputs) -> None:
    rows = slice(CHECKED_ROWS)
    if name == "torch_sum":
        assert result.isfinite()
    elif name == "sample":
        tokens, *_ = reference.sample_tokens(
            x.logits[rows],
            alpha=ALPHA,
            seed=torch.tensor([0]),
            counters=x.counters[rows],
            banned=None,
            entropy=False,
        )
        assert torch.equal(result[rows], tokens)
    else:
        expected = torch.stack(exact(x, rows))
        got = result[..., rows].double()
        # bfloat16 is what torch's cross-entropy rounds its result to.
        tolerance = 1e-2 if result.dtype == torch.bfloat16 else 1e-5
        expected = expected if got.ndim == 2 else expected[0]
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


CANDIDATES: list[Callable[[Inputs], Tensor]] = [
    torch_sum,
    torch_log_softmax_gather,
    torch_cross_entropy,
    torch_all_three,
    score_log_prob_only,
    score,
    sample,
]


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda candidate: candidate.__name__)
def test_score_tokens(
    benchmark: Any, inputs: Inputs, candidate: Callable[[Inputs], Tensor]
) -> None:
    check(candidate.__name__, candidate(inputs), inputs)
    dtype = str(inputs.logits.dtype).removeprefix("torch.")
    benchmark.group = f"{dtype} {list(inputs.logits.shape)}"
    # The ceiling is timed between the rounds: what else the machine does slows both.
    ceiling: list[float] = []

    def read_once() -> None:
        start = time.perf_counter()
        torch_sum(inputs)
        ceiling.append(time.perf_counter() - start)

    benchmark.pedantic(
        candidate, args=(inputs,), setup=read_once, rounds=ROUNDS, warmup_rounds=1, iterations=1
    )
    if benchmark.stats is None:  # --benchmark-disable
        return
    median = benchmark.stats.stats.median
    times = sorted(benchmark.stats.stats.data)
    num_bytes = inputs.logits.numel() * inputs.logits.element_size()
    benchmark.extra_info.update(
        shape=list(inputs.logits.shape),
        dtype=dtype,
        alpha=ALPHA,
        p20_ms=1e3 * times[len(times) // 5],
        p80_ms=1e3 * times[-1 - len(times) // 5],
        gigabytes_per_second=num_bytes / median / 1e9,
        times_the_sum=median / statistics.median(ceiling),
    )
