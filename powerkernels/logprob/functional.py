"""score_tokens, sample_tokens and sequence_log_likelihood: checks, torch ops, public functions.

The ops have no gradient of their own yet: where one is needed, the public functions go through the
reference, which is differentiable (and slower).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from powerkernels import _extension
from powerkernels._arguments import (
    INDEX_DTYPES,
    LOGIT_DTYPES,
    check_number,
    check_shape,
    check_tensor,
    check_vocab,
    described,
    seed_tensor,
)
from powerkernels.logprob import reference

MASK_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    *LOGIT_DTYPES,
)


class TokenScores(NamedTuple):
    log_prob: Tensor  # [...] log p(target)
    log_z: Tensor  # [...] log sum_v p(v)^alpha
    entropy: Tensor | None  # [...] of p, in nats; None unless asked


class TokenSamples(NamedTuple):
    token: Tensor  # int64 [C]
    log_prob: Tensor  # [C] log p(token)
    log_z: Tensor  # [C] log sum_v p(v)^alpha
    entropy: Tensor | None  # [C] of p, in nats; None unless asked


@torch.library.custom_op("powerkernels::score_tokens", mutates_args=())
def _score_tokens(
    logits: Tensor,
    targets: Tensor,
    alpha: float,
    temperature: float,
    entropy: bool,
    softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    if _extension.backend_for(logits.device) != "cpp":
        _check_targets(targets, logits.shape[-1], ignore_index)
        log_prob, log_z, entropies = reference.score_tokens(
            logits,
            targets,
            alpha=alpha,
            temperature=temperature,
            entropy=entropy,
            softcap=softcap,
            ignore_index=ignore_index,
        )
        return log_prob, log_z, log_prob.new_empty(0) if entropies is None else entropies
    targets = targets.contiguous()
    outputs = _empty_scores(logits, entropy)
    logits, inner, outer_stride, inner_stride = _rows(logits)
    bad_row = _extension.compiled().score_tokens(
        logits=logits.data_ptr(),
        dtype=_extension.DTYPE_CODES[logits.dtype],
        num_rows=targets.numel(),
        vocab=logits.shape[-1],
        inner=inner,
        outer_stride=outer_stride,
        inner_stride=inner_stride,
        targets=targets.data_ptr(),
        targets_are_int64=targets.dtype == torch.int64,
        ignore_index=ignore_index,
        alpha=alpha,
        temperature=temperature,
        softcap=0.0 if softcap is None else softcap,
        entropy=entropy,
        log_prob=outputs[0].data_ptr(),
        log_z=outputs[1].data_ptr(),
        entropy_out=outputs[2].data_ptr(),
        num_threads=_extension.num_threads(),
    )
    if bad_row >= 0:
        _raise_bad_target(targets, bad_row, logits.shape[-1], ignore_index)
    return outputs


@_score_tokens.register_fake
def _(
    logits: Tensor,
    targets: Tensor,
    alpha: float,
    temperature: float,
    entropy: bool,
    softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_scores(logits, entropy)


def score_tokens(
    logits: Tensor,
    targets: Tensor,
    *,
    alpha: float = 1.0,
    temperature: float = 1.0,
    entropy: bool = False,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> TokenScores:
    """Log-probability, power normaliser and entropy of each token, from one read of the logits.

    p = softmax(z / temperature), z = softcap * tanh(logits / softcap) if softcap is given.
    alpha * log_prob - log_z is the log-probability under p^alpha, renormalised.

    -inf logits are legal: such entries are outside the vocabulary (also at alpha = 0 and under a
    softcap), and as a target they have log_prob -inf. NaN, +inf, or nothing but -inf in a row gives
    NaN for that row alone. Rows whose target is ignore_index give 0 throughout.

    Where logits require a gradient, the differentiable reference computes the result: correct, in
    float64, slow.

    Args:
        logits: float16, bfloat16, float32 or float64 [..., V], V >= 1. Rows may have any stride.
        targets: int32 or int64 [...], in [0, V) or ignore_index.
        alpha: the power, finite, >= 0.
        temperature: > 0, finite.
        entropy: whether to compute the entropy of p.
        softcap: > 0, finite; None for none.
        ignore_index: the target of rows to leave out.

    Returns:
        TokenScores of float32 [...] (float64 for float64 logits): log_prob in [-inf, 0];
        log_z = LSE(alpha z) - alpha LSE(z), <= 0 for alpha >= 1, 0 at 1; entropy in nats or None.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype, device or range.
        IndexError: a target is neither in [0, V) nor ignore_index (checked on CPU only).

    Source: the power distribution of Karan & Du 2025, "Reasoning with Sampling", section 4.1.
    """
    check_tensor("logits", logits, LOGIT_DTYPES)
    check_vocab("logits", logits)
    check_tensor("targets", targets, INDEX_DTYPES, logits.device)
    check_shape("targets", targets, logits.shape[:-1])
    check_number("alpha", alpha, low=0)
    check_number("temperature", temperature, low=0, open_low=True)
    if softcap is not None:
        check_number("softcap", softcap, low=0, open_low=True)
    if torch.is_grad_enabled() and logits.requires_grad:
        if not torch.compiler.is_compiling():
            _check_targets(targets, logits.shape[-1], ignore_index)
        return TokenScores(
            *reference.score_tokens(
                logits,
                targets,
                alpha=alpha,
                temperature=temperature,
                entropy=entropy,
                softcap=softcap,
                ignore_index=ignore_index,
            )
        )
    log_prob, log_z, entropies = _score_tokens(
        logits,
        targets,
        float(alpha),
        float(temperature),
        entropy,
        None if softcap is None else float(softcap),
        ignore_index,
    )
    return TokenScores(log_prob, log_z, entropies if entropy else None)


@torch.library.custom_op("powerkernels::sample_tokens", mutates_args=())
def _sample_tokens(
    logits: Tensor,
    counters: Tensor,
    seed: Tensor,
    banned: Tensor | None,
    alpha: float,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_banned(banned, logits.shape[-1])
    if _extension.backend_for(logits.device) != "cpp":
        token, log_prob, log_z, entropies = reference.sample_tokens(
            logits, alpha=alpha, seed=seed, counters=counters, banned=banned, entropy=entropy
        )
        return token, log_prob, log_z, log_prob.new_empty(0) if entropies is None else entropies
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    counters = counters.contiguous()
    banned = None if banned is None else banned.contiguous()
    token = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    outputs = _empty_scores(logits, entropy)
    _extension.compiled().sample_tokens(
        logits=logits.data_ptr(),
        dtype=_extension.DTYPE_CODES[logits.dtype],
        num_rows=logits.shape[0],
        vocab=logits.shape[1],
        row_stride=logits.stride(0),
        seed=int(seed.item()) % 2**64,
        counters=counters.data_ptr(),
        banned=_extension.address(banned),
        alpha=alpha,
        temperature=1.0,
        entropy=entropy,
        token=token.data_ptr(),
        log_prob=outputs[0].data_ptr(),
        log_z=outputs[1].data_ptr(),
        entropy_out=outputs[2].data_ptr(),
        num_threads=_extension.num_threads(),
    )
    return token, *outputs


@_sample_tokens.register_fake
def _(
    logits: Tensor,
    counters: Tensor,
    seed: Tensor,
    banned: Tensor | None,
    alpha: float,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    token = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    return token, *_empty_scores(logits, entropy)


def sample_tokens(
    logits: Tensor,
    *,
    alpha: float = 1.0,
    seed: int | Tensor,
    counters: Tensor,
    banned: Tensor | None = None,
    entropy: bool = False,
) -> TokenSamples:
    """Draws a token per row from q ~ p^alpha, p = softmax(logits), and scores it under p.

    A row's result depends on its logits, counters, banned token and the seed, and on nothing else:
    not on the other rows, the row's place, or the number of threads. log_prob, log_z and entropy
    have the bits that `score_tokens` gives for the token.

    A row with NaN, +inf, or nothing but -inf gives token -1 and NaN scores. As in `score_tokens`,
    logits that require a gradient go through the differentiable reference.

    Args:
        logits: float16, bfloat16, float32 or float64 [C, V], V >= 1. -inf entries are never drawn.
        alpha: the power, finite, >= 0; 0 is uniform over the entries above -inf.
        seed: 64 bits, an int or an int64 tensor of one element.
        counters: int64 [C, 4], the row's Philox counter (index, position, step, chain). Rows with
            the same counter get the same uniforms.
        banned: int64 [C] or None. A banned token (-1: none) is drawn only if it alone has mass;
            the draw is from q restricted to the others, the scores are those without a ban.
        entropy: whether to compute the entropy of p.

    Returns:
        TokenSamples: token int64 [C]; the others float32 [C] (float64 for float64 logits).

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype, device or range.

    Source: the proposal of Karan & Du 2025, "Reasoning with Sampling", Algorithm 1.
    """
    check_tensor("logits", logits, LOGIT_DTYPES)
    check_vocab("logits", logits, 2)
    check_number("alpha", alpha, low=0)
    check_tensor("counters", counters, (torch.int64,), logits.device)
    check_shape("counters", counters, (logits.shape[0], 4))
    if banned is not None:
        check_tensor("banned", banned, (torch.int64,), logits.device)
        check_shape("banned", banned, (logits.shape[0],))
    key = seed_tensor(seed, logits.device)
    if torch.is_grad_enabled() and logits.requires_grad:
        if not torch.compiler.is_compiling():
            _check_banned(banned, logits.shape[-1])
        return TokenSamples(
            *reference.sample_tokens(
                logits, alpha=alpha, seed=key, counters=counters, banned=banned, entropy=entropy
            )
        )
    token, log_prob, log_z, entropies = _sample_tokens(
        logits, counters, key, banned, float(alpha), entropy
    )
    return TokenSamples(token, log_prob, log_z, entropies if entropy else None)


@torch.library.custom_op("powerkernels::sequence_log_likelihood", mutates_args=())
def _sequence_log_likelihood(
    log_prob: Tensor, alpha: float, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    _check_cu_seqlens(cu_seqlens, log_prob)
    if _extension.backend_for(log_prob.device) != "cpp":
        return reference.sequence_log_likelihood(
            log_prob, alpha=alpha, mask=mask, cu_seqlens=cu_seqlens
        )
    if log_prob.stride(-1) != 1:
        log_prob = log_prob.contiguous()
    kept = None if mask is None else (mask != 0).contiguous()
    bounds = None if cu_seqlens is None else cu_seqlens.long().contiguous()
    rows = log_prob.shape[0] if bounds is None else len(bounds) - 1
    total = torch.empty(rows, dtype=torch.float64)
    _extension.compiled().sequence_log_likelihood(
        log_prob=log_prob.data_ptr(),
        dtype=_extension.DTYPE_CODES[log_prob.dtype],
        rows=rows,
        length=log_prob.shape[-1],
        row_stride=log_prob.stride(0),
        mask=_extension.address(kept),
        cu_seqlens=_extension.address(bounds),
        alpha=alpha,
        out=total.data_ptr(),
        num_threads=_extension.num_threads(),
    )
    return total.to(reference.score_dtype(log_prob))


@_sequence_log_likelihood.register_fake
def _(log_prob: Tensor, alpha: float, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    rows = log_prob.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.empty(rows, dtype=reference.score_dtype(log_prob), device=log_prob.device)


def sequence_log_likelihood(
    log_prob: Tensor,
    *,
    alpha: float = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """alpha times the log-likelihood of each sequence: log p(x)^alpha, not normalised.

    Sums are in float64. Places that are masked out may hold anything. An impossible sequence (-inf)
    stays -inf at alpha = 0. A log_prob that requires a gradient goes through the reference.

    Args:
        log_prob: float16, bfloat16, float32 or float64, [B, T], or flat [N] with cu_seqlens.
        alpha: the power, finite, >= 0.
        mask: [B, T], bool, integer or floating; a place counts where it is not 0.
        cu_seqlens: int32 or int64 [B + 1], bounds of the sequences in flat log_prob: from 0, never
            falling, to N.

    Returns:
        float32 [B] (float64 for float64 log_prob).

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype, device or range, or
            mask and cu_seqlens are both given.

    Source: Karan & Du 2025, "Reasoning with Sampling", section 4.1.
    """
    check_tensor("log_prob", log_prob, LOGIT_DTYPES)
    check_number("alpha", alpha, low=0)
    if cu_seqlens is not None:
        if mask is not None:
            raise ValueError("mask must be None where cu_seqlens is given")
        check_tensor("cu_seqlens", cu_seqlens, INDEX_DTYPES, log_prob.device)
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
            raise ValueError(f"cu_seqlens must have shape [B + 1], got {described(cu_seqlens)}")
        if log_prob.ndim != 1:
            raise ValueError(
                f"log_prob must be flat [N] where cu_seqlens is given, got {described(log_prob)}"
            )
    elif log_prob.ndim != 2:
        raise ValueError(
            f"log_prob must have shape [B, T], or [N] with cu_seqlens, got {described(log_prob)}"
        )
    if mask is not None:
        check_tensor("mask", mask, MASK_DTYPES, log_prob.device)
        check_shape("mask", mask, log_prob.shape)
    if torch.is_grad_enabled() and log_prob.requires_grad:
        if not torch.compiler.is_compiling():
            _check_cu_seqlens(cu_seqlens, log_prob)
        return reference.sequence_log_likelihood(
            log_prob, alpha=alpha, mask=mask, cu_seqlens=cu_seqlens
        )
    return _sequence_log_likelihood(log_prob, float(alpha), mask, cu_seqlens)


def _empty_scores(logits: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    def empty(shape: torch.Size) -> Tensor:
        return torch.empty(shape, dtype=reference.score_dtype(logits), device=logits.device)

    shape = logits.shape[:-1]
    return empty(shape), empty(shape), empty(shape if entropy else torch.Size((0,)))


def _rows(logits: Tensor) -> tuple[Tensor, int, int, int]:
    """logits as rows without a copy if two row strides can say where they are.

    Returns logits, inner, outer_stride, inner_stride: row r is at
    (r // inner) * outer_stride + (r % inner) * inner_stride. So logits[:, :-1] needs no copy.
    """
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        logits = logits.contiguous()
    if logits.ndim == 1 or logits.numel() == 0:
        return logits, 1, 0, 0
    if logits.ndim == 2:
        return logits, max(logits.shape[0], 1), 0, logits.stride(0)
    if logits.ndim > 3:
        try:
            view = logits.view(-1, *logits.shape[-2:])
        except RuntimeError:
            view = logits.contiguous().view(-1, *logits.shape[-2:])
    else:
        view = logits
    return view, max(view.shape[1], 1), view.stride(0), view.stride(1)


def _check_targets(targets: Tensor, vocab: int, ignore_index: int) -> None:
    if targets.device.type != "cpu":  # would wait for the device
        return
    bad = ((targets < 0) | (targets >= vocab)) & (targets != ignore_index)
    if bad.any():
        row = int(bad.flatten().nonzero()[0])
        _raise_bad_target(targets, row, vocab, ignore_index)


def _raise_bad_target(targets: Tensor, row: int, vocab: int, ignore_index: int) -> None:
    raise IndexError(
        f"targets must be in [0, {vocab}) or ignore_index {ignore_index}, "
        f"got {int(targets.flatten()[row])} at row {row}"
    )


def _check_banned(banned: Tensor | None, vocab: int) -> None:
    if banned is None or banned.device.type != "cpu":
        return
    bad = (banned < -1) | (banned >= vocab)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise IndexError(f"banned must be in [-1, {vocab}), got {int(banned[row])} at row {row}")


def _check_cu_seqlens(cu_seqlens: Tensor | None, log_prob: Tensor) -> None:
    if cu_seqlens is None or cu_seqlens.device.type != "cpu":
        return
    bounds = cu_seqlens.long()
    count = log_prob.shape[0]
    if bounds[0] != 0 or bounds[-1] != count or (bounds.diff() < 0).any():
        raise ValueError(
            f"cu_seqlens must start at 0, never fall and end at the {count} entries of log_prob, "
            f"got {bounds.tolist()}"
        )
