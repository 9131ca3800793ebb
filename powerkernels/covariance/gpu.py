"""Launches the Triton kernels of covariance and selection."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from powerkernels._triton import EXACT, device_of, power_of_2
from powerkernels.covariance import kernels, reference
from powerkernels.covariance.reference import Rule
from powerkernels.covariance.tokens import Tokens

# Tokens that a program takes at a time: 4 a thread, 16 bytes of float32.
BLOCK, WARPS = 512, 4
# Of the histogram: as many tokens at a time as there are bins to clear and read for them. At 8
# warps the compiler takes up to 255 registers, which leaves 8 warps to wait for memory.
HISTOGRAM_BLOCK, HISTOGRAM_WARPS = 2048, 16
NARROW_WARPS = 8
# Enough for a large GPU (132 multiprocessors); each program's ties are one entry of a vector.
MAX_PROGRAMS = 1024


def moments(tokens: Tokens) -> Tensor:
    """float64 [NUM_MOMENTS], to be added up over parts."""
    size = tokens.log_prob.numel()
    programs, share = _shares(size, BLOCK)
    device = tokens.log_prob.device
    partials = torch.empty((programs, reference.NUM_MOMENTS), dtype=torch.float64, device=device)
    if programs:
        advantages, per_sequence = _advantages(tokens)
        with device_of(tokens.log_prob):
            kernels.moments_kernel[(programs,)](
                tokens.log_prob,
                advantages,
                tokens.mask.view(torch.int8),
                _width(tokens),
                size,
                share,
                partials,
                PER_SEQUENCE=per_sequence,
                BLOCK=BLOCK,
                num_warps=WARPS,
                **EXACT,
            )
    return partials.sum(0)


def covariances(tokens: Tokens, moments: Tensor) -> Tensor:
    """float32, shaped as the tokens."""
    out = torch.empty(tokens.log_prob.shape, dtype=torch.float32, device=tokens.log_prob.device)
    size = out.numel()
    if size:
        advantages, per_sequence = _advantages(tokens)
        with device_of(out):
            kernels.covariances_kernel[(triton.cdiv(size, BLOCK),)](
                tokens.log_prob,
                advantages,
                tokens.mask.view(torch.int8),
                _width(tokens),
                size,
                moments,
                out,
                PER_SEQUENCE=per_sequence,
                BLOCK=BLOCK,
                num_warps=WARPS,
                **EXACT,
            )
    return out


def unclipped(
    tokens: Tokens, old_log_prob: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor | None]:
    """See the reference."""
    out = torch.empty_like(tokens.selectable)
    size = out.numel()
    if size:
        advantages, per_sequence = _advantages(tokens)
        with device_of(out):
            kernels.unclipped_kernel[(triton.cdiv(size, BLOCK),)](
                tokens.log_prob,
                old_log_prob,
                advantages,
                tokens.selectable.view(torch.int8),
                _width(tokens),
                size,
                low,
                high,
                out.view(torch.int8),
                PER_SEQUENCE=per_sequence,
                BLOCK=BLOCK,
                num_warps=WARPS,
                **EXACT,
            )
    return out, None


class Keys(NamedTuple):
    """What the stages after the moments work on: the keys are computed again in each."""

    tokens: Tokens
    moments: Tensor
    rule: Rule
    seed: Tensor | None
    counts: Tensor  # int64 [digits, NUM_BINS + 1], zeros

    def arguments(self, share: int) -> tuple[Any, ...]:
        """Of the kernels, from log_prob_ptr to sequence_index_ptr."""
        tokens = self.tokens
        return (
            tokens.log_prob,
            _advantages(tokens)[0],
            tokens.selectable.view(torch.int8),
            _width(tokens),
            tokens.log_prob.numel(),
            share,
            tokens.cu_seqlens,
            tokens.num_sequences,
            self.moments,
            self.rule.lb,
            self.rule.ub,
            self.seed,
            tokens.first_sequence,
            tokens.sequence_index,
        )

    def constants(self, block: int) -> dict[str, Any]:
        tokens = self.tokens
        steps = 0 if tokens.cu_seqlens is None else tokens.num_sequences.bit_length()
        return {
            "BAND": self.rule.band,
            "PER_SEQUENCE": _advantages(tokens)[1],
            "STEPS": steps if self.rule.band else 0,
            "BLOCK": block,
        }


def keys_of(tokens: Tokens, moments: Tensor, rule: Rule, seed: Tensor | None) -> Keys:
    shape = (len(reference.DIGITS), reference.NUM_BINS + 1)
    counts = torch.zeros(shape, dtype=torch.int64, device=moments.device)
    return Keys(tokens, moments, rule, seed, counts)


def histogram(keys: Keys, state: Tensor | None, digit: int) -> Tensor:
    """int64 [NUM_BINS + 1], to be added up over parts."""
    shift, bits = reference.DIGITS[digit]
    programs, share = _shares(keys.tokens.log_prob.numel(), HISTOGRAM_BLOCK)
    if programs:
        with device_of(keys.moments):
            kernels.histogram_kernel[(programs,)](
                *keys.arguments(share),
                state,
                keys.counts[digit],
                SHIFT=shift,
                BITS=bits,
                **keys.constants(HISTOGRAM_BLOCK),
                num_warps=HISTOGRAM_WARPS,
                **EXACT,
            )
    return keys.counts[digit]


def narrow(
    histogram: Tensor, moments: Tensor, rule: Rule, state: Tensor | None, digit: int
) -> Tensor:
    """The state, int64 [NUM_STATE], with this digit in its threshold."""
    out = torch.empty(reference.NUM_STATE, dtype=torch.int64, device=moments.device)
    wanted = None
    if state is None:
        # Filled on the device: a ratio as an argument would be a float32.
        value = rule.ratio if rule.k < 0 else -1.0 - rule.k
        wanted = torch.full((1,), value, dtype=torch.float64, device=moments.device)
    with device_of(moments):
        kernels.narrow_kernel[(1,)](
            histogram,
            moments,
            wanted,
            state,
            out,
            BITS=reference.DIGITS[digit][1],
            num_warps=NARROW_WARPS,
            **EXACT,
        )
    return out


def mark(keys: Keys, state: Tensor, ties_before: Tensor | None) -> Tensor:
    """bool. ties_before: int64 [1] or None for 0: ties with the threshold in the parts before."""
    out = torch.empty_like(keys.tokens.selectable)
    programs, share = _shares(out.numel(), BLOCK)
    if not programs:
        return out
    ties = torch.empty(programs, dtype=torch.int32, device=out.device)
    with device_of(out):
        for target in (None, out.view(torch.int8)):
            kernels.mark_kernel[(programs,)](
                *keys.arguments(share),
                state,
                ties,
                ties_before,
                programs,
                target,
                PROGRAMS=power_of_2(programs),
                **keys.constants(BLOCK),
                num_warps=WARPS,
                **EXACT,
            )
    return out


def _shares(size: int, block: int) -> tuple[int, int]:
    """Programs, and the tokens of each: a multiple of the block."""
    blocks = triton.cdiv(size, block)
    share = triton.cdiv(blocks, MAX_PROGRAMS) if blocks else 1
    return triton.cdiv(blocks, share), share * block


def _width(tokens: Tokens) -> int:
    return 1 if tokens.cu_seqlens is not None else max(tokens.log_prob.shape[1], 1)


def _advantages(tokens: Tokens) -> tuple[Tensor, bool]:
    return advantages_at(tokens.advantages, tokens.cu_seqlens)


def advantages_at(advantages: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, bool]:
    """The tensor to point at, and whether it holds one a sequence."""
    per_sequence = cu_seqlens is None and advantages.stride() == (1, 0)
    return (advantages if per_sequence else advantages.contiguous()), per_sequence
