"""Power sampling on vLLM: the law of `PowerSampler`, from the same config, on vLLM's engine.

    from powerkernels.integrations.vllm import VLLMPowerSampler, load_llm

    sampler = VLLMPowerSampler(load_llm("path/to/model"), config=config)
    samples = sampler.sample(prompts, num_samples=4)

Every extension and every proposal of a chain is a request of its own, whose prompt is what it
keeps; vLLM's prefix cache has most of that. Requests wait for one another nowhere: the next one of
a chain goes in as soon as its last one is decided, and rows to spare make transitions ahead, so
that continuous batching has its rows full.

A logits processor in vLLM draws each token itself, with `sample_tokens`, from the logits before any
temperature, and leaves vLLM nothing but that token. So token, log_prob, log_z and entropy are of
one pass over one row of logits, the first token of a proposal is drawn from q restricted to what
differs from the current one, and a uniform depends on (seed, position, transition, chain) as in the
lane engine: at equal logits, the two engines draw the same chains.

The scores are those of decoding, in whatever batch vLLM put the token. A prefix that is visited
again has, in bfloat16, logits that differ by rounding; `PowerSample.log_z_noise` says by how much.

Needs vLLM >= 0.32, in one process (VLLM_ENABLE_V1_MULTIPROCESSING=0) and with its first model
runner (VLLM_USE_V2_MODEL_RUNNER=0); `load_llm` sees to both. Tensor parallelism is vLLM's.

Source: Karan & Du 2025, "Reasoning with Sampling", Algorithm 1, as in `power_sampling`.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from powerkernels.logprob import sample_tokens
from powerkernels.power_sampling import PowerSample, PowerSampler, PowerSamplingConfig, SamplerStats
from powerkernels.power_sampling import metropolis_hastings as mh
from powerkernels.power_sampling.engine import Chain, FinishedChain, LogZNoise
from powerkernels.power_sampling.lane_state import TRACE_FIELDS
from powerkernels.power_sampling.progress import ProgressLine
from powerkernels.power_sampling.sampler import DEFAULT_MIN_LANES

INSTALL_VLLM = "pip install 'vllm>=0.32'"
OLDEST_VLLM = (0, 32)

try:
    import vllm
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error.name} is not installed, and powerkernels.integrations.vllm needs it; "
        f"get it with: {INSTALL_VLLM}",
        name=error.name,
    ) from error

MULTIPROCESSING = "VLLM_ENABLE_V1_MULTIPROCESSING"
V2_MODEL_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
BATCH_INVARIANT = "VLLM_BATCH_INVARIANT"
BATCH_INVARIANT_CAPABILITY = 80  # the oldest CUDA device for which vLLM offers it

# Of `SamplingParams.extra_args`: a `Draw` as a dict.
EXTRA_ARG = "powerkernels"

# On a CPU: keys per block of the cache, the fewest for which its attention is quick.
CPU_BLOCK_SIZE = 32

_request_keys = itertools.count()


class Law(NamedTuple):
    """What q is, and the key of its Philox streams: rows that share it are drawn in one call."""

    seed: int
    power: float  # s in q ∝ p^s
    top_k: int | None
    top_p: float | None
    min_p: float | None


class Draw(NamedTuple):
    """What the logits processor has to know of a request."""

    key: int  # of the request
    first: int  # position in the completion of the request's first token
    transition: int  # 0 for an extension
    chain: int
    banned: int  # token excluded at `first`, -1 for none
    law: Law


class Record(NamedTuple):
    """One token as it was drawn."""

    token: int  # -1: the logits were no distribution
    log_prob: float
    log_z: float
    entropy: float


# A request's key and a position in the completion: what a record belongs to.
Place = tuple[int, int]


class _Row(NamedTuple):
    draw: Draw
    output: list[int]  # vLLM's own list of the request's tokens so far; only its length is read


class PowerLogitsProcessor(LogitsProcessor):
    """Draws the tokens of the sampler's requests, and leaves all other rows alone.

    What it has drawn is kept until `take`. A row is drawn from whenever vLLM computes logits for
    it: in a chunk of a prefill that is not its last too, and again after a preemption. The length
    of the output says for which position; the uniforms are that position's, and the last record of
    a position, the one whose token vLLM keeps, takes the place of those before.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._device = device
        self._rows: dict[int, _Row] = {}  # by their index in the batch
        self._drawn: list[tuple[list[Place], Tensor]] = []

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        if _draw_of(sampling_params) is not None and sampling_params.temperature != 0:
            raise ValueError(
                f"extra_args[{EXTRA_ARG!r}] needs temperature 0, so that the token is the "
                f"processor's; got {sampling_params.temperature}"
            )

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the rows: removed, then added, then moved, as vLLM asks for."""
        if batch_update is None:
            return
        rows = self._rows
        for index in batch_update.removed:
            rows.pop(index, None)
        for index, params, _, output in batch_update.added:
            draw = _draw_of(params)
            rows.pop(index, None)
            if draw is not None:
                rows[index] = _Row(draw, output)
        for source, target, direction in batch_update.moved:
            moving, other = rows.pop(source, None), rows.pop(target, None)
            if moving is not None:
                rows[target] = moving
            if direction == MoveDirectionality.SWAP and other is not None:
                rows[source] = other

    def apply(self, logits: Tensor) -> Tensor:
        """Draw for every row of ours; what is left of it is the token alone.

        Args:
            logits: float32 [rows of the batch, V], written in place.
        """
        by_law: defaultdict[Law, list[int]] = defaultdict(list)
        for index, row in self._rows.items():
            by_law[row.draw.law].append(index)
        for law, indices in by_law.items():
            self._draw(logits, law, indices)
        return logits

    def _draw(self, logits: Tensor, law: Law, indices: list[int]) -> None:
        rows = [self._rows[index] for index in indices]
        at = torch.tensor(indices, device=self._device)
        positions = [row.draw.first + len(row.output) for row in rows]
        asked = [
            (position, row.draw.transition, row.draw.chain, -1 if row.output else row.draw.banned)
            for position, row in zip(positions, rows, strict=True)
        ]
        position, transition, chain, banned = torch.tensor(asked, device=self._device).unbind(1)
        drawn = sample_tokens(
            logits[at],
            alpha=law.power,
            seed=law.seed,
            counters=mh.token_counters(position, transition, chain),
            banned=banned.contiguous(),
            entropy=True,
            top_k=law.top_k,
            top_p=law.top_p,
            min_p=law.min_p,
        )
        assert drawn.entropy is not None
        logits[at] = -math.inf
        logits[at, drawn.token.clamp(min=0)] = 0.0
        columns = (drawn.token, drawn.log_prob, drawn.log_z, drawn.entropy)
        # Stays on the device until `take`: a copy here would wait for it.
        values = torch.stack([column.double() for column in columns], dim=1)
        keys = [row.draw.key for row in rows]
        self._drawn.append((list(zip(keys, positions, strict=True)), values))

    def take(self) -> dict[Place, Record]:
        """What was drawn since the last call."""
        records = {}
        for places, values in self._drawn:
            for place, row in zip(places, values.tolist(), strict=True):
                token, log_prob, log_z, entropy = row
                records[place] = Record(int(token), log_prob, log_z, entropy)
        self._drawn.clear()
        return records


def _draw_of(params: SamplingParams) -> Draw | None:
    asked = (params.extra_args or {}).get(EXTRA_ARG)
    return None if asked is None else Draw(**(asked | {"law": Law(*asked["law"])}))


def _processor_of(worker: Any) -> PowerLogitsProcessor:
    processors = worker.model_runner.input_batch.logitsprocs.non_argmax_invariant
    (found,) = [one for one in processors if isinstance(one, PowerLogitsProcessor)]
    return found


def _take_in(worker: Any) -> dict[Place, Record]:
    return _processor_of(worker).take()


def load_llm(model: str | Path, *, batch_invariant: bool | None = None, **engine_args: Any) -> LLM:
    """An `LLM` as `VLLMPowerSampler` needs it.

    Args:
        model: a folder or a hub name.
        batch_invariant: vLLM's kernels whose results do not depend on the batch, which leave
            nothing of `log_z_noise` and cost some speed. None is yes where vLLM offers them (CUDA,
            compute capability 8.0 and newer). Not yet run on a GPU.
        engine_args: of `LLM`. The defaults here: prefix caching, no asynchronous scheduling, and on
            a CPU eager mode and a block size of 32.

    Sets VLLM_ENABLE_V1_MULTIPROCESSING=0, VLLM_USE_V2_MODEL_RUNNER=0 and VLLM_BATCH_INVARIANT in
    this process's environment where they are not set.

    Raises:
        ImportError: vLLM is too old.
        ValueError: one of the first two variables is set to something else, or `batch_invariant` to
            something that vLLM does not offer here.
    """
    check_version(vllm.__version__)
    for name, why in (
        (MULTIPROCESSING, "with the engine in another process the draws would be lost"),
        (V2_MODEL_RUNNER, "the second model runner takes another kind of logits processor"),
    ):
        if os.environ.setdefault(name, "0") != "0":
            raise ValueError(f"{name} must be 0, got {os.environ[name]!r}: {why}")
    offered = current_platform.is_cuda() and current_platform.has_device_capability(
        BATCH_INVARIANT_CAPABILITY
    )
    if batch_invariant and not offered:
        raise ValueError(
            "batch_invariant is True, but vLLM has no such kernels for "
            f"{current_platform.device_name or 'this device'}"
        )
    if batch_invariant or (batch_invariant is None and offered):
        os.environ.setdefault(BATCH_INVARIANT, "1")

    defaults: dict[str, Any] = {"enable_prefix_caching": True, "async_scheduling": False}
    if current_platform.is_cpu():
        defaults |= {"enforce_eager": True, "block_size": CPU_BLOCK_SIZE}
    processors = [*engine_args.pop("logits_processors", []), PowerLogitsProcessor]
    return LLM(str(model), logits_processors=processors, **(defaults | engine_args))


def check_version(version: str) -> None:
    """Refuse a vLLM whose interfaces are not those that this module was written for.

    Raises:
        ImportError: it is older than 0.32.
    """
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < OLDEST_VLLM:
        raise ImportError(
            f"vLLM {version} is too old, powerkernels.integrations.vllm needs 0.32 or newer; "
            f"get it with: {INSTALL_VLLM}",
            name="vllm",
        )


@dataclass
class VLLMStats(SamplerStats):
    """Counts of a run on vLLM; `num_lanes` is the most requests at once.

    `prefill_seconds` is 0, since vLLM prefills in the steps that it decodes in.
    """

    requests: int = 0  # extensions and proposals that went to vLLM
    aborted_requests: int = 0  # of them, proposals that were rejected early
    dropped_requests: int = 0  # of them, proposals made ahead of one that was accepted
    prompt_tokens: int = 0  # of the requests
    cached_tokens: int = 0  # of these, in the prefix cache
    log_z_noise: LogZNoise = field(default=LogZNoise(0, math.nan, math.nan))  # of finished chains


class VLLMPowerSampler(PowerSampler):
    """Metropolis-Hastings sampling from p(x)^alpha of a model in vLLM.

    Args:
        llm: an `LLM` of `load_llm`, or one with the same settings. While a call runs, between the
            samples of `iter_samples` too, it is the sampler's: nobody else steps it.
        tokenizer: needed for prompts that are text or chat messages; None is the `LLM`'s own.
        config: the settings, as for `PowerSampler`. `num_lanes` is the most requests at once: by
            default the number of chains, at least 8 with `prefetch` and at most the `LLM`'s
            max_num_seqs. With `prefetch`, those that chains do not need make their next transitions
            ahead.
        on_output: called with what the `LLM` returns meanwhile for requests of others; without it
            an `LLM` that has such requests is refused.

    Attributes:
        stats: counts of the last or current run, `VLLMStats`.

    Raises:
        ImportError: vLLM is too old.
        TypeError, ValueError: an argument, by name, or a setting of the `LLM`.
    """

    model: Any  # the LLM
    stats: VLLMStats

    def __init__(
        self,
        llm: LLM,
        tokenizer: Any = None,
        *,
        config: PowerSamplingConfig,
        on_output: Callable[[Any], None] | None = None,
    ) -> None:
        super().__init__(llm, tokenizer, config=config)
        _check_config(config)
        self.on_output = on_output
        self._model_config = llm.llm_engine.model_config
        if tokenizer is None and not self._model_config.skip_tokenizer_init:
            self.tokenizer = llm.get_tokenizer()
        self._take = self._find_records()

    def _check_model(self, model: Any) -> None:
        check_version(vllm.__version__)
        if not isinstance(model, LLM):
            raise TypeError(f"llm must be a vllm.LLM, got {type(model).__name__}")
        _check_llm(model)

    def _find_records(self) -> Callable[[], dict[Place, Record]]:
        """What takes the processor's records, across to the worker processes if there are any."""
        rpc = self.model.collective_rpc
        if self.model.llm_engine.vllm_config.parallel_config.world_size == 1:
            return rpc(_processor_of)[0].take
        # All ranks draw the same tokens; each call empties all of them.
        return lambda: rpc(_take_in)[0]

    def _make_stats(self) -> VLLMStats:
        return VLLMStats()

    def _run(
        self, chains: list[Chain], seed: int, num_samples: int, progress: bool | None
    ) -> Iterator[PowerSample]:
        line = ProgressLine(self.stats, progress)
        run = _Run(self, chains, seed)
        try:
            while run.admit():
                for finished in run.step():
                    yield self._sample(finished, num_samples)
                line.update()
        finally:
            run.close()
            line.close()

    def _vocab_size(self) -> int:
        return self._model_config.get_vocab_size()

    def _context(self) -> int:
        return self._model_config.max_model_len

    def _generation_config(self) -> SimpleNamespace:
        eos = self._model_config.try_get_generation_config().get("eos_token_id")
        if eos is None:
            eos = getattr(self._model_config.hf_text_config, "eos_token_id", None)
        return SimpleNamespace(eos_token_id=eos)


def _check_config(config: PowerSamplingConfig) -> None:
    if config.compat is not None:
        raise ValueError(f"config.compat must be None on vLLM, got {config.compat!r}")
    for name in ("device_loop", "compile"):
        if getattr(config, name):
            raise ValueError(
                f"config.{name} is a setting of the lane engine, and must not be True on vLLM, "
                "which has its own (enforce_eager, compilation_config)"
            )


def _check_llm(llm: LLM) -> None:
    """Refuse what would lose records or read them wrongly, with the setting to change."""
    engine = llm.llm_engine
    config = engine.vllm_config
    if not hasattr(engine, "model_executor"):  # it is in the engine's process
        raise ValueError(
            f"llm runs its engine in another process, where the draws would be lost; set "
            f"{MULTIPROCESSING}=0 before it is made, or make it with load_llm"
        )
    if config.use_v2_model_runner:
        raise ValueError(
            "llm uses vLLM's second model runner, which takes another kind of logits processor; "
            f"set {V2_MODEL_RUNNER}=0 before it is made, or make it with load_llm"
        )
    registered = config.model_config.logits_processors or ()
    if PowerLogitsProcessor not in registered:
        raise ValueError(
            "llm must be made with logits_processors=[PowerLogitsProcessor], or with load_llm, "
            f"got {list(registered)!r}"
        )
    parallel = config.parallel_config
    for wrong, setting in (
        (config.scheduler_config.async_scheduling, "async_scheduling=False"),
        (config.scheduler_config.stream_interval != 1, "stream_interval=1"),
        (parallel.pipeline_parallel_size > 1, "pipeline_parallel_size=1"),
        (parallel.data_parallel_size > 1, "data_parallel_size=1"),
    ):
        if wrong:
            raise ValueError(f"llm must be made with {setting}, or with load_llm's defaults")


class _Run:
    """One list of chains on its way through vLLM."""

    def __init__(self, sampler: VLLMPowerSampler, chains: Sequence[Chain], seed: int) -> None:
        self._engine = sampler.model.llm_engine
        self._stats, self._take, self._on_output = sampler.stats, sampler._take, sampler.on_output
        config = sampler.config
        self._prefetch = config.prefetch
        self._law = Law(seed, config.proposal_power, config.top_k, config.top_p, config.min_p)
        self._waiting = deque(chains)
        self._start = functools.partial(_ChainRun, config=config, eos=sampler._eos(), seed=seed)
        self._chains: list[_ChainRun] = []  # those that have begun and are not finished
        self._in_flight: dict[str, tuple[_ChainRun, _Item]] = {}  # by the id of the request
        self._stats.num_chains = len(chains)
        self._stats.num_lanes = config.num_lanes or self._default_rows(len(chains))
        self._started = time.perf_counter()
        self._noise = _Noise()
        self._take()  # what an interrupted run may have left
        others = self._engine.get_num_unfinished_requests()
        if others and self._on_output is None:
            raise ValueError(
                f"llm has {others} unfinished requests of others, whose outputs would be lost; "
                "pass on_output, or finish them first"
            )

    def _default_rows(self, num_chains: int) -> int:
        at_least = DEFAULT_MIN_LANES if self._prefetch else 1
        most: int = self._engine.vllm_config.scheduler_config.max_num_seqs
        return min(max(num_chains, at_least), most)

    def admit(self) -> bool:
        """Give vLLM as many requests as there is room for; whether any is in flight."""
        rows = self._stats.num_lanes
        while self._waiting and len(self._chains) < rows:
            chain = self._start(self._waiting.popleft())
            self._submit(chain)
            self._chains.append(chain)
        # With rows to spare, the next transitions of those that have the fewest under way.
        sparing = list(self._chains) if self._prefetch and not self._waiting else []
        while sparing and len(self._in_flight) < rows:
            chain = min(sparing, key=lambda chain: len(chain.pending))
            if not self._submit(chain):
                sparing.remove(chain)
        return bool(self._in_flight)

    def step(self) -> list[FinishedChain]:
        """One step of vLLM, and what follows from its tokens; the chains that it finished."""
        before = time.perf_counter()
        if not self._engine.has_unfinished_requests():
            raise RuntimeError(
                "vLLM has lost the sampler's requests; is the llm stepped elsewhere?"
            )
        outputs = self._engine.step()
        records = self._take()
        stats = self._stats
        stats.model_seconds += time.perf_counter() - before
        stats.model_steps += 1
        stats.busy_lanes = 0
        rejected: list[str] = []
        dropped: list[str] = []
        for output in outputs:
            if output.request_id in self._in_flight:
                stats.busy_lanes += 1
                chain, item = self._in_flight[output.request_id]
                if not item.drawn:
                    stats.cached_tokens += output.num_cached_tokens or 0
                place = item.key, item.length
                item.append(_checked(records.get(place), output.outputs[0].token_ids, item.length))
                if item.is_through:
                    del self._in_flight[output.request_id]
                    if not output.finished:
                        rejected.append(output.request_id)
                    dropped += [self._drop(other) for other in chain.resolve() if other.is_sent]
                elif output.finished:
                    raise RuntimeError(
                        "vLLM ended a request before its last token: "
                        f"{output.outputs[0].finish_reason}"
                    )
            elif output.request_id in dropped:
                stats.busy_lanes += 1
            elif self._on_output is not None:
                self._on_output(output)
        self._engine.abort_request(rejected + dropped)
        stats.aborted_requests += len(rejected)
        stats.dropped_requests += len(dropped)
        stats.decoded_tokens += stats.busy_lanes
        finished = []
        for chain in list(self._chains):
            if not chain.pending and not self._submit(chain):
                self._chains.remove(chain)
                finished.append(self._count(chain))
        stats.seconds = time.perf_counter() - self._started
        self._estimate()
        return finished

    def close(self) -> None:
        """Leave vLLM without a request of ours."""
        self._engine.abort_request(list(self._in_flight))
        self._in_flight.clear()
        self._take()

    def _drop(self, item: _Item) -> str:
        self._in_flight.pop(item.request_id, None)
        return item.request_id

    def _submit(self, chain: _ChainRun) -> bool:
        """Send off the chain's next item that needs the model; False if there is none yet."""
        item = chain.begin()
        if item is None:
            return False
        law = self._law
        draw = Draw(item.key, item.first, item.transition, chain.number, item.banned, law)
        params = SamplingParams(
            temperature=0.0,
            max_tokens=item.limit - item.first,
            stop_token_ids=list(chain.eos),
            ignore_eos=True,  # the model's own EOS tokens end nothing unless they are among ours
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={EXTRA_ARG: draw._asdict() | {"law": tuple(law)}},
        )
        prompt = [*chain.prompt, *item.written.tokens]
        self._engine.add_request(item.request_id, {"prompt_token_ids": prompt}, params)
        self._in_flight[item.request_id] = chain, item
        self._stats.requests += 1
        self._stats.prompt_tokens += len(prompt)
        return True

    def _count(self, chain: _ChainRun) -> FinishedChain:
        finished = chain.result()
        self._stats.count([finished])
        self._noise.add(chain.noise)
        self._stats.log_z_noise = self._noise.result()
        return finished

    def _estimate(self) -> None:
        # A proposal of the k-th block counts k times as long as one of the first.
        share = sum(chain.fraction_done**2 for chain in self._chains)
        stats = self._stats
        stats.fraction_done = (stats.finished_chains + share) / stats.num_chains


def _checked(record: Record | None, tokens: Sequence[int], position: int) -> Record:
    """The record of a request's new token, if it is the one that vLLM returned."""
    if record is not None and record.token < 0:
        raise FloatingPointError(
            "the model's logits must be finite or -inf: a row holds NaN, +inf or nothing but -inf"
        )
    if record is None or [record.token] != list(tokens):
        raise RuntimeError(
            f"vLLM returned the tokens {list(tokens)} at position {position} of a completion, "
            f"where the sampler drew {record}; is the llm stepped by somebody else, or is there a "
            "logits processor behind the sampler's?"
        )
    return record


class _Noise:
    """Sum, maximum and number of differences."""

    def __init__(self) -> None:
        self.visits, self.sum, self.max = 0, 0.0, -math.inf

    def visit(self, difference: float) -> None:
        # Two prefixes of equal log_z -inf have no difference.
        if not math.isnan(difference):
            self.visits, self.sum = self.visits + 1, self.sum + abs(difference)
            self.max = max(self.max, abs(difference))

    def add(self, other: _Noise) -> None:
        self.visits, self.sum = self.visits + other.visits, self.sum + other.sum
        self.max = max(self.max, other.max)

    def result(self) -> LogZNoise:
        if not self.visits:
            return LogZNoise(0, math.nan, math.nan)
        return LogZNoise(self.visits, self.sum / self.visits, self.max)


class _Item:
    """An extension or a proposal of a chain, whose tokens come one by one."""

    def __init__(
        self,
        number: int,
        block: int,
        limit: int,
        begun: mh.MHState | mh.Proposal,
        *,
        config: PowerSamplingConfig,
        eos: tuple[int, ...],
    ) -> None:
        self.number, self.block, self.limit = number, block, limit
        self.key = next(_request_keys)
        self.request_id = f"{EXTRA_ARG}-{self.key}"
        self._config, self._eos = config, eos
        self._powers: Mapping[str, float] = {
            "alpha": config.alpha,
            "proposal_power": config.proposal_power,
        }
        self.proposal = begun if isinstance(begun, mh.Proposal) else None
        self.written = begun.written if isinstance(begun, mh.Proposal) else begun
        self.first = self.length  # position of its first token
        self.entropy: list[float] = []  # of what was drawn
        self.difference = math.nan  # of log_z in two visits of the prefix before `first`
        # Nothing need be drawn for a proposal that is the current completion.
        self.is_sent = self.proposal is None or not self.proposal.repeats
        self.is_through = not self.is_sent

    @property
    def length(self) -> int:
        """Tokens of the completion that is being written."""
        return len(self.written.tokens)

    @property
    def drawn(self) -> int:
        return len(self.entropy)

    @property
    def banned(self) -> int:
        """The token excluded from the first draw, -1 for none."""
        banned = None if self.proposal is None else self.proposal.banned
        return -1 if banned is None else banned

    @property
    def transition(self) -> int:
        """The number of the transition among the chain's, from 1; 0 for an extension."""
        return 0 if self.proposal is None else self.proposal.written.transition

    def append(self, record: Record) -> None:
        """Add a token; note whether the item is through."""
        scored = mh.ScoredToken(record.token, record.log_prob, record.log_z)
        rejected = False
        if self.proposal is None:
            self.written = mh.extend(self.written, [scored], **self._powers)
        else:
            if not self.drawn:
                self.difference = record.log_z - self._log_z_of_state(self.first)
            self.proposal = mh.grow(self.proposal, scored, **self._powers)
            self.written = self.proposal.written
            rejected = self._config.can_reject_early and self.proposal.is_rejected
        self.entropy.append(record.entropy)
        self.is_through = rejected or record.token in self._eos or self.length == self.limit

    def _log_z_of_state(self, position: int) -> float:
        assert self.proposal is not None
        state, s = self.proposal.state, self._config.proposal_power
        return s * state.log_prob[position] - state.log_q[position]


class _ChainRun:
    """A chain and its items under way.

    The first of them is what the chain is at. The others are made ahead: begun from the same state,
    as the chain would if the earlier ones were rejected, and dropped when one is accepted. What a
    transition draws depends on its number and its state, so the chain is the same without them.
    """

    def __init__(
        self, chain: Chain, *, config: PowerSamplingConfig, eos: tuple[int, ...], seed: int
    ) -> None:
        self.number, self.prompt, self.eos = chain.number, chain.prompt, eos
        self._place, self._config, self._seed = chain.place, config, seed
        self._per_block = config.num_mcmc_steps + 1
        self._num_items = len(config.block_limits) * self._per_block
        self._next_item = 0
        self.pending: deque[_Item] = deque()
        self._state = mh.MHState((), (), (), (0.0,), 0)
        self._entropy: list[float] = []  # of the state's positions
        self._decoded = 0
        self._trace: list[tuple[float, ...]] = []
        self.noise = _Noise()

    @property
    def fraction_done(self) -> float:
        return self._next_item / self._num_items

    def begin(self) -> _Item | None:
        """The next item that needs the model, if it can be begun yet.

        With none, and none under way, the chain is finished.
        """
        while self._next_item < self._num_items:
            block, number = divmod(self._next_item, self._per_block)
            if number == 0 and self._has_ended:
                self._next_item += 1
                continue
            # Nothing is known of the state behind an extension before it is there.
            if self.pending and (number == 0 or self.pending[0].proposal is None):
                return None
            item = self._make_item(block, number)
            self._next_item += 1
            self.pending.append(item)
            if item.is_sent:
                return item
            self.resolve()
        return None

    def resolve(self) -> list[_Item]:
        """Decide the items that are through, in order; returns those that are dropped for it."""
        while self.pending and self.pending[0].is_through:
            item = self.pending.popleft()
            if self._decide(item):
                dropped = list(self.pending)
                self.pending.clear()
                self._next_item = item.number + 1
                return dropped
        return []

    def result(self) -> FinishedChain:
        """The chain as it is, at its end."""
        state = self._state
        return FinishedChain(
            place=self._place,
            tokens=torch.tensor(state.tokens, dtype=torch.int64),
            log_prob=torch.tensor(state.log_prob, dtype=torch.float32),
            log_q=torch.tensor(state.log_q, dtype=torch.float32),
            entropy=torch.tensor(self._entropy, dtype=torch.float32),
            ended=self._has_ended,
            decoded_tokens=self._decoded,
            trace=torch.tensor(self._trace, dtype=torch.float64).reshape(-1, len(TRACE_FIELDS)),
            log_z_noise=self.noise.result(),
        )

    @property
    def _has_ended(self) -> bool:
        return bool(self._state.tokens) and self._state.tokens[-1] in self.eos

    def _make_item(self, block: int, number: int) -> _Item:
        begun: mh.MHState | mh.Proposal = self._state
        if number > 0:
            made = block * self._config.num_mcmc_steps + number - 1
            begun = mh.begin(
                self._state._replace(transition=made),
                seed=self._seed,
                chain=self.number,
                shared_prefix_skip=self._config.shared_prefix_skip,
            )
        limit = self._config.block_limits[block]
        return _Item(self._next_item, block, limit, begun, config=self._config, eos=self.eos)

    def _decide(self, item: _Item) -> bool:
        """Make an item that is through part of the chain; whether the completion is another."""
        self._decoded += item.drawn
        if item.proposal is None:
            self._state = item.written
            self._entropy += item.entropy
            return True
        self.noise.visit(item.difference)
        self._state, info = mh.decide(item.proposal)
        if info.accepted and item.is_sent:
            self._entropy[item.first :] = item.entropy
        self._trace.append(
            (
                item.block,
                info.cut,
                len(self._state.tokens),
                info.accepted,
                info.log_accept_ratio,
                sum(self._state.log_prob),
                info.decoded_tokens,
            )
        )
        return info.accepted and item.is_sent
