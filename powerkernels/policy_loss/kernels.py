"""The GPU kernel of the losses, in Triton: pointers, sizes and strides.

One read of what a token has (log-probs, advantage, mask; selection, weight, moments where given),
one write of its derivative. A program takes one of `splits` stretches of a sequence; partial sums
are float64, one row a program, added up in a fixed order afterwards.

Not yet run on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from powerkernels.covariance.kernels import (
    ADVANTAGE,
    LOG_PROB,
    MAX_LOG_RATIO,
    clamp,
    covariance_of,
    end_of_blocks,
    is_finite,
    load,
    load_float,
    mean_of,
    ratio_of,
    store,
)
from powerkernels.policy_loss import objective, reference

POLICY = tl.constexpr(objective.POLICY)
K1 = tl.constexpr(objective.K1)
ABS = tl.constexpr(objective.ABS)
K2 = tl.constexpr(objective.K2)
VALUE = tl.constexpr(objective.VALUE)
DROP = tl.constexpr(objective.DROP)
PENALISE = tl.constexpr(objective.PENALISE)
MAX_K3 = tl.constexpr(reference.MAX_K3)
NUM_SUMS = tl.constexpr(objective.NUM_SUMS)
# Columns of a program's partial sums: those of the objective, and after them the loss.
LOSS = tl.constexpr(objective.NUM_SUMS)
NUM_COLUMNS = tl.constexpr(objective.NUM_SUMS + 1)


@triton.jit
def sign(x):
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0))


@triton.jit
def policy_loss(
    difference,
    ratio,
    advantage,
    selected,
    low,
    high,
    dual_clip,
    penalty,
    CLIP: tl.constexpr,
    SELECTED: tl.constexpr,
):
    """Loss, derivative, and whether PPO's clipping and the dual clip hold."""
    unclipped = -advantage * ratio
    loss = unclipped
    term = tl.where(tl.abs(difference) > MAX_LOG_RATIO, 0.0, loss)
    clipped = selected & (selected == 0)
    dual_clipped = clipped
    if CLIP:
        bounded = -advantage * clamp(ratio, low, high)
        clipped = bounded > unclipped
        loss = tl.where(clipped, bounded, loss)
        term = tl.where(clipped, 0.0, term)
        most = -advantage * dual_clip
        dual_clipped = (advantage < 0.0) & (loss > most)
        loss = tl.where(dual_clipped, most, loss)
        term = tl.where(dual_clipped, 0.0, term)
    if SELECTED == DROP:
        loss = tl.where(selected, 0.0, loss)
        term = tl.where(selected, 0.0, term)
    elif SELECTED == PENALISE:
        loss = tl.where(selected, loss + tl.abs(difference) * penalty, loss)
        term = tl.where(selected, term + sign(difference) * penalty, term)
    return loss, term, clipped, dual_clipped


@triton.jit
def divergence(log_prob, difference, log_ratio, KIND: tl.constexpr):
    """An estimate of KL(policy || reference), or the value itself; and its derivative."""
    if KIND == VALUE:
        loss, term = log_prob, log_prob * 0.0 + 1.0
    elif KIND == K1:
        loss, term = difference, difference * 0.0 + 1.0
    elif KIND == ABS:
        loss, term = tl.abs(difference), sign(difference)
    elif KIND == K2:
        loss, term = difference * difference * 0.5, difference
    else:
        inverse = tl.exp(-log_ratio)
        k3 = inverse + log_ratio - 1.0
        constant = (tl.abs(difference) > MAX_LOG_RATIO) | (k3 > MAX_K3)
        loss, term = clamp(k3, -MAX_K3, MAX_K3), tl.where(constant, 0.0, 1.0 - inverse)
    return loss, term


@triton.jit
def add_losses(
    index,
    inside,
    row,
    source,
    totals,
    KIND: tl.constexpr,
    CLIP: tl.constexpr,
    SELECTED: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
):
    """Writes the derivatives of a block of tokens; the totals with its sums."""
    log_prob_ptr, old_log_prob_ptr, advantages_ptr, mask_ptr, selected_ptr = source[:5]
    weights_ptr, moments_ptr, low, high, dual_clip, penalty, terms_ptr = source[5:]
    count, neg_log_ratio, abs_log_ratio, k3_estimate, num_clipped = totals[:5]
    num_dual, num_selected, nonfinite, total_cov, total_loss = totals[5:]
    mask = load(mask_ptr, index, inside) != 0
    log_prob = load_float(log_prob_ptr, index, inside, mask)
    finite = is_finite(log_prob)
    old_log_prob = log_prob
    if old_log_prob_ptr is not None:
        old_log_prob = load_float(old_log_prob_ptr, index, inside, mask)
        finite = finite & is_finite(old_log_prob)
    advantage = log_prob * 0.0
    if advantages_ptr is not None:
        if PER_SEQUENCE:
            one = tl.load(advantages_ptr + row).to(tl.float32)
            advantage = tl.where(mask, one, 0.0)
        else:
            advantage = load_float(advantages_ptr, index, inside, mask)
        finite = finite & is_finite(advantage)
    selected = mask & (mask == 0)
    if selected_ptr is not None:
        selected = mask & (load(selected_ptr, index, inside) != 0)

    difference = log_prob - old_log_prob
    ratio, log_ratio = ratio_of(difference)
    if KIND == POLICY:
        loss, term, clipped, dual_clipped = policy_loss(
            difference,
            ratio,
            advantage,
            selected,
            low,
            high,
            dual_clip,
            penalty,
            CLIP,
            SELECTED,
        )
        num_clipped += tl.where(mask & clipped, 1.0, 0.0)
        num_dual += tl.where(mask & dual_clipped, 1.0, 0.0)
    else:
        loss, term = divergence(log_prob, difference, log_ratio, KIND)
        if STRAIGHT_THROUGH:
            term = difference
    if weights_ptr is not None:
        weight = load_float(weights_ptr, index, inside, mask)
        finite = finite & is_finite(weight)
        loss, term = loss * weight, term * weight
    if moments_ptr is not None:
        cov = covariance_of(
            log_prob, advantage, mean_of(moments_ptr, LOG_PROB), mean_of(moments_ptr, ADVANTAGE)
        )
        total_cov += tl.where(mask, cov, 0.0)
    store(terms_ptr, index, tl.where(mask, term, 0.0), inside)

    count += tl.where(mask, 1.0, 0.0)
    neg_log_ratio += tl.where(mask, -log_ratio, 0.0)
    abs_log_ratio += tl.where(mask, tl.abs(log_ratio), 0.0)
    k3_estimate += tl.where(mask, ratio - 1.0 - log_ratio, 0.0)
    num_selected += tl.where(selected, 1.0, 0.0)
    nonfinite += tl.where(mask & (finite == 0), 1.0, 0.0)
    total_loss += tl.where(mask, loss, 0.0)
    return (
        count,
        neg_log_ratio,
        abs_log_ratio,
        k3_estimate,
        num_clipped,
        num_dual,
        num_selected,
        nonfinite,
        total_cov,
        total_loss,
    )


@triton.jit
def loss_kernel(
    log_prob_ptr,
    old_log_prob_ptr,  # None: as log_prob
    advantages_ptr,  # None: 0
    mask_ptr,
    selected_ptr,  # None: nothing
    weights_ptr,  # None: 1
    moments_ptr,  # None: no covariance
    bounds_ptr,  # None: sequences of `width` tokens
    width,
    splits,
    low,
    high,
    dual_clip,
    penalty,
    partials_ptr,  # float64 [programs, NUM_COLUMNS]
    terms_ptr,
    KIND: tl.constexpr,
    CLIP: tl.constexpr,
    SELECTED: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    row = tl.cast(pid // splits, tl.int64)
    split = pid % splits
    if bounds_ptr is None:
        row_begin = row * width
        row_end = row_begin + width
    else:
        row_begin = tl.load(bounds_ptr + row)
        row_end = tl.load(bounds_ptr + row + 1)
    share = tl.cdiv(tl.cdiv(row_end - row_begin, splits), BLOCK) * BLOCK
    first = row_begin + split * share
    last = tl.maximum(tl.minimum(first + share, row_end), first)

    source = (
        log_prob_ptr,
        old_log_prob_ptr,
        advantages_ptr,
        mask_ptr,
        selected_ptr,
        weights_ptr,
        moments_ptr,
        low,
        high,
        dual_clip,
        penalty,
        terms_ptr,
    )
    zeros = tl.zeros([BLOCK], tl.float32)
    totals = zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros
    lane = tl.arange(0, BLOCK)
    whole = end_of_blocks(first, last, BLOCK)
    for begin in range(first, whole, BLOCK):
        totals = add_losses(
            begin + lane,
            None,
            row,
            source,
            totals,
            KIND,
            CLIP,
            SELECTED,
            STRAIGHT_THROUGH,
            PER_SEQUENCE,
        )
    if whole < last:
        totals = add_losses(
            whole + lane,
            whole + lane < last,
            row,
            source,
            totals,
            KIND,
            CLIP,
            SELECTED,
            STRAIGHT_THROUGH,
            PER_SEQUENCE,
        )
    out_ptr = partials_ptr + tl.cast(pid, tl.int64) * NUM_COLUMNS
    for column in tl.static_range(NUM_COLUMNS):
        tl.store(out_ptr + column, tl.sum(totals[column].to(tl.float64)))
