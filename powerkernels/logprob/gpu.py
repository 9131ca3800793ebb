"""Launches the Triton kernels of the scores: sizes, strides and the table of variants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from powerkernels._triton import EXACT, device_of, power_of_2
from powerkernels.logprob import kernels
from powerkernels.logprob.options import (
    Rows,
    ScoreOptions,
    Scores,
    Support,
    empty_scores,
    rows_of,
)

SLICE_V = kernels.SLICE_V.value
GROUP = kernels.GROUP.value
LOG2_E = kernels.LOG2_E.value

# From this many groups of slices on, a program takes a whole group: below, that would leave the
# warps of a large GPU (132 multiprocessors of 32 one-warp programs) without work.
MANY_GROUPS = 4096
# Entries of a row that one program of the backward takes, and its warps: 32 entries a thread.
BWD_BLOCK_V, BWD_WARPS = 4096, 4
DRAW_WARPS = 4
# Entries of a row that are on their way at once in the search for a threshold, and the warps:
# 16 entries a thread.
THRESHOLD_BLOCK, THRESHOLD_WARPS = 8192, 16
# Bits of a float32 that a logit of the dtype leaves 0.
SPARE_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}
# Parts from which a row's merge takes four warps: one would spill.
MANY_PARTS, MANY_PARTS_WARPS = 512, 4
# e^alpha is a product for 2 * alpha up to this.
MAX_TWICE_ALPHA = 16


def serves(logits: Tensor, options: ScoreOptions) -> bool:
    """float64, and what a float32 exponent does not hold, are left to the reference."""
    return logits.dtype != torch.float64 and options.fit_float32()


def twice_alpha(alpha: float) -> int:
    twice = 2.0 * alpha
    return int(twice) if twice <= MAX_TWICE_ALPHA and twice.is_integer() else kernels.GENERAL.value


class Partials(NamedTuple):
    sums: Tensor  # float32 [4, N, parts]
    target_logit: Tensor  # float32 [N, 1 or parts], the largest counts
    parts_per_group: int


def score_tokens(
    logits: Tensor, targets: Tensor, ignore_index: int, options: ScoreOptions
) -> Scores:
    """logits [..., V], targets [...]."""
    partials = _row_sums(rows_of(logits), targets, ignore_index, options)
    scores = empty_scores(logits, targets.shape, options.entropy)
    merge(partials, targets, ignore_index, options, scores, finish=True)
    return scores


def row_sums(logits: Tensor, targets: Tensor, ignore_index: int, options: ScoreOptions) -> Tensor:
    """float32 [5, N] of a shard [..., V]; dot is in units of log2, unlike the reference's."""
    partials = _row_sums(rows_of(logits), targets, ignore_index, options)
    sums = torch.empty((5, targets.numel()), dtype=torch.float32, device=logits.device)
    merge(partials, targets, ignore_index, options, sums.unbind(), finish=False)
    return sums


def finish_scores(
    sums: Tensor, targets: Tensor, ignore_index: int, options: ScoreOptions
) -> Scores:
    """float32 [K, 5, N] of K shards -> the scores of all, shaped as targets."""
    partials = Partials(sums[:, :4].permute(1, 2, 0), sums[:, 4].T, 1)
    scores = empty_scores(sums, targets.shape, options.entropy)
    merge(partials, targets, ignore_index, options, scores, finish=True)
    return scores


def score_tokens_bwd(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    options: ScoreOptions,
    scores: Scores,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    dlogits: Tensor,
) -> None:
    """Writes the gradient of logits [..., V] to dlogits, which may be logits."""
    num_rows, vocab = targets.numel(), logits.shape[-1]
    if num_rows == 0:
        return
    rows, outputs = rows_of(logits), rows_of(dlogits)
    num_blocks = triton.cdiv(vocab, BWD_BLOCK_V)
    with device_of(logits):
        kernels.score_bwd_kernel[(num_rows * num_blocks,)](
            *rows,
            vocab,
            targets.contiguous(),
            ignore_index,
            *temperature_of(options),
            options.alpha,
            options.softcap or 0.0,
            scores.row_max,
            scores.log_sum,
            scores.log_prob,
            scores.log_z,
            scores.entropy,
            *(None if gradient is None else gradient.contiguous() for gradient in gradients),
            *outputs,
            num_blocks,
            TWICE_ALPHA=twice_alpha(options.alpha),
            SOFTCAP=options.softcap is not None,
            BLOCK_V=BWD_BLOCK_V,
            num_warps=BWD_WARPS,
            **EXACT,
        )


def sample_tokens(
    logits: Tensor,
    seed: Tensor,
    counters: Tensor,
    banned: Tensor | None,
    options: ScoreOptions,
    support: Support | None,
) -> tuple[Tensor, Scores]:
    """logits [C, V], seed int64 [1], counters int64 [C, 4], banned int64 [C] -> token, scores."""
    num_rows, vocab = logits.shape
    rows = rows_of(logits)
    token = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    scores = empty_scores(logits, token.shape, options.entropy)
    if num_rows:
        sums = _slice_sums(rows, options)
        num_slices = triton.cdiv(vocab, SLICE_V)
        threshold = None
        if support is not None:
            threshold = _threshold(rows, sums, options, support)
            _restrict(rows, sums, options, threshold)
        with device_of(logits):
            kernels.draw_kernel[(num_rows,)](
                rows.tensor,
                rows.inner_stride,
                vocab,
                seed,
                counters.contiguous(),
                None if banned is None else banned.contiguous(),
                threshold,
                options.alpha,
                sums,
                sums.stride(0),
                sums.stride(1),
                token,
                *scores[:3],
                ENTROPY=options.entropy,
                TWICE_ALPHA=twice_alpha(options.alpha),
                GROUPS=power_of_2(triton.cdiv(num_slices, GROUP)),
                SLICES=power_of_2(num_slices),
                num_warps=DRAW_WARPS,
                **EXACT,
            )
    return token, scores


def support_threshold(logits: Tensor, options: ScoreOptions, support: Support) -> Tensor:
    """logits [C, V] -> float32 [C]; see the reference. Need not be an entry of the row."""
    rows = rows_of(logits)
    if logits.shape[0] == 0:
        return torch.empty(0, dtype=torch.float32, device=logits.device)
    return _threshold(rows, _slice_sums(rows, options), options, support)


def _slice_sums(rows: Rows, options: ScoreOptions) -> Tensor:
    """float32 [4, C, slices]: max, sum, pow_sum, dot of every slice."""
    # No target yet: entry 0 is loaded and not used.
    num_rows = rows.tensor.shape[0]
    targets = torch.zeros(num_rows, dtype=torch.int64, device=rows.tensor.device)
    return _row_sums(rows, targets, kernels.NO_TOKEN.value, options, slices=1).sums


def _threshold(rows: Rows, sums: Tensor, options: ScoreOptions, support: Support) -> Tensor:
    _, num_rows, num_slices = sums.shape
    vocab = rows.tensor.shape[-1]
    top_p_drop = -math.inf
    if support.top_p < 1 and options.alpha > 0:
        # What has no more than this of the largest mass has less than 1 - top_p together.
        top_p_drop = math.log((1 - support.top_p) / (2 * vocab)) / options.alpha
    threshold = torch.empty(num_rows, dtype=torch.float32, device=sums.device)
    with device_of(sums):
        kernels.threshold_kernel[(num_rows,)](
            rows.tensor,
            rows.inner_stride,
            vocab,
            options.alpha,
            min(support.top_k, vocab),
            support.top_p,
            top_p_drop,
            support.min_p_drop(options.alpha),
            sums,
            sums.stride(1),
            num_slices,
            threshold,
            TOP_K=support.top_k < vocab,
            TOP_P=support.top_p < 1,
            TWICE_ALPHA=twice_alpha(options.alpha),
            SHIFT=SPARE_BITS[rows.tensor.dtype],
            SLICES=power_of_2(num_slices),
            BLOCK=THRESHOLD_BLOCK,
            num_warps=THRESHOLD_WARPS,
            **EXACT,
        )
    return threshold


def _restrict(rows: Rows, sums: Tensor, options: ScoreOptions, threshold: Tensor) -> None:
    """Makes pow_sum of the slices that of the entries at or above the threshold of their row."""
    _, num_rows, num_slices = sums.shape
    with device_of(sums):
        kernels.support_sums_kernel[(num_rows * num_slices,)](
            rows.tensor,
            rows.inner_stride,
            rows.tensor.shape[-1],
            options.alpha,
            threshold,
            sums,
            sums.stride(0),
            sums.stride(1),
            num_slices,
            TWICE_ALPHA=twice_alpha(options.alpha),
            num_warps=1,
            **EXACT,
        )


def _row_sums(
    rows: Rows,
    targets: Tensor,
    ignore_index: int,
    options: ScoreOptions,
    slices: int | None = None,
) -> Partials:
    """`slices`: per part, 1 or GROUP; by the table if None."""
    num_rows, vocab = targets.numel(), rows.tensor.shape[-1]
    num_groups = triton.cdiv(vocab, GROUP * SLICE_V)
    if slices is None:
        slices = GROUP if num_rows * num_groups >= MANY_GROUPS else 1
    num_parts = triton.cdiv(vocab, slices * SLICE_V)
    floats: dict[str, Any] = {"dtype": torch.float32, "device": rows.tensor.device}
    partials = Partials(
        torch.empty((4, num_rows, num_parts), **floats),
        torch.empty((num_rows, 1), **floats),
        GROUP // slices,
    )
    if num_rows == 0:
        return partials
    with device_of(rows.tensor):
        kernels.row_sums_kernel[(num_rows * num_parts,)](
            *rows,
            vocab,
            targets.contiguous(),
            ignore_index,
            *temperature_of(options),
            options.alpha,
            options.softcap or 0.0,
            partials.sums,
            partials.sums.stride(0),
            partials.sums.stride(1),
            num_parts,
            partials.target_logit,
            ENTROPY=options.entropy,
            TWICE_ALPHA=twice_alpha(options.alpha),
            SOFTCAP=options.softcap is not None,
            SLICES=slices,
            WORDS=_in_words(rows),
            num_warps=1,
            **EXACT,
        )
    return partials


def merge(
    partials: Partials,
    targets: Tensor,
    ignore_index: int,
    options: ScoreOptions,
    out: Sequence[Tensor],
    *,
    finish: bool,
) -> None:
    """Writes the scores to `out`, or with finish=False the five sums of `row_sums`."""
    _, num_rows, num_parts = partials.sums.shape
    if num_rows == 0:
        return
    block = power_of_2(triton.cdiv(num_parts, partials.parts_per_group))
    with device_of(partials.sums):
        kernels.merge_kernel[(num_rows,)](
            partials.sums,
            *partials.sums.stride(),
            num_parts,
            partials.target_logit,
            *partials.target_logit.stride(),
            partials.target_logit.shape[1],
            targets.contiguous(),
            ignore_index,
            *temperature_of(options),
            options.alpha,
            *out,
            ENTROPY=options.entropy,
            TWICE_ALPHA=twice_alpha(options.alpha),
            PARTS=partials.parts_per_group,
            BLOCK=block,
            FINISH=finish,
            num_warps=MANY_PARTS_WARPS if block >= MANY_PARTS else 1,
            **EXACT,
        )


def temperature_of(options: ScoreOptions) -> tuple[float, Tensor | None]:
    """scale, temperatures_ptr of the kernels."""
    temperatures = options.temperatures
    if temperatures is None:
        return LOG2_E / options.temperature, None
    return LOG2_E, temperatures.float().contiguous()


def _in_words(rows: Rows) -> bool:
    """Whether bfloat16 entries can be loaded two at a time."""
    address, strides = rows.tensor.data_ptr(), (rows.outer_stride, rows.inner_stride)
    aligned = address % 4 == 0 and all(stride % 2 == 0 for stride in strides)
    return rows.tensor.dtype == torch.bfloat16 and aligned
