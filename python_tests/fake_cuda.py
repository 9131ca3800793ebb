"""A torch.cuda of two devices that does no work, for what decides where and how work is recorded.

Streams, captures, pools and the generator behave as in torch 2.11 where a capture goes well and
where it fails. An end that fails leaves the generator in its capture and the pool in its recording,
which for pinned memory nobody can end. A pool released once too often ends the process (here: an
AssertionError).
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from powerkernels import _extension

NUM_DEVICES = 2
# What a kernel takes, as a node of a graph and with its launch.
MS_REPLAYED, MS_LAUNCHED = 1.0, 4.0


class Stream:
    def __init__(self, cuda: FakeCuda, device: int, is_default: bool = False) -> None:
        self.cuda, self.is_default = cuda, is_default
        self.device = torch.device("cuda", device)
        self.cuda_stream = len(cuda.streams)
        cuda.streams.append(self)

    def wait_stream(self, other: Stream) -> None:
        self.cuda.waits.append((self, other))

    def synchronize(self) -> None:
        self.cuda.refuse_while_recording("cudaStreamSynchronize")


class Event:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.device, self.at = cuda, -1, 0.0

    def record(self) -> None:
        self.device, self.at = self.cuda.device, self.cuda.milliseconds
        self.cuda.done_on.setdefault("event", []).append(self.device)

    def synchronize(self) -> None:
        self.cuda.refuse_while_recording("cudaEventSynchronize")

    def elapsed_time(self, end: Event) -> float:
        assert self.device == end.device
        return end.at - self.at


class Graph:
    """A torch.cuda.CUDAGraph."""

    cuda: FakeCuda

    def __init__(self, keep_graph: bool = False) -> None:
        self.keep_graph, self.ended = keep_graph, False
        self.nodes: Counter[str] = Counter()
        self.replays: list[int] = []
        self.instantiated = False

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        cuda = self.cuda
        if cuda.fails_to_begin:
            raise RuntimeError("a capture cannot begin")
        assert not cuda.stream.is_default, "CUDA graphs must be captured on a non-default stream"
        cuda.generator_captures = True
        self._pool = cuda.new_pool() if pool is None else pool
        for begun in (cuda.begun, cuda.begun_on_host):
            if begun is cuda.begun:
                cuda.references[self._pool] += 1
            if self._pool in begun:
                raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
            begun.add(self._pool)
        self.stream, self.device = cuda.stream, cuda.device
        cuda.recording, cuda.is_valid = self, True

    def capture_end(self) -> None:
        cuda = self.cuda
        if cuda.recording is not self or cuda.stream is not self.stream:
            raise RuntimeError("the stream is not in this capture")
        cuda.recording = None
        if not cuda.is_valid:
            raise RuntimeError("operation failed due to a previous error during capture")
        cuda.begun.remove(self._pool)
        cuda.begun_on_host.remove(self._pool)
        cuda.generator_captures = False
        self.ended = True
        if not self.nodes:
            warnings.warn("The CUDA Graph is empty. This usually means ...", stacklevel=2)
        if cuda.warning:
            warnings.warn(cuda.warning, stacklevel=2)
        cuda.graphs[id(self)] = self

    def pool(self) -> Any:
        if not self.ended:
            raise RuntimeError("pool() without a preceding successful capture")
        return self._pool

    def reset(self) -> None:
        if self.ended:
            self.cuda.release(self._pool)
            self.ended = False

    def __del__(self) -> None:
        self.reset()

    def raw_cuda_graph(self) -> int:
        if not self.keep_graph:
            raise RuntimeError("keep_graph must be true")
        return id(self)

    def instantiate(self) -> None:
        assert self.ended
        self.instantiated = True

    def replay(self) -> None:
        assert self.ended
        self.replays.append(self.cuda.device)
        self.cuda.milliseconds += MS_REPLAYED * sum(self.nodes.values())


class Loop:
    """The compiled GraphLoop: as many ticks as it is asked for, at once."""

    cuda: FakeCuda

    def __init__(self, tick_graph: int, flag: int, device: int) -> None:
        if self.cuda.loop_error is not None:
            raise self.cuda.loop_error
        assert self.cuda.device == device
        self.graph, self.launches, self.count = tick_graph, [], 0

    def launch(self, stream: int, max_ticks: int = 0) -> None:
        self.launches.append((self.cuda.device, stream))
        self.count += max_ticks

    def is_done(self) -> bool:
        return True

    def clear_stop(self) -> None:
        pass

    def ticks(self) -> int:
        return self.count


class OnDevice(Tensor):
    """A tensor of the CPU that says that it is on a CUDA device."""

    index: int

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", self.index)


class FakeCuda:
    def __init__(self) -> None:
        self.device = 0
        self.milliseconds = 0.0
        self.streams: list[Stream] = []
        self.current = [Stream(self, device, is_default=True) for device in range(NUM_DEVICES)]
        self.waits: list[tuple[Stream, Stream]] = []
        self.done_on: dict[str, list[int]] = {}
        self.recording: Graph | None = None
        self.is_valid = True
        self.begun: set[Any] = set()  # pools in a recording, as torch believes
        self.begun_on_host: set[Any] = set()  # the same of pinned memory
        self.references: Counter[Any] = Counter()  # of pools, by graphs
        self.generator_captures = False
        self.graphs: weakref.WeakValueDictionary[int, Graph] = weakref.WeakValueDictionary()
        self.fails_to_begin = False
        self.loop_error: Exception | None = None  # of the WHILE graph
        self.warning: str | None = None

    @property
    def stream(self) -> Stream:
        return self.current[self.device]

    @property
    def is_recording(self) -> bool:
        return self.recording is not None and self.recording.stream is self.stream

    def launch(self, kind: str = "kernel", stream: Stream | None = None) -> None:
        """What an operator does: a node of the capture that its stream is in."""
        stream = stream or self.stream
        if self.recording is None:
            self.milliseconds += MS_LAUNCHED
            return
        if stream is self.recording.stream:
            self.recording.nodes[kind] += 1
        elif stream.device == self.recording.stream.device:
            self.invalidate()

    def invalidate(self) -> None:
        """What no capture allows."""
        self.is_valid = False
        raise RuntimeError("operation not permitted when stream is capturing")

    def refuse_while_recording(self, name: str) -> None:
        if self.is_recording:
            self.invalidate()
        self.done_on.setdefault(name, []).append(self.device)

    def new_pool(self) -> tuple[int, int]:
        return (0, len(self.references) + 1000 * len(self.streams))

    def release(self, pool: Any) -> None:
        self.references[pool] -= 1
        assert self.references[pool] >= 0, "a pool was released once too often"

    def end_allocate(self, device: int, pool: Any) -> None:
        if pool not in self.begun:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.begun.remove(pool)

    def tensor(self, tensor: Tensor, device: int) -> Tensor:
        made = tensor.as_subclass(OnDevice)
        made.index = device
        return made

    @contextlib.contextmanager
    def on(self, device: Any) -> Iterator[None]:
        before, self.device = self.device, index_of(device, self.device)
        try:
            yield
        finally:
            self.device = before

    @contextlib.contextmanager
    def with_stream(self, stream: Stream) -> Iterator[None]:
        with self.on(stream.device):
            before, self.current[self.device] = self.stream, stream
            try:
                yield
            finally:
                self.current[self.device] = before


def index_of(device: Any, current: int) -> int:
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return current if index is None else index


def install(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """In place of torch.cuda and of what of the compiled part looks at graphs."""
    cuda = FakeCuda()
    modes = ["default"]

    def pool_handle() -> tuple[int, int]:
        pool = cuda.new_pool()
        cuda.references[pool] = 0
        return pool

    def synchronize(device: Any = None) -> None:
        with cuda.on(cuda.device if device is None else device):
            cuda.refuse_while_recording("synchronize")

    def allocated(device: Any = None) -> int:
        cuda.done_on.setdefault("memory", []).append(
            cuda.device if device is None else index_of(device, cuda.device)
        )
        return 0

    replaced: dict[str, Any] = {
        "CUDAGraph": type("CUDAGraph", (Graph,), {"cuda": cuda}),
        "Event": lambda enable_timing=False: Event(cuda),
        "Stream": lambda device=None: Stream(
            cuda, cuda.device if device is None else index_of(device, cuda.device)
        ),
        "current_device": lambda: cuda.device,
        "current_stream": lambda device=None: cuda.current[
            cuda.device if device is None else index_of(device, cuda.device)
        ],
        "device": cuda.on,
        "empty_cache": lambda: cuda.done_on.setdefault("empty_cache", []).append(cuda.device),
        "get_rng_state": lambda device: torch.zeros(1),
        "get_sync_debug_mode": lambda: modes[-1],
        "graph_pool_handle": pool_handle,
        "is_available": lambda: True,
        "max_memory_allocated": allocated,
        "memory_allocated": allocated,
        "reset_peak_memory_stats": allocated,
        "is_current_stream_capturing": lambda: cuda.is_recording,
        "set_sync_debug_mode": modes.append,
        "stream": cuda.with_stream,
        "synchronize": synchronize,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", cuda.end_allocate, raising=False)
    monkeypatch.setattr(
        torch._C, "_cuda_releasePool", lambda device, pool: cuda.release(pool), raising=False
    )
    real = _extension.extension()

    class Extension:
        has_cuda = True
        GraphLoop = type("GraphLoop", (Loop,), {"cuda": cuda})

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def why_no_graph_loop(self) -> str:
            return ""

        def graph_node_kinds(self, graph: int) -> dict[str, int]:
            return dict(cuda.graphs[graph].nodes)

    monkeypatch.setattr(_extension, "extension", Extension)
    monkeypatch.setattr(_extension, "compiled", Extension)
    return cuda
