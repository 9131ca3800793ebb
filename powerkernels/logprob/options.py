"""What every implementation of the scores is told, and how it finds the rows of a tensor."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Between these a scale, and its product with any difference of floats that matters, is a normal
# float32; the same bounds as in csrc/cpu/vocab_slice_f64.cpp.
MIN_FLOAT_SCALE, MAX_FLOAT_SCALE = 1e-30, 1e30


class ScoreOptions(NamedTuple):
    alpha: float = 1.0
    temperature: float = 1.0
    temperatures: Tensor | None = None  # float32 or float64, one a row; instead of temperature
    entropy: bool = False
    softcap: float | None = None

    def fit_float32(self) -> bool:
        """Whether exponents can be computed in float32. temperatures are not looked at."""
        scales = [1.0 / self.temperature]
        if self.alpha != 0:
            scales.append(self.alpha / self.temperature)
        if self.softcap is not None:
            scales.append(self.softcap)
        return all(MIN_FLOAT_SCALE <= scale <= MAX_FLOAT_SCALE for scale in scales)


class Support(NamedTuple):
    """Bounds of what may be drawn; `reference.support_threshold` says what they mean."""

    top_k: int  # >= 1; the vocabulary and more: no bound
    top_p: float  # in (0, 1]; 1: no bound
    min_p: float  # in [0, 1]; 0: no bound

    def keeps_all(self, vocab: int) -> bool:
        return self.top_k >= vocab and self.top_p == 1 and self.min_p == 0

    def min_p_drop(self, alpha: float) -> float:
        """How far below the largest logit the smallest one may be, by min_p; -inf: anywhere."""
        return math.log(self.min_p) / alpha if self.min_p > 0 and alpha > 0 else -math.inf


class Scores(NamedTuple):
    """float32 (float64 for float64 logits), one of each a row; zeros where ignored."""

    log_prob: Tensor
    log_z: Tensor
    entropy: Tensor  # no elements unless asked
    row_max: Tensor  # the largest logit after softcap, before temperature
    log_sum: Tensor  # log sum_v e^((z_v - row_max) / temperature)


def empty_scores(logits: Tensor, shape: torch.Size, entropy: bool) -> Scores:
    def empty(size: torch.Size) -> Tensor:
        return torch.empty(size, dtype=score_dtype(logits), device=logits.device)

    none = torch.Size((0,))
    return Scores(
        empty(shape), empty(shape), empty(shape if entropy else none), empty(shape), empty(shape)
    )


class Rows(NamedTuple):
    """Row r is at (r // inner) * outer_stride + (r % inner) * inner_stride, in elements."""

    tensor: Tensor
    inner: int
    outer_stride: int
    inner_stride: int


def rows_of(logits: Tensor) -> Rows:
    """logits [..., V] without a copy if two row strides can say where its rows are.

    So logits[:, :-1] needs no copy.
    """
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        logits = logits.contiguous()
    if logits.ndim == 1 or logits.numel() == 0:
        return Rows(logits, 1, 0, 0)
    if logits.ndim == 2:
        return Rows(logits, max(logits.shape[0], 1), 0, logits.stride(0))
    view = logits
    if logits.ndim > 3:
        try:
            view = logits.view(-1, *logits.shape[-2:])
        except RuntimeError:
            view = logits.contiguous().view(-1, *logits.shape[-2:])
    return Rows(view, max(view.shape[1], 1), view.stride(0), view.stride(1))


def can_be_overwritten(logits: Tensor) -> bool:
    """Whether every entry of [..., V] has a place of its own that `rows_of` finds."""
    if logits.numel() == 0:
        return False
    rows = rows_of(logits)
    expanded = any(
        stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True)
    )
    return rows.tensor.data_ptr() == logits.data_ptr() and not expanded


def score_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
