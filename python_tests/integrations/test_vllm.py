"""The vLLM backend: the lane engine's chains, the law, records that stay where they belong."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from powerkernels import PowerSampler, PowerSamplingConfig
from powerkernels.power_sampling import metropolis_hastings as mh
from python_tests.power_sampling.enumerable import EOS, EnumerableModel, chi2_p_value

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's own, and those of what it imports
    pytest.importorskip("vllm", exc_type=ImportError)
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    from powerkernels.integrations import vllm as integration
    from powerkernels.integrations.vllm import PowerLogitsProcessor, VLLMPowerSampler, load_llm

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("vllm")]

VOCAB, CONTEXT = 71, 256
SIGNIFICANCE = 1e-4
# float32: two implementations of one forward, 2 layers of width 64. Seen: below 1e-5.
TOLERANCE = 1e-4
PROMPTS = [[5, 6, 7], [8] * 40 + [9] * 30, [9, 10], [5, 6, 8]]


def llama(folder: Path, *, vocab_size: int, seed: int = 0) -> transformers.LlamaForCausalLM:
    """A random Llama whose next-token distributions are far from uniform, saved."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=CONTEXT,
            bos_token_id=None,
            eos_token_id=EOS,
            initializer_range=0.3,
        )
    ).eval()
    model.save_pretrained(folder)
    return model


def small_llm(folder: Path, **engine_args: Any) -> Any:
    settings = dict(dtype="float32", max_model_len=CONTEXT, skip_tokenizer_init=True)
    return load_llm(folder, **(settings | engine_args))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def model(folder: Path) -> transformers.LlamaForCausalLM:
    return llama(folder, vocab_size=VOCAB)


@pytest.fixture(scope="module")
def llm(model: object, folder: Path) -> Any:
    return small_llm(folder, max_num_seqs=16)


@pytest.fixture(scope="module")
def crowded_llm(model: object, folder: Path) -> Any:
    """Blocks for three long requests at once, and prefills in chunks of 24 tokens."""
    return small_llm(folder, max_num_seqs=8, num_gpu_blocks_override=14, max_num_batched_tokens=24)


def config(**changes: Any) -> PowerSamplingConfig:
    values: dict = dict(alpha=2.0, max_new_tokens=40, block_size=10, num_mcmc_steps=4, seed=3)
    return PowerSamplingConfig(**(values | changes))


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(early_rejection=False),
        dict(shared_prefix_skip=False),
        dict(early_rejection=False, shared_prefix_skip=False),
        dict(alpha=4.0, proposal_temperature=0.5),
        dict(proposal_temperature=2.0),
        dict(top_k=5),
        dict(top_p=0.8, min_p=0.01),
        dict(eos_token_id=()),
        dict(eos_token_id=(3, 4), num_lanes=2),
        dict(num_lanes=12, early_rejection=False),
        dict(num_mcmc_steps=0),
        dict(num_mcmc_steps=9, block_size=40, num_lanes=24),
        dict(prefetch=False),
        dict(alpha=0.5, seed=2**64 - 1),
    ],
    ids=str,
)
def test_chains_are_those_of_the_lane_engine(
    model: transformers.LlamaForCausalLM, llm: Any, changes: dict
) -> None:
    sampler = VLLMPowerSampler(llm, config=config(**changes))
    ours = sampler.sample(PROMPTS, num_samples=2)
    lanes = PowerSampler(model, config=config(**changes)).sample(PROMPTS, num_samples=2)
    assert len(ours) == len(lanes) == 8
    for sample, expected in zip(ours, lanes, strict=True):
        assert (sample.prompt_index, sample.sample_index) == (
            expected.prompt_index,
            expected.sample_index,
        )
        # A uniform within rounding of a bound would part two chains; these seeds have none.
        assert sample.tokens == expected.tokens
        assert sample.finish_reason == expected.finish_reason
        assert sample.decoded_tokens == expected.decoded_tokens
        for name in ("block", "cut", "length", "accepted", "decoded"):
            assert torch.equal(getattr(sample.trace, name), getattr(expected.trace, name)), name
        close = dict(rtol=TOLERANCE, atol=TOLERANCE)
        torch.testing.assert_close(sample.log_prob, expected.log_prob, **close)
        torch.testing.assert_close(sample.log_q, expected.log_q, **close)
        torch.testing.assert_close(
            sample.trace.log_likelihood, expected.trace.log_likelihood, rtol=0, atol=1e-3
        )
        assert sample.confidence == pytest.approx(expected.confidence, abs=TOLERANCE)
    assert sampler.stats.finished_chains == 8
    assert sampler.stats.used_tokens == sum(sample.decoded_tokens for sample in ours)
    assert sampler.stats.decoded_tokens >= sampler.stats.used_tokens
    assert not llm.llm_engine.has_unfinished_requests()


def test_rows_to_spare_make_transitions_ahead(llm: Any) -> None:
    ahead = VLLMPowerSampler(llm, config=config(num_mcmc_steps=8, num_lanes=8))
    alone = VLLMPowerSampler(llm, config=config(num_mcmc_steps=8, prefetch=False))
    (sample,), (expected,) = ahead.sample(PROMPTS[0]), alone.sample(PROMPTS[0])
    assert sample.tokens == expected.tokens
    assert sample.decoded_tokens == expected.decoded_tokens
    assert ahead.stats.model_steps < alone.stats.model_steps
    assert ahead.stats.dropped_requests > 0
    assert alone.stats.dropped_requests == 0
    assert ahead.stats.decoded_tokens > ahead.stats.used_tokens == alone.stats.decoded_tokens
    assert not llm.llm_engine.has_unfinished_requests()


def logits_of(model: transformers.LlamaForCausalLM, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0, -1].double()


def test_no_record_is_misaligned_in_a_crowded_engine(
    model: transformers.LlamaForCausalLM, crowded_llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Preemptions, chunked prefills, prefix hits and requests of others, all at once; then each
    # record is compared with a forward over its whole prefix.
    preemptions = count_calls(crowded_llm, "_preempt_request", monkeypatch)
    records: list[tuple[list[int], Any]] = []
    prompt_of: dict[int, tuple[int, ...]] = {}
    begin, append = integration._ChainRun.begin, integration._Item.append

    def begun(chain: Any) -> Any:
        item = begin(chain)
        if item is not None:
            prompt_of[item.key] = chain.prompt
        return item

    def kept(item: Any, record: Any) -> None:
        records.append(([*prompt_of[item.key], *item.written.tokens], record))
        append(item, record)

    monkeypatch.setattr(integration._ChainRun, "begin", begun)
    monkeypatch.setattr(integration._Item, "append", kept)
    others: dict[str, list[int]] = {}

    def on_output(output: Any) -> None:
        others[output.request_id] = list(output.outputs[0].token_ids)

    greedy = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, detokenize=False)
    alone = {
        f"other-{i}": list(
            crowded_llm.generate({"prompt_token_ids": [20 + i] * 30}, greedy, use_tqdm=False)[0]
            .outputs[0]
            .token_ids
        )
        for i in range(2)
    }
    for i, name in enumerate(alone):
        crowded_llm.llm_engine.add_request(name, {"prompt_token_ids": [20 + i] * 30}, greedy)

    settings = config(alpha=1.5, max_new_tokens=60, block_size=20, num_mcmc_steps=5)
    sampler = VLLMPowerSampler(crowded_llm, config=settings, on_output=on_output)
    samples = sampler.sample(PROMPTS, num_samples=3)

    assert others == alone
    assert len(preemptions) > 0
    assert sampler.stats.cached_tokens > 0
    assert sampler.stats.requests > 100
    assert len(records) >= sampler.stats.used_tokens
    s = settings.proposal_power
    for prefix, record in records:
        log_p = logits_of(model, prefix).log_softmax(-1)
        assert record.log_prob == pytest.approx(float(log_p[record.token]), abs=TOLERANCE)
        assert record.log_z == pytest.approx(float((s * log_p).logsumexp(-1)), abs=TOLERANCE)
        entropy = -float((log_p.exp() * log_p).sum())
        assert record.entropy == pytest.approx(entropy, abs=TOLERANCE)
    lanes = PowerSampler(model, config=settings).sample(PROMPTS, num_samples=3)
    assert [sample.tokens for sample in samples] == [sample.tokens for sample in lanes]


def count_calls(llm: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows by one with each call of a method of the scheduler's."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    method, calls = getattr(scheduler, name), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return method(*args, **kwargs)

    monkeypatch.setattr(scheduler, name, counted)
    return calls


PROMPT = [1]
NUM_CHAINS = 3000
# Two blocks: extension, growth into the second limit and a chain that ended in the first.
LAW = dict(alpha=2.0, max_new_tokens=4, block_size=2, num_mcmc_steps=4, seed=11)


@pytest.fixture(scope="module")
def enumerable(tmp_path_factory: pytest.TempPathFactory) -> tuple[EnumerableModel, Any]:
    """A Llama of three tokens as a table of logits, and in vLLM."""
    folder = tmp_path_factory.mktemp("enumerable")
    model = llama(folder, vocab_size=3, seed=1)
    table = EnumerableModel(vocab_size=3, max_tokens=4)
    prefixes: list[list[int]] = [[]]
    while prefixes:
        prefix = prefixes.pop()
        table.logits[table.code(tuple(prefix))] = logits_of(model, PROMPT + prefix).float()
        if len(prefix) < 3:
            prefixes.extend([*prefix, token] for token in range(3))
    return table, small_llm(folder, max_num_seqs=256)


def law_p_value(table: EnumerableModel, llm: Any, **changes: Any) -> float:
    settings = PowerSamplingConfig(**(LAW | changes))
    samples = VLLMPowerSampler(llm, config=settings).sample([PROMPT], num_samples=NUM_CHAINS)
    index = {x: i for i, x in enumerate(table.completions(settings.max_new_tokens))}
    counts = np.zeros(len(index) + 1)  # the last cell is for what is no completion
    for sample in samples:
        counts[index.get(tuple(sample.tokens), -1)] += 1
    assert counts.sum() == NUM_CHAINS
    return chi2_p_value(counts, np.append(table.chain_law(settings), 0.0))


@pytest.mark.parametrize("early_rejection", [False, True])
@pytest.mark.parametrize("shared_prefix_skip", [False, True])
def test_law(
    enumerable: tuple[EnumerableModel, Any], early_rejection: bool, shared_prefix_skip: bool
) -> None:
    p = law_p_value(
        *enumerable, early_rejection=early_rejection, shared_prefix_skip=shared_prefix_skip
    )
    assert p > SIGNIFICANCE


def test_without_length_term_the_law_is_wrong(
    enumerable: tuple[EnumerableModel, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        mh, "_log_accept_ratio", lambda state, proposed: proposed.w_cumsum[-1] - state.w_cumsum[-1]
    )
    assert law_p_value(*enumerable) < 1e-8


def test_noise_is_what_two_visits_differ_by(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Exact logits first, then logits that are another model's at every visit.
    sampler = VLLMPowerSampler(llm, config=config())
    samples = sampler.sample(PROMPTS, num_samples=4)
    noises = [sample.log_z_noise for sample in samples]
    proposals = sum(int((sample.trace.decoded > 0).sum()) for sample in samples)
    found = sampler.stats.log_z_noise
    assert found.visits == sum(noise.visits for noise in noises) == proposals
    assert found.max == max(noise.max for noise in noises if noise.visits)
    assert 0 <= found.mean <= found.max < TOLERANCE

    size, generator = 0.05, torch.Generator().manual_seed(0)
    apply = PowerLogitsProcessor.apply

    def disturbed(self: PowerLogitsProcessor, logits: torch.Tensor) -> torch.Tensor:
        return apply(self, logits.add_(size * torch.randn(logits.shape, generator=generator)))

    monkeypatch.setattr(PowerLogitsProcessor, "apply", disturbed)
    sampler.sample(PROMPTS, num_samples=4)
    found = sampler.stats.log_z_noise
    assert size / 20 < found.mean < found.max < 20 * size


def test_text_prompts_use_the_tokenizer_given(llm: Any) -> None:
    class Tokenizer:
        eos_token_id = EOS

        def __call__(self, text: str) -> dict:
            return {"input_ids": [int(word) for word in text.split()]}

        def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
            return " ".join(map(str, tokens))

    (as_text,) = VLLMPowerSampler(llm, Tokenizer(), config=config()).sample("5 6 7")
    (as_ids,) = VLLMPowerSampler(llm, config=config()).sample([5, 6, 7])
    assert as_text.tokens == as_ids.tokens
    assert as_text.text == " ".join(map(str, as_text.tokens))
    assert as_ids.text is None


def test_interrupt_leaves_the_engine_free(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = VLLMPowerSampler(llm, config=config(num_lanes=2))
    everything = sampler.sample(PROMPTS)
    step = integration._Run.step

    def interrupted(run: Any) -> list:
        if sampler.stats.finished_chains >= 2:
            raise KeyboardInterrupt
        return step(run)

    with monkeypatch.context() as patch:
        patch.setattr(integration._Run, "step", interrupted)
        samples = sampler.sample(PROMPTS)
    assert sampler.stats.interrupted
    assert len(samples) >= 2
    for sample in samples:
        assert sample.tokens == everything[sample.prompt_index].tokens
    assert not llm.llm_engine.has_unfinished_requests()
    again = sampler.sample(PROMPTS)
    assert [sample.tokens for sample in again] == [sample.tokens for sample in everything]


def test_requests_have_no_seed_of_their_own(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # vLLM's CPU build crashes with one in a chunked prefill.
    asked = []
    add_request = llm.llm_engine.add_request

    def add(request_id: str, prompt: Any, params: SamplingParams) -> str:
        asked.append(params)
        return add_request(request_id, prompt, params)

    monkeypatch.setattr(llm.llm_engine, "add_request", add)
    VLLMPowerSampler(llm, config=config()).sample(PROMPTS)
    assert asked
    assert all(params.seed is None and params.temperature == 0 for params in asked)


# What the processor does with rows, against a batch kept in the plainest way.


def processor() -> PowerLogitsProcessor:
    return PowerLogitsProcessor(None, torch.device("cpu"), False)


def params(key: int | None, **changes: Any) -> SamplingParams:
    if key is None:
        return SamplingParams(temperature=0.0)
    law = integration.Law(7, 2.0, None, None, None)
    draw = integration.Draw(key, 0, 1, key, -1, law)._replace(**changes)
    return SamplingParams(
        temperature=0.0, extra_args={integration.EXTRA_ARG: draw._asdict() | {"law": tuple(law)}}
    )


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_followed(seed: int) -> None:
    random = np.random.default_rng(seed)
    found, batch, key = processor(), {}, 0
    for _ in range(30):
        removed = [i for i in batch if random.random() < 0.3]
        for i in removed:
            del batch[i]
        added = []
        for _ in range(random.integers(0, 4)):
            key += 1
            index = int(random.integers(0, 8))  # a row in use is replaced
            name = None if random.random() < 0.3 else key
            output: list[int] = [0] * int(random.integers(0, 5))
            batch[index] = (name, output)
            added.append((index, params(name), None, output))
        moved = []
        for _ in range(random.integers(0, 4)):
            a, b = (int(i) for i in random.choice(8, 2, replace=False))
            if a not in batch:
                continue
            swap = bool(random.random() < 0.5)
            old_a, old_b = batch.pop(a), batch.pop(b, None)
            batch[b] = old_a
            if swap and old_b is not None:
                batch[a] = old_b
            direction = MoveDirectionality.SWAP if swap else MoveDirectionality.UNIDIRECTIONAL
            moved.append((a, b, direction))
        found.update_state(BatchUpdate(8, removed, added, moved))
        found.update_state(None)
        for _, output in batch.values():
            output.append(0)  # vLLM appends to its own list
        found.apply(torch.zeros(8, 5))
        expected = {(name, len(output)) for name, output in batch.values() if name is not None}
        assert set(found.take()) == expected
    assert found.take() == {}


def test_other_rows_are_left_alone() -> None:
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    one = processor()
    added = [(0, params(None), None, []), (1, params(4), None, [2]), (2, params(None), None, [])]
    one.update_state(BatchUpdate(3, [], added, []))
    after = one.apply(logits)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    ((place, record),) = one.take().items()
    assert place == (4, 1)
    assert int(after[1].argmax()) == record.token
    assert bool((after[1] > -math.inf).sum() == 1)
    log_p = before[1].double().log_softmax(-1)
    assert record.log_prob == pytest.approx(float(log_p[record.token]), abs=1e-6)
    assert record.log_z == pytest.approx(float((2 * log_p).logsumexp(-1)), abs=1e-6)


def test_ban_is_of_the_first_token_alone() -> None:
    logits = torch.full((2, 4), -30.0)
    logits[:, 3] = 0.0  # all but drawn for sure
    one = processor()
    added = [(0, params(1, banned=3), None, []), (1, params(2, banned=3), None, [3])]
    one.update_state(BatchUpdate(2, [], added, []))
    one.apply(logits)
    records = one.take()
    assert records[1, 0].token != 3
    assert records[2, 1].token == 3


def test_last_record_of_a_position_counts() -> None:
    one = processor()
    one.update_state(BatchUpdate(1, [], [(0, params(1), None, [])], []))
    for logit in (0.0, 5.0):
        one.apply(torch.tensor([[logit, 0.0]]))
    ((place, record),) = one.take().items()
    assert place == (1, 0)
    assert record.log_z == pytest.approx(
        float((2 * torch.tensor([5.0, 0.0]).log_softmax(-1)).logsumexp(-1)), abs=1e-5
    )


# Bad input.


@pytest.mark.parametrize("name", ["VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_USE_V2_MODEL_RUNNER"])
def test_load_refuses_settings_that_lose_records(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError, match=f"{name} must be 0, got '1'"):
        load_llm(folder)


def test_load_refuses_what_vllm_does_not_offer(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("offered here")
    with pytest.raises(ValueError, match="batch_invariant"):
        load_llm(folder, batch_invariant=True)


@pytest.mark.parametrize("version", ["0.31.9", "0.9.2", "0.31.0rc1"])
def test_other_versions_are_refused(
    llm: Any, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(integration.vllm, "__version__", version)
    with pytest.raises(ImportError, match=rf"vLLM {version} is too old.*0\.32"):
        VLLMPowerSampler(llm, config=config())


def test_newer_versions_are_taken() -> None:
    for version in ("0.32.0", "0.32.1+cpu", "0.40.0.dev3", "1.0"):
        integration.check_version(version)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("scheduler_config.async_scheduling", True, "async_scheduling=False"),
        ("scheduler_config.stream_interval", 4, "stream_interval=1"),
        ("parallel_config.pipeline_parallel_size", 2, "pipeline_parallel_size=1"),
        ("parallel_config.data_parallel_size", 2, "data_parallel_size=1"),
        ("model_config.logits_processors", None, "PowerLogitsProcessor"),
    ],
)
def test_llm_with_other_settings_is_refused(
    llm: Any, monkeypatch: pytest.MonkeyPatch, path: str, value: Any, message: str
) -> None:
    part, name = path.split(".")
    monkeypatch.setattr(getattr(llm.llm_engine.vllm_config, part), name, value)
    with pytest.raises(ValueError, match=message):
        VLLMPowerSampler(llm, config=config())


def test_llm_in_another_process_is_refused(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(llm.llm_engine, "model_executor")
    with pytest.raises(ValueError, match="VLLM_ENABLE_V1_MULTIPROCESSING=0"):
        VLLMPowerSampler(llm, config=config())


def test_second_model_runner_is_refused(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    always = property(lambda _: True)
    monkeypatch.setattr(type(llm.llm_engine.vllm_config), "use_v2_model_runner", always)
    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        VLLMPowerSampler(llm, config=config())


def test_arguments_are_checked(llm: Any) -> None:
    with pytest.raises(TypeError, match=r"llm must be a vllm\.LLM, got str"):
        VLLMPowerSampler("path", config=config())
    with pytest.raises(TypeError, match="config must be a PowerSamplingConfig"):
        VLLMPowerSampler(llm, config={"alpha": 4})
    with pytest.raises(ValueError, match=r"config\.compat must be None on vLLM"):
        VLLMPowerSampler(llm, config=config(compat="reference"))
    for name in ("device_loop", "compile"):
        with pytest.raises(ValueError, match=rf"config\.{name} is a setting of the lane engine"):
            VLLMPowerSampler(llm, config=config(**{name: True}))
    sampler = VLLMPowerSampler(llm, config=config())
    with pytest.raises(ValueError, match="tokenizer is needed"):
        sampler.sample("some text")
    with pytest.raises(ValueError, match=f"context of {CONTEXT}"):
        sampler.sample([[5] * (CONTEXT - 39)])
    with pytest.raises(ValueError, match=rf"token ids from 0 to {VOCAB}"):
        sampler.sample([[VOCAB]])
    with pytest.raises(VLLMValidationError, match="temperature 0"):
        llm.generate(
            {"prompt_token_ids": [5]},
            SamplingParams(temperature=1.0, extra_args=params(1).extra_args),
        )


@pytest.fixture
def other_request(llm: Any) -> Iterator[None]:
    llm.llm_engine.add_request("other", {"prompt_token_ids": [5]}, SamplingParams(max_tokens=200))
    yield
    llm.llm_engine.abort_request(["other"])


@pytest.mark.usefixtures("other_request")
def test_requests_of_others_are_not_lost_silently(llm: Any) -> None:
    with pytest.raises(ValueError, match="1 unfinished requests of others"):
        VLLMPowerSampler(llm, config=config()).sample([[5]])


def test_somebody_else_steps_the_engine(llm: Any) -> None:
    samples = VLLMPowerSampler(llm, config=config(num_lanes=2)).iter_samples(PROMPTS)
    next(samples)
    llm.llm_engine.step()
    with pytest.raises(RuntimeError, match="stepped by somebody else"):
        list(samples)
    assert not llm.llm_engine.has_unfinished_requests()


def test_logits_that_are_no_distribution(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    apply = PowerLogitsProcessor.apply
    monkeypatch.setattr(
        PowerLogitsProcessor, "apply", lambda self, logits: apply(self, logits.fill_(math.nan))
    )
    with pytest.raises(FloatingPointError, match="finite or -inf"):
        VLLMPowerSampler(llm, config=config()).sample([[5]])
    assert not llm.llm_engine.has_unfinished_requests()
