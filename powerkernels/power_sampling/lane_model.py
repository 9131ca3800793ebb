"""What the lane engine asks of a model, and how a transformers causal LM answers it.

A lane model owns a static cache with two copies per lane. `step` writes the *working* copy; `move`
copies ranges of positions between the copies and between lanes. One step always has the shape
[num_lanes, 1], whatever the lanes are doing, so what it computes for a prefix does not depend on
the path that led there, nor on the lane: scores stored while decoding are exact for the rest of
the chain.
"""

from __future__ import annotations

import inspect
import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from powerkernels._cuda_graph import on_device
from powerkernels.decode_attention.functional import launch as decode_attention
from powerkernels.decode_attention.functional import op as decode_attention_op
from powerkernels.decode_attention.reference import attended, masked_attention
from powerkernels.lane_moves import LaneCaches, move_positions
from powerkernels.power_sampling import decoder_step
from powerkernels.power_sampling.decoder_step import TOLERANCE, DecoderStep
from powerkernels.power_sampling.lane_state import WORKING
from powerkernels.power_sampling.packed_linear import PackedLinears

# What the cache and the lanes' state may take of the memory that is free.
MEMORY_SHARE = 0.9
_instances = itertools.count()


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

    def move(self, moves: Tensor, offset: Tensor) -> None:
        """Copy cached positions, all moves as if at once.

        Args:
            moves: int64 [C, 5], a row (source lane, source copy, first, count, both from) for each
                lane. Positions offset + first … offset + first + count - 1 of that copy of the
                source lane go to the lane's other copy, and those from offset + both from on to
                its copy of the same name too, if it is not its own source. Nothing where count is
                0. What is a source is no target.
            offset: int64 [C].
        """
        ...


class TransformersLaneModel:
    """A transformers causal LM on lanes.

    Args:
        model: a causal LM whose attention goes through transformers' AttentionInterface. Its
            weights and its configuration are left as they are.
        num_lanes: rows of the batch.
        max_length: positions of the cache, prompt and completion together.
        compile: run the model step through torch.compile. Compiling takes a minute or more.

    Raises:
        ValueError: a model this cannot run exactly, with the part of it that says so, or a cache
            that the free memory does not hold, with the largest that it does.
    """

    def __init__(
        self, model: Any, num_lanes: int, max_length: int, *, compile: bool = False
    ) -> None:
        _refuse_unsupported(model, max_length)
        self._model = model
        self.num_lanes = num_lanes
        self.vocab_size = model.config.get_text_config().vocab_size
        self.device = model.get_input_embeddings().weight.device
        self.max_length = max_length
        self._cache_argument = cache_argument(model)
        self._attention = _Attention(num_lanes, self.device)
        in_one_call = not compile and decoder_step.why_not(model) is None
        # torch's compiler packs weights itself.
        self._packed = PackedLinears(nn.Module() if compile else model, own=in_one_call)
        self._prefilled: tuple[tuple[int, ...], list[tuple[Tensor, Tensor]]] = ((), [])
        with self.running():
            shapes = self._prefill_layers((0,))
            self._refuse_too_large(shapes)
            self._cache = _lane_cache(shapes, num_lanes, max_length)
        layers = self._cache.layers
        self._caches = LaneCaches(
            [copies for layer in layers for copies in (layer.key_copies, layer.value_copies)],
            max_length,
        )
        self._first_row = torch.arange(num_lanes, device=self.device) * max_length
        self._weights = self._addresses()
        self._forward: Callable[..., Any] = model
        if compile:
            self._forward = torch.compile(model, dynamic=False, fullgraph=True)
        self._decoder = self._make_decoder() if in_one_call else None

    @contextmanager
    def running(self) -> Iterator[None]:
        """The model's attention (and on CPU its linear layers) replaced while samples are drawn.

        Its device is the current one meanwhile: a model's own kernels go there.
        """
        attention = self._attention.in_use(self._model)
        with on_device(self.device), torch.inference_mode(), attention, self._packed.in_use():
            yield

    def refresh(self) -> bool:
        """Take notice of weights that changed in place; False if the model must be taken anew."""
        self._prefilled = ((), [])
        if self._decoder is not None and decoder_step.why_not(self._model) is not None:
            return False
        self._packed.refresh()
        return self._addresses() == self._weights

    def _addresses(self) -> list[tuple[int, torch.dtype]]:
        return [(weight.data_ptr(), weight.dtype) for weight in self._model.parameters()]

    def prefill(self, lane: int, tokens: tuple[int, ...]) -> None:
        prefix = tokens[:-1]
        if not prefix:
            return
        if self._prefilled[0] != prefix:  # chains of one prompt come one after another
            self._prefilled = (prefix, self._prefill_layers(prefix))
        for layer, (key, value) in zip(self._cache.layers, self._prefilled[1], strict=True):
            layer.load(lane, key, value)

    def _prefill_layers(self, tokens: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of all layers, [1, H, T, D] each."""
        cache = _prefill_cache()
        self._model(
            input_ids=torch.tensor([tokens], device=self.device),
            position_ids=torch.arange(len(tokens), device=self.device)[None],
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: cache},
        )
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _make_decoder(self) -> DecoderStep | None:
        """The step in one call, if what it makes is what the model makes."""
        caches = [
            (layer.key_copies[WORKING], layer.value_copies[WORKING]) for layer in self._cache.layers
        ]
        decoder = DecoderStep(self._model, self._packed, caches, self.num_lanes, self.max_length)
        tokens = torch.arange(self.num_lanes) % self.vocab_size
        with self.running():
            for position in range(min(2, self.max_length)):
                positions = torch.full((self.num_lanes,), position)
                own = self._step_of_modules(tokens, positions)
                distance = (decoder(tokens, positions).double() - own.double()).norm()
                if not distance <= TOLERANCE[own.dtype] * own.double().norm():
                    break
            else:
                return decoder
        warnings.warn(
            f"the compiled step of {type(self._model).__name__} makes other logits than the model "
            "itself: the model's own modules are used, which are slower",
            stacklevel=3,
        )
        return None

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        if self._decoder is not None:
            return self._decoder(tokens, positions)
        return self._step_of_modules(tokens, positions)

    def _step_of_modules(self, tokens: Tensor, positions: Tensor) -> Tensor:
        row = self._first_row + positions
        for layer in self._cache.layers:
            layer.row = row
        with self._attention.of_lanes(positions + 1):
            output = self._forward(
                input_ids=tokens[:, None],
                position_ids=positions[:, None],
                use_cache=True,
                **{self._cache_argument: self._cache},
            )
        return output.logits[:, -1]

    def move(self, moves: Tensor, offset: Tensor) -> None:
        move_positions(self._caches, moves, offset)

    def memory(self) -> int:
        """Bytes of the cache, both copies."""
        return sum(
            copies.numel() * copies.element_size()
            for layer in self._cache.layers
            for copies in (layer.key_copies, layer.value_copies)
        )

    def _refuse_too_large(self, shapes: list[tuple[Tensor, Tensor]]) -> None:
        of_position = 2 * sum(
            tensor.shape[1] * tensor.shape[3] * tensor.element_size()
            for layer in shapes
            for tensor in layer
        )
        free = free_memory(self.device)
        if free is None:
            return
        positions = int(MEMORY_SHARE * free / of_position)
        if self.num_lanes * self.max_length > positions:
            needed = self.num_lanes * self.max_length * of_position
            raise ValueError(
                f"num_lanes = {self.num_lanes} lanes of {self.max_length} positions need "
                f"{needed / 1e9:.1f} GB of cache; {free / 1e9:.1f} GB are free on {self.device}: "
                f"at most {positions // self.max_length} lanes of that length fit, or as many of "
                f"{positions // self.num_lanes} positions (prompt and max_new_tokens together)"
            )


def cache_argument(model: Any) -> str:
    """The argument of a model's call that takes the cache: "cache" from transformers 5.24 on."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on a device; None where nobody says."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    if device.type != "cpu":
        return None
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


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


class _Attention:
    """The attention function of one lane model, under a name of its own."""

    def __init__(self, num_lanes: int, device: torch.device) -> None:
        self._name = f"powerkernels_lanes_{next(_instances)}"
        # Positions in use of each lane, int64 [C], while a lane step runs; None during a prefill.
        self._lengths: Tensor | None = None

    @contextmanager
    def in_use(self, model: Any) -> Iterator[None]:
        from transformers import AttentionInterface

        AttentionInterface.register(self._name, self._attend)
        before, training = model.config._attn_implementation, model.training
        model.eval()
        model.set_attn_implementation(self._name)
        try:
            yield
        finally:
            model.set_attn_implementation(before)
            model.train(training)
            getattr(AttentionInterface, "_global_mapping", {}).pop(self._name, None)

    @contextmanager
    def of_lanes(self, lengths: Tensor) -> Iterator[None]:
        self._lengths = lengths
        try:
            yield
        finally:
            self._lengths = None

    def _attend(
        self,
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

        query is [C, Hq, 1, D] against [C, H, S, D] in a step, [1, Hq, T, D] against [1, H, T, D] in
        a prefill. Returns [B, T, Hq, Dv]. The mask is never built: transformers makes none for a
        function it does not know.
        """
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if self._lengths is not None:
            query, lengths = query[:, :, 0], self._lengths
            if torch.compiler.is_compiling():
                output = decode_attention_op(
                    query, key, value, lengths, scale, sliding_window, softcap, s_aux
                )
            else:
                output = decode_attention(
                    query,
                    key,
                    value,
                    lengths,
                    scale=scale,
                    window=sliding_window,
                    softcap=softcap,
                    sinks=s_aux,
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
            ends = torch.arange(1, length + 1, device=query.device)
            mask = attended(ends, length, sliding_window)
            output = masked_attention(
                query, key, value, mask, scale=scale, softcap=softcap, sinks=s_aux
            )
        return output.transpose(1, 2), None


def _prefill_cache() -> Any:
    """Keys and values of all layers as they come: sliding windows are the attention's business."""
    from transformers.cache_utils import DynamicCache

    return DynamicCache()


def _lane_cache(shapes: list[tuple[Tensor, Tensor]], num_lanes: int, max_length: int) -> Any:
    """A cache of layers like those of a prefill, [1, H, T, D] each."""
    from transformers.cache_utils import Cache, CacheLayerMixin

    class LaneLayer(CacheLayerMixin):
        """Keys and values of one layer, [2 copies, C · S, H · D]: a position of a lane is a row."""

        is_compileable = True
        is_sliding = False

        def __init__(self, key: Tensor, value: Tensor) -> None:
            super().__init__()
            self.lazy_initialization(key, value)

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
            self.row: Tensor | None = None  # int64 [C], the rows of the positions a step writes
            self.is_initialized = True

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
        ) -> tuple[Tensor, Tensor]:
            assert self.row is not None
            for copies, new in (
                (self.key_copies, key_states),
                (self.value_copies, value_states),
            ):
                copies[WORKING].index_copy_(0, self.row, new.reshape(num_lanes, -1))
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

    return Cache(layers=[LaneLayer(key, value) for key, value in shapes])
