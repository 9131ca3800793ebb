"""The lane step of a Llama-like model on a CPU in one call of the compiled part.

A step of the model's own modules costs what its thousand small operators cost: measured on two
cores, one row of SmolLM2, more than reading the weights. csrc/cpu/decoder_step.cpp does the same
with the same roundings; `why_not` says which models it knows. What it makes is compared with the
model's own forward once, when a lane model is built: a later transformers, or a patched module,
that computes something else is found there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from powerkernels import _extension
from powerkernels.decode_attention.functional import MAX_QUERY_GROUP
from powerkernels.power_sampling import packed_linear
from powerkernels.power_sampling.packed_linear import PackedLinears

# Of transformers: the name of a model's classes, less what they are of.
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
_PARTS = ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")
# Largest distance of the two sets of logits, over the length of the model's own: one is a few
# roundings of the model's dtype, another model is of the order of 1.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def why_not(model: Any) -> str | None:
    """Why a `DecoderStep` cannot run a model here, in a line; None if it can."""
    weight = model.get_input_embeddings().weight
    if _extension.backend_for(weight.device) != "cpp":
        return "the compiled part does not serve its device"
    if weight.dtype not in TOLERANCE or any(p.dtype != weight.dtype for p in model.parameters()):
        return "its weights are not all bfloat16 or all float32"
    if weight.dtype == torch.bfloat16 and packed_linear.multiplies_bfloat16():
        return "this CPU's own bfloat16 products are faster"
    family = type(model).__name__.removesuffix("ForCausalLM")
    if family not in FAMILIES:
        return f"{type(model).__name__} is not one of {', '.join(FAMILIES)}"
    home = f"transformers.models.{family.lower()}.modeling_{family.lower()}"
    known = {(home, family + part) for part in _PARTS}
    for name, module in model.named_modules():
        if type(module) not in (nn.Linear, nn.Embedding, nn.ModuleList) and not (
            _is_silu(module) or (type(module).__module__, type(module).__name__) in known
        ):
            return f"{name} is a {type(module).__name__}"
        if _does_more(module):
            return f"{name} has a hook or another forward"
    config = model.config
    if config.num_attention_heads // config.num_key_value_heads > MAX_QUERY_GROUP:
        return f"more than {MAX_QUERY_GROUP} query heads share a key"
    head_size = model.model.layers[0].self_attn.head_dim
    if head_size % 2 or getattr(config, "partial_rotary_factor", None) not in (None, 1.0):
        return "its rotary positions do not turn whole heads"
    if not _is_silu(model.model.layers[0].mlp.act_fn):
        return "its activation is not SiLU"
    return None


def _is_silu(module: nn.Module) -> bool:
    kind = type(module)
    return kind is nn.SiLU or (kind.__module__, kind.__name__) == (
        "transformers.activations",
        "SiLUActivation",
    )


def _does_more(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__


class DecoderStep:
    """The step of a model for which `why_not` is None.

    It reads the weights where they are, the linear layers' from `packed`: they must outlive it.

    Args:
        model: the model.
        packed: its linear layers, `own` panels.
        caches: keys and values of each layer, [C · S, H · D] each, contiguous; a step writes the
            rows of its positions.
        num_lanes: C.
        max_length: S.
    """

    def __init__(
        self,
        model: Any,
        packed: PackedLinears,
        caches: list[tuple[Tensor, Tensor]],
        num_lanes: int,
        max_length: int,
    ) -> None:
        self._embedding = model.get_input_embeddings()
        self._rotary = model.model.rotary_emb
        self._packed, self._caches = packed, caches
        self._columns = model.lm_head.weight.shape[0]
        attention = model.model.layers[0].self_attn
        extension = _extension.compiled()
        self._run = extension.DecoderStep(
            dtype=_extension.DTYPE_CODES[self._embedding.weight.dtype],
            lanes=num_lanes,
            positions=max_length,
            hidden=model.config.hidden_size,
            heads=model.config.num_attention_heads,
            kv_heads=model.config.num_key_value_heads,
            head_size=attention.head_dim,
            intermediate=model.config.intermediate_size,
            epsilon=model.model.norm.variance_epsilon,
            scale=attention.scaling,
            layers=[
                self._layer(model, layer, *cache)
                for layer, cache in zip(model.model.layers, caches, strict=True)
            ],
            final_norm=model.model.norm.weight.data_ptr(),
            head=self._linear(model.lm_head),
        )

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """int64 tokens [C] at int64 positions [C] to their logits [C, V], in the model's dtype.

        Raises:
            IndexError: a token or a position that there is not.
        """
        embedded = self._embedding(tokens).contiguous()
        cos, sin = self._rotary(embedded[:, None], positions[:, None])
        cos, sin = cos.contiguous(), sin.contiguous()
        positions = positions.contiguous()
        logits = embedded.new_empty(len(tokens), self._columns)
        self._run(
            embedded=embedded.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            position=positions.data_ptr(),
            logits=logits.data_ptr(),
            num_threads=_extension.num_threads(),
        )
        return logits

    def _layer(self, model: Any, layer: Any, keys: Tensor, values: Tensor) -> Any:
        attention, mlp = layer.self_attn, layer.mlp
        # Mistral's layers have the configuration's window; where layers differ each has its own.
        window = getattr(attention, "sliding_window", None)
        if type(model).__name__ == "MistralForCausalLM":
            window = getattr(model.config, "sliding_window", None)
        norms = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        query_norm, key_norm = (0 if norm is None else norm.weight.data_ptr() for norm in norms)
        return _extension.compiled().DecoderLayer(
            input_norm=layer.input_layernorm.weight.data_ptr(),
            mlp_norm=layer.post_attention_layernorm.weight.data_ptr(),
            query_norm=query_norm,
            key_norm=key_norm,
            query=self._linear(attention.q_proj),
            key=self._linear(attention.k_proj),
            value=self._linear(attention.v_proj),
            out=self._linear(attention.o_proj),
            gate=self._linear(mlp.gate_proj),
            up=self._linear(mlp.up_proj),
            down=self._linear(mlp.down_proj),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            window=window or 0,
        )

    def _linear(self, module: nn.Linear) -> tuple[int, int, int]:
        panels = self._packed.panels[module]
        return panels.data_ptr(), _extension.address(module.bias), module.weight.shape[0]
