"""The scores by the C++ part: CPU tensors in, addresses and strides on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from powerkernels import _extension
from powerkernels.logprob import eager
from powerkernels.logprob.options import ScoreOptions, Scores, Support, empty_scores, rows_of

finish_scores = eager.finish_scores


def score_tokens(
    logits: Tensor, targets: Tensor, ignore_index: int, options: ScoreOptions
) -> Scores:
    """logits [..., V], targets [...], which are in [0, V) or ignore_index."""
    scores = empty_scores(logits, targets.shape, options.entropy)
    arguments = _Arguments(logits, targets, ignore_index, options)
    bad_row = _extension.compiled().score_tokens(
        **arguments.keywords,
        entropy=options.entropy,
        log_prob=scores.log_prob.data_ptr(),
        log_z=scores.log_z.data_ptr(),
        entropy_out=scores.entropy.data_ptr(),
        row_max=scores.row_max.data_ptr(),
        log_sum=scores.log_sum.data_ptr(),
    )
    if bad_row >= 0:
        eager.raise_bad_target(targets, bad_row, logits.shape[-1], ignore_index)
    return scores


def row_sums(logits: Tensor, targets: Tensor, ignore_index: int, options: ScoreOptions) -> Tensor:
    """float64 [5, N]; see the reference."""
    sums = torch.empty((5, targets.numel()), dtype=torch.float64)
    arguments = _Arguments(logits, targets, ignore_index, options)
    _extension.compiled().row_sums(
        **arguments.keywords, entropy=options.entropy, out=sums.data_ptr()
    )
    return sums


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
    arguments = _Arguments(logits, targets, ignore_index, options)
    kept = [None if gradient is None else gradient.contiguous() for gradient in gradients]
    scores = Scores(*(score.contiguous() for score in scores))
    out = rows_of(dlogits)
    _extension.compiled().score_tokens_bwd(
        **arguments.keywords,
        row_max=scores.row_max.data_ptr(),
        log_sum=scores.log_sum.data_ptr(),
        log_prob=scores.log_prob.data_ptr(),
        log_z=scores.log_z.data_ptr(),
        entropy=0 if kept[2] is None else scores.entropy.data_ptr(),
        grad_log_prob=_extension.address(kept[0]),
        grad_log_z=_extension.address(kept[1]),
        grad_entropy=_extension.address(kept[2]),
        dlogits=out.tensor.data_ptr(),
        dlogits_inner=out.inner,
        dlogits_outer_stride=out.outer_stride,
        dlogits_inner_stride=out.inner_stride,
    )


def sample_tokens(
    logits: Tensor,
    seed: Tensor,
    counters: Tensor,
    banned: Tensor | None,
    options: ScoreOptions,
    support: Support | None,
) -> tuple[Tensor, Scores]:
    """logits [C, V], seed int64 [1], counters int64 [C, 4], banned int64 [C] -> token, scores.

    row_max and log_sum of the scores are not written.
    """
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    counters = counters.contiguous()
    banned = None if banned is None else banned.contiguous()
    token = torch.empty(logits.shape[0], dtype=torch.int64)
    scores = empty_scores(logits, token.shape, options.entropy)
    _extension.compiled().sample_tokens(
        **_row_arguments(logits, options, support),
        seed=int(seed.item()) % 2**64,
        counters=counters.data_ptr(),
        banned=_extension.address(banned),
        entropy=options.entropy,
        token=token.data_ptr(),
        log_prob=scores.log_prob.data_ptr(),
        log_z=scores.log_z.data_ptr(),
        entropy_out=scores.entropy.data_ptr(),
    )
    return token, scores


def support_threshold(logits: Tensor, options: ScoreOptions, support: Support) -> Tensor:
    """logits [C, V] -> float64 [C]; see the reference. NaN for a row without a softmax."""
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    threshold = torch.empty(logits.shape[0], dtype=torch.float64)
    _extension.compiled().support_threshold(
        **_row_arguments(logits, options, support), out=threshold.data_ptr()
    )
    return threshold


def _row_arguments(
    logits: Tensor, options: ScoreOptions, support: Support | None
) -> dict[str, Any]:
    """logits [C, V], contiguous in V."""
    num_rows, vocab = logits.shape
    top_k, top_p, min_p = support or Support(vocab, 1.0, 0.0)
    return {
        "logits": logits.data_ptr(),
        "dtype": _extension.DTYPE_CODES[logits.dtype],
        "num_rows": num_rows,
        "vocab": vocab,
        "row_stride": logits.stride(0),
        "alpha": options.alpha,
        "temperature": options.temperature,
        "top_k": min(top_k, vocab),
        "top_p": top_p,
        "min_p": min_p,
        "num_threads": _extension.num_threads(),
    }


class _Arguments:
    """What the three ops share; keeps the tensors alive whose addresses are in `keywords`."""

    def __init__(
        self, logits: Tensor, targets: Tensor, ignore_index: int, options: ScoreOptions
    ) -> None:
        self.rows = rows_of(logits)
        self.targets = targets.contiguous()
        temperatures = options.temperatures
        self.temperatures = None if temperatures is None else temperatures.double().contiguous()
        self.keywords: dict[str, Any] = {
            "logits": self.rows.tensor.data_ptr(),
            "dtype": _extension.DTYPE_CODES[logits.dtype],
            "num_rows": targets.numel(),
            "vocab": logits.shape[-1],
            "inner": self.rows.inner,
            "outer_stride": self.rows.outer_stride,
            "inner_stride": self.rows.inner_stride,
            "targets": self.targets.data_ptr(),
            "targets_are_int64": targets.dtype == torch.int64,
            "ignore_index": ignore_index,
            "alpha": options.alpha,
            "temperature": options.temperature,
            "temperatures": _extension.address(self.temperatures),
            "softcap": options.softcap or 0.0,
            "num_threads": _extension.num_threads(),
        }
