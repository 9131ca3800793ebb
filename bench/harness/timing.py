"""Clocks: variants in turn, cold and sustained.

One sample of each variant is taken in every round, in an order that rotates, so that what else the
machine does falls on all of them. "cold": one call after the caches were filled with something
else. "sustained": calls back to back over copies of the inputs that are together larger than the
last cache; the time of one. On a GPU both are CUDA graphs between two events (one call, or many),
or plain calls where a variant cannot be captured; that part has not yet run on a GPU. On a CPU the
timer is pytest-benchmark's.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pytest_benchmark.timers import default_timer

from bench.harness.cases import Call

# A CPU's last cache where the system does not say; twice an H200's L2.
CPU_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
CPU_CACHE_BYTES = 2**25
GPU_CACHE_BYTES = 2**26
# A sustained sample lasts so long at least; one call that does alone is sampled cold only.
SUSTAINED_SECONDS = {"cpu": 2e-3, "cuda": 5e-4}
LONG_SECONDS = 0.1
MAX_CALLS = 200
WARMUP_CALLS = 2
PEER_ROUNDS = 5  # of slow ones, a median and its spread; ours are compared between runs
MAX_SETS = 32


@dataclass(frozen=True)
class Plan:
    """How much time a case has, and how its samples are taken."""

    seconds: float  # for all variants together
    min_rounds: int = 5
    max_rounds: int = 40
    evict: bool = True
    peers: frozenset[str] = frozenset()  # that may do with PEER_ROUNDS
    whole_job: bool = False  # calls of seconds, that have run before: no warm-up, by the wall clock


@dataclass
class Samples:
    """Seconds a call."""

    cold: list[float] = field(default_factory=list)
    sustained: list[float] = field(default_factory=list)
    calls: int = 1  # in a sustained sample
    graph: bool | None = None  # whether it was captured; None on a CPU
    why_no_graph: str | None = None


def interleaved(
    calls: Mapping[str, Sequence[Call]],
    device: torch.device,
    plan: Plan,
    on_error: Callable[[str, Exception], None] | None = None,
) -> dict[str, Samples]:
    """Samples of each variant; its calls do the same on different copies of the inputs.

    A variant that raises is left out from then on, and `on_error` hears of it; without one the
    exception is the caller's.
    """
    clock: Any = JobClock if plan.whole_job else HostClock
    if device.type == "cuda" and not plan.whole_job:
        # One pool for all graphs: they run one after the other, and nobody needs their results.
        clock = functools.partial(DeviceClock, pool=torch.cuda.graph_pool_handle())
    clocks, seconds = {}, {}
    for name, of_variant in calls.items():
        with _reported(name, on_error):
            made = clock(of_variant, device)
            clocks[name], seconds[name] = made, made.seconds
    rounds = _rounds(seconds, plan)
    evict = Evictor(device) if plan.evict else None
    names = list(clocks)
    for number in range(max(rounds.values(), default=0)):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if name in clocks and number < rounds[name]:
                with _reported(name, on_error, clocks):
                    clocks[name].take(evict)
        names = [name for name in names if name in clocks]
        if not names:
            break
    return {name: made.samples for name, made in clocks.items()}


@contextlib.contextmanager
def _reported(
    name: str,
    on_error: Callable[[str, Exception], None] | None,
    clocks: dict[str, Any] | None = None,
) -> Any:
    try:
        yield
    except Exception as error:
        if on_error is None:
            raise
        if clocks is not None:
            del clocks[name]
        on_error(name, error)


def _rounds(seconds: Mapping[str, float], plan: Plan) -> dict[str, int]:
    """An equal share of the time each; what the fast ones leave is not used up by the slow ones."""
    share = plan.seconds / max(1, len(seconds))
    wanted = {name: int(share / max(each, 1e-9)) for name, each in seconds.items()}
    return {
        name: min(
            plan.max_rounds,
            max(min(plan.min_rounds, PEER_ROUNDS) if name in plan.peers else plan.min_rounds, n),
        )
        for name, n in wanted.items()
    }


class HostClock:
    """Wall-clock time of calls on a CPU."""

    def __init__(self, calls: Sequence[Call], device: torch.device) -> None:
        self._calls, self._next = calls, 0
        self.samples = Samples()
        once = self._timed()
        self._sustain = once < LONG_SECONDS
        if self._sustain:
            once = min(self._timed() for _ in range(WARMUP_CALLS))
            wanted = -(-SUSTAINED_SECONDS["cpu"] // once)
            self.samples.calls = int(min(MAX_CALLS, max(1, wanted)))
        self.seconds = once * (1 + self._sustain * self.samples.calls)

    def _call(self) -> None:
        call = self._calls[self._next]
        self._next = (self._next + 1) % len(self._calls)
        call()

    def _timed(self) -> float:
        start = default_timer()
        self._call()
        return max(default_timer() - start, 1e-9)

    def take(self, evict: Evictor | None) -> None:
        if evict is not None:
            evict()
        self.samples.cold.append(self._timed())
        if self._sustain:
            count = range(self.samples.calls)
            start = default_timer()
            for _ in count:
                self._call()
            self.samples.sustained.append((default_timer() - start) / self.samples.calls)


class JobClock:
    """Wall-clock time of whole jobs, until the device is idle again."""

    def __init__(self, calls: Sequence[Call], device: torch.device) -> None:
        self._call, self._device = calls[0], device
        self.samples = Samples()
        self.seconds = LONG_SECONDS

    def take(self, evict: Evictor | None) -> None:
        start = default_timer()
        self._call()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.samples.cold.append(default_timer() - start)


class DeviceClock:
    """Time between two events on a GPU, of CUDA graphs where the calls can be captured."""

    def __init__(self, calls: Sequence[Call], device: torch.device, *, pool: Any) -> None:
        self._calls, self._device, self._pool = calls, device, pool
        self.samples = Samples(graph=True)
        with torch.cuda.device(device):
            self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for call in [*calls, *calls[:1]] * WARMUP_CALLS:
                    call()
            torch.cuda.current_stream().wait_stream(stream)
            once = self._timed(calls[0])
            wanted = int(min(MAX_CALLS, max(1, SUSTAINED_SECONDS["cuda"] / max(once, 1e-7))))
            self.samples.calls = max(wanted, min(len(calls), MAX_CALLS))
            self._cold, self._sustained = self._captured()
            self.seconds = once * (1 + self.samples.calls)

    def _many(self) -> None:
        for number in range(self.samples.calls):
            self._calls[number % len(self._calls)]()

    def _captured(self) -> tuple[Call, Call]:
        graphs = []
        try:
            for work in (self._calls[-1], self._many):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self._pool):
                    work()
                graphs.append(graph)
        except Exception as error:  # it waits for the host, or allocates behind torch's back
            torch.cuda.synchronize()
            self.samples.graph = False
            self.samples.why_no_graph = str(error).splitlines()[0] if str(error) else repr(error)
            return self._calls[-1], self._many
        return graphs[0].replay, graphs[1].replay

    def _timed(self, work: Call) -> float:
        self._start.record()
        work()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3

    def take(self, evict: Evictor | None) -> None:
        with torch.cuda.device(self._device):
            if evict is not None:
                evict()
            self.samples.cold.append(self._timed(self._cold))
            self._sustained()  # the clocks of a busy device
            self.samples.sustained.append(self._timed(self._sustained) / self.samples.calls)


class Evictor:
    """Fills the last cache with something else."""

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.empty(2 * cache_bytes(device), dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        self._buffer.zero_()


def cache_bytes(device: torch.device) -> int:
    """Bytes of the last cache."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or (
            GPU_CACHE_BYTES
        )
    with contextlib.suppress(OSError, ValueError):
        return int(CPU_CACHE.read_text().strip().removesuffix("K")) * 1024
    return CPU_CACHE_BYTES


def num_sets(set_bytes: int, device: torch.device) -> int:
    """How many copies of the inputs are together twice the last cache."""
    return max(1, min(MAX_SETS, -(-2 * cache_bytes(device) // max(1, set_bytes))))


def median(samples: Sequence[float]) -> float:
    return statistics.median(samples)


def quantile(samples: Sequence[float], share: float) -> float:
    """The sample below which `share` of them lie, the nearest one."""
    ordered = sorted(samples)
    return ordered[round(share * (len(ordered) - 1))]
