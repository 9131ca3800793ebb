"""What every implementation of the losses is told, and what it returns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from powerkernels.covariance.tokens import sequences_of

# Kinds of a token's loss. All but VALUE compare log_prob with a second one.
POLICY, K1, ABS, K2, K3, VALUE = range(6)
# What happens to selected tokens: nothing, their loss is dropped, or a penalty is added.
KEEP, DROP, PENALISE = range(3)

# Columns of LossSums.sums.
(
    COUNT,  # tokens
    NEG_LOG_RATIO,  # old_log_prob - log_prob
    ABS_LOG_RATIO,
    K3_ESTIMATE,  # ratio - 1 - log ratio
    CLIPPED,  # tokens that PPO's clipping makes constant
    DUAL_CLIPPED,  # tokens of negative advantage that the dual clip makes constant
    SELECTED,  # tokens
    NONFINITE,  # tokens with a NaN or infinity in any input
    COVARIANCE,  # of `moments`; 0 without
    NUM_SUMS,
) = range(10)


def result_dtype(*values: Tensor | None) -> torch.dtype:
    """float64 where one of the values is, else float32."""
    has_double = any(value is not None and value.dtype == torch.float64 for value in values)
    return torch.float64 if has_double else torch.float32


class Objective(NamedTuple):
    kind: int = POLICY
    clip: bool = False
    low: float = 0.0  # bounds of the ratio
    high: float = 0.0
    dual_clip: float = float("inf")  # the largest ratio at negative advantages
    selected: int = KEEP
    penalty: float = 0.0  # times |log ratio|
    straight_through: bool = False  # the value of its kind, the gradient of K2


class TokenInputs(NamedTuple):
    """All in the layout of `covariance.tokens`; None: 1, 0 or no such thing."""

    log_prob: Tensor
    old_log_prob: Tensor | None
    advantages: Tensor | None
    mask: Tensor  # bool
    selected: Tensor | None  # bool
    weights: Tensor | None
    moments: Tensor | None  # float64, of the covariance
    cu_seqlens: Tensor | None  # int64

    @property
    def num_sequences(self) -> int:
        return sequences_of(self.log_prob, self.cu_seqlens)

    @property
    def dtype(self) -> torch.dtype:
        """That of the losses."""
        return result_dtype(self.log_prob, self.old_log_prob, self.advantages, self.weights)


class LossSums(NamedTuple):
    row_loss: Tensor  # float64 [R], the sum over each sequence's tokens
    row_count: Tensor  # float64 [R], its tokens
    sums: Tensor  # float64 [NUM_SUMS]
    terms: Tensor  # d loss / d log_prob of each token, as if all losses were added up; float32
