"""The worked example makes the chains of PowerSampler."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from powerkernels import PowerSampler, PowerSamplingConfig
from powerkernels.power_sampling.sampler import _number_chains
from python_tests.power_sampling.test_paths import small_llama

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "own_sampler.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("own_sampler", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("prompt", [[5], [7, 8, 9], [3, 1, 4, 1, 5]])
def test_example_makes_the_chains_of_the_sampler(example: ModuleType, prompt: list[int]) -> None:
    model = small_llama(torch.float32)
    config = PowerSamplingConfig(
        alpha=2.0, max_new_tokens=18, block_size=6, num_mcmc_steps=3, seed=7
    )
    (sample,) = PowerSampler(model, config=config).sample([prompt])
    (chain,) = _number_chains([tuple(prompt)], 1)
    state, infos = example.power_sample(
        model,
        prompt,
        alpha=2.0,
        block_limits=config.block_limits,
        num_mcmc_steps=3,
        eos=0,
        seed=7,
        chain=chain.number,
    )
    assert list(state.tokens) == sample.tokens
    assert [info.accepted for info in infos] == sample.trace.accepted.tolist()
    assert [info.cut for info in infos] == sample.trace.cut.tolist()
    assert sum(state.log_prob) == pytest.approx(sample.log_likelihood, abs=1e-3)
    by_forward = example.log_likelihood(model, prompt, state.tokens)
    assert by_forward == pytest.approx(sample.log_likelihood, abs=1e-3)
