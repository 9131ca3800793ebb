"""The lane engine: one tick for all lanes, again and again; new chains follow finished ones."""

from __future__ import annotations

import functools
import heapq
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from powerkernels._advice import warn_once
from powerkernels._cuda_graph import on_device
from powerkernels.logprob import TokenSamples, sample_tokens
from powerkernels.power_sampling import lane_state
from powerkernels.power_sampling.config import PowerSamplingConfig
from powerkernels.power_sampling.graph_loop import (
    CaptureError,
    DeviceLoop,
    HostLoop,
    capture,
    why_no_graph_loop,
)
from powerkernels.power_sampling.lane_model import LaneModel
from powerkernels.power_sampling.lane_state import CURRENT, TRACE_FIELDS, LaneState, Rules
from powerkernels.power_sampling.transition import state_device, transition_of


class Chain(NamedTuple):
    """A chain to run: where its result belongs, its prompt, its number in the Philox counters."""

    place: int
    prompt: tuple[int, ...]
    number: int


class LogZNoise(NamedTuple):
    """|difference of log_z| in two visits of the same prefix, over a chain's proposals, nats.

    A proposal's first token is drawn behind a prefix whose log_z the chain has; the two are equal
    where logits depend on the prefix alone.
    """

    visits: int
    mean: float  # NaN without visits
    max: float


class FinishedChain(NamedTuple):
    """The end of a chain; tensors on the CPU."""

    place: int
    tokens: Tensor  # int64 [n]
    log_prob: Tensor  # float32 [n]
    log_q: Tensor  # float32 [n]
    entropy: Tensor  # float32 [n]
    ended: bool  # the last token is an EOS
    decoded_tokens: int  # without what was made ahead and dropped
    trace: Tensor  # float64 [number of transitions, len(TRACE_FIELDS)]
    log_z_noise: LogZNoise | None = None  # None where there cannot be any


@dataclass
class SamplerStats:
    """Counts of a run, true at every moment of it."""

    num_chains: int = 0
    num_lanes: int = 0
    finished_chains: int = 0
    model_steps: int = 0  # ticks, each one model call on all lanes
    decoded_tokens: int = 0  # tokens drawn by the model, kept or not, those made ahead too
    used_tokens: int = 0  # of finished chains, without what was made ahead and dropped
    kept_tokens: int = 0  # tokens of finished completions
    transitions: int = 0  # of finished chains
    accepted_transitions: int = 0
    prefill_seconds: float = 0.0
    model_seconds: float = 0.0  # in ticks: model steps, draws and transitions
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

    def count(self, finished: Sequence[FinishedChain]) -> None:
        """Count chains that have finished."""
        self.finished_chains += len(finished)
        self.kept_tokens += sum(chain.tokens.numel() for chain in finished)
        self.used_tokens += sum(chain.decoded_tokens for chain in finished)
        transitions = torch.cat([chain.trace for chain in finished])
        self.transitions += transitions.shape[0]
        self.accepted_transitions += int(transitions[:, TRACE_FIELDS.index("accepted")].sum())


def run_chains(
    model: LaneModel,
    config: PowerSamplingConfig,
    chains: Sequence[Chain],
    *,
    eos: tuple[int, ...],
    stats: SamplerStats,
    on_tick: Callable[[], None] | None = None,
    rules: Rules | None = None,
) -> Generator[FinishedChain, None, None]:
    """`LaneEngine(model, config, eos, rules).run(chains, stats, on_tick)`."""
    return LaneEngine(model, config, eos, rules).run(chains, stats, on_tick)


class LaneEngine:
    """A model's lanes and the loop over their ticks, for one list of chains after another.

    On a GPU the loop runs there, in one CUDA graph that is captured here and serves all runs; the
    host only gives idle lanes new chains. Where the device cannot repeat the captured tick, the
    host replays it; elsewhere, and where it cannot be captured, the host calls each tick.

    Args:
        model: the lanes.
        config: the settings; `num_lanes` and `eos_token_id` are the caller's to resolve.
        eos: tokens that end a completion.
        rules: what a transition does; None is what `config` says.

    Raises:
        CaptureError: `config.device_loop` is True and the device cannot repeat the tick.
    """

    def __init__(
        self,
        model: LaneModel,
        config: PowerSamplingConfig,
        eos: tuple[int, ...],
        rules: Rules | None = None,
    ) -> None:
        self.model, self._config = model, config
        self._state = lane_state.init_lanes(
            model.num_lanes, config, eos, state_device(model.device), rules
        )
        self._transition = transition_of(self._state)
        self._seed = self._state.seed.to(model.device)
        self._sampling: dict[str, Any] = {
            "alpha": config.proposal_power,
            "entropy": True,
            "top_k": config.top_k,
            "top_p": config.top_p,
            "min_p": config.min_p,
        }
        self._loop = self._make_loop()

    def _make_loop(self) -> DeviceLoop | HostLoop:
        wanted, device, go = self._config.device_loop, self.model.device, self._state.go
        if wanted is False:
            return HostLoop(self._tick, go)
        reason, cause = why_no_graph_loop(device), None
        if device.type == "cuda" and go.device.type != "cuda":
            reason = reason or "the lanes' transitions are made on the CPU"
        graph = None
        if device.type == go.device.type == "cuda" and (reason is None or not wanted):
            try:
                # With all lanes idle a tick leaves the state as it is.
                graph = capture(self._tick, device=device)
                if reason is None:
                    return DeviceLoop(graph, go)
            except (RuntimeError, ValueError) as error:
                reason, cause = str(error), error
        if wanted:
            raise CaptureError(f"device_loop is True, but {reason}") from cause
        if graph is not None:
            warn_once(f"the host replays the sampler's tick, a CUDA graph, by itself: {reason}")
            return HostLoop(graph, go)
        if device.type == "cuda":
            warn_once(f"the host makes the sampler's ticks, kernel by kernel: {reason}")
        return HostLoop(self._tick, go)

    def run(
        self,
        chains: Sequence[Chain],
        stats: SamplerStats,
        on_tick: Callable[[], None] | None = None,
        *,
        seed: int | None = None,
    ) -> Generator[FinishedChain, None, None]:
        """Run chains on the lanes and yield each as it finishes.

        A chain's result depends on its prompt, its number and the settings, not on its lane, on
        when it starts, on what the other lanes do or on how many of them work on it.

        Args:
            chains: what to run.
            stats: counted up while it runs.
            on_tick: called every now and then.
            seed: key of the Philox streams; None is the config's.

        Raises:
            FloatingPointError: the model's logits hold NaN or +inf.
            KeyboardInterrupt: in a tick or in `on_tick`, after what was finished has been yielded.
        """
        run = _Run(self.model, self._config, self._state, chains, stats)
        lane_state.reset_lanes(self._state, self._config.seed if seed is None else seed)
        self._seed.copy_(self._state.seed)
        while run.admit():
            self._transition(None)
            self._move()
            interrupt = None
            before, ticks_before = time.perf_counter(), stats.model_steps

            def progress(ticks: int, before: float = before, first: int = ticks_before) -> None:
                run.progress(first + ticks, time.perf_counter() - before)
                if on_tick is not None:
                    on_tick()

            try:
                ticks = self._loop.run(on_progress=progress)
                run.progress(ticks_before + ticks, time.perf_counter() - before)
            except KeyboardInterrupt as error:
                interrupt = error
            yield from run.finished()
            if interrupt is not None:
                raise interrupt
            if on_tick is not None:
                on_tick()

    def _tick(self) -> None:
        """One model step and one token on every lane, and what follows from it."""
        with on_device(self.model.device):  # whichever of them is the current one
            self._tick_on_device()

    def _tick_on_device(self) -> None:
        state, model = self._state, self.model
        to_model = functools.partial(torch.Tensor.to, device=model.device)
        logits = model.step(to_model(state.fed), to_model(state.position))
        drawn = sample_tokens(
            logits,
            seed=self._seed,
            counters=to_model(state.counters),
            banned=to_model(state.ban),
            **self._sampling,
        )
        if state.fed.device != model.device:
            columns: list[Any] = [
                column.to(state.fed.device) for column in drawn if column is not None
            ]
            drawn = TokenSamples(*columns)
        self._transition(drawn)
        self._move()

    def _move(self) -> None:
        moves = self._state.moves
        if moves.device.type == "cpu" and not bool(moves[:, lane_state.COUNT].any()):
            return
        to_model = functools.partial(torch.Tensor.to, device=self.model.device)
        self.model.move(to_model(moves), to_model(self._state.offset))


class _Run:
    """One list of chains on its way through the lanes."""

    def __init__(
        self,
        model: LaneModel,
        config: PowerSamplingConfig,
        state: LaneState,
        chains: Sequence[Chain],
        stats: SamplerStats,
    ) -> None:
        self._model, self._config, self._state, self._stats = model, config, state, stats
        self._waiting = deque(chains)
        self._idle = list(range(model.num_lanes))[::-1]
        self._in_slot: dict[int, Chain] = {}
        self._started = time.perf_counter()
        self._model_seconds = 0.0  # of the launches before
        stats.num_chains, stats.num_lanes = len(chains), model.num_lanes

    def admit(self) -> bool:
        """Give idle lanes something to do; whether any chain is running."""
        lanes, chains = [], []
        while self._idle and self._waiting:
            lanes.append(self._idle.pop())
            chains.append(self._waiting.popleft())
        before = time.perf_counter()
        for lane, chain in zip(lanes, chains, strict=True):
            self._model.prefill(lane, chain.prompt)
            self._in_slot[lane] = chain
        self._stats.prefill_seconds += time.perf_counter() - before
        if lanes:
            lane_state.load_chains(self._state, lanes, [chain.number for chain in chains])
            prompts = [chain.prompt for chain in chains]
            lane_state.join_chains(self._state, lanes, lanes, prompts)
        if self._config.prefetch and self._idle and self._in_slot:
            self._share_idle_lanes()
        self._model_seconds = self._stats.model_seconds
        return bool(self._in_slot)

    def _share_idle_lanes(self) -> None:
        """Idle lanes go to the chains that have the fewest, and get the prompt from there."""
        state = self._state
        lanes_of = Counter(state.lanes[:, lane_state.SLOT].tolist())
        fewest = [(lanes_of[slot], slot) for slot in self._in_slot]
        heapq.heapify(fewest)
        slots = []
        for _ in self._idle:
            count, slot = fewest[0]
            heapq.heapreplace(fewest, (count + 1, slot))
            slots.append(slot)
        prompts = [self._in_slot[slot].prompt for slot in slots]
        lane_state.join_chains(state, self._idle, slots, prompts)
        moves = torch.zeros(state.moves.shape, dtype=torch.int64)
        # A chain's first lane has the number of its slot.
        offset = torch.tensor([len(prompt) - 1 for prompt in prompts])
        copy = torch.full_like(offset, CURRENT)
        columns = (torch.tensor(slots), copy, -offset, offset, -offset)
        moves[torch.tensor(self._idle)] = torch.stack(columns, dim=1)
        self._idle.clear()
        self._model.move(moves.to(self._model.device), state.offset.to(self._model.device))

    def progress(self, ticks: int, seconds: float) -> None:
        """Count `ticks` of the run, the last `seconds` of them since the last `admit`."""
        stats = self._stats
        stats.model_steps = ticks
        stats.model_seconds = self._model_seconds + seconds
        stats.seconds = time.perf_counter() - self._started
        if self._state.totals.device.type == "cpu":  # elsewhere reading would wait for the device
            self._read_totals()
            self._estimate()

    def _read_totals(self) -> list[int]:
        totals = self._state.totals.tolist()
        self._stats.decoded_tokens = totals[lane_state.NUM_DECODED]
        self._stats.busy_lanes = totals[lane_state.NUM_BUSY]
        return totals

    def finished(self) -> list[FinishedChain]:
        """The chains that are finished, out of their slots."""
        totals, state = self._read_totals(), self._state
        if totals[lane_state.BAD]:
            raise FloatingPointError(
                "the model's logits must be finite or -inf: a row holds NaN, +inf or nothing but "
                "-inf"
            )
        if not totals[lane_state.NUM_FINISHED]:
            return []
        status = state.slots[:, lane_state.STATUS]
        slots = (status == lane_state.FINISHED).nonzero()[:, 0].tolist()
        found = collect(state, slots, [self._in_slot.pop(slot).place for slot in slots])
        self._idle.extend(lane_state.release_slots(state, slots))
        self._count(found)
        return found

    def _count(self, found: list[FinishedChain]) -> None:
        self._stats.count(found)
        self._estimate()

    def _estimate(self) -> None:
        # A proposal of the k-th block counts k times as long as one of the first.
        stats = self._stats
        running = self._state.slots[:, lane_state.STATUS] == lane_state.RUNNING
        made = self._state.slots[running, lane_state.NEXT_ITEM].double() / self._state.num_items
        share = float(made.square().sum())
        stats.fraction_done = (stats.finished_chains + share) / stats.num_chains


def collect(state: LaneState, slots: Sequence[int], places: Sequence[int]) -> list[FinishedChain]:
    """The chains that are finished in the slots."""
    chains = state.slots[torch.tensor(slots)].cpu()
    lanes = chains[:, lane_state.NEWEST].to(state.lanes.device)
    tokens = state.tokens[CURRENT, lanes].cpu()
    scores = state.scores[CURRENT, lanes].float().cpu()
    items = state.trace[torch.tensor(slots)].cpu()
    ends = chains[:, lane_state.END_ITEM]
    is_transition = torch.arange(items.shape[1]) % state.rules.items_per_block != 0
    num_transitions = torch.cat((torch.zeros(1, dtype=torch.int64), is_transition.cumsum(0)))[ends]
    done = torch.arange(items.shape[1]) < ends[:, None]
    decoded = (items[:, :, TRACE_FIELDS.index("decoded")] * done).sum(1)
    # Tens of thousands of short chains may finish in one tick: whole columns, then one slice each.
    rows = zip(
        places,
        tokens.unbind(),
        scores[:, :, lane_state.LOG_PROB].unbind(),
        scores[:, :, lane_state.LOG_Q].unbind(),
        scores[:, :, lane_state.ENTROPY].unbind(),
        chains[:, lane_state.NEWEST_LENGTH].tolist(),
        chains[:, lane_state.ENDED].tolist(),
        decoded.tolist(),
        items[:, is_transition].unbind(),
        num_transitions.tolist(),
        strict=True,
    )
    return [
        FinishedChain(
            place=place,
            tokens=token[:n],
            log_prob=log_prob[:n],
            log_q=log_q[:n],
            entropy=entropy[:n],
            ended=bool(ended),
            decoded_tokens=int(decoded),
            trace=transitions[:made],
        )
        for place, token, log_prob, log_q, entropy, n, ended, decoded, transitions, made in rows
    ]
