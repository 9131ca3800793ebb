"""The counts of the cost model beside what is counted in real runs at small scale."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench import cost_model
from bench.jobs import cases as jobs
from powerkernels import (
    PowerSampler,
    PowerSamplingConfig,
    _process_group,
    score_tokens,
    select_top_cov,
)
from powerkernels.linear_logprob import functional as linear
from powerkernels.logprob.options import ScoreOptions
from python_tests.logprob.test_vocab_parallel import run

PAGE = Path(__file__).parents[2] / "docs" / "cost_model.md"


class ArgumentBytes(TorchDispatchMode):
    """Bytes of all tensors that an operator takes and gives."""

    def __init__(self, operator: Any) -> None:
        super().__init__()
        self.operator, self.bytes = operator, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is self.operator:
            leaves = pytree.tree_leaves((args, kwargs, result))
            self.bytes += sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy", [False, True])
def test_bytes_of_score_tokens(dtype: torch.dtype, entropy: bool) -> None:
    rows, vocab = 5, 300
    logits = torch.randn(rows, vocab, dtype=dtype)
    targets = torch.arange(rows)
    with ArgumentBytes(torch.ops.powerkernels.score_tokens.default) as counted:
        score_tokens(logits, targets, entropy=entropy)
    assert counted.bytes == cost_model.score_tokens_bytes(
        rows, vocab, dtype.itemsize, entropy=entropy
    )


def added_product(total: Any, a: Any, b: Any, *, out_shape: Any = None, **factors: Any) -> int:
    return 2 * math.prod(a) * b[1]


def test_flops_of_linear_score_tokens() -> None:
    rows, hidden_size, vocab = 6, 32, 1000
    hidden, weight = torch.randn(rows, hidden_size), torch.randn(vocab, hidden_size)
    targets = torch.arange(rows)
    options = ScoreOptions(2.0, 1.0, None, True, None)
    # The product that adds to the gradient of the hidden states is not in torch's own table.
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_product})
    # Inside of the operators, which the counter does not know.
    with counter:
        scores = linear._forward(hidden, weight, None, targets, -100, options, "", "chunked")
    assert counter.get_total_flops() == cost_model.linear_flops(
        rows, hidden_size, vocab, backward=False
    )
    ones = torch.ones(rows)
    with counter:
        linear._add_gradients(
            hidden,
            weight,
            None,
            targets,
            -100,
            options,
            scores,
            (ones, ones, ones),
            torch.zeros(rows, hidden_size),
            torch.zeros(vocab, hidden_size),
            None,
        )
    assert counter.get_total_flops() == 3 * cost_model.linear_flops(
        rows, hidden_size, vocab, backward=False
    )


def selection_bytes(rank: int, ranks: int) -> list[dict[str, int]]:
    """What the rank hands to collectives in selections of few tokens and of many."""
    counted = {"reduced": 0, "gathered": 0, "calls": 0}

    def counting(name: str, collective: Any) -> Any:
        @functools.wraps(collective)
        def call(value: torch.Tensor, group: str) -> Any:
            counted[name] += value.nbytes
            counted["calls"] += 1
            return collective(value, group)

        return call

    _process_group.all_reduce = counting("reduced", _process_group.all_reduce)
    _process_group.all_gather = counting("gathered", _process_group.all_gather)
    generator, found = torch.Generator().manual_seed(rank), []
    for tokens in (4, 400):
        counted.update(dict.fromkeys(counted, 0))
        log_prob, advantages = (torch.randn(2, tokens, generator=generator) for _ in range(2))
        select_top_cov(log_prob, advantages, k=3, process_group=dist.group.WORLD)
        found.append(dict(counted))
    return found


@pytest.mark.slow
def test_bytes_of_a_selection_of_two_processes(tmp_path: Path) -> None:
    expected = cost_model.selection_collectives(2)._asdict()
    for counted in run(selection_bytes, 2, tmp_path):
        assert counted == [expected, expected]


def sampler_run(num_mcmc_steps: int, chains: int) -> Any:
    (case,) = jobs.sampler_cases("quick")
    model = jobs._model(case, torch.device("cpu"))
    config = PowerSamplingConfig(
        alpha=2.0,
        max_new_tokens=12,
        block_size=4,
        num_mcmc_steps=num_mcmc_steps,
        early_rejection=False,
        shared_prefix_skip=False,
        prefetch=False,
        eos_token_id=(),
        num_lanes=chains,
    )
    sampler = PowerSampler(model, config=config)
    samples = sampler.sample([[5, 6, 7]] * chains, progress=False)
    return sampler.stats, samples


def test_decoded_tokens_of_a_real_run() -> None:
    chains, steps = 64, 3
    stats, samples = sampler_run(steps, chains)
    # A transition from n tokens redraws a uniform number of 1 … n: its variance is (n² - 1) / 12.
    variance = sum(steps * (n**2 - 1) / 12 for n in (4, 8, 12))
    expected = cost_model.expected_decoded(12, 4, steps)
    assert abs(stats.decoded_tokens / chains - expected) < 4 * math.sqrt(variance / chains)
    assert stats.decoded_tokens == sum(sample.decoded_tokens for sample in samples)


def test_decoded_tokens_without_transitions_are_exact() -> None:
    stats, _ = sampler_run(0, 3)
    assert stats.decoded_tokens == 3 * cost_model.expected_decoded(12, 4, 0) == 36
    assert stats.model_steps == 12


def test_steps_of_the_sampler() -> None:
    settings: dict[str, Any] = {
        "model_bytes": 1e9,
        "cache_bytes_per_token": 1e4,
        "lanes": 8,
        "decoded_per_chain": 100.0,
        "mean_context": 50.0,
        "machine": cost_model.Machine(),
    }
    one = cost_model.sampling(chains=32, gpus=1, **settings)
    four = cost_model.sampling(chains=32, gpus=4, **settings)
    many = cost_model.sampling(chains=32, gpus=1000, **settings)
    assert one.steps == 4 * four.steps == 400
    assert many.steps == four.steps == 100
    assert many.seconds < four.seconds < one.seconds


def test_collectives_do_not_grow_with_tokens() -> None:
    few, many = (cost_model.trainer_step(tokens, cost_model.QWEN_7B, 1024) for tokens in (8, 8192))
    assert few.collectives == many.collectives
    assert cost_model.selection_collectives(1).calls == 0


def test_the_page_has_the_tables() -> None:
    page, machine = PAGE.read_text(), cost_model.Machine()
    assert cost_model.losses_table(cost_model.DEFAULT_GPUS, machine) in page
    assert cost_model.sampler_table(cost_model.DEFAULT_GPUS, machine) in page
