"""The losses of tokens and their gradients, in torch on any device: the truth.

Sources: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", equation 7; Ye et al.
2020, "Mastering Complex Control in MOBA Games with Deep Reinforcement Learning", section 4 (dual
clip); Cui et al. 2025, "The Entropy Mechanism of Reinforcement Learning for Reasoning Language
Models", section 4.3 (Clip-Cov, KL-Cov); Schulman 2020, "Approximating KL Divergence" (k1, k2, k3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from powerkernels.covariance.reference import MAX_LOG_RATIO, masked_covariances
from powerkernels.policy_loss import objective as objectives
from powerkernels.policy_loss.objective import LossSums, Objective, TokenInputs

# verl's bound of the k3 estimate.
MAX_K3 = 10.0


def loss_sums(inputs: TokenInputs, objective: Objective) -> LossSums:
    wide = inputs.dtype
    log_prob = inputs.log_prob.to(wide)
    old = log_prob if inputs.old_log_prob is None else inputs.old_log_prob.to(wide)
    zero = torch.zeros((), dtype=wide, device=log_prob.device)
    advantages = zero if inputs.advantages is None else inputs.advantages.to(wide)
    mask = inputs.mask
    selected = torch.zeros_like(mask) if inputs.selected is None else inputs.selected & mask
    weights = zero + 1 if inputs.weights is None else inputs.weights.to(wide)

    difference = log_prob - old
    log_ratio = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    inside = difference.abs() <= MAX_LOG_RATIO
    clipped = dual_clipped = torch.zeros_like(mask)
    if objective.kind == objectives.POLICY:
        unclipped = loss = -advantages * ratio
        terms = torch.where(inside, loss, zero)
        if objective.clip:
            bounded = -advantages * ratio.clamp(objective.low, objective.high)
            clipped = bounded > unclipped
            loss, terms = torch.maximum(unclipped, bounded), torch.where(clipped, zero, terms)
            most = -advantages * objective.dual_clip
            dual_clipped = (advantages < 0) & (loss > most)
            loss, terms = (
                torch.where(dual_clipped, most, loss),
                torch.where(dual_clipped, zero, terms),
            )
        if objective.selected == objectives.DROP:
            loss, terms = torch.where(selected, zero, loss), torch.where(selected, zero, terms)
        elif objective.selected == objectives.PENALISE:
            loss = torch.where(selected, loss + objective.penalty * difference.abs(), loss)
            terms = torch.where(selected, terms + objective.penalty * difference.sign(), terms)
    elif objective.kind == objectives.VALUE:
        loss, terms = log_prob, torch.ones_like(log_prob)
    else:
        loss, terms = _divergence(objective.kind, difference)
        if objective.straight_through:
            terms = difference
    loss, terms = loss * weights, terms * weights

    cov = torch.zeros_like(log_prob)
    if inputs.moments is not None:
        assert inputs.advantages is not None
        cov = masked_covariances(inputs.log_prob, inputs.advantages, mask, inputs.moments)
    finite = log_prob.isfinite() & old.isfinite() & advantages.isfinite() & weights.isfinite()
    columns = [
        torch.ones_like(log_prob),
        -log_ratio,
        log_ratio.abs(),
        ratio - 1 - log_ratio,
        clipped,
        dual_clipped,
        selected,
        ~finite,
        cov,
    ]
    sums = [torch.where(mask, column.double(), 0.0).sum() for column in columns]
    row_loss = row_sums(torch.where(mask, loss.double(), 0.0), inputs.cu_seqlens)
    row_count = row_sums(mask.double(), inputs.cu_seqlens)
    return LossSums(row_loss, row_count, torch.stack(sums), torch.where(mask, terms, zero))


def row_sums(values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[R, T], or [N] with cu_seqlens -> [R]."""
    if cu_seqlens is None:
        return values.sum(-1)
    rows = torch.arange(cu_seqlens.shape[0] - 1, device=values.device)
    rows = rows.repeat_interleave(cu_seqlens.diff(), output_size=values.shape[0])
    return torch.zeros(len(cu_seqlens) - 1, dtype=values.dtype, device=values.device).index_add_(
        0, rows, values
    )


def _divergence(kind: int, difference: Tensor) -> tuple[Tensor, Tensor]:
    """An estimate of KL(policy || reference) from log_prob - ref_log_prob, and its derivative."""
    if kind == objectives.K1:
        return difference, torch.ones_like(difference)
    if kind == objectives.ABS:
        return difference.abs(), difference.sign()
    if kind == objectives.K2:
        return 0.5 * difference.square(), difference
    bounded = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = (-bounded).exp()
    k3 = ratio + bounded - 1
    # `>` and not `<=`: a NaN stays one.
    constant = (difference.abs() > MAX_LOG_RATIO) | (k3 > MAX_K3)
    return k3.clamp(-MAX_K3, MAX_K3), torch.where(constant, 0.0, 1 - ratio)
