"""What the lane engine asks of a model, and how a transformers causal LM answers it.

A lane model owns a static cache with two copies per lane. `step` writes the *working* copy;
`commit` and `restore` bring the two together over a range of positions. One step always has the
shape [num_lanes, 1], whatever the lanes are doing, so what it computes for a prefix does not depend
on the path that led there: scores stored while decoding are exact for the rest of the chain.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from powerkernels.decode_attention.functional import launch as decode_attention
from powerkernels.decode_attention.reference import attended, masked_attention
from powerkernels.power_sampling.packed_linear import PackedLinears

ATTENTION_NAME = "powerkernels_lanes"
WORKING, CURRENT = 0, 1


class LaneModel(Protocol):
    """A model on `num_lanes` static rows. All tensors are on `device`."""

    num_lanes: int
    vocab_size: int
    device: torch.device

    def prefill(self, lane: int, tokens: tuple[int, ...]) -> None:
        """Fill both copies of a lane with the prompt less its last token."""
        ...

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Feed int64 tokens [C] at int64 positions [C], return the next tokens' logits [C, V]."""
        ...

    def commit(self, lanes: Tensor, first: Tensor, last: Tensor) -> None:
        """Working to current at the positions first..last of each of the lanes [F]."""
        ...

    def restore(self, lanes: Tensor, first: Tensor, last: Tensor) -> None:
        """Current to working, likewise."""
        ...


class TransformersLaneModel:
    """A transformers causal LM on lanes.

    Args:
        model: a causal LM whose attention goes through transformers' AttentionInterface. Its
            weights and its configuration are left as they are.
        num_lanes: rows of the batch.
        max_length: positions of the cache, prompt and completion together.

    Raises:
        ValueError: a model this cannot run exactly; the message says which part of it.
    """

    def __init__(self, model: Any, num_lanes: int, max_length: int) -> None:
        _refuse_unsupported(model, max_length)
        self._model = model
        self.num_lanes = num_lanes
        self.vocab_size = model.config.get_text_config().vocab_size
        self.device = model.get_input_embeddings().weight.device
        self.max_length = max_length
        self._positions = torch.zeros(num_lanes, dtype=torch.int64, device=self.device)
        self._cache = _lane_cache(num_lanes, max_length, self._positions)
        self._prefilled: tuple[tuple[int, ...], list[tuple[Tensor, Tensor]]] = ((), [])
        self._packed = PackedLinears(model)

    @contextmanager
    def running(self) -> Iterator[None]:
        """The model's attention (and on CPU its linear layers) replaced while samples are drawn."""
        with torch.inference_mode(), _lane_attention(self._model), self._packed.in_use():
            yield

    def prefill(self, lane: int, tokens: tuple[int, ...]) -> None:
        prefix = tokens[:-1]
        if not prefix:
            return
        if self._prefilled[0] != prefix:  # chains of one prompt come one after another
            output = self._model(
                input_ids=torch.tensor([prefix], device=self.device),
                position_ids=torch.arange(len(prefix), device=self.device)[None],
                past_key_values=_prefill_cache(),
                use_cache=True,
                logits_to_keep=1,
            )
            layers = output.past_key_values.layers
            self._prefilled = (prefix, [(layer.keys, layer.values) for layer in layers])
        if not self._cache.layers:  # they take their shapes from a first step
            zero = torch.zeros_like(self._positions)
            self.step(zero, zero)
        for layer, (key, value) in zip(self._cache.layers, self._prefilled[1], strict=True):
            layer.load(lane, key, value)

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        self._positions.copy_(positions)
        token = _lane_lengths.set(self._positions + 1)
        try:
            output = self._model(
                input_ids=tokens[:, None],
                position_ids=self._positions[:, None],
                past_key_values=self._cache,
                use_cache=True,
            )
        finally:
            _lane_lengths.reset(token)
        return output.logits[:, -1]

    def commit(self, lanes: Tensor, first: Tensor, last: Tensor) -> None:
        self._copy(lanes, first, last, WORKING, CURRENT)

    def restore(self, lanes: Tensor, first: Tensor, last: Tensor) -> None:
        self._copy(lanes, first, last, CURRENT, WORKING)

    def memory(self) -> int:
        """Bytes of the cache, both copies."""
        return sum(
            copies.numel() * copies.element_size()
            for layer in self._cache.layers
            if layer.is_initialized
            for copies in (layer.key_copies, layer.value_copies)
        )

    def _copy(self, lanes: Tensor, first: Tensor, last: Tensor, source: int, target: int) -> None:
        count = last - first + 1
        lane = lanes.repeat_interleave(count)
        start = (first - (count.cumsum(0) - count)).repeat_interleave(count)
        row = lane * self.max_length + start + torch.arange(lane.numel()).to(lane)
        for layer in self._cache.layers:
            for copies in (layer.key_copies, layer.value_copies):
                copies[target].index_copy_(0, row, copies[source].index_select(0, row))


def _refuse_unsupported(model: Any, max_length: int) -> None:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
    }
    if kinds:
        raise ValueError(
            "model must hold attention layers only, whose cache is one key and value per position; "
            f"{type(model).__name__} has layers of type {sorted(kinds)}"
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(
            "model must take its attention from transformers' AttentionInterface; "
            f"{type(model).__name__} does not"
        )
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and max_length > context:
        raise ValueError(
            f"prompt and max_new_tokens must fit the model's context of {context} tokens, "
            f"got {max_length}"
        )


# Positions in use per lane, int64 [C], while a lane step runs; None during a prefill.
_lane_lengths: ContextVar[Tensor | None] = ContextVar("lane_lengths", default=None)


@contextmanager
def _lane_attention(model: Any) -> Iterator[None]:
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, _attention)
    before, training = model.config._attn_implementation, model.training
    model.eval()
    model.set_attn_implementation(ATTENTION_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        model.train(training)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention of a lane step and of a prefill, called by the model's layers.

    query is [C, Hq, 1, D] against [C, H, S, D] in a step, [1, Hq, T, D] against [1, H, T, D] in a
    prefill. Returns [B, T, Hq, Dv]. The mask is never built: transformers makes none for a function
    it does not know.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "sinks": s_aux}
    lengths = _lane_lengths.get()
    if lengths is not None:
        output = decode_attention(
            query[:, :, 0], key, value, lengths, window=sliding_window, **options
        )
        return output[:, None], None
    length = query.shape[2]
    if sliding_window is not None and sliding_window >= length:
        sliding_window = None
    if sliding_window is None and softcap is None and s_aux is None:
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, scale=scale, is_causal=True, enable_gqa=True
        )
    else:
        mask = attended(torch.arange(1, length + 1, device=query.device), length, sliding_window)
        output = masked_attention(query, key, value, mask, **options)
    return output.transpose(1, 2), None


def _prefill_cache() -> Any:
    """Keys and values of all layers as they come: sliding windows are the attention's business."""
    from transformers.cache_utils import DynamicCache

    return DynamicCache()


def _lane_cache(num_lanes: int, max_length: int, positions: Tensor) -> Any:
    from transformers.cache_utils import Cache, CacheLayerMixin

    class LaneLayer(CacheLayerMixin):
        """Keys and values of one layer, [2 copies, C · S, H · D]: a position of a lane is a row."""

        is_compileable = True
        is_sliding = False

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            rows = num_lanes * max_length
            self.key_copies, self.value_copies = (
                new.new_zeros(2, rows, new.shape[1] * new.shape[3])
                for new in (key_states, value_states)
            )
            # What the model reads is the working copy, [C, H, S, D].
            self.keys, self.values = (
                copies[WORKING].view(num_lanes, max_length, new.shape[1], -1).transpose(1, 2)
                for copies, new in (
                    (self.key_copies, key_states),
                    (self.value_copies, value_states),
                )
            )
            self.first_row = torch.arange(num_lanes, device=positions.device) * max_length
            self.is_initialized = True

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
        ) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            row = self.first_row + positions
            for copies, new in (
                (self.key_copies, key_states),
                (self.value_copies, value_states),
            ):
                copies[WORKING].index_copy_(0, row, new.reshape(num_lanes, -1))
            assert self.keys is not None
            assert self.values is not None
            return self.keys, self.values

        def load(self, lane: int, key: Tensor, value: Tensor) -> None:
            """Put a prefix's keys and values [1, H, T, D] at the start of both copies of a lane."""
            start, length = lane * max_length, key.shape[2]
            for copies, new in ((self.key_copies, key), (self.value_copies, value)):
                copies[:, start : start + length] = new[0].transpose(0, 1).reshape(length, -1)

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return max_length, 0

        def get_seq_length(self) -> int:
            return 0  # each lane has its own; the engine passes position_ids

        def get_max_length(self) -> int:
            return max_length

        get_max_cache_shape = get_max_length  # the name before transformers 5.2x

    return Cache(layer_class_to_replicate=LaneLayer)
