"""The public sampler's drop-ins: signature, results, and both laws against enumeration."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from powerkernels import PowerSamplingConfig
from powerkernels.integrations import public_sampler
from powerkernels.integrations.public_sampler import (
    mcmc_power_samp,
    mcmc_power_samp_batch,
    naive_temp,
)
from powerkernels.power_sampling.engine import Chain, SamplerStats, run_chains
from python_tests.power_sampling.enumerable import EOS, PROMPT, EnumerableModel, chi2_p_value

NUM_CHAINS, NUM_LANES = 20_000, 10_000
SIGNIFICANCE = 1e-4


class Public:
    """What the public `AutoregressiveSampler` holds."""

    def __init__(self, model: object, tokenizer: object) -> None:
        self.model, self.tokenizer, self.device = model, tokenizer, torch.device("cpu")


@pytest.fixture(scope="module")
def p() -> Public:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=71,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=0,
        initializer_range=0.4,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    tokenizer = SimpleNamespace(eos_token_id=0, decode=lambda *args, **kwargs: "")
    return Public(model, tokenizer)


def distributions(p: Public, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return p.model(torch.tensor([ids])).logits[0].double()


@pytest.mark.parametrize("compat", [None, "reference"])
def test_results_are_those_of_the_public_function(p: Public, compat: str | None) -> None:
    temp, context = 0.5, [5, 6, 7]
    gen, norm, unnorm, ratio = mcmc_power_samp(
        p, context, temp, 4, 24, block_num=3, compat=compat, seed=1
    )
    assert gen[:3] == context
    tokens = gen[3:]
    assert 1 <= len(tokens) <= 24
    assert len(norm) == len(unnorm) == len(tokens)
    assert all(isinstance(value, float) for value in [*norm, *unnorm, ratio])
    assert 0 <= ratio <= 1
    logits = distributions(p, gen)[len(context) - 1 : -1]
    log_p = logits.log_softmax(-1)
    scaled = logits / temp
    if compat:
        smallest = scaled.topk(50).values[:, -1:]
        scaled = scaled.masked_fill(scaled < smallest, -torch.inf)
    at = torch.tensor(tokens)[:, None]
    torch.testing.assert_close(
        torch.tensor(unnorm).double(), log_p.gather(1, at)[:, 0] / temp, rtol=0, atol=1e-4
    )
    torch.testing.assert_close(
        torch.tensor(norm).double(),
        scaled.log_softmax(-1).gather(1, at)[:, 0],
        rtol=0,
        atol=1e-4,
    )


def test_batch_is_the_prompts_one_by_one(p: Public) -> None:
    contexts = [[5, 6, 7], [8], [9, 10]]
    options = dict(seed=2, num_lanes=4)
    together = mcmc_power_samp_batch(p, contexts, 0.5, 3, 12, 2, **options)
    for context, sample in zip(contexts, together, strict=True):
        alone = mcmc_power_samp(p, context, 0.5, 3, 12, 2, **options)
        assert alone.gen == sample.gen
        assert alone.acceptance_ratio == sample.acceptance_ratio
        assert alone.log_probs_norm == pytest.approx(sample.log_probs_norm, abs=1e-4)


def test_the_global_generator_makes_runs_repeatable(p: Public) -> None:
    def run() -> list[int]:
        return mcmc_power_samp(p, [5], 1.0, 2, 12, 2).gen

    torch.manual_seed(3)
    first, second = run(), run()
    torch.manual_seed(3)
    assert run() == first != second


def test_a_sampler_is_kept_for_the_next_call(p: Public, monkeypatch: pytest.MonkeyPatch) -> None:
    mcmc_power_samp(p, [5, 6], 0.5, 2, 12, 2)
    kept = public_sampler._samplers[p]
    mcmc_power_samp(p, [7], 0.5, 2, 12, 2, seed=9)
    assert public_sampler._samplers[p] is kept
    mcmc_power_samp(p, [7], 0.4, 2, 12, 2)
    assert public_sampler._samplers[p] is not kept


def test_a_namespace_will_do(p: Public) -> None:
    namespace = SimpleNamespace(model=p.model, tokenizer=p.tokenizer, device=p.device)
    sample = mcmc_power_samp(namespace, [5, 6], 0.5, 2, 12, 2, seed=4)
    assert sample == mcmc_power_samp(p, [5, 6], 0.5, 2, 12, 2, seed=4)


def test_naive_temp(p: Public) -> None:
    gen, norm, unnorm = naive_temp(p, [5, 6], 0.5, 10, seed=1)
    assert gen[:2] == [5, 6]
    assert 3 <= len(gen) <= 10
    assert len(norm) == len(unnorm) == len(gen) - 2
    assert math.isnan(mcmc_power_samp(p, [5], 0.5, 0, 8, 2).acceptance_ratio)


def test_bounds_of_generate(p: Public) -> None:
    bounds = public_sampler._generate_bounds
    model = SimpleNamespace(generation_config=SimpleNamespace(top_k=None, top_p=None, min_p=None))
    assert bounds(model) == {"top_k": 50, "top_p": None, "min_p": None}
    model.generation_config = SimpleNamespace(top_k=0, top_p=0.9, min_p=0.1)
    assert bounds(model) == {"top_k": None, "top_p": 0.9, "min_p": 0.1}
    assert bounds(p.model)["top_k"] == 50


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([5], 0.0, 2, 12, 2), ValueError, "temp must be > 0"),
        (([5], "cold", 2, 12, 2), TypeError, "temp must be a number"),
        (([5], 0.5, 2, 12, 5), ValueError, "max_new_tokens must be a multiple of block_num = 5"),
        (([5], 0.5, 2, 12, 0), ValueError, "block_num must be an int >= 1"),
        (([5], 0.5, -1, 12, 2), ValueError, "num_mcmc_steps must be >= 0"),
        (([], 0.5, 2, 12, 2), ValueError, r"prompts\[0\] must hold at least one token"),
    ],
)
def test_bad_arguments(p: Public, arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mcmc_power_samp(p, *arguments)


def settings(**changes: object) -> PowerSamplingConfig:
    values: dict = dict(
        alpha=2.0,
        max_new_tokens=4,
        block_size=2,
        num_mcmc_steps=3,
        seed=5,
        prefetch=False,
        compat="reference",
    )
    return PowerSamplingConfig(**(values | changes))


def p_value(
    model: EnumerableModel,
    config: PowerSamplingConfig,
    law: dict[tuple[int, ...], float],
    num_chains: int = NUM_CHAINS,
    num_lanes: int = NUM_LANES,
) -> float:
    """Of our chains against a law; what it cannot give counts against them."""
    chains = [Chain(i, PROMPT, i) for i in range(num_chains)]
    lanes = model(num_lanes, len(PROMPT) + config.max_new_tokens)
    found = Counter(
        tuple(chain.tokens.tolist())
        for chain in run_chains(lanes, config, chains, eos=(EOS,), stats=SamplerStats())
    )
    counts = [found.pop(x, 0) for x in law] + [sum(found.values())]
    return chi2_p_value(np.array(counts, dtype=float), np.array([*law.values(), 0.0]))


@pytest.fixture(scope="module")
def model() -> EnumerableModel:
    return EnumerableModel(vocab_size=4, max_tokens=4, scale=1.0, eos_logit=-0.5)


def test_public_law_is_a_law(model: EnumerableModel) -> None:
    law = model.public_law(settings(), top_k=3)
    assert sum(law.values()) == pytest.approx(1.0, abs=1e-12)
    assert min(law.values()) >= 0
    # Chains that shrank and lost their EOS: the public function returns completions like these.
    assert any(len(x) == 3 and x[-1] != EOS for x in law)


@pytest.mark.parametrize("early_rejection", [False, True])
@pytest.mark.parametrize("shared_prefix_skip", [False, True])
@pytest.mark.parametrize("top_k", [None, 3])
def test_compat_has_the_public_law(
    model: EnumerableModel, early_rejection: bool, shared_prefix_skip: bool, top_k: int | None
) -> None:
    config = settings(
        early_rejection=early_rejection, shared_prefix_skip=shared_prefix_skip, top_k=top_k
    )
    assert p_value(model, config, model.public_law(config, top_k=top_k)) > SIGNIFICANCE


def test_compat_has_the_public_law_on_several_lanes_a_chain(model: EnumerableModel) -> None:
    config = settings(prefetch=True, top_k=3)
    law = model.public_law(config, top_k=3)
    assert p_value(model, config, law, num_chains=5000, num_lanes=15000) > SIGNIFICANCE


def test_the_two_laws_are_told_apart(model: EnumerableModel) -> None:
    public = model.public_law(settings())
    assert p_value(model, settings(compat=None), public) < 1e-12
    limit = dict(zip(model.completions(4), model.chain_law(settings()), strict=True))
    assert p_value(model, settings(compat=None), limit) > SIGNIFICANCE
    assert p_value(model, settings(), limit) < 1e-12
    assert p_value(model, settings(top_k=3), public) < 1e-12
