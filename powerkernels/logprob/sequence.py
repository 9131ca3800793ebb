"""sequence_log_likelihood: checks, torch op, public function."""

from __future__ import annotations

import torch
from torch import Tensor

from powerkernels import _extension
from powerkernels._arguments import (
    LOGIT_DTYPES,
    MASK_DTYPES,
    check_bounds,
    check_cu_seqlens,
    check_number,
    check_shape,
    check_tensor,
    described,
)
from powerkernels.logprob import reference
from powerkernels.logprob.options import score_dtype


@torch.library.custom_op("powerkernels::sequence_log_likelihood", mutates_args=())
def _sequence_log_likelihood(
    log_prob: Tensor, alpha: float, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    check_bounds(cu_seqlens, log_prob)
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
    return total.to(score_dtype(log_prob))


@_sequence_log_likelihood.register_fake
def _(log_prob: Tensor, alpha: float, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    rows = log_prob.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.empty(rows, dtype=score_dtype(log_prob), device=log_prob.device)


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
        check_cu_seqlens(cu_seqlens, log_prob.device)
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
            check_bounds(cu_seqlens, log_prob)
        return reference.sequence_log_likelihood(
            log_prob, alpha=alpha, mask=mask, cu_seqlens=cu_seqlens
        )
    return _sequence_log_likelihood(log_prob, float(alpha), mask, cu_seqlens)
