"""PowerSampler: prompts in, samples from p^alpha of a causal LM out."""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from powerkernels.power_sampling.config import PowerSamplingConfig
from powerkernels.power_sampling.engine import (
    Chain,
    FinishedChain,
    LaneEngine,
    LogZNoise,
    SamplerStats,
)
from powerkernels.power_sampling.lane_model import LaneModel, TransformersLaneModel
from powerkernels.power_sampling.lane_state import TRACE_FIELDS
from powerkernels.power_sampling.progress import ProgressLine

DEFAULT_MIN_LANES, DEFAULT_MAX_LANES = 8, 16
# A CPU reads weights for a few rows in the time of one, but not for 8: measured on two cores, one
# prompt is done soonest on 4 lanes.
MIN_LANES_OF_CPU = 4
# Lengths of the cache, so that prompts of other lengths find one that serves.
LENGTH_STEP = 64

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]] | Tensor


class MHTrace(NamedTuple):
    """The transitions of a chain in order, one element each."""

    block: Tensor  # int64
    cut: Tensor  # int64, m
    length: Tensor  # int64, tokens of the completion after the transition
    accepted: Tensor  # bool
    log_accept_ratio: Tensor  # float64, log r, or its upper bound where rejected early
    log_likelihood: Tensor  # float64, log p of the completion after the transition, nats
    decoded: Tensor  # int64, tokens that the model decoded for it


@dataclass(frozen=True)
class PowerSample:
    """A completion drawn from p^alpha.

    Attributes:
        prompt_index: index of its prompt; sample_index: number among the prompt's samples.
        tokens: the completion's token ids, its EOS included.
        text: the completion decoded without special tokens; None without a tokenizer.
        log_prob: float32 [len(tokens)], log p(x_t | x_<t), nats.
        log_q: float32 [len(tokens)], log q(x_t | x_<t) of the proposal, nats.
        log_likelihood: log p of the completion under the model itself (alpha = 1), nats.
        confidence: minus the mean entropy of the next-token distributions, nats; <= 0.
        acceptance_rate: accepted share of the transitions, 0 to 1; NaN without transitions.
        decoded_tokens: tokens the model decoded for this chain, kept or not; without those of
            transitions that were made ahead and dropped.
        finish_reason: "stop" for an EOS, "length" for the limit.
        trace: the chain's transitions.
        log_z_noise: how far log_z of one prefix was apart in two visits, where the engine is one
            whose logits depend on the way to a prefix; None for the lanes, where they do not.
    """

    prompt_index: int
    sample_index: int
    tokens: list[int]
    text: str | None
    log_prob: Tensor
    log_q: Tensor
    log_likelihood: float
    confidence: float
    acceptance_rate: float
    decoded_tokens: int
    finish_reason: Literal["stop", "length"]
    trace: MHTrace
    log_z_noise: LogZNoise | None = None


class PowerSampler:
    """Metropolis-Hastings sampling from p(x)^alpha of a causal LM.

    Args:
        model: a transformers causal LM (left as it is), or a function
            ``(num_lanes, max_length) -> LaneModel`` for a model of one's own.
        tokenizer: its tokenizer; needed for prompts that are text or chat messages.
        config: the settings.

    What a model needs to run on lanes (its cache, packed weights, a CUDA graph) is kept from one
    call to the next; `release` frees it. Between calls weights may change.

    Attributes:
        stats: counts of the last or current run.

    Source: Karan & Du 2025, "Reasoning with Sampling", Algorithm 1, with the length term and growth
    to the block limit that make p^alpha the stationary law.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[int, int], LaneModel],
        tokenizer: Any = None,
        *,
        config: PowerSamplingConfig,
    ) -> None:
        if not isinstance(config, PowerSamplingConfig):
            raise TypeError(f"config must be a PowerSamplingConfig, got {type(config).__name__}")
        self._check_model(model)
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.stats = SamplerStats()
        self._engine: LaneEngine | None = None

    def _check_model(self, model: Any) -> None:
        if not callable(model):
            raise TypeError(
                "model must be a transformers causal LM or a function that makes a LaneModel, "
                f"got {type(model).__name__}"
            )

    def sample(
        self,
        prompts: Prompt | Sequence[Prompt],
        num_samples: int = 1,
        *,
        seed: int | None = None,
        first_sample: Sequence[int] | None = None,
        progress: bool | None = None,
    ) -> list[PowerSample]:
        """Draw `num_samples` completions of every prompt.

        Args:
            prompts: one prompt or several. A prompt is a string, a list of chat messages
                (``{"role": …, "content": …}``) or a list of token ids.
            num_samples: chains per prompt, >= 1.
            seed: of this call, 0 <= seed < 2^64; None is the config's.
            first_sample: for each prompt, the number of its first sample among the samples of equal
                prompts, >= 0: what earlier calls, or other parts of a data set, have drawn for it.
                Samples of other numbers are independent, a number gives the same sample again. None
                counts within this call.
            progress: a progress line on standard error; None shows it on a terminal only.

        Returns:
            The samples, prompt by prompt, in order. After an interrupt (Ctrl-C) those that were
            finished by then; `stats.interrupted` says so.

        Raises:
            TypeError, ValueError: an argument, by name.
            FloatingPointError: the model returned NaN.
        """
        samples: list[PowerSample] = []
        try:
            run = self.iter_samples(
                prompts, num_samples, seed=seed, first_sample=first_sample, progress=progress
            )
            for sample in run:
                samples.append(sample)  # what is finished survives an interrupt
        except KeyboardInterrupt:
            self.stats.interrupted = True
        return sorted(samples, key=lambda sample: (sample.prompt_index, sample.sample_index))

    def iter_samples(
        self,
        prompts: Prompt | Sequence[Prompt],
        num_samples: int = 1,
        *,
        seed: int | None = None,
        first_sample: Sequence[int] | None = None,
        progress: bool | None = None,
    ) -> Iterator[PowerSample]:
        """As `sample`, but yields each sample as soon as its chain has finished."""
        if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(f"num_samples must be an int >= 1, got {num_samples!r}")
        config = self.config if seed is None else replace(self.config, seed=seed)
        encoded = [
            self._encode(prompt, f"prompts[{i}]") for i, prompt in enumerate(_as_list(prompts))
        ]
        if not encoded:
            raise ValueError("prompts must hold at least one prompt, got none")
        for i, prompt in enumerate(encoded):
            self._check_context(prompt, f"prompts[{i}]")
        chains = _number_chains(encoded, num_samples, first_sample)
        self.stats = self._make_stats()
        return self._run(chains, config.seed, num_samples, progress)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of one prompt, as `sample` takes them.

        Raises:
            TypeError, ValueError: `sample` would refuse it.
        """
        ids = self._encode(prompt, "prompt")
        self._check_context(ids, "prompt")
        return list(ids)

    def release(self) -> None:
        """Free the cache and what else is kept between calls."""
        self._engine = None

    def _make_stats(self) -> SamplerStats:
        return SamplerStats()

    def _run(
        self, chains: list[Chain], seed: int, num_samples: int, progress: bool | None
    ) -> Iterator[PowerSample]:
        stats = self.stats
        num_lanes = num_lanes_for(self.config, len(chains), self._device_type())
        # The last token of a completion is never fed.
        max_length = max(len(chain.prompt) for chain in chains) + self.config.max_new_tokens - 1
        engine = self._take_engine(num_lanes, max_length)
        running = getattr(engine.model, "running", nullcontext)
        line = ProgressLine(stats, progress)
        run = engine.run(chains, stats, line.update, seed=seed)
        try:
            while True:
                # Left before each yield: whoever takes the sample finds the model, and torch's
                # gradient mode, as they were.
                with running():
                    finished = next(run, None)
                if finished is None:
                    return
                yield self._sample(finished, num_samples)
        finally:
            run.close()
            line.close()
            if isinstance(engine.model, TransformersLaneModel):
                self._engine = engine

    def _take_engine(self, num_lanes: int, max_length: int) -> LaneEngine:
        """The last run's engine if it serves, else a new one; nobody else has it meanwhile."""
        engine, self._engine = self._engine, None
        if not isinstance(self.model, nn.Module):
            return LaneEngine(self.model(num_lanes, max_length), self.config, self._eos())
        if engine is not None:
            model = engine.model
            assert isinstance(model, TransformersLaneModel)
            if model.num_lanes == num_lanes and model.max_length >= max_length and model.refresh():
                return engine
            del engine, model  # before the next one asks for memory
        rounded = -(-max_length // LENGTH_STEP) * LENGTH_STEP
        context = self._context()
        if context is not None:
            rounded = max(min(rounded, context), max_length)
        model = TransformersLaneModel(self.model, num_lanes, rounded, compile=self.config.compile)
        with model.running():
            return LaneEngine(model, self.config, self._eos())

    def _sample(self, finished: FinishedChain, num_samples: int) -> PowerSample:
        tokens = finished.tokens.tolist()
        column = dict(zip(TRACE_FIELDS, finished.trace.unbind(dim=1), strict=True))
        trace = MHTrace(
            block=column["block"].long(),
            cut=column["cut"].long(),
            length=column["length"].long(),
            accepted=column["accepted"].bool(),
            log_accept_ratio=column["log_accept_ratio"].clone(),
            log_likelihood=column["log_likelihood"].clone(),
            decoded=column["decoded"].long(),
        )
        text = None
        if self.tokenizer is not None:
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return PowerSample(
            prompt_index=finished.place // num_samples,
            sample_index=finished.place % num_samples,
            tokens=tokens,
            text=text,
            log_prob=finished.log_prob.clone(),
            log_q=finished.log_q.clone(),
            log_likelihood=float(finished.log_prob.double().sum()),
            confidence=-float(finished.entropy.double().mean()),
            acceptance_rate=float(trace.accepted.double().mean()),
            decoded_tokens=finished.decoded_tokens,
            finish_reason="stop" if finished.ended else "length",
            trace=trace,
            log_z_noise=finished.log_z_noise,
        )

    def _encode(self, prompt: Prompt, name: str) -> tuple[int, ...]:
        if isinstance(prompt, Tensor):
            prompt = prompt.tolist()
        is_text = isinstance(prompt, str)
        is_chat = _holds(prompt, Mapping)
        if not (is_text or is_chat or _holds(prompt, int) or prompt == []):
            raise TypeError(
                f"{name} must be a string, a list of chat messages or a list of token ids, "
                f"got {prompt!r}"
            )
        if (is_text or is_chat) and self.tokenizer is None:
            raise ValueError(
                f"tokenizer is needed for {name}, which is text; pass one or token ids"
            )
        if is_chat:
            encoding = self.tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=True, return_dict=True
            )
            ids = encoding["input_ids"]
        elif is_text:
            ids = self.tokenizer(prompt)["input_ids"]
        else:
            ids = prompt
        if len(ids) == 0:
            raise ValueError(f"{name} must hold at least one token, got none")
        vocab_size = self._vocab_size()
        for token in ids:
            if isinstance(token, bool) or token < 0 or (vocab_size and token >= vocab_size):
                raise ValueError(
                    f"{name} must hold token ids from 0 to {vocab_size or '…'} (excluded), "
                    f"got {token!r}"
                )
        return tuple(ids)

    def _vocab_size(self) -> int | None:
        config = getattr(self.model, "config", None)
        return None if config is None else config.get_text_config().vocab_size

    def _context(self) -> int | None:
        config: Any = getattr(self.model, "config", None)
        return config and getattr(config.get_text_config(), "max_position_embeddings", None)

    def _check_context(self, prompt: tuple[int, ...], name: str) -> None:
        context = self._context()
        if context and len(prompt) + self.config.max_new_tokens > context:
            raise ValueError(
                f"{name} and max_new_tokens must fit the model's context of {context} "
                f"tokens, got {len(prompt)} + {self.config.max_new_tokens}"
            )

    def _device_type(self) -> str | None:
        """Where the model is; None for a lane model of somebody's own."""
        if not isinstance(self.model, nn.Module):
            return None
        model: Any = self.model
        return str(model.get_input_embeddings().weight.device.type)

    def _generation_config(self) -> Any:
        return getattr(self.model, "generation_config", None)

    def _eos(self) -> tuple[int, ...]:
        ids = self.config.eos_token_id
        for owner in (self._generation_config(), self.tokenizer):
            if ids is None:
                ids = getattr(owner, "eos_token_id", None)
        if ids is None:
            return ()
        return (ids,) if isinstance(ids, int) else tuple(ids)


def num_lanes_for(
    config: PowerSamplingConfig, num_chains: int, device_type: str | None = None
) -> int:
    """Rows of the static batch of a run of `num_chains` chains."""
    fewest = MIN_LANES_OF_CPU if device_type == "cpu" else DEFAULT_MIN_LANES
    at_least = fewest if config.prefetch else 1
    return config.num_lanes or min(max(num_chains, at_least), DEFAULT_MAX_LANES)


def _as_list(prompts: Any) -> list[Any]:
    """A list of prompts, whether one or several were given."""
    single = isinstance(prompts, str) or _holds(prompts, int) or _holds(prompts, Mapping)
    if isinstance(prompts, Tensor):
        single = prompts.ndim == 1
    if single:
        return [prompts]
    if isinstance(prompts, (bytes, Mapping)) or not hasattr(prompts, "__iter__"):
        raise TypeError(f"prompts must be a prompt or a list of prompts, got {prompts!r}")
    return list(prompts)


def _holds(value: Any, kind: type) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], kind)


def _number_chains(
    prompts: list[tuple[int, ...]], num_samples: int, first_sample: Sequence[int] | None = None
) -> list[Chain]:
    """Number the chains by what they are, so that no result depends on the order of the prompts.

    A number is 32 bits of a hash of the prompt plus the sample's index among the samples of equal
    prompts: chains of one prompt always have different numbers; two prompts share uniforms with
    probability 2^-32, each still following its own law.
    """
    if first_sample is not None:
        _check_first_sample(first_sample, len(prompts))
    chains, seen = [], Counter[tuple[int, ...]]()
    for i, prompt in enumerate(prompts):
        digest = hashlib.blake2b(struct.pack(f"<{len(prompt)}q", *prompt), digest_size=4).digest()
        first = seen[prompt] if first_sample is None else first_sample[i]
        for sample in range(num_samples):
            number = (int.from_bytes(digest, "little") + first + sample) % 2**32
            chains.append(Chain(i * num_samples + sample, prompt, number))
        seen[prompt] += num_samples
    return chains


def _check_first_sample(first_sample: Sequence[int], num_prompts: int) -> None:
    if len(first_sample) != num_prompts:
        raise ValueError(
            f"first_sample must hold one number for each of the {num_prompts} prompts, "
            f"got {len(first_sample)}"
        )
    for i, number in enumerate(first_sample):
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ValueError(f"first_sample[{i}] must be an int >= 0, got {number!r}")
