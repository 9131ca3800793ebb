"""Models of several families on lanes, against their own forward; what is refused."""

from __future__ import annotations

import pytest
import torch
import transformers

from powerkernels import PowerSampler, PowerSamplingConfig
from powerkernels.power_sampling import lane_model, packed_linear
from powerkernels.power_sampling.lane_model import TransformersLaneModel
from powerkernels.power_sampling.packed_linear import PackedLinears

COMMON = dict(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    initializer_range=0.3,
    bos_token_id=None,
    eos_token_id=0,
    pad_token_id=None,
)


def make(family: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=50,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=0,
        )
        return transformers.GPT2LMHeadModel(config).eval()
    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {}),
        # window 5 < lengths: sliding in prefill and in steps
        "mistral": (
            transformers.MistralConfig,
            transformers.MistralForCausalLM,
            {"sliding_window": 5},
        ),
        "gemma2": (
            transformers.Gemma2Config,
            transformers.Gemma2ForCausalLM,
            {
                "sliding_window": 5,
                "attn_logit_softcapping": 2.0,
                "final_logit_softcapping": 5.0,
                "query_pre_attn_scalar": 8,
            },
        ),
        "gpt_oss": (
            transformers.GptOssConfig,
            transformers.GptOssForCausalLM,
            {"sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 1},
        ),
    }
    config_class, model_class, extra = classes[family]
    config = config_class(**(COMMON | extra), attn_implementation="eager")
    return model_class(config).eval()


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2", "gpt_oss", "gpt2"])
def test_scores_are_those_of_the_model(family: str) -> None:
    model = make(family)
    config = PowerSamplingConfig(
        alpha=1.5, max_new_tokens=24, block_size=8, num_mcmc_steps=3, num_lanes=3
    )
    prompts = [[5], [4, 3, 2, 1, 6, 7, 8, 9], [9, 8, 7]]
    for sample in PowerSampler(model, config=config).sample(prompts, num_samples=2):
        ids = prompts[sample.prompt_index] + sample.tokens
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, -len(sample.tokens) - 1 : -1]
        truth = logits.double().log_softmax(-1).gather(1, torch.tensor(sample.tokens)[:, None])
        torch.testing.assert_close(sample.log_prob.double(), truth[:, 0], rtol=0, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_linears_are_the_layers(dtype: torch.dtype) -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(40, 24), torch.nn.Linear(24, 50, bias=False))
    layers = layers.to(dtype)
    x = torch.randn(16, 1, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    packed = PackedLinears(layers)
    with torch.inference_mode():
        expected = layers(x)
        with packed.in_use():
            assert all("forward" in layer.__dict__ for layer in layers)
            got = layers(x)
        assert not any("forward" in layer.__dict__ for layer in layers)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("has_bias", [True, False])
def test_widened_bfloat16_rounds_once(monkeypatch: pytest.MonkeyPatch, has_bias: bool) -> None:
    monkeypatch.setattr(packed_linear, "multiplies_bfloat16", lambda: False)
    layer = torch.nn.Linear(300, 70, bias=has_bias).bfloat16()
    x = torch.randn(16, 1, 300, generator=torch.Generator().manual_seed(2)).bfloat16()
    with torch.inference_mode(), PackedLinears(layer).in_use():
        got = layer(x)
        bias = layer.bias.double() if has_bias else None
        truth = torch.nn.functional.linear(x.double(), layer.weight.double(), bias)
    assert got.dtype == torch.bfloat16
    # Half a unit of bfloat16's last place, and the rounding of a float32 sum beside it.
    torch.testing.assert_close(got.double(), truth, rtol=2**-8, atol=1e-5)


def test_packed_linears_leave_other_layers_alone() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    hooked = torch.nn.Linear(4, 4)
    hooked.register_forward_hook(lambda module, args, output: output + 1)
    layers = torch.nn.Sequential(Doubled(4, 4), hooked)
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = layers(x)
        with PackedLinears(layers).in_use():
            torch.testing.assert_close(layers(x), expected)


def test_state_space_models_are_refused() -> None:
    config = transformers.MambaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4
    )
    with pytest.raises(ValueError, match=r"model must .*MambaForCausalLM"):
        TransformersLaneModel(transformers.MambaForCausalLM(config), 2, 16)


def test_linear_attention_layers_are_refused() -> None:
    model = make("llama")
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match="linear_attention"):
        TransformersLaneModel(model, 2, 16)


def test_length_past_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="context of 64 tokens, got 65"):
        TransformersLaneModel(make("llama"), 2, 65)


def test_cache_that_does_not_fit_is_refused_before_it_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # llama: 2 layers, keys and values, 2 heads of 8 floats, 2 copies: 512 bytes a position
    monkeypatch.setattr(lane_model, "free_memory", lambda device: 512 * 100)
    monkeypatch.setattr(lane_model, "MEMORY_SHARE", 1.0)
    TransformersLaneModel(make("llama"), 4, 25)
    message = r"num_lanes = 5 lanes of 25 .* at most 4 lanes .* or as many of 20 positions"
    with pytest.raises(ValueError, match=message):
        TransformersLaneModel(make("llama"), 5, 25)


def test_cache_is_as_large_as_was_counted() -> None:
    assert TransformersLaneModel(make("llama"), 4, 25).memory() == 512 * 100
    free = lane_model.free_memory(torch.device("cpu"))
    assert free is None or free > 10**6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
def test_compiled_model_step_gives_the_same_logits() -> None:
    model = make("llama")
    tokens, positions = torch.tensor([3, 4, 5]), torch.tensor([2, 0, 1])
    logits = []
    for compile in (False, True):
        lanes = TransformersLaneModel(model, 3, 16, compile=compile)
        with lanes.running():
            lanes.prefill(0, (7, 8, 3))
            lanes.prefill(2, (9, 5))
            logits.append(lanes.step(tokens, positions))
            logits.append(lanes.step(tokens, positions + 1))
    # Two layers in float32, each product added up in another order.
    torch.testing.assert_close(logits[2:], logits[:2], rtol=1e-5, atol=4e-5)
