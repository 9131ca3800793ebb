"""The scores as formulas in plain torch: the truth that the other backends are tested against.

Everything is computed in float64 and differentiable. p = softmax(z / temperature), q = p^alpha
renormalised.
"""

from __future__ import annotations

import torch
from torch import Tensor

from powerkernels.philox.reference import philox4x32, uniform53

# Vocabulary entries per slice: the sampler picks a slice, then a token in it. Part of the contract
# between backends: with other slices the same uniforms give other tokens.
SLICE_V = 1024
NO_TOKEN = -1


def score_tokens(
    logits: Tensor,
    targets: Tensor,
    *,
    alpha: float,
    temperature: float,
    entropy: bool,
    softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """logits [..., V], targets [...] -> log_prob, log_z, entropy [...] (None unless asked)."""
    ignored = targets == ignore_index
    # Ignored rows take part in nothing: not even a NaN in them reaches a gradient.
    z = logits.masked_fill(ignored.unsqueeze(-1), 0.0)
    log_p = log_softmax(z, temperature, softcap)
    scores = _scores(log_p, targets.masked_fill(ignored, 0), alpha, entropy)
    log_prob, log_z, entropies = (
        None if score is None else score.masked_fill(ignored, 0.0).to(score_dtype(logits))
        for score in scores
    )
    assert log_prob is not None
    assert log_z is not None
    return log_prob, log_z, entropies


def sample_tokens(
    logits: Tensor,
    *,
    alpha: float,
    seed: Tensor,
    counters: Tensor,
    banned: Tensor | None,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """logits [C, V] -> token [C] drawn from q, and its log_prob, log_z, entropy [C]."""
    log_p = log_softmax(logits, 1.0, None)
    token = _draw(log_p.detach(), alpha, philox4x32(counters, seed), banned)
    scores = _scores(log_p, token.clamp(min=0), alpha, entropy)
    log_prob, log_z, entropies = (
        None if score is None else score.to(score_dtype(logits)) for score in scores
    )
    assert log_prob is not None
    assert log_z is not None
    return token, log_prob, log_z, entropies


def sequence_log_likelihood(
    log_prob: Tensor, *, alpha: float, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """log_prob [B, T] (and mask), or [N] with cu_seqlens [B + 1] -> alpha * sum over each, [B]."""
    values = log_prob.double()
    if cu_seqlens is not None:
        position = torch.arange(len(values), device=values.device)
        sequence = torch.searchsorted(cu_seqlens[1:].long(), position, right=True)
        total = values.new_zeros(len(cu_seqlens) - 1).index_add(0, sequence, values)
    elif mask is not None:
        total = torch.where(mask != 0, values, 0.0).sum(-1)
    else:
        total = values.sum(-1)
    # An impossible sequence stays impossible at alpha = 0.
    scaled = torch.where(total == -torch.inf, total, alpha * total)
    return scaled.to(score_dtype(log_prob))


def score_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def log_softmax(logits: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """log p, float64. -inf is a masked entry and stays one under a softcap."""
    z = logits.double()
    if softcap is not None:
        z = torch.where(z == -torch.inf, z, softcap * torch.tanh(z / softcap))
    return torch.log_softmax(z / temperature, dim=-1)


def _scores(
    log_p: Tensor, targets: Tensor, alpha: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    masked = log_p == -torch.inf
    log_prob = log_p.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)
    # A constant where the target is impossible: its gradient is zero, not NaN.
    log_prob = torch.where(log_prob == -torch.inf, -torch.inf, log_prob)
    # The mask matters at alpha = 0, where 0 * -inf is NaN.
    log_z = torch.logsumexp((alpha * log_p).masked_fill(masked, -torch.inf), dim=-1)
    if alpha == 1:
        log_z = 0.0 * log_z  # a NaN row stays NaN
    elif alpha > 1:
        log_z = log_z.clamp(max=0.0)  # what it is, but for rounding
    else:
        log_z = log_z.clamp(min=0.0)
    if not entropy:
        return log_prob, log_z, None
    return log_prob, log_z, -(log_p.exp() * log_p.masked_fill(masked, 0.0)).sum(-1)


def _draw(log_p: Tensor, alpha: float, words: Tensor, banned: Tensor | None) -> Tensor:
    """Hierarchical inverse CDF: words 0, 1 pick the slice, words 2, 3 the token in it."""
    num_rows, vocab = log_p.shape
    no_softmax = log_p.isnan().any(-1)
    if banned is not None:
        entry = torch.arange(vocab, device=log_p.device)
        log_p = log_p.masked_fill(entry == banned.unsqueeze(-1), -torch.inf)
    masked = log_p == -torch.inf
    best = log_p.masked_fill(masked, torch.finfo(log_p.dtype).min).amax(-1, keepdim=True)
    mass = (alpha * (log_p - best)).exp().masked_fill(masked, 0.0)
    width = min(SLICE_V, vocab)
    num_slices = -(-vocab // width)
    mass = torch.nn.functional.pad(mass, (0, num_slices * width - vocab))
    mass = mass.view(num_rows, num_slices, width)
    picked = inverse_cdf(mass.sum(-1), uniform53(words[:, 0], words[:, 1]))
    index = picked.view(-1, 1, 1).expand(-1, 1, width)
    inside = inverse_cdf(mass.gather(1, index).squeeze(1), uniform53(words[:, 2], words[:, 3]))
    token = picked * width + inside
    if banned is not None:
        token = torch.where(masked.all(-1), banned, token)
    return torch.where(no_softmax, NO_TOKEN, token)


def inverse_cdf(mass: Tensor, u: Tensor) -> Tensor:
    """mass [C, K], u [C] -> the first index whose cumulative mass exceeds u * total, [C].

    An index without mass is never returned, if there is any mass.
    """
    cumulative = mass.cumsum(-1)
    first = (cumulative <= (u * cumulative[:, -1]).unsqueeze(-1)).sum(-1)
    # u * total may round up to the total.
    index = torch.arange(mass.shape[-1], device=mass.device)
    last = torch.where(mass > 0, index, 0).amax(-1)
    return torch.minimum(first, last)
