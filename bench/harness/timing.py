"""Clocks: variants in turn, cold and sustained.

One sample of each variant is taken in every round, in an order that rotates, so that what else the
machine does falls on all of them. "cold": one call after the caches were filled with something
else. "sustained": calls back to back over copies of the inputs that are together larger than the
last cache; the time of one. On a GPU both are CUDA graphs between two events (one call, or many),
or plain calls where a variant cannot be captured; a variant that works on the host too is timed
there, until the device is idle. The ceiling is timed in each of the ways that a variant beside it
is. None of that has yet run on a GPU. On a CPU the timer is pytest-benchmark's.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pytest_benchmark.timers import default_timer

from bench.harness.cases import Call
from powerkernels import _cuda_graph
from powerkernels._cuda_graph import EmptyGraphError, on_device

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

# Between two events: a CUDA graph, or calls. On the host: calls, until their work is done.
TimedBy = Literal["graph", "plain calls", "wall clock"]


@dataclass(frozen=True)
class Plan:
    """How much time a case has, and how its samples are taken."""

    seconds: float  # for all variants together
    min_rounds: int = 5
    max_rounds: int = 40
    evict: bool = True
    peers: frozenset[str] = frozenset()  # that may do with PEER_ROUNDS
    on_host: frozenset[str] = frozenset()  # that work on the host too: by the wall clock
    ceiling: str | None = None  # what the others are held against: timed as each of them is
    whole_job: bool = False  # calls of seconds, that have run before: no warm-up, by the wall clock


@dataclass
class Samples:
    """Seconds a call."""

    cold: list[float] = field(default_factory=list)
    sustained: list[float] = field(default_factory=list)
    calls: int = 1  # in a sustained sample
    timed_by: TimedBy = "wall clock"
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
    exception is the caller's. The ceiling's samples in another way than its own are found under
    `ceiling_by`.
    """
    with on_device(device) if plan.whole_job else capture_stream(device):
        clocks = _clocks(calls, device, plan, on_error)
        rounds = _rounds({name: made.seconds for name, made in clocks.items()}, plan)
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


def _clocks(
    calls: Mapping[str, Sequence[Call]],
    device: torch.device,
    plan: Plan,
    on_error: Callable[[str, Exception], None] | None,
) -> dict[str, Any]:
    recorder = Recorder()
    clocks: dict[str, Any] = {}

    def add(name: str, of_variant: Sequence[Call], way: TimedBy) -> None:
        with _reported(name, on_error):
            if plan.whole_job:
                clocks[name] = JobClock(of_variant, device)
            elif way == "wall clock":
                clocks[name] = HostClock(of_variant, device)
            else:
                clocks[name] = DeviceClock(of_variant, recorder if way == "graph" else None)

    for name, of_variant in calls.items():
        on_host = device.type != "cuda" or name in plan.on_host
        add(name, of_variant, "wall clock" if on_host else "graph")
    if plan.ceiling in clocks:
        own = clocks[plan.ceiling].samples.timed_by
        ways: set[TimedBy] = {clock.samples.timed_by for clock in clocks.values()}
        for way in sorted(ways - {own, "graph"}):
            add(ceiling_by(plan.ceiling, way), calls[plan.ceiling], way)
    return clocks


def ceiling_by(ceiling: str, way: TimedBy) -> str:
    """The name of the ceiling's samples in another way than its own."""
    return f"{ceiling}, {way}"


@contextlib.contextmanager
def capture_stream(device: torch.device) -> Iterator[None]:
    """The stream that graphs are recorded on as the current one; for what becomes part of a graph.

    Autograd runs a backward on the stream of its forward, and a capture takes in nothing of another
    stream: a forward that is not timed has to be made on this one too. A single one, as cuBLAS
    keeps a workspace for each stream.
    """
    if device.type != "cuda":
        yield
        return
    with on_device(device):
        before = torch.cuda.current_stream()
        stream = _capture_stream(torch.cuda.current_device())
        stream.wait_stream(before)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            before.wait_stream(stream)


@functools.cache
def _capture_stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(torch.device("cuda", index))


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
    """Wall-clock time of calls on a CPU, or in part on a GPU, until that is idle."""

    def __init__(self, calls: Sequence[Call], device: torch.device) -> None:
        self._calls, self._next, self._device = calls, 0, device
        self.samples = Samples()
        if device.type == "cuda":
            self.samples.graph = False
            self.samples.why_no_graph = "part of its work is on the host, or is beside such work"
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

    def _timed(self, count: int = 1) -> float:
        """Seconds of so many calls."""
        _wait_for(self._device)
        calls = range(count)
        start = default_timer()
        for _ in calls:
            self._call()
        _wait_for(self._device)
        return max(default_timer() - start, 1e-9)

    def take(self, evict: Evictor | None) -> None:
        if evict is not None:
            evict()
        self.samples.cold.append(self._timed())
        if self._sustain:
            self.samples.sustained.append(self._timed(self.samples.calls) / self.samples.calls)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class JobClock:
    """Wall-clock time of whole jobs, until the device is idle again."""

    def __init__(self, calls: Sequence[Call], device: torch.device) -> None:
        self._call, self._device = calls[0], device
        self.samples = Samples()
        self.seconds = LONG_SECONDS

    def take(self, evict: Evictor | None) -> None:
        _wait_for(self._device)
        start = default_timer()
        self._call()
        _wait_for(self._device)
        self.samples.cold.append(default_timer() - start)


class Recorder:
    """Records graphs on the current stream, for clocks that take turns.

    They share a pool: they run one after the other and nobody needs their results, while pools of
    their own would hold the peaks of all variants at once, which is more than a card has. A
    recording that fails takes the pool with it (`_cuda_graph.record`): the next begins another.
    """

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, work: Call) -> torch.cuda.CUDAGraph:
        pool, self._pool = self._pool or torch.cuda.graph_pool_handle(), None
        graph = _cuda_graph.record(work, torch.cuda.current_stream(), pool=pool)
        graph.instantiate()
        self._pool = pool
        return graph


class DeviceClock:
    """Time between two events on a GPU, on the current stream.

    Of CUDA graphs where there is a recorder and the calls can be captured.

    Raises:
        EmptyGraphError: the calls do nothing on the device that a graph of them could repeat.
    """

    def __init__(self, calls: Sequence[Call], recorder: Recorder | None) -> None:
        self._calls = calls
        self.samples = Samples(timed_by="plain calls", graph=False)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for call in [*calls, *calls[:1]] * WARMUP_CALLS:
            call()
        once = self._timed(calls[0])
        wanted = int(min(MAX_CALLS, max(1, SUSTAINED_SECONDS["cuda"] / max(once, 1e-7))))
        self.samples.calls = max(wanted, min(len(calls), MAX_CALLS))
        self._cold, self._sustained = self._calls[-1], self._many
        if recorder is None:
            self.samples.why_no_graph = "it is beside a variant that cannot be captured"
        else:
            self._record(recorder)
        self.seconds = once * (1 + self.samples.calls)

    def _many(self) -> None:
        for number in range(self.samples.calls):
            self._calls[number % len(self._calls)]()

    def _record(self, recorder: Recorder) -> None:
        try:
            graphs = [recorder(work) for work in (self._calls[-1], self._many)]
        except EmptyGraphError:
            raise
        except Exception as error:  # it waits for the host, or allocates behind torch's back
            text = str(error).splitlines()[0] if str(error) else repr(error)
            self.samples.why_no_graph = text
            return
        self._cold, self._sustained = (graph.replay for graph in graphs)
        self.samples.timed_by, self.samples.graph = "graph", True

    def _timed(self, work: Call) -> float:
        self._start.record()
        work()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3

    def take(self, evict: Evictor | None) -> None:
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
