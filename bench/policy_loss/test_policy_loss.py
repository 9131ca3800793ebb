"""Selection and loss, forward and backward, over the tokens of an RL step: verl's functions beside.

Ours are checked against verl's value and gradient before anything is timed (Clip-Cov: with verl's
own choice of tokens). "interleaved": verl's function runs once before each round of ours, which
finds its inputs out of the caches; "loop": each in a loop of its own, one after the other.
`times_faster` is verl's median by ours. Skipped by name where verl is not installed.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from powerkernels import clip_cov_loss, kl_cov_loss, ppo_clip_loss

# One million tokens; a quick size.
SHAPE, QUICK_SHAPE = (256, 4096), (16, 512)
ROUNDS, QUICK_ROUNDS = 15, 2
KL_COEF = 1.0


class Batch(NamedTuple):
    log_prob: Tensor
    old_log_prob: Tensor
    advantages: Tensor
    mask: Tensor


@pytest.fixture(scope="module")
def batch(quick: bool) -> Batch:
    """Log-probs whose covariances are spread about as in the paper's table: 2% are above 1."""
    generator = torch.Generator().manual_seed(0)
    rows, length = shape = QUICK_SHAPE if quick else SHAPE
    log_prob = 0.4 * torch.rand(shape, generator=generator).log()
    old_log_prob = log_prob + 0.05 * torch.randn(shape, generator=generator)
    advantages = torch.randn(rows, 1, generator=generator).expand(shape).contiguous()
    lengths = torch.randint(length // 2, length + 1, (rows, 1), generator=generator)
    mask = torch.arange(length) < lengths
    return Batch(log_prob.requires_grad_(), old_log_prob, advantages, mask)


def ours_ppo_clip(x: Batch, selected: Tensor | None = None) -> Tensor:
    return ppo_clip_loss(*x).loss


def ours_clip_cov(x: Batch, selected: Tensor | None = None) -> Tensor:
    return clip_cov_loss(*x, seed=0, selected=selected).loss


def ours_kl_cov(x: Batch, selected: Tensor | None = None) -> Tensor:
    return kl_cov_loss(*x, ppo_kl_coef=KL_COEF).loss


class Verl:
    def __init__(self) -> None:
        pytest.importorskip("verl")
        from python_tests.policy_loss import verl_losses

        self.function = verl_losses.algorithms.get_policy_loss_fn
        self.config = verl_losses.config(ppo_kl_coef=KL_COEF)

    def loss(self, name: str, x: Batch) -> Tensor:
        inputs = (x.old_log_prob, x.log_prob, x.advantages, x.mask)
        return self.function(name)(*inputs, "token-mean", self.config)[0]


@pytest.fixture(scope="module")
def verl() -> Verl:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what verl imports
        return Verl()


# verl's name of each of ours.
PAIRS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "ppo_clip": (ours_ppo_clip, "vanilla"),
    "clip_cov": (ours_clip_cov, "clip_cov"),
    "kl_cov": (ours_kl_cov, "kl_cov"),
}


def forward_and_backward(loss: Callable[[], Tensor], x: Batch) -> Tensor:
    return torch.autograd.grad(loss(), x.log_prob)[0]


def verl_choice(x: Batch, gradient: Tensor) -> Tensor:
    """The tokens that verl's Clip-Cov left out: no gradient, where PPO's clipping leaves one."""
    ppo = forward_and_backward(lambda: ours_ppo_clip(x), x)
    return (gradient == 0) & (ppo != 0)


def check(name: str, x: Batch, verl: Verl) -> None:
    ours, theirs = PAIRS[name]
    loss = verl.loss(theirs, x)
    (gradient,) = torch.autograd.grad(loss, x.log_prob)
    selected = verl_choice(x, gradient) if name == "clip_cov" else None
    found = ours(x, selected)
    torch.testing.assert_close(found, loss, rtol=1e-4, atol=1e-6)
    (found_gradient,) = torch.autograd.grad(found, x.log_prob)
    torch.testing.assert_close(found_gradient, gradient, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("caches", ["interleaved", "loop"])
def test_policy_loss(
    benchmark: Any, batch: Batch, verl: Verl, name: str, caches: str, quick: bool
) -> None:
    check(name, batch, verl)
    ours, theirs = PAIRS[name]
    rounds = QUICK_ROUNDS if quick else ROUNDS
    peer: list[float] = []

    def run_verl() -> None:
        start = time.perf_counter()
        forward_and_backward(lambda: verl.loss(theirs, batch), batch)
        peer.append(time.perf_counter() - start)

    if caches == "loop":
        run_verl()  # as the warm-up round of ours
        peer.clear()
        for _ in range(rounds):
            run_verl()
    benchmark.group = f"{name}, {caches}, forward and backward, {list(batch.log_prob.shape)} tokens"
    benchmark.pedantic(
        forward_and_backward,
        args=(lambda: ours(batch), batch),
        setup=run_verl if caches == "interleaved" else None,
        rounds=rounds,
        warmup_rounds=1,
        iterations=1,
    )
    if benchmark.stats is None:  # --benchmark-disable
        return
    times = sorted(benchmark.stats.stats.data)
    theirs_median = statistics.median(peer)
    benchmark.extra_info.update(
        shape=list(batch.log_prob.shape),
        dtype="float32",
        tokens=int(batch.mask.sum()),
        caches=caches,
        p20_ms=1e3 * times[len(times) // 5],
        p80_ms=1e3 * times[-1 - len(times) // 5],
        verl_ms=1e3 * theirs_median,
        times_faster=theirs_median / benchmark.stats.stats.median,
    )
