"""Moments, covariances and the exact selection, in torch on any device: the truth.

Selection goes in stages whose results add up, so that several micro-batches or ranks take part in
one selection by adding up their moments and histograms:

    moments      sums of log_prob and advantages, exact: in whatever order, the same bits
    sort_keys    a 32-bit integer for each token that may be selected; larger goes first
    histogram    of the keys' next digit, among the keys that begin as the threshold does
    narrow       that digit of the threshold
    mark         keys above the threshold, and of those equal to it the first in order of index

Sources: Cui et al. 2025, "The Entropy Mechanism of Reinforcement Learning for Reasoning Language
Models", section 4 (covariance, Clip-Cov, KL-Cov). Sums: Rump, Ogita, Oishi 2008, "Accurate
Floating-Point Summation" (extraction of leading parts).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from powerkernels.covariance.tokens import Tokens
from powerkernels.philox.reference import philox4x32

# A value is split into multiples of these units. Any sum of up to 2^30 of one unit's parts is exact
# in float64 where |value| < 2^25; what is below 2^-65 is dropped.
UNITS = (2.0**2, 2.0**-20, 2.0**-42, 2.0**-64)
# x + ROUNDER * unit - ROUNDER * unit is x rounded to a multiple of the unit.
ROUNDER = 1.5 * 2.0**52
NUM_UNITS = len(UNITS)

# Of the moments: tokens, those among them with a NaN or infinity, parts of the two sums.
COUNT, NONFINITE, LOG_PROB, ADVANTAGE = 0, 1, 2, 2 + NUM_UNITS
NUM_MOMENTS = 2 + 2 * NUM_UNITS

# Digits of a key, from the highest: shift and bits.
DIGITS = ((21, 11), (10, 11), (0, 10))
NUM_BINS = 2048
# The bin after the digits': tokens whose covariance is not 0.
NONZERO = NUM_BINS

# Of the selection's state: the digits of the threshold so far; how many of the keys that begin as
# it does are still to be taken; how many are taken in all; tokens whose covariance is not 0.
THRESHOLD, REMAINING, CHOSEN, NUM_NONZERO, NUM_STATE = 0, 1, 2, 3, 4

# Beyond this a log-ratio is taken as this: e^20 is far outside of any clipping, and is finite.
MAX_LOG_RATIO = 20.0

# The last word of a token's Philox counter: apart from those of the sampler.
STREAM = 0x436F7631


class Rule(NamedTuple):
    """Which tokens to select, and how many."""

    band: bool  # a uniform subset of lb < cov < ub, instead of the largest
    ratio: float  # of the number of tokens, at least 1 token; used where k is negative
    k: int
    lb: float = 0.0
    ub: float = 0.0


def moments(tokens: Tokens) -> Tensor:
    """float64 [NUM_MOMENTS], to be added up over parts."""
    log_prob, advantages = tokens.log_prob.double(), tokens.advantages.double()
    finite = log_prob.isfinite() & advantages.isfinite()
    kept = tokens.mask & finite
    count = tokens.mask.sum(dtype=torch.float64)
    nonfinite = (tokens.mask & ~finite).sum(dtype=torch.float64)
    sums = [count, nonfinite]
    for value in (log_prob, advantages):
        rest = torch.where(kept, value, 0.0)
        for unit in UNITS:
            shift = ROUNDER * unit
            part = (rest + shift) - shift
            rest = rest - part
            sums.append(part.sum())
    return torch.stack(sums)


def means(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Means of log_prob and advantages: NaN where a token is not finite, or there is none."""
    count = torch.where(moments[NONFINITE] > 0, torch.nan, moments[COUNT])

    def mean(first: int) -> Tensor:
        parts = moments[first : first + NUM_UNITS]
        total = ((parts[3] + parts[2]) + parts[1]) + parts[0]
        return total / count

    return mean(LOG_PROB), mean(ADVANTAGE)


def covariances(tokens: Tokens, moments: Tensor) -> Tensor:
    """float32, shaped as the tokens."""
    return masked_covariances(tokens.log_prob, tokens.advantages, tokens.mask, moments)


def masked_covariances(
    log_prob: Tensor, advantages: Tensor, mask: Tensor, moments: Tensor
) -> Tensor:
    """(log_prob - mean) * (advantage - mean) in float64, rounded to float32; 0 where masked out."""
    mean_log_prob, mean_advantage = means(moments)
    cov = (log_prob.double() - mean_log_prob) * (advantages.double() - mean_advantage)
    # The sum makes a zero of -0.
    return torch.where(mask, cov, 0.0).float() + 0.0


def unclipped(
    tokens: Tokens, old_log_prob: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor | None]:
    """bool: selectable tokens whose loss PPO's clipping leaves alone; low, high bound the ratio.

    And the moments, where they come with it.
    """
    wide = torch.promote_types(tokens.log_prob.dtype, torch.float32)
    log_ratio = tokens.log_prob.to(wide) - old_log_prob.to(wide)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    advantages = tokens.advantages.to(wide)
    clipped = -advantages * ratio.clamp(low, high) > -advantages * ratio
    return tokens.selectable & ~clipped, None


def sort_keys(tokens: Tokens, cov: Tensor, rule: Rule, seed: Tensor | None) -> Tensor:
    """int64, shaped as the tokens: in [1, 2^32), or 0 for a token that cannot be selected."""
    if not rule.band:
        keys = ordered_bits(cov)
        return torch.where(tokens.selectable & ~cov.isnan(), keys, 0)
    # As float32, so that a bound is compared as a covariance of its value would be.
    lb, ub = torch.tensor([rule.lb, rule.ub], dtype=torch.float32).tolist()
    eligible = tokens.selectable & (cov > lb) & (cov < ub)
    assert seed is not None
    words = philox4x32(counters(tokens), seed)[..., 0]
    return torch.where(eligible, words.clamp(min=1), 0)


def ordered_bits(value: Tensor) -> Tensor:
    """float32 -> int64 in [0, 2^32), in the same order."""
    bits = value.view(torch.int32).long()
    return torch.where(bits < 0, ~bits, bits + 2**31) & (2**32 - 1)


def counters(tokens: Tokens) -> Tensor:
    """int64 [..., 4]: position in the sequence, the sequence's number in two words, STREAM."""
    device = tokens.log_prob.device
    numbers = tokens.sequence_index
    if numbers is None:
        numbers = tokens.first_sequence + torch.arange(tokens.num_sequences, device=device)
    bounds = tokens.cu_seqlens
    if bounds is None:
        sequence = numbers[:, None].expand(tokens.log_prob.shape)
        position = torch.arange(tokens.log_prob.shape[1], device=device).expand_as(sequence)
    else:
        size = tokens.log_prob.shape[0]
        lengths = bounds.diff()
        sequence = numbers.repeat_interleave(lengths, output_size=size)
        first = bounds[:-1].repeat_interleave(lengths, output_size=size)
        position = torch.arange(size, device=device) - first
    stream = torch.full_like(position, STREAM)
    return torch.stack((position, sequence, sequence >> 32, stream), dim=-1)


class Keys(NamedTuple):
    """What the stages after the moments work on."""

    values: Tensor  # of `sort_keys`
    num_nonzero: Tensor  # int64 [], selectable tokens whose covariance is not 0


def keys_of(tokens: Tokens, moments: Tensor, rule: Rule, seed: Tensor | None) -> Keys:
    """moments: of all parts."""
    cov = covariances(tokens, moments)
    num_nonzero = (tokens.selectable & (cov != 0)).sum()
    return Keys(sort_keys(tokens, cov, rule, seed), num_nonzero)


def histogram(keys: Keys, state: Tensor | None, digit: int) -> Tensor:
    """int64 [NUM_BINS + 1], to be added up over parts; the last bin comes with the first digit."""
    shift, bits = DIGITS[digit]
    begin_so = keys.values >> (shift + bits) == (0 if state is None else state[THRESHOLD])
    counted = (keys.values > 0) & begin_so
    bins = torch.where(counted, (keys.values >> shift) & (2**bits - 1), 0).flatten()
    out = torch.zeros(NUM_BINS + 1, dtype=torch.int64, device=bins.device)
    out.index_add_(0, bins, counted.flatten().long())
    if digit == 0:
        out[NONZERO] = keys.num_nonzero
    return out


def narrow(
    histogram: Tensor, moments: Tensor, rule: Rule, state: Tensor | None, digit: int
) -> Tensor:
    """The state, int64 [NUM_STATE], with this digit in its threshold."""
    bits = DIGITS[digit][1]
    counts = histogram[: 2**bits]
    from_here_up = counts.flip(0).cumsum(0).flip(0)
    if state is None:
        # Where every covariance is 0 there is nothing to choose by.
        nonzero = histogram[NONZERO]
        total = torch.where(nonzero > 0, from_here_up[0], 0)
        chosen = torch.minimum(_wanted(moments, rule), total)
        threshold, remaining = torch.zeros_like(chosen), chosen
    else:
        threshold, remaining, chosen, nonzero = state.unbind()
    # The last bin from which on there are enough; of none, the highest, which then takes none.
    bin = (from_here_up >= remaining).sum() - 1
    remaining = remaining - (from_here_up[bin] - counts[bin])
    return torch.stack(((threshold << bits) + bin, remaining, chosen, nonzero))


def _wanted(moments: Tensor, rule: Rule) -> Tensor:
    """How many tokens to select, if there are as many."""
    count = moments[COUNT]
    k = (count * rule.ratio).floor().clamp(min=1) if rule.k < 0 else torch.full_like(count, rule.k)
    return torch.where((count > 0) & (moments[NONFINITE] == 0), k, 0).long()


def mark(keys: Keys, state: Tensor, ties_before: Tensor | None) -> Tensor:
    """bool. ties_before: int64 [1] or None for 0: ties with the threshold in the parts before."""
    threshold, remaining = state[THRESHOLD], state[REMAINING]
    flat = keys.values.flatten()
    tied = (flat == threshold) & (flat > 0)
    place = tied.cumsum(0) - 1
    if ties_before is not None:
        place = place + ties_before
    return ((flat > threshold) | (tied & (place < remaining))).view(keys.values.shape)
