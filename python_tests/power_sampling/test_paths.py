"""Chains bit for bit: early rejection, order, lanes, the one-chain oracle, replay."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
import transformers

from powerkernels import PowerSample, PowerSampler, PowerSamplingConfig, sample_tokens, score_tokens
from powerkernels.power_sampling import engine, reference
from powerkernels.power_sampling import metropolis_hastings as mh
from powerkernels.power_sampling.lane_model import TransformersLaneModel
from powerkernels.power_sampling.sampler import _number_chains
from python_tests.power_sampling.enumerable import EOS, EnumerableModel

VOCAB_SIZE = 61
PROMPTS = [[5], [7, 8, 9], [5], list(range(10, 30)), [3, 1, 4, 1, 5, 9], [2, 7], [8] * 12]


def small_llama(dtype: torch.dtype) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=0,
        initializer_range=0.25,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


@pytest.fixture(scope="module")
def llama() -> transformers.LlamaForCausalLM:
    return small_llama(torch.float32)


def config(**changes: object) -> PowerSamplingConfig:
    values: dict = dict(
        alpha=2.0, max_new_tokens=40, block_size=10, num_mcmc_steps=5, seed=3, num_lanes=4
    )
    return PowerSamplingConfig(**(values | changes))


def draw(
    model: object, settings: PowerSamplingConfig, prompts: list[list[int]] = PROMPTS
) -> list[PowerSample]:
    return PowerSampler(model, config=settings).sample(prompts, num_samples=2)


def assert_same_chain(a: PowerSample, b: PowerSample) -> None:
    assert a.tokens == b.tokens
    assert torch.equal(a.log_prob, b.log_prob)
    assert torch.equal(a.log_q, b.log_q)
    assert a.confidence == b.confidence
    for name in ("block", "cut", "length", "accepted", "log_likelihood"):
        assert torch.equal(getattr(a.trace, name), getattr(b.trace, name)), name


@pytest.mark.parametrize("proposal_temperature", [None, 0.7, 1.0])
@pytest.mark.parametrize("shared_prefix_skip", [False, True])
@pytest.mark.each_value
def test_early_rejection_leaves_the_chain_as_it_is(
    llama: object, shared_prefix_skip: bool, proposal_temperature: float | None
) -> None:
    options = dict(shared_prefix_skip=shared_prefix_skip, proposal_temperature=proposal_temperature)
    off = draw(llama, config(early_rejection=False, **options))
    on = draw(llama, config(early_rejection=True, **options))
    for a, b in zip(off, on, strict=True):
        assert_same_chain(a, b)
    assert sum(s.decoded_tokens for s in on) < sum(s.decoded_tokens for s in off)
    assert any(0 < s.acceptance_rate < 1 for s in on)


@pytest.mark.parametrize("proposal_temperature", [None, 0.7])
@pytest.mark.parametrize(
    ("num_lanes", "prompts", "num_samples"),
    [(8, PROMPTS[2:3], 1), (5, PROMPTS, 2), (3, PROMPTS, 1)],
)
def test_prefetching_leaves_the_chain_as_it_is(
    llama: object,
    num_lanes: int,
    prompts: list[list[int]],
    num_samples: int,
    proposal_temperature: float | None,
) -> None:
    runs, steps = [], []
    for prefetch in (False, True):
        settings = config(
            num_lanes=num_lanes, prefetch=prefetch, proposal_temperature=proposal_temperature
        )
        sampler = PowerSampler(llama, config=settings)
        runs.append(sampler.sample(prompts, num_samples))
        steps.append(sampler.stats.model_steps)
        assert sampler.stats.used_tokens == sum(s.decoded_tokens for s in runs[-1])
        if not prefetch:
            assert sampler.stats.decoded_tokens == sampler.stats.used_tokens
    for a, b in zip(*runs, strict=True):
        assert_same_chain(a, b)
        assert torch.equal(a.trace.log_accept_ratio, b.trace.log_accept_ratio)
        assert torch.equal(a.trace.decoded, b.trace.decoded)
        assert a.decoded_tokens == b.decoded_tokens
    assert steps[1] < steps[0]


@pytest.mark.parametrize("compat", [None, "reference"])
def test_compiled_transition_makes_the_chains_of_the_reference(
    llama: object, compat: str | None, monkeypatch: pytest.MonkeyPatch, compiled_backend: None
) -> None:
    compiled = draw(llama, config(compat=compat))
    monkeypatch.setattr(
        engine, "transition_of", lambda state: lambda drawn: reference.transition(state, drawn)
    )
    for a, b in zip(draw(llama, config(compat=compat)), compiled, strict=True):
        assert_same_chain(a, b)
        assert torch.equal(a.trace.log_accept_ratio, b.trace.log_accept_ratio)
        assert a.decoded_tokens == b.decoded_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_order_of_prompts_changes_nothing(dtype: torch.dtype) -> None:
    model = small_llama(dtype)
    order = list(range(len(PROMPTS)))
    random.Random(1).shuffle(order)
    assert order != sorted(order)
    first = draw(model, config())
    shuffled = draw(model, config(), [PROMPTS[i] for i in order])

    def chains(samples: list[PowerSample], prompts: list[list[int]]) -> list[PowerSample]:
        # Equal prompts share a set of chains, whichever of them comes first.
        return sorted(samples, key=lambda s: (prompts[s.prompt_index], s.tokens, s.log_likelihood))

    pairs = zip(chains(first, PROMPTS), chains(shuffled, [PROMPTS[i] for i in order]), strict=True)
    for a, b in pairs:
        assert_same_chain(a, b)


def test_parts_of_a_list_draw_what_the_whole_list_draws(llama: object) -> None:
    sampler = PowerSampler(llama, config=config())
    whole = sampler.sample(PROMPTS, num_samples=2)
    # PROMPTS holds [5] twice: the second one's samples are numbers 2 and 3 of that prompt.
    parts = [
        *sampler.sample(PROMPTS[:2], num_samples=2, first_sample=[0, 0]),
        *sampler.sample(PROMPTS[2:], num_samples=2, first_sample=[2, 0, 0, 0, 0]),
    ]
    for a, b in zip(whole, parts, strict=True):
        assert_same_chain(a, b)
    again = sampler.sample(PROMPTS[2:3], num_samples=2)
    assert_same_chain(again[0], whole[0])
    assert again[0].tokens != whole[4].tokens


def test_one_sampler_serves_prompts_of_other_lengths_and_weights_that_change() -> None:
    model = small_llama(torch.float32)
    sampler = PowerSampler(model, config=config())
    first = sampler.sample(PROMPTS)
    assert sampler.sample(PROMPTS[3:4])[0].tokens == first[3].tokens
    with torch.no_grad():
        for weight in model.parameters():
            weight.data.mul_(0.7)  # which no version counter sees
    changed = sampler.sample(PROMPTS)
    fresh = PowerSampler(model, config=config()).sample(PROMPTS)
    assert [s.tokens for s in changed] != [s.tokens for s in first]
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 0.3)
    for a, b in zip(changed, fresh, strict=True):
        assert_same_chain(a, b)
    fresh = PowerSampler(model, config=config()).sample(PROMPTS)
    for a, b in zip(sampler.sample(PROMPTS), fresh, strict=True):
        assert_same_chain(a, b)


def test_two_runs_of_one_sampler_do_not_mix(llama: object) -> None:
    sampler = PowerSampler(llama, config=config())
    one, other = sampler.iter_samples(PROMPTS), sampler.iter_samples(PROMPTS[::-1])
    pairs = [(next(one), next(other)) for _ in PROMPTS]
    expected = {tuple(sample.tokens) for sample in sampler.sample(PROMPTS)}
    for samples in zip(*pairs, strict=True):
        assert {tuple(sample.tokens) for sample in samples} == expected


def test_chains_of_one_prompt_differ(llama: object) -> None:
    sampler = PowerSampler(llama, config=config(alpha=1.0))  # alpha > 1 may agree on the mode
    samples = sampler.sample([PROMPTS[0], PROMPTS[0]], num_samples=4)
    assert len({tuple(sample.tokens) for sample in samples}) == 8


@pytest.mark.parametrize("num_lanes", [1, 16])
def test_other_lane_counts_give_the_same_tokens_and_decisions(
    llama: object, num_lanes: int
) -> None:
    for a, b in zip(draw(llama, config()), draw(llama, config(num_lanes=num_lanes)), strict=True):
        assert a.tokens == b.tokens
        assert torch.equal(a.trace.accepted, b.trace.accepted)
        assert torch.equal(a.trace.cut, b.trace.cut)
        torch.testing.assert_close(a.log_prob, b.log_prob, rtol=0, atol=1e-4)


def test_seeds_differ(llama: object) -> None:
    a, b = draw(llama, config(alpha=1.0)), draw(llama, config(alpha=1.0, seed=4))
    assert all(x.tokens != y.tokens for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_gives_the_same_scores(dtype: torch.dtype) -> None:
    model = small_llama(dtype)
    settings = config()
    samples = draw(model, settings)
    lanes = TransformersLaneModel(model, settings.num_lanes, 64)
    with lanes.running():
        for sample in samples:
            prompt = tuple(PROMPTS[sample.prompt_index])
            lane = sample.prompt_index % settings.num_lanes
            lanes.prefill(lane, prompt)
            tokens = torch.randint(0, VOCAB_SIZE, (settings.num_lanes,))  # the others' business
            positions = torch.zeros_like(tokens)
            fed = prompt[-1]
            for t, token in enumerate(sample.tokens):
                tokens[lane], positions[lane] = fed, len(prompt) - 1 + t
                logits = lanes.step(tokens, positions)
                scores = score_tokens(logits[lane], torch.tensor(token), alpha=settings.alpha)
                assert float(scores.log_prob) == float(sample.log_prob[t])
                fed = token


@pytest.mark.parametrize("early_rejection", [False, True])
@pytest.mark.parametrize("shared_prefix_skip", [False, True])
@pytest.mark.parametrize("proposal_temperature", [None, 0.8, 1.5])
def test_lanes_make_the_chain_of_the_pure_functions(
    early_rejection: bool, shared_prefix_skip: bool, proposal_temperature: float | None
) -> None:
    model = EnumerableModel(vocab_size=4, max_tokens=6, eos_logit=-1.5)
    settings = config(
        max_new_tokens=6,
        block_size=2,
        num_lanes=3,
        proposal_temperature=proposal_temperature,
        early_rejection=early_rejection,
        shared_prefix_skip=shared_prefix_skip,
        eos_token_id=EOS,
    )
    samples = draw(model, settings, [[1], [2, 3]])
    prompts = [(1,), (2, 3)]
    for sample, chain in zip(samples, _number_chains(prompts, 2), strict=True):
        state, infos, decoded = pure_chain(model, settings, chain.number)
        assert sample.tokens == list(state.tokens)
        assert sample.log_prob.tolist() == list(state.log_prob)
        assert sample.trace.accepted.tolist() == [info.accepted for info in infos]
        assert sample.trace.cut.tolist() == [info.cut for info in infos]
        assert sample.trace.log_accept_ratio.tolist() == [info.log_accept_ratio for info in infos]
        assert sample.decoded_tokens == decoded


def pure_chain(
    model: EnumerableModel, settings: PowerSamplingConfig, chain: int
) -> tuple[mh.MHState, list[mh.MHInfo], int]:
    """A chain made with `metropolis_hastings` and one call of the model per token."""
    s = settings.proposal_power

    def generate(
        prefix: tuple[int, ...], transition: int, banned: int | None, limit: int
    ) -> Iterator:
        while len(prefix) < limit:
            drawn = sample_tokens(
                model.logits[model.code(prefix)][None],
                alpha=s,
                seed=settings.seed,
                counters=torch.tensor([[mh.TOKEN_DRAW, len(prefix), transition, chain]]),
                banned=None if banned is None else torch.tensor([banned]),
            )
            token, banned = int(drawn.token), None
            yield mh.ScoredToken(token, float(drawn.log_prob), float(drawn.log_z))
            if token == EOS:
                return
            prefix = (*prefix, token)

    state, infos, decoded = None, [], 0
    for limit in settings.block_limits:
        if state is None or state.tokens[-1] != EOS:
            prefix = () if state is None else state.tokens
            extension = list(generate(prefix, 0, None, limit))
            decoded += len(extension)
            if state is None:
                state = mh.init(extension, alpha=settings.alpha, proposal_power=s)
            else:
                state = mh.extend(state, extension, alpha=settings.alpha, proposal_power=s)
        for _ in range(settings.num_mcmc_steps):
            transition = state.transition + 1
            state, info = mh.step(
                state,
                lambda prefix, banned, limit, transition=transition: generate(
                    prefix, transition, banned, limit
                ),
                limit=limit,
                alpha=settings.alpha,
                proposal_power=s,
                seed=settings.seed,
                chain=chain,
                early_rejection=settings.early_rejection,
                shared_prefix_skip=settings.shared_prefix_skip,
            )
            infos.append(info)
            decoded += info.decoded_tokens
    return state, infos, decoded
