"""Decode attention: checks, torch op, public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from powerkernels import _extension
from powerkernels._arguments import check_tensor, described
from powerkernels.decode_attention import reference

# What the C++ kernel takes; it widens to float32. float64 goes to the reference.
CPP_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_QUERY_GROUP = 128  # kMaxQueryGroup in csrc/include/powerkernels/decode_attention.h


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
    """Attention of one new token per lane over the lane's own prefix in a static cache.

    A lane's result depends on its own first `lengths` positions only: not on what the cache holds
    behind them, on its size, on the other lanes or on the number of threads, to the last bit.

    Args:
        query: float16, bfloat16, float32 or float64 [C, Hq, D].
        key: same dtype [C, H, S, D], Hq a multiple of H. Any strides, last dimension contiguous.
        value: same dtype [C, H, S, Dv].
        lengths: int64 [C], positions in use of each lane, the new token's included, 1 to S.
        scale: factor of the dot products.
        window: attend to the last `window` positions, >= 1; None is all.
        softcap: scores become softcap · tanh(score / softcap); None for none.
        sinks: [Hq], a score per head that enters the softmax without a value; None for none.

    Returns:
        [C, Hq, Dv] in query's dtype, softmax in float32 (float64 for float64). Not differentiable.

    Raises:
        TypeError, ValueError: an argument, by name.

    Source: online softmax, Milakov & Gimelshein 2018, over chunks of positions; in splits, on a
    GPU, as in Dao et al. 2023, "Flash-Decoding".
    """
    _check(query, key, value, lengths, window, sinks)
    return op(query, key, value, lengths, scale, window, softcap, sinks)


@torch.library.custom_op("powerkernels::decode_attention", mutates_args=())
def op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    return launch(
        query, key, value, lengths, scale=scale, window=window, softcap=softcap, sinks=sinks
    )


@op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    return query.new_empty(*query.shape[:2], value.shape[3])


def launch(
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
    """`decode_attention` without checks and without the dispatcher, for loops over many layers."""
    backend = _extension.backend_for(query.device)
    options: dict[str, Any] = {
        "scale": scale,
        "window": window,
        "softcap": softcap,
        "sinks": sinks,
    }
    if backend == "triton":
        from powerkernels.decode_attention import gpu

        if gpu.serves(query, value):
            query, key, value = (_last_contiguous(tensor) for tensor in (query, key, value))
            return gpu.decode_attention(query, key, value, lengths, **options)
    group = query.shape[1] // key.shape[1]
    if backend != "cpp" or query.dtype not in CPP_DTYPES or group > MAX_QUERY_GROUP:
        return reference.decode_attention(query, key, value, lengths, **options)
    query, key, value = (_last_contiguous(tensor) for tensor in (query, key, value))
    sinks = None if sinks is None else sinks.float().contiguous()
    lengths = lengths.contiguous()
    lanes, heads, head_size = query.shape
    output = query.new_empty(lanes, heads, value.shape[3])
    _extension.compiled().decode_attention(
        query=query.data_ptr(),
        key=key.data_ptr(),
        value=value.data_ptr(),
        lengths=lengths.data_ptr(),
        sinks=_extension.address(sinks),
        output=output.data_ptr(),
        dtype=_extension.DTYPE_CODES[query.dtype],
        lanes=lanes,
        kv_heads=key.shape[1],
        group=group,
        head_size=head_size,
        value_size=value.shape[3],
        query_strides=query.stride()[:2],
        key_strides=key.stride()[:3],
        value_strides=value.stride()[:3],
        scale=scale,
        softcap=softcap or 0.0,
        window=window or 0,
        num_threads=_extension.num_threads(),
    )
    return output


def _last_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    window: int | None,
    sinks: Tensor | None,
) -> None:
    dtypes = (*CPP_DTYPES, torch.float64)
    check_tensor("query", query, dtypes)
    for name, tensor in (("key", key), ("value", value)):
        check_tensor(name, tensor, (query.dtype,), query.device)
        if tensor.ndim != 4 or tensor.shape[0] != query.shape[0]:
            raise ValueError(f"{name} must be [C, H, S, D] with query's C, got {described(tensor)}")
    if query.ndim != 3 or query.shape[2] != key.shape[3] or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query must be [C, Hq, D] with Hq a multiple of key's H and key's D, "
            f"got {described(query)} for key {described(key)}"
        )
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"value must have key's C, H and S, got {described(value)} for key {described(key)}"
        )
    check_tensor("lengths", lengths, (torch.int64,), query.device)
    if lengths.shape != query.shape[:1]:
        raise ValueError(f"lengths must be [C], one per lane, got {described(lengths)}")
    if lengths.device.type == "cpu" and lengths.numel():
        low, high = int(lengths.min()), int(lengths.max())
        if low < 1 or high > key.shape[2]:
            raise ValueError(f"lengths must be 1 to S = {key.shape[2]}, got {low} to {high}")
    if window is not None and window < 1:
        raise ValueError(f"window must be >= 1 or None, got {window!r}")
    if sinks is not None:
        if sinks.device != query.device:
            raise ValueError(f"sinks must be on {query.device}, got {described(sinks)}")
        if sinks.shape != query.shape[1:2]:
            raise ValueError(f"sinks must be [Hq], one per query head, got {described(sinks)}")
