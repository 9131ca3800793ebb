"""The lane step in one call: against float64 and the model's own modules; when it is not used."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.llama import modeling_llama

from powerkernels import PowerSampler, PowerSamplingConfig, _extension
from powerkernels.power_sampling import decoder_step, packed_linear
from powerkernels.power_sampling.lane_model import TransformersLaneModel

pytestmark = pytest.mark.skipif(_extension.extension() is None, reason="no compiled part")

# No size is a whole number of panels or of vectors; half a head is not either.
SIZES = dict(
    vocab_size=53,
    hidden_size=42,
    intermediate_size=70,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    max_position_embeddings=200,
)
FAMILIES = {
    "Llama": {},
    "Llama-biases": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {"sliding_window": 5},
    "Qwen2": {
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "Qwen3": {},
}
LENGTH = 70  # more than one chunk of the attention


def make(family: str = "Llama", dtype: torch.dtype = torch.float32, **sizes: object):
    torch.manual_seed(3)
    options = SIZES | FAMILIES[family] | sizes
    name = family.split("-")[0]
    config = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():  # biases and norms too
        spread = torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.2)
        parameter.data = (spread + (parameter.ndim == 1)).to(dtype)
    return model.eval()


@pytest.fixture(autouse=True)
def no_bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU whose bfloat16 products are no faster."""
    monkeypatch.setattr(packed_linear, "multiplies_bfloat16", lambda: False)


def decode(lanes: TransformersLaneModel, ids: Tensor, first: list[int]) -> Tensor:
    """Logits [C, length, V]: each lane's `ids` [C, length] one by one, from its `first` on."""
    logits = []
    with lanes.running():
        for lane, count in enumerate(first):
            lanes.prefill(lane, tuple(ids[lane, : count + 1].tolist()))
        for step in range(ids.shape[1] - max(first)):
            positions = torch.tensor(first) + step
            logits.append(lanes.step(ids.gather(1, positions[:, None])[:, 0], positions).clone())
    return torch.stack(logits, 1)


def true_logits(model: transformers.PreTrainedModel, ids: Tensor, first: list[int]) -> Tensor:
    with torch.inference_mode():
        whole = copy.deepcopy(model).double()(ids).logits
    count = ids.shape[1] - max(first)
    return torch.stack(
        [row[start : start + count] for row, start in zip(whole, first, strict=True)]
    )


def error(logits: Tensor, truth: Tensor) -> float:
    return float((logits.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_against_float64(
    simd_level: str,
    family: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    generator: torch.Generator,
) -> None:
    model = make(family, dtype)
    ids = torch.randint(SIZES["vocab_size"], (7, LENGTH), generator=generator)
    first = [0, 0, 1, 2, 3, 5, 9]
    truth = true_logits(model, ids, first)
    in_one_call = TransformersLaneModel(model, 7, LENGTH)
    assert in_one_call._decoder is not None
    logits = decode(in_one_call, ids, first)
    assert logits.dtype == dtype
    monkeypatch.setattr(decoder_step, "why_not", lambda model: "not wanted")
    modules = TransformersLaneModel(model, 7, LENGTH)
    assert modules._decoder is None
    of_modules = error(decode(modules, ids, first), truth)
    # The same roundings at the same places: no further from the truth than the modules, but for
    # luck.
    assert error(logits, truth) <= 1.5 * of_modules
    assert of_modules < decoder_step.TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_lane_depends_on_itself_alone(
    dtype: torch.dtype, restore_threads: None, generator: torch.Generator
) -> None:
    model = make("Qwen3", dtype)
    ids = torch.randint(SIZES["vocab_size"], (13, 20), generator=generator)
    torch.set_num_threads(1)
    together = decode(TransformersLaneModel(model, 13, 20), ids, [0] * 13)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for lanes in (1, 2, 3, 4, 6, 8):
            alone = decode(TransformersLaneModel(model, lanes, 20), ids[5 : 5 + lanes], [0] * lanes)
            assert torch.equal(alone, together[5 : 5 + lanes])


def test_changed_weights_are_noticed(generator: torch.Generator) -> None:
    model = make()
    ids = torch.randint(SIZES["vocab_size"], (2, 6), generator=generator)
    lanes = TransformersLaneModel(model, 2, 6)
    before = decode(lanes, ids, [0, 0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    assert lanes.refresh()
    after = decode(lanes, ids, [0, 0])
    assert error(after, true_logits(model, ids, [0, 0])) < 1e-5
    assert error(before, true_logits(model, ids, [0, 0])) > 1e-2
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: 2 * output)
    assert not lanes.refresh()


def test_non_finite_values_stay_in_their_lane(generator: torch.Generator) -> None:
    model = make()
    ids = torch.randint(1, SIZES["vocab_size"], (4, 6), generator=generator)
    clean = decode(TransformersLaneModel(model, 4, 6), ids, [0] * 4)
    lanes = TransformersLaneModel(model, 4, 6)
    ids[2, 3] = 0
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = float("nan")
    assert lanes.refresh()
    logits = decode(lanes, ids, [0] * 4)
    assert logits[2, 3:].isnan().all()
    assert torch.equal(logits[2, :3], clean[2, :3])
    others = [0, 1, 3]
    assert torch.equal(logits[others], clean[others])


@pytest.mark.parametrize("position", [-1, 6])
def test_a_position_outside_the_cache_is_refused(position: int) -> None:
    lanes = TransformersLaneModel(make(), 2, 6)
    message = f"position {position} of lane 1 is not in a cache of 6"
    with lanes.running(), pytest.raises(IndexError, match=message):
        lanes.step(torch.tensor([1, 2]), torch.tensor([0, position]))


def test_which_models_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decoder_step.why_not(make()) is None
    gelu = make(hidden_act="gelu")
    assert "GELUActivation" in (decoder_step.why_not(gelu) or "")
    mixed = make()
    mixed.model.norm.bfloat16()
    assert "not all" in (decoder_step.why_not(mixed) or "")
    assert "not all" in (decoder_step.why_not(make().half()) or "")
    hooked = make()
    hooked.lm_head.register_forward_pre_hook(lambda module, args: None)
    assert decoder_step.why_not(hooked) == "lm_head has a hook or another forward"
    wrapped = make()
    wrapped.model.layers[0].self_attn.q_proj = torch.nn.Sequential(torch.nn.Linear(42, 60))
    assert "q_proj is a Sequential" in (decoder_step.why_not(wrapped) or "")
    other = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=12, n_head=2))
    assert "GPT2LMHeadModel is not one of Llama" in (decoder_step.why_not(other) or "")
    monkeypatch.setattr(packed_linear, "multiplies_bfloat16", lambda: True)
    assert decoder_step.why_not(make()) is None
    assert "faster" in (decoder_step.why_not(make(dtype=torch.bfloat16)) or "")
    monkeypatch.setenv("POWERKERNELS_BACKEND", "reference")
    assert "compiled part" in (decoder_step.why_not(make()) or "")


def test_a_model_that_computes_something_else_is_found(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    """As when a later transformers changes a module under the same name."""
    before = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: 2 * before(self, x))
    model = make()
    ids = torch.randint(SIZES["vocab_size"], (2, 6), generator=generator)
    with pytest.warns(UserWarning, match="LlamaForCausalLM makes other logits"):
        lanes = TransformersLaneModel(model, 2, 6)
    assert error(decode(lanes, ids, [0, 0]), true_logits(model, ids, [0, 0])) < 1e-5


def test_chains_do_not_depend_on_the_number_of_lanes() -> None:
    model = make()
    chains = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for lanes in (1, 3, 8):
            config = PowerSamplingConfig(
                alpha=2.0,
                max_new_tokens=16,
                block_size=4,
                num_mcmc_steps=4,
                num_lanes=lanes,
                seed=5,
            )
            chains.append(
                [
                    (sample.tokens, sample.log_prob.tolist())
                    for sample in PowerSampler(model, config=config).sample(
                        [[1, 2, 3], [4]], num_samples=2
                    )
                ]
            )
    assert chains[0] == chains[1] == chains[2]
