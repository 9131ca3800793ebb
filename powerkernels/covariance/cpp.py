"""Covariance and selection by the C++ part: CPU tensors in, addresses on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from powerkernels import _extension
from powerkernels.covariance import reference
from powerkernels.covariance.reference import Rule
from powerkernels.covariance.tokens import Tokens


def moments(tokens: Tokens) -> Tensor:
    """float64 [NUM_MOMENTS], to be added up over parts."""
    return _moments(tokens)


def _moments(
    tokens: Tokens,
    old_log_prob: Tensor | None = None,
    low: float = 0.0,
    high: float = 0.0,
    unclipped: Tensor | None = None,
) -> Tensor:
    arrays = _Arrays(tokens)
    out = torch.empty(reference.NUM_MOMENTS, dtype=torch.float64)
    _extension.compiled().cov_moments(
        **arrays.keywords,
        mask=tokens.mask.data_ptr(),
        old_log_prob=floats(old_log_prob),
        selectable=tokens.selectable.data_ptr(),
        low=low,
        high=high,
        unclipped=_extension.address(unclipped),
        out=out.data_ptr(),
        num_threads=threads(),
    )
    return out


def covariances(tokens: Tokens, moments: Tensor) -> Tensor:
    """float32, shaped as the tokens."""
    arrays = _Arrays(tokens)
    out = torch.empty(tokens.log_prob.shape, dtype=torch.float32)
    _extension.compiled().cov_tokens(
        **arrays.keywords,
        mask=tokens.mask.data_ptr(),
        moments=moments.data_ptr(),
        out=out.data_ptr(),
        num_threads=threads(),
    )
    return out


def unclipped(
    tokens: Tokens, old_log_prob: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor | None]:
    """See the reference; the moments come from the same read."""
    out = torch.empty(tokens.log_prob.shape, dtype=torch.bool)
    return out, _moments(tokens, old_log_prob, low, high, out)


class Keys:
    """What the stages after the moments work on."""

    def __init__(self, values: Tensor, counts: Tensor) -> None:
        self.values = values  # int32, the keys' 32 bits, shaped as the tokens
        self.counts = counts  # int64 [NUM_BINS + 1] of the first digit
        self._candidates: Any = None

    def candidates(self, state: Tensor) -> Any:
        """_C.KeyCandidates; first asked for when the threshold has one digit."""
        if self._candidates is None:
            self._candidates = _extension.compiled().KeyCandidates(
                values=self.values.data_ptr(),
                num_tokens=self.values.numel(),
                first_digit=int(state[reference.THRESHOLD]),
                num_threads=threads(),
            )
        return self._candidates


def keys_of(tokens: Tokens, moments: Tensor, rule: Rule, seed: Tensor | None) -> Keys:
    arrays = _Arrays(tokens)
    values = torch.empty(tokens.log_prob.shape, dtype=torch.int32)
    counts = torch.empty(reference.NUM_BINS + 1, dtype=torch.int64)
    _extension.compiled().cov_keys(
        **arrays.keywords,
        selectable=tokens.selectable.data_ptr(),
        moments=moments.data_ptr(),
        band=rule.band,
        lb=rule.lb,
        ub=rule.ub,
        seed=0 if seed is None else int(seed.item()) % 2**64,
        first_sequence=int(tokens.first_sequence.item()),
        sequence_index=_extension.address(tokens.sequence_index),
        values=values.data_ptr(),
        counts=counts.data_ptr(),
        num_threads=threads(),
    )
    return Keys(values, counts)


def histogram(keys: Keys, state: Tensor | None, digit: int) -> Tensor:
    """int64 [NUM_BINS + 1], to be added up over parts."""
    if state is None:
        return keys.counts
    out = torch.empty_like(keys.counts)
    keys.candidates(state).histogram(
        prefix=int(state[reference.THRESHOLD]), digit=digit, out=out.data_ptr()
    )
    return out


def narrow(
    histogram: Tensor, moments: Tensor, rule: Rule, state: Tensor | None, digit: int
) -> Tensor:
    """The state, int64 [NUM_STATE], with this digit in its threshold."""
    found = _extension.compiled().cov_narrow(
        counts=histogram.data_ptr(),
        moments=moments.data_ptr(),
        ratio=rule.ratio,
        k=rule.k,
        state=None if state is None else state.tolist(),
        digit=digit,
    )
    return torch.tensor(found)


def mark(keys: Keys, state: Tensor, ties_before: Tensor | None) -> Tensor:
    """bool. ties_before: int64 [1] or None for 0: ties with the threshold in the parts before."""
    out = torch.zeros(keys.values.shape, dtype=torch.bool)
    keys.candidates(state).mark(
        state=state.tolist(),
        ties_before=0 if ties_before is None else int(ties_before.item()),
        out=out.data_ptr(),
    )
    return out


def threads() -> int:
    return _extension.num_threads()


def floats(tensor: Tensor | None) -> tuple[int, int]:
    """Address and code of the dtype; (0, 0) for None."""
    if tensor is None:
        return 0, 0
    return tensor.data_ptr(), _extension.DTYPE_CODES[tensor.dtype]


def rows(log_prob: Tensor, num_sequences: int, cu_seqlens: Tensor | None) -> list[int]:
    width = 0 if cu_seqlens is not None else log_prob.shape[1]
    return [log_prob.numel(), num_sequences, max(width, 1), _extension.address(cu_seqlens)]


class _Arrays:
    """What the ops share; keeps the tensors alive whose addresses are in `keywords`."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        self.advantages = tokens.advantages.contiguous()
        self.keywords: dict[str, Any] = {
            "rows": rows(tokens.log_prob, tokens.num_sequences, tokens.cu_seqlens),
            "log_prob": floats(tokens.log_prob),
            "advantages": floats(self.advantages),
        }
