"""Attention with everything a decoder asks for, in plain torch: the truth."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(softcap · tanh(scale · q·k / softcap)) v over the positions that `mask` allows.

    Args:
        query: [B, Hq, T, D].
        key: [B, H, S, D]; value: [B, H, S, Dv], Hq a multiple of H.
        mask: bool, broadcastable to [B, Hq, T, S]; True takes part.
        scale: factor of the dot products.
        softcap: bound of the scores, None for none.
        sinks: [Hq], a score per head that takes part in the normaliser only.

    Returns:
        [B, Hq, T, Dv] in query's dtype; the softmax is in float32 or wider.
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = torch.matmul(query, key.transpose(-1, -2)).to(wide) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink = sinks.to(wide)[None, :, None, None].expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, sink), dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    return torch.matmul(weights.to(value.dtype), value)


def attended(lengths: Tensor, num_positions: int, window: int | None) -> Tensor:
    """bool [len(lengths), S]: the last `window` (None: all) of the first lengths[i] positions."""
    position = torch.arange(num_positions, device=lengths.device)
    mask = position < lengths[:, None]
    return mask if window is None else mask & (position >= lengths[:, None] - window)


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """See functional.decode_attention. query [C, Hq, D] -> [C, Hq, Dv]."""
    mask = attended(lengths, key.shape[2], window)[:, None, None]
    return masked_attention(
        query[:, :, None], key, value, mask, scale=scale, softcap=softcap, sinks=sinks
    )[:, :, 0]
