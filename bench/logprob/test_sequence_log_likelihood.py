"""sequence_log_likelihood against the same sum in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from powerkernels import sequence_log_likelihood

ALPHA = 4.0
# Sequences times tokens of one RL step; a quick one.
SHAPE, QUICK_SHAPE = (2048, 4096), (64, 512)


@pytest.fixture(scope="module")
def padded(quick: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows, length = QUICK_SHAPE if quick else SHAPE
    log_prob = -torch.rand(rows, length, generator=generator)
    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
    return log_prob, torch.arange(length) < lengths


def torch_expression(log_prob: Tensor, mask: Tensor) -> Tensor:
    return (ALPHA * torch.where(mask, log_prob, 0.0).sum(-1, dtype=torch.float64)).float()


def ours(log_prob: Tensor, mask: Tensor) -> Tensor:
    return sequence_log_likelihood(log_prob, alpha=ALPHA, mask=mask)


@pytest.mark.parametrize("candidate", [torch_expression, ours], ids=lambda c: c.__name__)
def test_sequence_log_likelihood(
    benchmark: Any, padded: tuple[Tensor, Tensor], candidate: Callable[[Tensor, Tensor], Tensor]
) -> None:
    log_prob, mask = padded
    expected = (ALPHA * torch.where(mask, log_prob.double(), 0.0).sum(-1)).float()
    torch.testing.assert_close(candidate(log_prob, mask), expected, rtol=2**-22, atol=0)
    benchmark.extra_info.update(shape=list(log_prob.shape), dtype=str(log_prob.dtype))
    benchmark.pedantic(candidate, args=(log_prob, mask), rounds=15, warmup_rounds=1)
