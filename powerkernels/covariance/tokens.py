"""The tokens of a batch as every implementation is given them, and the checks before that."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from powerkernels._arguments import (
    LOGIT_DTYPES,
    MASK_DTYPES,
    check_cu_seqlens,
    check_shape,
    check_tensor,
    described,
)


class Tokens(NamedTuple):
    """R sequences in one of two layouts; token i of a flat view is always at flat index i.

    padded: tensors [R, T], cu_seqlens None. packed: tensors [N], sequence r at
    cu_seqlens[r] .. cu_seqlens[r + 1]. All are contiguous but advantages, which may be expanded.
    """

    log_prob: Tensor  # float16, bfloat16, float32 or float64
    advantages: Tensor  # of any of these
    mask: Tensor  # bool: the tokens that count
    selectable: Tensor  # bool: those of them that may be selected; may be `mask` itself
    cu_seqlens: Tensor | None  # int64 [R + 1]
    first_sequence: Tensor  # int64 [1], the number of sequence 0
    sequence_index: Tensor | None  # int64 [R], numbers instead of first_sequence + r
    moments: Tensor | None = None  # where they are known

    @property
    def num_sequences(self) -> int:
        return sequences_of(self.log_prob, self.cu_seqlens)


def sequences_of(log_prob: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many there are in a layout."""
    return log_prob.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def check_tokens(
    log_prob: Tensor,
    advantages: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    names: tuple[str, str, str] = ("log_prob", "advantages", "mask"),
    sequences: bool = False,
    has_advantages: bool = True,
) -> None:
    """Types, dtypes, shapes and devices.

    sequences: whether log_prob must say what its sequences are: [B, T], or [N] with cu_seqlens.
    """
    check_tensor(names[0], log_prob, LOGIT_DTYPES)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, log_prob.device)
        if log_prob.ndim != 1:
            raise ValueError(
                f"{names[0]} must be flat [N] where cu_seqlens is given, got {described(log_prob)}"
            )
    elif sequences and log_prob.ndim != 2:
        raise ValueError(
            f"{names[0]} must have shape [B, T], or [N] with cu_seqlens, got {described(log_prob)}"
        )
    elif log_prob.ndim == 0:
        raise ValueError(f"{names[0]} must have at least 1 dimension, got {described(log_prob)}")
    if has_advantages:
        check_tensor(names[1], advantages, LOGIT_DTYPES, log_prob.device)
        assert advantages is not None
        row = (1, log_prob.shape[-1])  # packed tokens that no one can take for sequences
        if not _is_per_sequence(advantages, log_prob, cu_seqlens) and (
            cu_seqlens is None or advantages.shape != row
        ):
            check_shape(names[1], advantages, log_prob.shape)
    if mask is not None:
        check_tensor(names[2], mask, MASK_DTYPES, log_prob.device)
        check_shape(names[2], mask, log_prob.shape)


def check_like(name: str, value: Tensor | None, log_prob: Tensor, dtypes: tuple) -> None:
    """None, or a tensor of one of `dtypes` shaped as log_prob."""
    if value is not None:
        check_tensor(name, value, dtypes, log_prob.device)
        check_shape(name, value, log_prob.shape)


def layout(value: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """A tensor shaped as log_prob, contiguous as [R, T] or [N].

    One dimension without cu_seqlens is N sequences of one token.
    """
    if cu_seqlens is not None:
        return value.contiguous()
    if value.ndim == 1:
        return value.contiguous().view(-1, 1)
    return value.reshape(math.prod(value.shape[:-1]), value.shape[-1]).contiguous()


def tokens_of(
    log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    exclude: Tensor | None,
    cu_seqlens: Tensor | None,
    sequence_index: Tensor | None = None,
) -> Tokens:
    """Checked tensors in the layout of the implementations. Nothing carries a gradient on."""
    kept = as_bool(mask, log_prob)
    selectable = kept if exclude is None else kept & ~as_bool(exclude, log_prob)
    return Tokens(
        layout(log_prob.detach(), cu_seqlens),
        per_token(advantages.detach(), log_prob, cu_seqlens),
        layout(kept, cu_seqlens),
        layout(selectable, cu_seqlens),
        None if cu_seqlens is None else cu_seqlens.long().contiguous(),
        torch.zeros(1, dtype=torch.int64, device=log_prob.device),
        None if sequence_index is None else sequence_index.flatten().contiguous(),
    )


def as_bool(mask: Tensor | None, log_prob: Tensor) -> Tensor:
    if mask is None:
        return torch.ones(log_prob.shape, dtype=torch.bool, device=log_prob.device)
    return mask if mask.dtype == torch.bool else mask != 0


def per_token(advantages: Tensor, log_prob: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """advantages of tokens or sequences -> one a token in the layout; padded ones by a stride 0."""
    if not _is_per_sequence(advantages, log_prob, cu_seqlens):
        if cu_seqlens is not None:
            advantages = _unambiguous(advantages, cu_seqlens).flatten()
        return layout(advantages, cu_seqlens)
    if cu_seqlens is None:
        return advantages.reshape(math.prod(log_prob.shape[:-1]), 1).expand(-1, log_prob.shape[-1])
    lengths = cu_seqlens.diff()
    return advantages.flatten().repeat_interleave(lengths, output_size=log_prob.shape[0])


def _is_per_sequence(advantages: Tensor, log_prob: Tensor, cu_seqlens: Tensor | None) -> bool:
    if advantages.shape == log_prob.shape:
        return False
    if cu_seqlens is not None:
        sequences = cu_seqlens.shape[0] - 1
        return advantages.shape in ((sequences,), (sequences, 1))
    leading = log_prob.shape[:-1]
    return log_prob.ndim > 1 and advantages.shape in (leading, (*leading, 1))


def _unambiguous(advantages: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Packed [N] that may be as many sequences means the same if each of them has one token.

    If not it is an error: an exception on a CPU; elsewhere NaN, since nothing waits for the device.
    """
    if advantages.ndim != 1 or advantages.shape[0] != cu_seqlens.shape[0] - 1:
        return advantages
    alike = (cu_seqlens.diff() == 1).all()
    if advantages.device.type != "cpu" or torch.compiler.is_compiling():
        return advantages.where(alike, torch.nan)
    if not alike:
        n = advantages.shape[0]
        raise ValueError(
            f"advantages [{n}] of {n} tokens in {n} sequences, some of which are empty, may be "
            f"one a token or one a sequence: give them as [1, {n}] or as [{n}, 1]"
        )
    return advantages
