"""The losses as textbooks write them, in torch with autograd; in float64 they are the truth."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from powerkernels.policy_loss import PolicyLoss
from python_tests.covariance import expected as covariance_truth
from python_tests.covariance.expected import rows_of, spread

MAX_LOG_RATIO = 20.0
MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)
SHARES = (0.0002, 0.002, 0.02, 0.2, 0.5, 1.0)

# Error allowed: this many times that of the same expression in torch's float32, plus a few float32
# roundings of the sum of the absolute losses.
ERROR_FACTOR = 2.0
FLOOR = {torch.float32: 2.0**-22, torch.float64: 2.0**-48}
# Of a gradient: its rounding to the dtype of log_prob, and the smallest number of that.
ROUNDING = {
    torch.float64: (2.0**-48, 0.0),
    torch.float32: (2.0**-22, 0.0),
    torch.bfloat16: (2.0**-8, 0.0),
    torch.float16: (2.0**-11, 2.0**-24),
}


class Batch(NamedTuple):
    log_prob: Tensor
    old_log_prob: Tensor
    advantages: Tensor
    mask: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(*(function(value) for value in self))


def random_batch(
    shape: tuple[int, ...],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    spread: float = 0.3,
) -> Batch:
    """spread: of the log-ratios. About a quarter of the tokens are masked out."""
    found = covariance_truth.random_batch(shape, generator)
    old = found.log_prob + spread * torch.randn(shape, generator=generator)
    return Batch(
        found.log_prob.to(dtype), old.to(dtype), found.advantages.to(dtype), found.mask.clone()
    )


# Each of the following: what it needs of a token, flat -> its loss, flat, in the inputs' dtype.


def ratio_of(log_prob: Tensor, old: Tensor) -> Tensor:
    return (log_prob - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def ppo_clip(
    log_prob: Tensor, old: Tensor, advantages: Tensor, low: float, high: float, c: float | None
) -> Tensor:
    ratio = ratio_of(log_prob, old)
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))
    if c is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -advantages * c), loss)


def clip_cov(
    log_prob: Tensor,
    old: Tensor,
    advantages: Tensor,
    low: float,
    high: float,
    selected: Tensor,
) -> Tensor:
    loss = ppo_clip(log_prob, old, advantages, low, high, None)
    return loss * (~selected).to(loss.dtype)


def kl_cov(
    log_prob: Tensor, old: Tensor, advantages: Tensor, coef: float, selected: Tensor
) -> Tensor:
    penalty = coef * (log_prob - old).abs()
    return -advantages * ratio_of(log_prob, old) + penalty * selected.to(log_prob.dtype)


def kl(log_prob: Tensor, ref: Tensor, estimator: str) -> Tensor:
    """With the "+" the value of the estimator and the gradient of k2."""
    name = estimator.removesuffix("+")
    difference = log_prob - ref
    if name in ("k1", "kl"):
        value = difference
    elif name == "abs":
        value = difference.abs()
    elif name in ("k2", "mse"):
        value = 0.5 * difference**2
    else:
        bounded = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        value = ((-bounded).exp() + bounded - 1).clamp(-10, 10)
    if estimator.endswith("+"):
        k2 = 0.5 * difference**2
        value = k2 + (value - k2).detach()
    return value


def aggregate(
    loss: Tensor,
    kept: Tensor,
    rows: list[range],
    mode: str,
    horizon: int | None,
    *,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    loss_scale_factor: float | None = None,
) -> Tensor:
    """loss and kept: flat; verl's `agg_loss`, row by row."""
    sums = [torch.where(kept[row], loss[row], 0).sum() for row in map(list, rows)]
    counts = [int(kept[row].sum()) for row in map(list, rows)]
    if mode == "seq-mean-token-mean":
        sums = [value / (count + 1e-8) for value, count in zip(sums, counts, strict=True)]
    total = dp_size * sum(sums, 0 * loss.sum())
    if mode == "token-mean":
        return total / (batch_num_tokens or max(1, sum(counts)))
    if mode == "token-sum":
        return total
    total = total / (global_batch_size or max(1, sum(count > 0 for count in counts)))
    if mode == "seq-mean-token-sum-norm":
        total = total / (loss_scale_factor or horizon)
    return total


class Expected(NamedTuple):
    loss: Tensor  # float64 []
    gradient: Tensor  # float64, flat
    tokens: Tensor  # float64, the tokens' losses, flat
    total: Callable[[Tensor], Tensor]  # the aggregate of such


def expect(
    token_loss: Callable[..., Tensor],
    tensors: tuple[Tensor, ...],
    mask: Tensor | None,
    *,
    dtype: torch.dtype = torch.float64,
    mode: str = "token-mean",
    weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **counts: Any,
) -> Expected:
    """token_loss of log_prob, the first of the tensors, and the others (advantages of sequences
    are spread); what is masked out is 0."""
    log_prob = tensors[0].detach()
    kept = torch.from_numpy(covariance_truth.as_bool(mask, log_prob))

    def flat(value: Tensor) -> Tensor:
        values = torch.from_numpy(spread(value, log_prob, cu_seqlens)).to(dtype)
        return torch.where(kept, values, 0)

    first, *others = (flat(value) for value in tensors)
    x = first.requires_grad_()
    loss = token_loss(x, *others)
    if weights is not None:
        loss = loss * flat(weights)
    horizon = log_prob.shape[-1] if cu_seqlens is None else None
    rows = rows_of(log_prob, cu_seqlens)

    def total(values: Tensor) -> Tensor:
        return aggregate(values, kept, rows, mode, horizon, **counts)

    value = total(loss)
    (slope,) = torch.autograd.grad(value, x)
    return Expected(value.detach().double(), slope.double(), loss.detach().double(), total)


def assert_loss(
    found: PolicyLoss,
    leaf: Tensor,
    token_loss: Callable[..., Tensor],
    *inputs: Any,
    magnitude: float = 0.0,
    **how: Any,
) -> None:
    """Value, and gradient for the leaf; the inputs as of `expect`, on the CPU.

    magnitude: of what a token's loss, or its derivative, is the difference of, where that is much
    smaller.
    """
    exact = expect(token_loss, *inputs, **how)
    peer = expect(token_loss, *inputs, **how, dtype=torch.float32)
    loss = found.loss
    assert loss.shape == ()
    assert loss.dtype in (torch.float32, torch.float64)
    error = (loss.detach().cpu().double() - exact.loss).abs()
    allowed = FLOOR[loss.dtype] * exact.total(exact.tokens.abs() + magnitude)
    if loss.dtype == torch.float32:
        allowed = allowed + ERROR_FACTOR * exact.total((peer.tokens - exact.tokens).abs())
    assert error <= allowed, (loss, exact.loss, error, allowed)

    (slope,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert slope.dtype == leaf.dtype
    assert slope.shape == leaf.shape
    relative, least = ROUNDING[slope.dtype]
    error = (slope.detach().cpu().double().flatten() - exact.gradient).abs()
    largest = exact.gradient.abs().max() if len(exact.gradient) else 0
    tokens = exact.tokens.requires_grad_()
    (shares,) = torch.autograd.grad(exact.total(tokens), tokens)
    rounding = largest + magnitude * shares.abs()
    allowed = relative * exact.gradient.abs() + least + FLOOR[loss.dtype] * rounding
    if loss.dtype == torch.float32:
        allowed = allowed + ERROR_FACTOR * (peer.gradient - exact.gradient).abs().amax()
    assert (error <= allowed).all(), (error.max(), (error / allowed).max())


def assert_metrics(found: PolicyLoss, wanted: dict[str, float], size: float = 1.0) -> None:
    """Counts and shares exactly, means to float32's rounding of numbers of this size."""
    for name, value in wanted.items():
        got = found.metrics[name]
        assert got.shape == (), name
        assert got.dtype == torch.float64, name
        assert not got.requires_grad, name
        exact = "clipfrac" in name or "tokens" in name or "constant" in name
        close = math.isclose(
            got.item(),
            value,
            rel_tol=1e-15 if exact else 2**-21,
            abs_tol=0 if exact else 2**-22 * size,
        )
        assert close, (name, got.item(), value)


def clipped_by_ppo(
    log_prob: Tensor, old: Tensor, advantages: Tensor, low: float, high: float
) -> Tensor:
    """bool: the unclipped objective is the larger one."""
    ratio = ratio_of(log_prob.double(), old.double())
    above = (advantages > 0) & (ratio > 1 + high)
    return above | ((advantages < 0) & (ratio < 1 - low))


def common_metrics(log_prob: Tensor, old: Tensor, mask: Tensor | None) -> dict[str, float]:
    kept = torch.from_numpy(covariance_truth.as_bool(mask, log_prob)).view(log_prob.shape)
    count = max(1, int(kept.sum()))
    difference = (log_prob.double() - old.double())[kept].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return {
        "actor/approx_kl_k1": -difference.sum().item() / count,
        "actor/approx_kl_k3": (difference.exp() - 1 - difference).sum().item() / count,
        "actor/nonfinite_tokens": 0,
    }


def table_metrics(truth: covariance_truth.Truth) -> dict[str, float]:
    ordered = sorted(truth.cov[truth.kept].tolist(), reverse=True)
    found = {"actor/covariance": truth.covariance}
    for share in SHARES:
        number = max(1, math.floor(truth.count * share))
        found[f"actor/cov_top_{share:g}"] = math.fsum(ordered[:number]) / number
        found[f"actor/cov_quantile_{share:g}"] = ordered[number - 1]
    return found
