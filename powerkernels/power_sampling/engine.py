"""The lane engine with its loop on the host: one tick for all lanes, idle lanes refilled."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from powerkernels.logprob import sample_tokens
from powerkernels.power_sampling import reference
from powerkernels.power_sampling.config import PowerSamplingConfig
from powerkernels.power_sampling.lane_model import LaneModel
from powerkernels.power_sampling.metropolis_hastings import token_counters


class Chain(NamedTuple):
    """A chain to run: where its result belongs, its prompt, its number in the Philox counters."""

    slot: int
    prompt: tuple[int, ...]
    number: int


class FinishedChain(NamedTuple):
    """What a lane holds at the end of its chain; tensors on the CPU."""

    slot: int
    tokens: Tensor  # int64 [n]
    log_prob: Tensor  # float32 [n]
    entropy: Tensor  # float32 [n]
    ended: bool  # the last token is an EOS
    decoded_tokens: int
    trace: Tensor  # float64 [number of transitions, len(TRACE_FIELDS)]


@dataclass
class SamplerStats:
    """Counts of a run, true at every moment of it."""

    num_chains: int = 0
    num_lanes: int = 0
    finished_chains: int = 0
    model_steps: int = 0  # ticks, each one model call on all lanes
    decoded_tokens: int = 0  # tokens drawn by the model, kept or not
    kept_tokens: int = 0  # tokens of finished completions
    transitions: int = 0  # of finished chains
    accepted_transitions: int = 0
    prefill_seconds: float = 0.0
    model_seconds: float = 0.0  # in model steps
    seconds: float = 0.0
    interrupted: bool = False
    busy_lanes: int = field(default=0, repr=False)  # in the last tick
    fraction_done: float = field(default=0.0, repr=False)  # an estimate of the work, 0 to 1

    @property
    def lane_occupancy(self) -> float:
        """Share of the lane rows computed that decoded a token, 0 to 1."""
        rows = self.model_steps * self.num_lanes
        return self.decoded_tokens / rows if rows else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted share of the transitions of finished chains; NaN without transitions."""
        return self.accepted_transitions / self.transitions if self.transitions else float("nan")

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens per second."""
        return self.decoded_tokens / self.seconds if self.seconds else 0.0


def run_chains(
    model: LaneModel,
    config: PowerSamplingConfig,
    chains: Sequence[Chain],
    *,
    eos: tuple[int, ...],
    stats: SamplerStats,
    on_tick: Callable[[], None] | None = None,
) -> Iterator[FinishedChain]:
    """Run chains on the model's lanes and yield each as it finishes.

    A chain's result depends on its prompt, its number and the settings, not on its lane, on when it
    starts or on what the other lanes do.

    Raises:
        FloatingPointError: the model's logits hold NaN or +inf.
    """
    started = time.perf_counter()
    stats.num_chains, stats.num_lanes = len(chains), model.num_lanes
    state = reference.init_lanes(model.num_lanes, config, eos, model.device)
    waiting = deque(chains)
    idle = list(range(model.num_lanes))[::-1]
    on_lane: dict[int, Chain] = {}
    # Absolute position of completion position -1, the prompt's last token, and that token.
    offset = torch.zeros(model.num_lanes, dtype=torch.int64, device=model.device)
    last_prompt_token = torch.zeros_like(offset)

    while True:
        fresh = []
        while idle and waiting:
            lane, chain = idle.pop(), waiting.popleft()
            before = time.perf_counter()
            model.prefill(lane, chain.prompt)
            stats.prefill_seconds += time.perf_counter() - before
            on_lane[lane] = chain
            fresh.append(lane)
        if not on_lane:
            break
        if fresh:
            lanes = torch.tensor(fresh, device=model.device)
            entering = [on_lane[lane] for lane in fresh]
            offset[lanes] = lanes.new_tensor([len(chain.prompt) - 1 for chain in entering])
            last_prompt_token[lanes] = lanes.new_tensor([chain.prompt[-1] for chain in entering])
            reference.load_chains(
                state, lanes, lanes.new_tensor([chain.number for chain in entering])
            )
            reference.begin(state, config, lanes)

        before = time.perf_counter()
        through = _tick(model, state, config, offset, last_prompt_token)
        stats.model_steps += 1
        stats.busy_lanes = len(on_lane)
        stats.decoded_tokens += len(on_lane)
        now = time.perf_counter()
        stats.model_seconds += now - before
        stats.seconds = now - started

        if through.numel():
            accepted, first, last = reference.commit(state, through)
            at = offset[through]
            model.commit(*(x[accepted] for x in (through, first + at, last + at)))
            model.restore(*(x[~accepted] for x in (through, first + at, last + at)))
            done = reference.begin(state, config, through)
            finished = _collect(state, done, [on_lane.pop(lane) for lane in done.tolist()])
            idle.extend(done.tolist())
            _count(stats, finished)
            yield from finished
            stats.fraction_done = _fraction_done(state, config, stats)
        if on_tick is not None:
            on_tick()


def _tick(
    model: LaneModel,
    state: reference.LaneState,
    config: PowerSamplingConfig,
    offset: Tensor,
    last_prompt_token: Tensor,
) -> Tensor:
    """One model step and one token on every lane; returns the lanes that are through, int64 [F]."""
    cursor = state.cursor
    previous = state.tokens[reference.WORKING].gather(1, (cursor - 1).clamp(min=0)[:, None])[:, 0]
    fed = torch.where(cursor == 0, last_prompt_token, previous)
    logits = model.step(fed, offset + cursor)
    banned = torch.where(cursor == state.divergence, state.banned, -1)
    samples = sample_tokens(
        logits,
        alpha=config.proposal_power,
        seed=state.seed,
        counters=token_counters(cursor, _draw_number(state), state.chain),
        banned=banned,
        entropy=True,
    )
    if bool(((samples.token < 0) & (state.phase != reference.IDLE)).any()):
        raise FloatingPointError(
            "the model's logits must be finite or -inf: a row holds NaN, +inf or nothing but -inf"
        )
    return reference.append(state, config, samples)


def _draw_number(state: reference.LaneState) -> Tensor:
    """The step word of a token's counter: 0 while a block is extended, else the transition's."""
    extending = state.phase == reference.EXTEND
    return torch.where(extending, torch.zeros_like(state.transition), state.transition)


def _fraction_done(
    state: reference.LaneState, config: PowerSamplingConfig, stats: SamplerStats
) -> float:
    """Work done, counting a proposal of the k-th block k times as long as one of the first."""
    blocks = state.block_limits.numel()
    steps = blocks * max(config.num_mcmc_steps, 1)
    made = state.transition if config.num_mcmc_steps else state.block.clamp(min=0)
    made = made[state.phase != reference.IDLE].double() / steps
    share = made.square() if config.num_mcmc_steps else made
    return (stats.finished_chains + float(share.sum())) / stats.num_chains


def _collect(state: reference.LaneState, lanes: Tensor, chains: list[Chain]) -> list[FinishedChain]:
    current = reference.CURRENT
    lengths = state.length[lanes].tolist()
    tokens = state.tokens[current, lanes].cpu()
    log_prob = state.scores[current, lanes, :, reference.LOG_PROB].float().cpu()
    entropy = state.scores[current, lanes, :, reference.ENTROPY].float().cpu()
    ended, decoded = state.ended[lanes].tolist(), state.decoded[lanes].tolist()
    trace = state.trace[lanes].cpu()
    return [
        FinishedChain(
            slot=chain.slot,
            tokens=tokens[i, :n],
            log_prob=log_prob[i, :n],
            entropy=entropy[i, :n],
            ended=ended[i],
            decoded_tokens=decoded[i],
            trace=trace[i],
        )
        for i, (chain, n) in enumerate(zip(chains, lengths, strict=True))
    ]


def _count(stats: SamplerStats, finished: list[FinishedChain]) -> None:
    accepted = reference.TRACE_FIELDS.index("accepted")
    for chain in finished:
        stats.finished_chains += 1
        stats.kept_tokens += chain.tokens.numel()
        stats.transitions += chain.trace.shape[0]
        stats.accepted_transitions += int(chain.trace[:, accepted].sum())
