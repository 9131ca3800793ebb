"""Covariance and selection: checks, torch ops, public functions."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from powerkernels import _extension, _process_group
from powerkernels._advice import warn_once
from powerkernels._arguments import (
    INDEX_DTYPES,
    MASK_DTYPES,
    check_bounds,
    check_number,
    check_shape,
    check_tensor,
    described,
    seed_tensor,
)
from powerkernels.covariance import cpp, reference
from powerkernels.covariance.reference import Rule
from powerkernels.covariance.tokens import Tokens, check_like, check_tokens, layout, tokens_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Above this a share of all tokens is more likely a percentage.
SUSPICIOUS_RATIO = 0.1


class TokenCovariance(NamedTuple):
    cov: Tensor  # float32 [...], 0 where masked out
    covariance: Tensor  # float64 [], the mean of cov
    mean_log_prob: Tensor  # float64 []
    mean_advantage: Tensor  # float64 []
    count: Tensor  # type: ignore[assignment]  # int64 [], tokens


class Selection(NamedTuple):
    """What a selection found: its masks and what they were found by."""

    masks: list[Tensor]  # bool, in the layout of each part's Tokens
    moments: Tensor  # float64 [reference.NUM_MOMENTS]
    state: Tensor  # int64 [reference.NUM_STATE]


def implementation(tokens: Tokens) -> ModuleType:
    """The module that computes on these tokens."""
    backend = _extension.backend_for(tokens.log_prob.device)
    if torch.float64 in (tokens.log_prob.dtype, tokens.advantages.dtype):
        return reference
    if backend == "cpp":
        return cpp
    if backend == "triton":
        from powerkernels.covariance import gpu  # imports triton

        return gpu
    return reference


def moments_of(parts: Sequence[Tokens], group: str) -> tuple[Tensor, Tensor]:
    """The moments of all parts on all ranks, and int64 []: the sequences on the ranks before."""
    known = [
        implementation(part).moments(part) if part.moments is None else part.moments
        for part in parts
    ]
    moments = _added(known)
    before = torch.zeros((), dtype=torch.int64, device=moments.device)
    if group:
        size = moments.new_full((1,), sum(part.num_sequences for part in parts))
        ranks = _process_group.all_gather(torch.cat((moments, size)), group)
        moments = ranks[:, :-1].sum(0)
        before = ranks[: _process_group.group_named(group).rank(), -1].sum().long()
    return moments, before


def select(parts: Sequence[Tokens], rule: Rule, seed: Tensor | None, group: str) -> Selection:
    """One selection over all parts on all ranks; a part's first_sequence counts from this rank's.

    Nothing waits for the device. Every part has at least the means in common with the others, so
    all must be here before the first mask is.
    """
    modules = [implementation(part) for part in parts]
    moments, before = moments_of(parts, group)
    if group:
        parts = [part._replace(first_sequence=part.first_sequence + before) for part in parts]
    keys = [m.keys_of(part, moments, rule, seed) for m, part in zip(modules, parts, strict=True)]
    state = own = None
    for digit in range(len(reference.DIGITS)):
        own = [m.histogram(key, state, digit) for m, key in zip(modules, keys, strict=True)]
        total = _added(own)
        if group:
            total = total.clone() if total is own[0] else total
            _process_group.all_reduce(total, group)
        state = modules[0].narrow(total, moments, rule, state, digit)
    assert state is not None
    assert own is not None
    masks = [
        module.mark(key, state, before)
        for module, key, before in zip(modules, keys, _ties_before(own, state, group), strict=True)
    ]
    return Selection(masks, moments, state)


def _ties_before(own: Sequence[Tensor], state: Tensor, group: str) -> list[Tensor | None]:
    """For each part int64 [1]: keys equal to the threshold in the parts and ranks before it.

    own: the parts' histograms of the last digit.
    """
    if len(own) == 1 and not group:
        return [None]
    bits = reference.DIGITS[-1][1]
    last_bin = state[reference.THRESHOLD : reference.THRESHOLD + 1] & (2**bits - 1)
    ties = [counts.index_select(0, last_bin) for counts in own]
    before: Tensor | None = None
    if group:
        ranks = _process_group.all_gather(_added(ties), group)
        before = ranks[: _process_group.group_named(group).rank()].sum(0)
    found = []
    for tie in ties:
        found.append(before)
        before = tie if before is None else before + tie
    return found


def _added(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(tuple(values)).sum(0)


@torch.library.custom_op("powerkernels::token_covariance", mutates_args=())
def _token_covariance(
    log_prob: Tensor, advantages: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_bounds(cu_seqlens, log_prob)
    tokens = tokens_of(log_prob, advantages, mask, None, cu_seqlens)
    module = implementation(tokens)
    moments, _ = moments_of([tokens], group)
    cov = module.covariances(tokens, moments).view(log_prob.shape)
    total = cov.sum(dtype=torch.float64)
    if group:
        _process_group.all_reduce(total, group)
    mean_log_prob, mean_advantage = reference.means(moments)
    covariance = torch.where(mean_log_prob.isnan(), torch.nan, total / moments[reference.COUNT])
    count = moments[reference.COUNT].long()
    return cov, covariance, mean_log_prob, mean_advantage, count


@_token_covariance.register_fake
def _(
    log_prob: Tensor, advantages: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def scalar(dtype: torch.dtype) -> Tensor:
        return torch.empty((), dtype=dtype, device=log_prob.device)

    cov = torch.empty(log_prob.shape, dtype=torch.float32, device=log_prob.device)
    doubles = [scalar(torch.float64) for _ in range(3)]
    return cov, doubles[0], doubles[1], doubles[2], scalar(torch.int64)


def token_covariance(
    log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> TokenCovariance:
    """(log_prob - mean) * (advantage - mean) of each token; their mean is the covariance.

    Means are over the tokens of the mask, and with process_group over those of all its ranks. They
    are sums of exact parts, so they have the same bits however the tokens are ordered or divided,
    and a large common offset costs nothing. Nothing has a gradient.

    Masked-out places may hold anything. A NaN or infinity at a place that counts makes every cov
    there, and the means, NaN. Without a token the means are NaN.

    Args:
        log_prob: float16, bfloat16, float32 or float64 [..., T], or flat [N].
        advantages: of any of these, shaped as log_prob, or one a sequence: [...] or [..., 1] for
            [..., T]. With cu_seqlens [N] or [1, N], or [B] or [B, 1]: where N = B and a sequence
            is empty, only those of two dimensions are clear (see Raises).
        mask: shaped as log_prob, bool, integer or floating: a token counts where it is not 0.
        cu_seqlens: int32 or int64 [B + 1], bounds of the sequences in flat log_prob.
        process_group: the ranks that hold the other tokens. All call together.

    Returns:
        TokenCovariance: cov float32, shaped as log_prob; scalars on the same device.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype or device, or
            cu_seqlens do not add up, or leave open whose the advantages are. What cu_seqlens hold
            is looked at on a CPU only; on a GPU such advantages are taken for NaN.

    Source: Cui et al. 2025, "The Entropy Mechanism of Reinforcement Learning for Reasoning Language
    Models", equation 10.
    """
    check_tokens(log_prob, advantages, mask, cu_seqlens)
    group = _process_group.name_of(process_group)
    found = _token_covariance(log_prob.detach(), advantages.detach(), mask, cu_seqlens, group)
    return TokenCovariance(*found)


@torch.library.custom_op("powerkernels::select_cov", mutates_args=())
def _select_cov(
    log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    exclude: Tensor | None,
    old_log_prob: Tensor | None,
    cu_seqlens: Tensor | None,
    sequence_index: Tensor | None,
    seed: Tensor | None,
    band: bool,
    ratio: float,
    k: int,
    lb: float,
    ub: float,
    clip_low: float,
    clip_high: float,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """mask, moments, state of one part. old_log_prob: tokens that PPO clips cannot be selected."""
    check_bounds(cu_seqlens, log_prob)
    tokens = tokens_of(log_prob, advantages, mask, exclude, cu_seqlens, sequence_index)
    if old_log_prob is not None:
        tokens = without_clipped(tokens, old_log_prob, clip_low, clip_high)
    found = select([tokens], Rule(band, ratio, k, lb, ub), seed, group)
    return found.masks[0].view(log_prob.shape), found.moments, found.state


@_select_cov.register_fake
def _(log_prob: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    def empty(size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=log_prob.device)

    mask = torch.empty(log_prob.shape, dtype=torch.bool, device=log_prob.device)
    return (
        mask,
        empty(reference.NUM_MOMENTS, torch.float64),
        empty(reference.NUM_STATE, torch.int64),
    )


def select_cov(
    log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    rule: Rule,
    *,
    exclude: Tensor | None = None,
    old_log_prob: Tensor | None = None,
    clip_bounds: tuple[float, float] = (0.0, 0.0),
    cu_seqlens: Tensor | None = None,
    sequence_index: Tensor | None = None,
    seed: int | Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Checked arguments to the op: mask, moments and state.

    With old_log_prob, tokens that PPO's clipping to clip_bounds makes constant are left out.
    """
    return _select_cov(
        log_prob.detach(),
        advantages.detach(),
        mask,
        exclude,
        None if old_log_prob is None else old_log_prob.detach(),
        cu_seqlens,
        None if sequence_index is None else sequence_index.long(),
        None if seed is None else seed_tensor(seed, log_prob.device),
        *rule,
        *clip_bounds,
        _process_group.name_of(process_group),
    )


def without_clipped(tokens: Tokens, old_log_prob: Tensor, low: float, high: float) -> Tokens:
    old = layout(old_log_prob.detach(), tokens.cu_seqlens)
    module = reference if old.dtype == torch.float64 else implementation(tokens)
    selectable, moments = module.unclipped(tokens, old, low, high)
    return tokens._replace(selectable=selectable, moments=moments)


def select_top_cov(
    log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    ratio: float | None = None,
    k: int | None = None,
    exclude: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """The tokens whose covariance of log-probability and advantage is largest: KL-Cov's choice.

    Exactly k of them, or max(1, floor(ratio * number of tokens)); all that may be selected where
    there are fewer. Covariances are compared as float32; equal ones go by index, the smaller first:
    rank, then place in the tensor. Nothing waits for the device, and the op can be captured in a
    CUDA graph.

    Nothing is selected where every covariance is 0 (constant advantages or log-probs), where there
    is no token, and where one is NaN or infinite.

    Args:
        log_prob, advantages, mask, cu_seqlens: as of `token_covariance`.
        ratio: in (0, 1], of the tokens of the mask, of all ranks together.
        k: >= 0, instead of ratio.
        exclude: shaped as log_prob, bool, integer or floating: tokens (not 0) that count for the
            means and the number and cannot be selected.
        process_group: the ranks that share one selection of k tokens among all of theirs. In a CUDA
            graph as in `score_tokens`.

    Returns:
        bool, shaped as log_prob.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype, device or range, both
            or neither of ratio and k are given, or cu_seqlens do not add up.

    Source: Cui et al. 2025, section 4.3, KL-Cov.
    """
    check_tokens(log_prob, advantages, mask, cu_seqlens)
    check_like("exclude", exclude, log_prob, MASK_DTYPES)
    return select_cov(
        log_prob,
        advantages,
        mask,
        Rule(False, *check_number_of_tokens(ratio, k)),
        exclude=exclude,
        cu_seqlens=cu_seqlens,
        process_group=process_group,
    )[0]


def select_cov_band(
    log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    ratio: float | None = None,
    k: int | None = None,
    lb: float,
    ub: float,
    seed: int | Tensor,
    exclude: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sequence_index: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """A uniform subset of the tokens with lb < covariance < ub: Clip-Cov's choice.

    As many as of `select_top_cov`, or all in the band where there are fewer; without replacement.
    A token's random number is Philox's of the seed, its sequence's number and its place in the
    sequence, so the subset does not depend on padding, on how a batch is divided, or (with
    sequence_index) on the order of the sequences. Numbers have 32 bits, equal ones go by index.

    Args:
        log_prob, advantages, mask, cu_seqlens: as of `token_covariance`.
        ratio, k, exclude, process_group: as of `select_top_cov`.
        lb, ub: bounds of the covariance, both exclusive, lb < ub; infinite ones are allowed.
        seed: 64 bits, an int or an int64 tensor of one element; another one each step.
        sequence_index: int32 or int64, shaped as the sequences ([...] of [..., T], [B] with
            cu_seqlens): their numbers, where they are not counted through: rank, then place.

    Returns, raises: as `select_top_cov`.

    Source: Cui et al. 2025, section 4.3, Clip-Cov.
    """
    check_tokens(log_prob, advantages, mask, cu_seqlens)
    check_like("exclude", exclude, log_prob, MASK_DTYPES)
    check_band(lb, ub)
    check_sequence_index(sequence_index, log_prob, cu_seqlens)
    return select_cov(
        log_prob,
        advantages,
        mask,
        Rule(True, *check_number_of_tokens(ratio, k), float(lb), float(ub)),
        exclude=exclude,
        cu_seqlens=cu_seqlens,
        sequence_index=sequence_index,
        seed=seed_tensor(seed, log_prob.device),
        process_group=process_group,
    )[0]


def check_number_of_tokens(
    ratio: float | None, k: int | None, name: str = "ratio"
) -> tuple[float, int]:
    """ratio and k as of `Rule`."""
    if (ratio is None) == (k is None):
        raise ValueError(f"one of {name} and k must be given, got {name}={ratio!r}, k={k!r}")
    if k is not None:
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"k must be an int >= 0, got {described(k)}")
        if k < 0:
            raise ValueError(f"k must be an int >= 0, got {k}")
        return 0.0, k
    check_number(name, ratio, low=0, open_low=True)
    assert ratio is not None
    if ratio > 1:
        raise ValueError(f"{name} must be a share of the tokens in (0, 1], got {ratio!r}")
    if ratio > SUSPICIOUS_RATIO and not torch.compiler.is_compiling():
        warn_once(
            f"{name}={ratio!r} selects {100 * ratio:g}% of all tokens; the paper's shares are "
            "0.0002 to 0.002. Was a percentage meant?"
        )
    return float(ratio), -1


def check_band(lb: float, ub: float, names: tuple[str, str] = ("lb", "ub")) -> None:
    for name, value in zip(names, (lb, ub), strict=True):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {described(value)}")
    if not lb < ub:
        raise ValueError(f"{names[0]} must be < {names[1]}, got {lb!r} and {ub!r}")


def clip_bounds(low: float, high: float | None) -> tuple[float, float]:
    """Of the ratio, from clip_ratio_low and clip_ratio_high; None: as low."""
    check_number("clip_ratio_low", low, low=0)
    high = low if high is None else high
    check_number("clip_ratio_high", high, low=0)
    return 1.0 - low, 1.0 + high


def check_sequence_index(
    sequence_index: Tensor | None, log_prob: Tensor, cu_seqlens: Tensor | None
) -> None:
    if sequence_index is None:
        return
    check_tensor("sequence_index", sequence_index, INDEX_DTYPES, log_prob.device)
    if cu_seqlens is not None:
        shape: Sequence[int] = (cu_seqlens.shape[0] - 1,)
    else:
        shape = log_prob.shape if log_prob.ndim == 1 else log_prob.shape[:-1]
    check_shape("sequence_index", sequence_index, shape)
