"""What the scores and their gradients should be, and how far from it is still right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from powerkernels.logprob import reference

ALPHAS = (0.0, 0.5, 1.0, 2.0, 2.5, 4.0, 7.3)

# Error allowed: this many times the error of the same expression in torch's float32, plus a few
# float32 roundings of the result. Measured: at most 1.5 times on all levels.
ERROR_FACTOR = 2.0
ERROR_FLOOR = 2**-22
# Of gradients: the rounding to the logits' dtype, relative to the row's largest; and that of the
# saved float32 log sums, relative to what comes in, about 1, and multiplied by alpha.
GRADIENT_FLOOR = {
    torch.float64: 1e-12,
    torch.float32: 0.0,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}
SAVED_FLOOR = (2**-21, 2**-50)  # float32, float64
DEFAULTS: dict[str, Any] = {
    "alpha": 1.0,
    "temperature": 1.0,
    "entropy": True,
    "softcap": None,
    "ignore_index": -100,
}


def random_logits(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal logits, a fifth of them masked, entry 0 of every row never."""
    logits = 4 * torch.randn(shape, generator=generator)
    logits[torch.rand(shape, generator=generator) < 0.2] = -torch.inf
    logits[..., 0] = 1.0
    return logits.to(dtype)


def far_apart(logits: Tensor) -> Tensor:
    """The same two rows, 2^31 elements apart; what lies between them is never touched."""
    distance = 2**31
    memory = torch.empty(distance + logits.shape[1], dtype=logits.dtype)
    rows = memory.as_strided(logits.shape, (distance, 1))
    return rows.copy_(logits)


def truth(logits: Tensor, targets: Tensor, **options: Any) -> list[Tensor]:
    return list(reference.score_tokens(logits.double(), targets, **(DEFAULTS | options)))


def float32_expression(
    logits: Tensor, targets: Tensor, alpha: float, temperature: float | Tensor
) -> list[Tensor]:
    """The scores as one writes them in torch, in float32."""
    if isinstance(temperature, Tensor):
        temperature = temperature.float().unsqueeze(-1)
    log_p = torch.log_softmax(logits.float() / temperature, dim=-1)
    log_prob = log_p.gather(-1, targets[..., None].long()).squeeze(-1)
    masked = log_p == -torch.inf
    log_z = torch.logsumexp((alpha * log_p).masked_fill(masked, -torch.inf), dim=-1)
    return [log_prob, log_z, -(log_p.exp() * log_p.masked_fill(masked, 0.0)).sum(-1)]


def assert_close_to_truth(got: Tensor, exact: Tensor, expression: Tensor, what: str) -> None:
    finite = exact.isfinite()
    special = exact[~finite].to(got.dtype)
    torch.testing.assert_close(got[~finite], special, rtol=0, atol=0, equal_nan=True, msg=what)
    if not finite.any():
        return
    exact = exact[finite]
    error = (got[finite].double() - exact).abs()
    if got.dtype == torch.float64:
        # The same formula in another order: a few roundings of float64 times log V.
        assert (error <= 1e-12 * (1 + exact.abs())).all(), (what, error.max())
        return
    peer = (expression[finite].double() - exact).abs().max()
    allowed = ERROR_FACTOR * peer + ERROR_FLOOR * (1 + exact.abs())
    assert (error <= allowed).all(), (what, error.max(), peer)


def gradient(scores: Any, weights: list[Tensor], logits: Tensor) -> Tensor:
    """Of the weighted sum of the finite scores."""
    total = sum(
        (torch.where(score.isfinite(), score, 0.0) * weight.to(score.dtype)).sum()
        for score, weight in zip(scores, weights, strict=True)
    )
    return torch.autograd.grad(total, logits)[0]


def true_gradient(
    logits: Tensor, targets: Tensor, weights: list[Tensor], **options: Any
) -> tuple[Tensor, Tensor]:
    """float64, and that of the same expression in torch's float32."""
    z = logits.double().requires_grad_()
    exact = gradient(truth(z, targets, **options), weights, z)
    x = logits.float().requires_grad_()
    keep = (options["alpha"], options.get("temperature", 1.0))
    values = float32_expression(x, targets.clamp(min=0), *keep)
    ignored = targets == options.get("ignore_index", -100)
    values = [value.masked_fill(ignored, 0.0) for value in values]
    return exact, gradient(values, weights, x).nan_to_num(0.0)


def assert_gradient_close(
    got: Tensor, exact: Tensor, expression: Tensor, what: str, alpha: float = 1.0
) -> None:
    """By rows: an entry's error is held against the row's largest entry."""
    error = (got.double() - exact).abs().amax(-1)
    peer = (expression.double() - exact).abs().amax(-1)
    scale = exact.abs().amax(-1)
    saved = SAVED_FLOOR[got.dtype == torch.float64] * (1 + alpha)
    rounding = GRADIENT_FLOOR[got.dtype] * scale + saved * scale.clamp(min=1.0)
    allowed = ERROR_FACTOR * peer + rounding + 1e-30
    if got.dtype == torch.float16:
        allowed = allowed + 2**-24  # its smallest number
    assert (error <= allowed).all(), (what, error, peer, scale)


def random_weights(targets: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Incoming gradients of log_prob, log_z and entropy, 0 for some rows and fields."""
    weights = [torch.randn(targets.shape, generator=generator) for _ in range(3)]
    for k, weight in enumerate(weights):
        weight.view(-1)[k::5] = 0.0
    return weights
