"""The scores as formulas in plain torch: the truth that the other backends are tested against.

Everything is computed in float64 and differentiable. p = softmax(z / temperature), q = p^alpha
renormalised.
"""

from __future__ import annotations

import torch
from torch import Tensor

from powerkernels.logprob.options import Support, score_dtype
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
    temperature: float | Tensor,
    entropy: bool,
    softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """logits [..., V], targets [...] -> log_prob, log_z, entropy [...] (None unless asked).

    temperature: a number or a tensor [...].
    """
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


def row_sums(
    logits: Tensor,
    targets: Tensor,
    *,
    alpha: float,
    temperature: float | Tensor,
    entropy: bool,
    softcap: float | None,
    ignore_index: int,
) -> Tensor:
    """logits [N, V], targets [N] -> float64 [5, N]: max, sum, pow_sum, dot, target_logit.

    With d = z - max: sum = Σ e^(d/T), pow_sum = Σ e^(alpha d/T), dot = Σ d e^(d/T). What shards
    and chunks of a vocabulary are merged from. A target outside [0, V) belongs to another shard:
    its logit is -inf here. Ignored rows are empty.
    """
    ignored = (targets == ignore_index).unsqueeze(-1)
    z = soft_capped(logits.double(), softcap).masked_fill(ignored, -torch.inf)
    top = z.nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(-1, keepdim=True)
    masked = z == -torch.inf
    d = (z - top.masked_fill(top == -torch.inf, 0.0)) / _per_row(temperature)
    e = d.exp()
    pow_sum = (alpha * d).exp().masked_fill(masked, 0.0).sum(-1)
    dot = torch.zeros_like(pow_sum)
    if entropy:
        dot = (e * (d * _per_row(temperature)).masked_fill(masked, 0.0)).sum(-1)
    here = (targets >= 0) & (targets < logits.shape[-1]) & ~ignored.squeeze(-1)
    target_logit = z.gather(-1, targets.long().masked_fill(~here, 0).unsqueeze(-1)).squeeze(-1)
    target_logit = target_logit.masked_fill(~here, -torch.inf)
    return torch.stack((top.squeeze(-1), e.sum(-1), pow_sum, dot, target_logit))


def finish_scores(
    sums: Tensor,
    ignored: Tensor,
    *,
    alpha: float,
    temperature: float | Tensor,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """float64 sums of K shards [K, 5, N], ignored [N] -> five float64 [N].

    log_prob, log_z, entropy (of no meaning unless asked), row_max, log_sum = log Σ e^((z-max)/T).
    """
    maxes, shard_sum, shard_pow, shard_dot, target_logits = sums.unbind(1)
    row_max = maxes.amax(0)
    empty = maxes == -torch.inf
    distance = (maxes - row_max.masked_fill(row_max == -torch.inf, 0.0)).masked_fill(empty, 0.0)
    factor = (distance / temperature).exp().masked_fill(empty, 0.0)
    pow_factor = (alpha * distance / temperature).exp().masked_fill(empty, 0.0)
    total = (factor * shard_sum).sum(0)
    dot = (factor * (shard_dot + distance * shard_sum)).sum(0)
    log_sum = total.log()
    log_prob = (target_logits.amax(0) - row_max) / temperature - log_sum
    log_z = (pow_factor * shard_pow).sum(0).log() - alpha * log_sum
    log_z = _of_its_sign(log_z, alpha)
    entropies = log_sum - dot / (total * temperature)
    no_softmax = (row_max == -torch.inf) | total.isnan() | (row_max == torch.inf)
    if not entropy:
        entropies = torch.zeros_like(entropies)
    log_prob, log_z, entropies, row_max, log_sum = (
        value.masked_fill(no_softmax, torch.nan).masked_fill(ignored, 0.0)
        for value in (log_prob, log_z, entropies, row_max, log_sum)
    )
    return log_prob, log_z, entropies, row_max, log_sum


def score_tokens_bwd(
    logits: Tensor,
    targets: Tensor,
    scores: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    *,
    alpha: float,
    temperature: float | Tensor,
    softcap: float | None,
    ignore_index: int,
) -> Tensor:
    """The gradient of logits [..., V], in their dtype.

    scores: what `finish_scores` returns, [...]; gradients: of log_prob, log_z, entropy, [...].

        d log_prob / dz = onehot(y) - p
        d log_z    / dz = alpha (q - p)
        d entropy  / dz = -p (log p + H)

    each over the temperature. The logits may be one shard of the vocabulary; a target outside
    [0, V) is on another. Ignored rows, and rows whose gradients are all 0, get 0 whatever they
    hold; a target with probability 0 has no gradient of its log_prob.
    """
    log_prob, log_z, entropy, row_max, log_sum = (score.double().unsqueeze(-1) for score in scores)
    grad_log_prob, grad_log_z, grad_entropy = (
        torch.zeros_like(row_max) if gradient is None else gradient.double().unsqueeze(-1)
        for gradient in gradients
    )
    nothing = (grad_log_prob == 0) & (grad_log_z == 0) & (grad_entropy == 0)
    nothing = nothing | (targets == ignore_index).unsqueeze(-1)
    grad_log_prob = grad_log_prob.masked_fill(log_prob == -torch.inf, 0.0)
    z = soft_capped(logits.double(), softcap)
    masked = z == -torch.inf
    heat = _per_row(temperature)
    log_p = ((z - row_max) / heat - log_sum).masked_fill(masked, 0.0)
    p = log_p.exp()
    q = (alpha * log_p - log_z).exp()
    entry = torch.arange(logits.shape[-1], device=logits.device)
    one_hot = (entry == targets.unsqueeze(-1)).double()
    dz = grad_log_prob * (one_hot - p)
    if alpha not in (0.0, 1.0):  # there log_z is constant
        dz = dz + alpha * grad_log_z * (q - p)
    if gradients[2] is not None:
        dz = dz - grad_entropy * p * (log_p + entropy)
    dz = dz / heat
    if softcap is not None:
        dz = dz * (1 - (z / softcap) ** 2)
    dz = dz.masked_fill(masked & row_max.isfinite(), 0.0).masked_fill(nothing, 0.0)
    return dz.to(logits.dtype)


def sample_tokens(
    logits: Tensor,
    *,
    alpha: float,
    seed: Tensor,
    counters: Tensor,
    banned: Tensor | None,
    entropy: bool,
    support: Support | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """logits [C, V] -> token [C] drawn from q on its support, and log_prob, log_z, entropy [C]."""
    token = draw_tokens(
        logits, alpha=alpha, seed=seed, counters=counters, banned=banned, support=support
    )
    log_p = log_softmax(logits, 1.0, None)
    scores = _scores(log_p, token.clamp(min=0), alpha, entropy)
    log_prob, log_z, entropies = (
        None if score is None else score.to(score_dtype(logits)) for score in scores
    )
    assert log_prob is not None
    assert log_z is not None
    if support is not None:
        log_z = support_log_z(logits, alpha=alpha, support=support)
    return token, log_prob, log_z, entropies


def draw_tokens(
    logits: Tensor,
    *,
    alpha: float,
    seed: Tensor,
    counters: Tensor,
    banned: Tensor | None,
    support: Support | None = None,
) -> Tensor:
    """logits [C, V] -> token int64 [C] drawn from q on its support."""
    logits = logits.detach()
    if support is not None:
        logits = logits.masked_fill(_outside(logits, alpha, support), -torch.inf)
    log_p = log_softmax(logits, 1.0, None)
    return _draw(log_p, alpha, philox4x32(counters, seed), banned)


def support_threshold(logits: Tensor, *, alpha: float, support: Support) -> Tensor:
    """logits [C, V] -> float64 [C]: the support are the entries >= it, without those of -inf.

    It is the largest of three: the top_k-th largest logit; of what that leaves, the largest one
    that has top_p of the mass of q above or at it; and log(min_p) / alpha below the largest logit,
    where q is min_p times its maximum.
    """
    z = logits.double().sort(dim=-1, descending=True).values
    best = z[:, :1]
    threshold = z[:, min(support.top_k, z.shape[-1]) - 1].unsqueeze(-1)
    if support.top_p < 1:  # at 1 rounding would leave out what has hardly any mass
        outside = (z < threshold) | (z == -torch.inf)
        cumulative = (alpha * (z - best)).exp().masked_fill(outside, 0.0).cumsum(-1)
        missing = (cumulative < support.top_p * cumulative[:, -1:]).sum(-1, keepdim=True)
        threshold = torch.maximum(threshold, z.gather(-1, missing))
    return torch.maximum(threshold, best + support.min_p_drop(alpha)).squeeze(-1)


def support_log_z(logits: Tensor, *, alpha: float, support: Support) -> Tensor:
    """logits [C, V] -> log Σ p^alpha over the support [C], p of all entries."""
    log_p = log_softmax(logits, 1.0, None)
    log_z = _log_z(log_p.masked_fill(_outside(logits, alpha, support), -torch.inf), alpha)
    # A sum over a part: below 1 it may have either sign.
    log_z = log_z.clamp(max=0.0) if alpha >= 1 else log_z
    return log_z.to(score_dtype(logits))


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


def log_softmax(logits: Tensor, temperature: float | Tensor, softcap: float | None) -> Tensor:
    """log p, float64."""
    z = soft_capped(logits.double(), softcap)
    return torch.log_softmax(z / _per_row(temperature), dim=-1)


def soft_capped(z: Tensor, softcap: float | None) -> Tensor:
    """-inf is a masked entry and stays one."""
    if softcap is None:
        return z
    return torch.where(z == -torch.inf, z, softcap * torch.tanh(z / softcap))


def _per_row(temperature: float | Tensor) -> float | Tensor:
    return temperature.double().unsqueeze(-1) if isinstance(temperature, Tensor) else temperature


def _of_its_sign(log_z: Tensor, alpha: float) -> Tensor:
    """What Jensen's inequality says of it, and rounding must not undo; a NaN stays."""
    if alpha == 1:
        return 0.0 * log_z
    return log_z.clamp(max=0.0) if alpha > 1 else log_z.clamp(min=0.0)


def _scores(
    log_p: Tensor, targets: Tensor, alpha: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    masked = log_p == -torch.inf
    log_prob = log_p.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)
    # A constant where the target is impossible: its gradient is zero, not NaN.
    log_prob = torch.where(log_prob == -torch.inf, -torch.inf, log_prob)
    log_z = _of_its_sign(_log_z(log_p, alpha), alpha)
    if not entropy:
        return log_prob, log_z, None
    return log_prob, log_z, -(log_p.exp() * log_p.masked_fill(masked, 0.0)).sum(-1)


def _log_z(log_p: Tensor, alpha: float) -> Tensor:
    # The mask matters at alpha = 0, where 0 * -inf is NaN.
    return torch.logsumexp((alpha * log_p).masked_fill(log_p == -torch.inf, -torch.inf), dim=-1)


def _outside(logits: Tensor, alpha: float, support: Support) -> Tensor:
    """bool [C, V]; nothing of a row that has no softmax because of NaN or -inf."""
    threshold = support_threshold(logits, alpha=alpha, support=support)
    return logits.double() < threshold.unsqueeze(-1)


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
