"""The chains' law against enumeration, and known-wrong variants that the same test rejects."""

from __future__ import annotations

import numpy as np
import pytest

from powerkernels.power_sampling import PowerSamplingConfig
from powerkernels.power_sampling.engine import Chain, SamplerStats, run_chains
from powerkernels.power_sampling.lane_state import Rules, rules_of
from python_tests import tiers
from python_tests.power_sampling.enumerable import (
    EOS,
    PROMPT,
    EnumerableModel,
    chi2_p_value,
    total_variation,
)

NUM_CHAINS = 50_000
NUM_LANES = 25_000
# A right sampler fails one setting in 10,000; the wrong ones are far below this.
SIGNIFICANCE = 1e-4


def completion_counts(
    model: EnumerableModel,
    config: PowerSamplingConfig,
    *,
    num_chains: int = NUM_CHAINS,
    num_lanes: int = NUM_LANES,
    eos: bool = True,
    rules: Rules | None = None,
) -> np.ndarray:
    """How often chains ended at each of `completions`; a last cell counts what is none of them."""
    limit = config.max_new_tokens
    index = {x: i for i, x in enumerate(model.completions(limit, eos=eos))}
    counts = np.zeros(len(index) + 1)
    chains = [Chain(i, PROMPT, i) for i in range(num_chains)]
    lanes = model(num_lanes, len(PROMPT) + limit)
    for finished in run_chains(
        lanes, config, chains, eos=(EOS,) if eos else (), stats=SamplerStats(), rules=rules
    ):
        counts[index.get(tuple(finished.tokens.tolist()), -1)] += 1
    assert counts.sum() == num_chains
    return counts


def p_value(counts: np.ndarray, law: np.ndarray) -> float:
    return chi2_p_value(counts, np.append(law, 0.0))


def settings(**changes: object) -> PowerSamplingConfig:
    # Two blocks, so that extension, growth into the second limit and a chain that ended in the
    # first are all there.
    values: dict = dict(
        alpha=2.0, max_new_tokens=4, block_size=2, num_mcmc_steps=4, seed=11, prefetch=False
    )
    return PowerSamplingConfig(**(values | changes))


@pytest.fixture(scope="module")
def model() -> EnumerableModel:
    return EnumerableModel(vocab_size=3, max_tokens=4, eos_logit=-1.0)


# s = alpha; 1 < s < alpha; s = 1, on the bound's edge; s < 1 and s > alpha, where it does not hold
PROPOSAL_POWERS = [None, 1.5, 1.0, 0.7, 2.6]


@pytest.mark.parametrize("proposal_power", PROPOSAL_POWERS)
def test_transition_leaves_the_power_law_invariant(
    model: EnumerableModel, proposal_power: float | None
) -> None:
    law = model.power_law(2.0, 4)
    _, matrix = model.transition_matrix(2.0, proposal_power or 2.0, 4)
    np.testing.assert_allclose(law @ matrix, law, atol=1e-14)
    flow = law[:, None] * matrix
    np.testing.assert_allclose(flow, flow.T, atol=1e-14)


SWITCHES = {
    "plain": {"early_rejection": False, "shared_prefix_skip": False},
    "both": {"early_rejection": True, "shared_prefix_skip": True},
    "skip": {"early_rejection": False, "shared_prefix_skip": True},
    "early": {"early_rejection": True, "shared_prefix_skip": False},
}


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("proposal_power", PROPOSAL_POWERS)
@pytest.mark.each_value
def test_chain_has_its_exact_law_at_every_length(
    model: EnumerableModel, switches: str, proposal_power: float | None
) -> None:
    # The law after a few transitions, before the chain has forgotten its start: every entry of the
    # transition matrix counts, not only what its stationary law shows.
    config = settings(
        **SWITCHES[switches],
        proposal_temperature=None if proposal_power is None else 1 / proposal_power,
    )
    counts = completion_counts(model, config)
    assert p_value(counts, model.chain_law(config)) > SIGNIFICANCE


# A model on which 48 transitions bring the chain within 1e-5 of its stationary law.
FAST = dict(vocab_size=3, max_tokens=3, scale=0.8)
LONG_CHAIN = dict(alpha=1.5, max_new_tokens=3, block_size=3, num_mcmc_steps=48)


@pytest.mark.parametrize("early_rejection", [False, True])
@pytest.mark.parametrize("shared_prefix_skip", [False, True])
@pytest.mark.parametrize("proposal_power", [None, 1.2])
@pytest.mark.each_value
def test_long_chain_has_the_power_law(
    early_rejection: bool, shared_prefix_skip: bool, proposal_power: float | None
) -> None:
    model = EnumerableModel(**FAST)
    config = settings(
        **LONG_CHAIN,
        early_rejection=early_rejection,
        shared_prefix_skip=shared_prefix_skip,
        proposal_temperature=None if proposal_power is None else 1 / proposal_power,
    )
    law = model.power_law(1.5, 3)
    assert np.abs(model.chain_law(config) - law).sum() / 2 < 1e-3
    counts = completion_counts(model, config)
    assert p_value(counts, law) > SIGNIFICANCE


def test_chain_without_eos(model: EnumerableModel) -> None:
    config = settings(block_size=3)
    counts = completion_counts(model, config, eos=False)
    assert p_value(counts, model.chain_law(config, eos=False)) > SIGNIFICANCE


def test_single_block_of_five_tokens() -> None:
    model = EnumerableModel(vocab_size=3, max_tokens=5, eos_logit=-1.0, seed=3)
    config = settings(max_new_tokens=5, block_size=5, num_mcmc_steps=6)
    counts = completion_counts(model, config)
    assert p_value(counts, model.chain_law(config)) > SIGNIFICANCE


@pytest.mark.parametrize("alpha", tiers.every(3, [0.0, 0.5, 1.0, 4.0]))
def test_other_powers(model: EnumerableModel, alpha: float) -> None:
    config = settings(alpha=alpha)
    counts = completion_counts(model, config)
    assert p_value(counts, model.chain_law(config)) > SIGNIFICANCE


def test_plain_sampling_is_the_model(model: EnumerableModel) -> None:
    counts = completion_counts(model, settings(alpha=1.0, num_mcmc_steps=0))
    assert p_value(counts, model.power_law(1.0, 4)) > SIGNIFICANCE


def test_low_temperature_is_not_the_power_law(model: EnumerableModel) -> None:
    counts = completion_counts(model, settings(num_mcmc_steps=0))
    assert p_value(counts, model.power_law(2.0, 4)) < 1e-12


@pytest.mark.parametrize("lanes_per_chain", [2, 5])
def test_chains_of_several_lanes_have_the_law(model: EnumerableModel, lanes_per_chain: int) -> None:
    config, num_chains = settings(prefetch=True), 5000
    counts = completion_counts(
        model, config, num_chains=num_chains, num_lanes=lanes_per_chain * num_chains
    )
    assert p_value(counts, model.chain_law(config)) > SIGNIFICANCE


def assert_wrong_law(*, rules: dict[str, bool], **changes: object) -> None:
    """Both tests above reject the sampler with other rules."""
    model = EnumerableModel(**FAST)
    config = settings(**(LONG_CHAIN | changes))
    counts = completion_counts(model, config, rules=rules_of(config)._replace(**rules))
    law = model.power_law(1.5, 3)
    assert p_value(counts, law) < 1e-12
    assert p_value(counts, model.chain_law(config)) < 1e-12
    assert total_variation(counts[:-1], law) > 0.01


@pytest.mark.parametrize("shared_prefix_skip", tiers.every(2, [True, False]))
def test_without_length_term_the_law_is_wrong(shared_prefix_skip: bool) -> None:
    assert_wrong_law(rules={"length_term": False}, shared_prefix_skip=shared_prefix_skip)


@pytest.mark.parametrize("shared_prefix_skip", tiers.every(2, [True, False]))
def test_with_growth_capped_the_law_is_wrong(shared_prefix_skip: bool) -> None:
    assert_wrong_law(rules={"growth_cap": True}, shared_prefix_skip=shared_prefix_skip)
