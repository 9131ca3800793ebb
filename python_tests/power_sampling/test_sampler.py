"""PowerSampler: prompts, results, interrupts, progress, the model left as it was, errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from powerkernels import PowerSampler, PowerSamplingConfig
from powerkernels.power_sampling.engine import SamplerStats
from powerkernels.power_sampling.progress import ProgressLine, describe
from python_tests import tiers
from python_tests.power_sampling.enumerable import EOS, EnumerableModel, chi2_p_value
from python_tests.tiny_model import CHAT_TEMPLATE, save_tiny_model

SMALL = dict(alpha=2.0, max_new_tokens=8, block_size=4, num_mcmc_steps=3, seed=1)


def config(**changes: object) -> PowerSamplingConfig:
    return PowerSamplingConfig(**(SMALL | changes))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    folder: Path = save_tiny_model(tmp_path_factory.mktemp("tiny"), template=CHAT_TEMPLATE)
    return (
        transformers.AutoModelForCausalLM.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder),
    )


def test_kinds_of_prompts(tiny: tuple) -> None:
    model, tokenizer = tiny
    chat = [{"role": "user", "content": "one two"}]
    ids = tokenizer("user one two assistant")["input_ids"]
    sampler = PowerSampler(model, tokenizer, config=config(num_lanes=2))
    as_text = sampler.sample("user one two assistant")
    for prompts in ([chat], chat, ids, [ids], torch.tensor(ids), ["user one two assistant"]):
        (sample,) = sampler.sample(prompts)
        assert sample.tokens == as_text[0].tokens
    assert as_text[0].text == tokenizer.decode(as_text[0].tokens, skip_special_tokens=True)


def test_results(tiny: tuple) -> None:
    model, tokenizer = tiny
    sampler = PowerSampler(model, tokenizer, config=config())
    prompts = ["one two three", "four"]
    samples = sampler.sample(prompts, num_samples=3)
    assert [(s.prompt_index, s.sample_index) for s in samples] == [
        (prompt, sample) for prompt in range(2) for sample in range(3)
    ]
    for sample in samples:
        prompt = tokenizer(prompts[sample.prompt_index])["input_ids"]
        n = len(sample.tokens)
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + sample.tokens])).logits[0, len(prompt) - 1 : -1]
        log_p = logits.double().log_softmax(-1)
        truth = log_p.gather(1, torch.tensor(sample.tokens)[:, None])[:, 0]
        torch.testing.assert_close(sample.log_prob.double(), truth, rtol=1e-4, atol=1e-4)
        assert sample.log_likelihood == pytest.approx(float(truth.sum()), abs=1e-3)
        confidence = float((log_p.exp() * log_p).sum(-1).mean())
        assert sample.confidence == pytest.approx(confidence, abs=1e-4)
        assert sample.finish_reason == ("stop" if sample.tokens[-1] == 1 else "length")
        assert 1 not in sample.tokens[:-1]
        assert n == 8 or sample.finish_reason == "stop"
        assert sample.trace.accepted.shape == (6,)
        assert sample.acceptance_rate == pytest.approx(sample.trace.accepted.double().mean())
        assert int(sample.trace.length[-1]) == n
        assert float(sample.trace.log_likelihood[-1]) == pytest.approx(sample.log_likelihood)
        assert sample.decoded_tokens >= n + int(sample.trace.decoded.sum()) - 8
        assert sample.log_q.shape == sample.log_prob.shape
        assert bool((sample.log_q <= 0).all())
    assert sampler.stats.finished_chains == 6
    assert sampler.stats.used_tokens == sum(s.decoded_tokens for s in samples)
    assert sampler.stats.decoded_tokens >= sampler.stats.used_tokens
    assert sampler.stats.kept_tokens == sum(len(s.tokens) for s in samples)
    assert 0 < sampler.stats.lane_occupancy <= 1


def test_model_is_left_as_it_was(tiny: tuple) -> None:
    model, _ = tiny
    model.train()
    before = model.config._attn_implementation
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    PowerSampler(model, config=config()).sample([[2, 3]])
    assert model.training
    model.eval()
    assert model.config._attn_implementation == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert model(torch.tensor([[2, 3]])).logits.requires_grad


def test_between_samples_the_model_is_free(tiny: tuple) -> None:
    model, _ = tiny
    samples = PowerSampler(model, config=config(num_lanes=1)).iter_samples([[2], [3], [4]])
    for sample in samples:
        assert not torch.is_inference_mode_enabled()
        loss = model(torch.tensor([[2, *sample.tokens]])).logits.sum()
        (loss * sample.log_prob.sum()).backward()
    model.zero_grad()


def test_interrupt_keeps_what_is_finished(tiny: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny
    sampler = PowerSampler(model, tokenizer, config=config(num_lanes=1))
    everything = sampler.sample(["one", "two", "three"])

    def interrupt(line: ProgressLine) -> None:
        if sampler.stats.finished_chains == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(ProgressLine, "update", interrupt)
    samples = sampler.sample(["one", "two", "three"])
    assert sampler.stats.interrupted
    assert [s.tokens for s in samples] == [s.tokens for s in everything[:2]]
    assert model.config._attn_implementation != "powerkernels_lanes"


def test_progress_line(capsys: pytest.CaptureFixture) -> None:
    stats = SamplerStats(num_chains=4, num_lanes=2, finished_chains=1, decoded_tokens=500)
    stats.busy_lanes, stats.transitions, stats.accepted_transitions = 2, 10, 4
    stats.fraction_done = 0.25
    line = describe(stats, 20.0)
    for part in ("1/4 chains", "25 tok/s", "2/2 lanes busy", "acceptance 0.40", "1:00 left"):
        assert part in line
    shown = ProgressLine(stats, show=True)
    shown._drawn -= 1
    shown.update()
    shown.close()
    assert "1/4 chains" in capsys.readouterr().err
    ProgressLine(stats).update()  # standard error is not a terminal here
    assert capsys.readouterr().err == ""


def test_two_token_example_of_the_paper() -> None:
    # The example's four numbers add up to .9; what counts is their ratio.
    a, b = 1, 2
    pairs = {(a, a): 0.0, (a, b): 0.40, (b, a): 0.25, (b, b): 0.25}
    model = EnumerableModel(vocab_size=3, max_tokens=2)
    first = {x: sum(p for pair, p in pairs.items() if pair[0] == x) for x in (a, b)}
    table = torch.zeros_like(model.logits)
    table[model.code(()), [a, b]] = torch.tensor([first[a], first[b]])
    for (x, y), p in pairs.items():
        table[model.code((x,)), y] = p / first[x]
    model.logits = table.log()

    def first_token_counts(num_mcmc_steps: int) -> torch.Tensor:
        settings = PowerSamplingConfig(
            alpha=2.0,
            max_new_tokens=2,
            block_size=2,
            num_mcmc_steps=num_mcmc_steps,
            num_lanes=1000,
            eos_token_id=(),
        )
        samples = PowerSampler(model, config=settings).sample([[1]], num_samples=4000)
        first_tokens = torch.tensor([sample.tokens[0] for sample in samples])
        return torch.stack(((first_tokens == a).sum(), (first_tokens == b).sum())).double()

    def law(weight_a: float, weight_b: float) -> torch.Tensor:
        return torch.tensor([weight_a, weight_b], dtype=torch.float64) / (weight_a + weight_b)

    power = first_token_counts(40).numpy()
    low_temperature = first_token_counts(0).numpy()
    assert chi2_p_value(power, law(0.160, 0.125).numpy()) > 1e-4
    assert chi2_p_value(low_temperature, law(0.160, 0.250).numpy()) > 1e-4
    assert chi2_p_value(low_temperature, law(0.160, 0.125).numpy()) < 1e-12


def test_without_eos_completions_have_full_length(tiny: tuple) -> None:
    model, _ = tiny
    for sample in PowerSampler(model, config=config(eos_token_id=())).sample([[2]], num_samples=8):
        assert len(sample.tokens) == 8
        assert sample.finish_reason == "length"


def test_vocabulary_of_one() -> None:
    model = EnumerableModel(vocab_size=1, max_tokens=3)
    (sample,) = PowerSampler(model, config=config(max_new_tokens=3, eos_token_id=())).sample([[0]])
    assert sample.tokens == [0, 0, 0]
    assert sample.log_likelihood == 0.0
    (sample,) = PowerSampler(model, config=config(max_new_tokens=3, eos_token_id=EOS)).sample([[0]])
    assert sample.tokens == [0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_logits_are_an_error(value: float) -> None:
    model = EnumerableModel(vocab_size=3, max_tokens=8)
    model.logits[:] = value
    with pytest.raises(FloatingPointError, match="logits"):
        PowerSampler(model, config=config(eos_token_id=EOS)).sample([[1]])


def test_minus_infinity_is_never_drawn() -> None:
    model = EnumerableModel(vocab_size=3, max_tokens=8)
    model.logits[:, 2] = -torch.inf
    samples = PowerSampler(model, config=config(eos_token_id=EOS)).sample([[1]], num_samples=50)
    assert all(2 not in sample.tokens for sample in samples)


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([], ValueError, "prompts must hold at least one"),
        ([[]], ValueError, r"prompts\[0\] must hold at least one token"),
        ([[1], ""], ValueError, r"prompts\[1\] must hold at least one token"),
        ([[2, 9]], ValueError, r"prompts\[0\] must hold token ids from 0 to 9"),
        ([[-1]], ValueError, r"prompts\[0\] must hold token ids"),
        ([[2.5]], TypeError, r"prompts\[0\] must be a string"),
        (7, TypeError, "prompts must be"),
        ([b"one"], TypeError, r"prompts\[0\] must be a string"),
        ([[2] * 57], ValueError, r"prompts\[0\] and max_new_tokens must fit .* 64 tokens"),
    ],
)
def test_bad_prompts(tiny: tuple, prompts: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PowerSampler(*tiny, config=config()).sample(prompts)


def test_longest_prompt_that_fits(tiny: tuple) -> None:
    (sample,) = PowerSampler(*tiny, config=config()).sample([[2] * 56])
    assert sample.tokens


def test_text_without_tokenizer(tiny: tuple) -> None:
    with pytest.raises(ValueError, match=r"tokenizer is needed for prompts\[0\]"):
        PowerSampler(tiny[0], config=config()).sample("one")


def test_encode_gives_what_sample_takes(tiny: tuple) -> None:
    model, tokenizer = tiny
    sampler = PowerSampler(model, tokenizer, config=config(num_lanes=2))
    chat = [{"role": "user", "content": "one two"}]
    ids = sampler.encode(chat)
    assert ids == tokenizer("user one two assistant")["input_ids"]
    (of_chat,), (of_ids,) = sampler.sample([chat]), sampler.sample([ids])
    assert of_chat.tokens == of_ids.tokens
    with pytest.raises(ValueError, match="prompt must hold at least one token"):
        sampler.encode("")
    with pytest.raises(ValueError, match="prompt and max_new_tokens must fit"):
        sampler.encode([2] * 57)


@pytest.mark.parametrize(
    ("first_sample", "message"),
    [
        ([0], "first_sample must hold one number for each of the 2 prompts, got 1"),
        ([0, -1], r"first_sample\[1\] must be an int >= 0, got -1"),
        ([0.5, 1], r"first_sample\[0\] must be an int >= 0"),
        ([True, 1], r"first_sample\[0\] must be an int >= 0"),
    ],
)
def test_bad_first_sample(tiny: tuple, first_sample: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PowerSampler(*tiny, config=config()).sample(["one", "two"], first_sample=first_sample)


@pytest.mark.parametrize("num_samples", [0, -1, 1.5, True])
def test_bad_num_samples(tiny: tuple, num_samples: object) -> None:
    with pytest.raises(ValueError, match="num_samples must be an int >= 1"):
        PowerSampler(*tiny, config=config()).sample("one", num_samples)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"alpha": -0.1}, ValueError),
        ({"alpha": float("nan")}, ValueError),
        ({"alpha": float("inf")}, ValueError),
        ({"alpha": "4"}, TypeError),
        ({"max_new_tokens": 0}, ValueError),
        ({"max_new_tokens": -3}, ValueError),
        ({"max_new_tokens": 2.0}, TypeError),
        ({"block_size": 0}, ValueError),
        ({"num_mcmc_steps": -1}, ValueError),
        ({"proposal_temperature": 0.0}, ValueError),
        ({"proposal_temperature": -1.0}, ValueError),
        ({"proposal_temperature": float("nan")}, ValueError),
        ({"proposal_temperature": 1e-320}, ValueError),
        ({"seed": -1}, ValueError),
        ({"seed": 2**64}, ValueError),
        ({"early_rejection": 1}, TypeError),
        ({"shared_prefix_skip": None}, TypeError),
        ({"num_lanes": 0}, ValueError),
        ({"prefetch": 1}, TypeError),
        ({"compile": None}, TypeError),
        ({"device_loop": "yes"}, TypeError),
        ({"top_k": 0}, ValueError),
        ({"top_k": 2.0}, TypeError),
        ({"top_p": 0.0}, ValueError),
        ({"top_p": 1.1}, ValueError),
        ({"top_p": float("nan")}, ValueError),
        ({"min_p": -0.1}, ValueError),
        ({"min_p": "x"}, TypeError),
        ({"compat": "public"}, ValueError),
        ({"eos_token_id": -1}, ValueError),
        ({"eos_token_id": (1, "x")}, TypeError),
    ],
)
def test_bad_settings_name_the_argument(change: dict, error: type[Exception]) -> None:
    (name,) = change
    with pytest.raises(error, match=name):
        config(**change)


def test_block_larger_than_the_completion_is_one_block() -> None:
    assert config(block_size=100).block_limits == (8,)
    assert config(block_size=3).block_limits == (3, 6, 8)
    assert PowerSamplingConfig().block_limits == tuple(range(192, 3073, 192))


@tiers.examples(0.1)
@given(
    alpha=st.floats(0, 8, allow_nan=False),
    max_new_tokens=st.integers(1, 5),
    block_size=st.integers(1, 7),
    num_mcmc_steps=st.integers(0, 3),
    proposal_temperature=st.none() | st.floats(0.1, 4) | st.just(float("inf")),
    seed=st.integers(0, 2**64 - 1),
    num_lanes=st.integers(1, 5),
    compat=st.sampled_from([None, "reference"]),
    num_samples=st.integers(1, 4),
    vocab_size=st.integers(1, 4),
    switches=st.tuples(*[st.booleans()] * 4),
    prompts=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=4),
)
def test_any_legal_settings_work(
    alpha: float,
    max_new_tokens: int,
    block_size: int,
    num_mcmc_steps: int,
    proposal_temperature: float | None,
    seed: int,
    num_lanes: int,
    compat: str | None,
    num_samples: int,
    vocab_size: int,
    switches: tuple[bool, bool, bool, bool],
    prompts: list[list[int]],
) -> None:
    has_eos, early_rejection, shared_prefix_skip, prefetch = switches
    model = EnumerableModel(vocab_size=vocab_size, max_tokens=5)
    settings_ = PowerSamplingConfig(
        alpha=alpha,
        max_new_tokens=max_new_tokens,
        block_size=block_size,
        num_mcmc_steps=num_mcmc_steps,
        proposal_temperature=proposal_temperature,
        seed=seed,
        num_lanes=num_lanes,
        early_rejection=early_rejection,
        shared_prefix_skip=shared_prefix_skip,
        prefetch=prefetch,
        compat=compat,
        eos_token_id=EOS if has_eos else (),
    )
    samples = PowerSampler(model, config=settings_).sample(prompts, num_samples)
    assert len(samples) == len(prompts) * num_samples
    possible = set(model.completions(max_new_tokens, eos=has_eos))
    if compat:  # there a chain that has shrunk may end below the limit
        possible = {x[:n] for x in possible for n in range(1, len(x) + 1)}
    for sample in samples:
        assert tuple(sample.tokens) in possible
        assert sample.log_likelihood == pytest.approx(
            model.log_prob(tuple(sample.tokens)), rel=1e-4, abs=1e-4
        )
