"""Repeats a tick until its flag is 0: on the device in one launch, or from the host.

A tick is a callable that does one round of work on tensors that stay where they are, and leaves in
the flag, an int32 tensor of one element, whether there is another. `capture` records it as a CUDA
graph; `DeviceLoop` repeats the graph on the device, which saves the host's launch and its look at
the flag in every round; `HostLoop` does the same work from Python, on any device.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from powerkernels import _cuda_graph, _extension
from powerkernels._arguments import check_number, check_shape, check_tensor, described
from powerkernels._cuda_graph import EmptyGraphError, on_device, waits_are_errors
from powerkernels.power_sampling.operator_watch import (
    OperatorWatch,
    random_states,
    same_states,
    watched,
)

FIRST_PAUSE = (
    5e-5  # seconds; doubles up to poll_seconds, so that a short loop is not waited for long
)
_OLDEST_TORCH = "2.8"  # the first with raw_cuda_graph
# Without one, nothing that a tick does could change the flag, and the loop would never end.
_NEEDS = ("kernel",)


class CaptureError(RuntimeError):
    """The tick cannot be recorded as a CUDA graph; the message names the operator and layer."""


class TickLoop(Protocol):
    """What `DeviceLoop` and `HostLoop` share."""

    @property
    def ticks(self) -> int:
        """Ticks of all runs so far; may be read while one runs."""

    def request_stop(self) -> None:
        """End the current run after the tick it is in; a run begun later makes no tick, once."""

    def run(
        self,
        *,
        on_progress: Callable[[int], object] | None = None,
        poll_seconds: float = 0.02,
        max_ticks: int | None = None,
    ) -> int:
        """Repeat the tick while the flag is not 0; returns the number of ticks."""


def why_no_graph_loop(device: torch.device | str) -> str | None:
    """Why `DeviceLoop` cannot work on `device`, in a line; None if it can."""
    kind = torch.device(device).type
    if kind != "cuda":
        return f"it needs a CUDA device, got {kind}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph"):
        return f"torch {torch.__version__} does not give its graphs away, {_OLDEST_TORCH} does"
    module = _extension.extension()
    if module is None:
        return f"the compiled part of powerkernels is missing: {_extension.why_missing()}"
    if not module.has_cuda:
        return "the compiled part of powerkernels was built without CUDA"
    if not hasattr(module, "GraphLoop"):
        return "the compiled part of powerkernels was built with a CUDA toolkit older than 12.4"
    return module.why_no_graph_loop() or None


class DeviceLoop:
    """Repeats a captured tick on the device, in one launch, until its flag is 0.

    The flag is read before the first tick too. Built once, it may be run any number of times; it
    keeps the graph and the flag alive.

    Args:
        tick: the captured tick, of `capture` or of a `torch.cuda.CUDAGraph(keep_graph=True)`. Only
            kernels, and copies and memsets of device or pinned memory, all on one device.
        flag: int32 [1] on the CUDA device; nonzero is "one more tick".

    Raises:
        TypeError: tick is no CUDAGraph, or flag no int32 tensor.
        ValueError: flag is not of shape [1] or not on a CUDA device, or the tick holds no kernel or
            a node that the device cannot repeat; the message names its type.
        RuntimeError: this machine cannot do it (`why_no_graph_loop`), or CUDA refuses.
    """

    def __init__(self, tick: torch.cuda.CUDAGraph, flag: Tensor) -> None:
        if not isinstance(tick, torch.cuda.CUDAGraph):
            raise TypeError(f"tick must be a torch.cuda.CUDAGraph, got {described(tick)}")
        _check_flag(flag)
        if flag.device.type != "cuda":
            raise ValueError(f"flag must be on a CUDA device, got {described(flag)}")
        reason = why_no_graph_loop(flag.device)
        if reason is not None:
            raise RuntimeError(f"no loop on the device: {reason}; HostLoop repeats the tick too")
        with torch.cuda.device(flag.device):
            # Set before what it reads, so that it is gone before that too.
            self._loop: Any = _extension.compiled().GraphLoop(
                tick.raw_cuda_graph(), flag.data_ptr(), flag.device.index
            )
        self._tick = tick
        self._flag = flag
        self._running = False

    @property
    def ticks(self) -> int:
        """Ticks of all runs so far. Costs no CUDA call, and is true while a run is under way."""
        return int(self._loop.ticks())

    def request_stop(self) -> None:
        """End the current run after the tick it is in; may be called from any thread.

        Without a run, the next one makes no tick.
        """
        self._loop.request_stop()

    def run(
        self,
        *,
        on_progress: Callable[[int], object] | None = None,
        poll_seconds: float = 0.02,
        max_ticks: int | None = None,
    ) -> int:
        """Launch the loop on the current stream and wait until it has ended.

        Ctrl-C, like any exception of `on_progress`, ends the loop after the tick it is in, and is
        raised when the device is idle again.

        Args:
            on_progress: called with the run's ticks so far, about every `poll_seconds`.
            poll_seconds: longest pause between two looks at the device; > 0.
            max_ticks: end after so many ticks, >= 1; None is no limit.

        Returns:
            The ticks of this run.

        Raises:
            RuntimeError: CUDA failed, in the loop or before it.
        """
        _check_run(poll_seconds, max_ticks)
        with torch.cuda.device(self._flag.device):
            self._finish()  # a run that a second Ctrl-C left behind
            before = self.ticks
            self._running = True
            try:
                self._loop.launch(torch.cuda.current_stream().cuda_stream, max_ticks or 0)
                for pause in _pauses(poll_seconds):
                    if self._loop.is_done():
                        break
                    time.sleep(pause)
                    if on_progress is not None and pause == poll_seconds:
                        on_progress(self.ticks - before)
            except BaseException:
                self._finish()
                raise
            self._running = False
            self._loop.clear_stop()
            return self.ticks - before

    def _finish(self) -> None:
        """Stop the run under way, if there is one, and wait for its end."""
        if not self._running:
            return
        self._loop.request_stop()
        for pause in _pauses(0.001):
            if self._loop.is_done():
                break
            time.sleep(pause)
        self._running = False
        self._loop.clear_stop()


class HostLoop:
    """Repeats a tick from the host until its flag is 0: the same work, on any device.

    Reading the flag of a CUDA device waits for the tick.

    Args:
        tick: a captured tick, or a callable. Ctrl-C takes effect between two replays, but may cut
            a callable short.
        flag: int32 [1]; nonzero is "one more tick".
        check_every: ticks between two looks at the flag, >= 1. Above 1 it saves waits, and up to
            `check_every - 1` ticks are made after the flag is 0, which must do no harm.

    Raises:
        TypeError: tick is neither, or flag no int32 tensor.
        ValueError: flag is not of shape [1], check_every is below 1, or a captured tick holds no
            kernel.
    """

    def __init__(
        self,
        tick: torch.cuda.CUDAGraph | Callable[[], object],
        flag: Tensor,
        *,
        check_every: int = 1,
    ) -> None:
        if isinstance(tick, torch.cuda.CUDAGraph):
            self._tick: Callable[[], object] = tick.replay
        elif callable(tick):
            self._tick = tick
        else:
            raise TypeError(
                f"tick must be a torch.cuda.CUDAGraph or a callable, got {described(tick)}"
            )
        _check_flag(flag)
        _check_count("check_every", check_every)
        if isinstance(tick, torch.cuda.CUDAGraph):
            try:
                _cuda_graph.refuse_without(tick, _NEEDS, flag.device)
            except EmptyGraphError as error:
                raise ValueError(f"the tick would be repeated for ever: {error}") from error
        self._flag = flag
        self._check_every = check_every
        self._ticks = 0
        self._stop = threading.Event()

    @property
    def ticks(self) -> int:
        """Ticks of all runs so far."""
        return self._ticks

    def request_stop(self) -> None:
        """End the current run after the tick it is in; may be called from any thread.

        Without a run, the next one makes no tick.
        """
        self._stop.set()

    def run(
        self,
        *,
        on_progress: Callable[[int], object] | None = None,
        poll_seconds: float = 0.02,
        max_ticks: int | None = None,
    ) -> int:
        """Repeat the tick on the current stream while the flag is not 0.

        Args:
            on_progress: called with the run's ticks so far, at most every `poll_seconds`.
            poll_seconds: > 0.
            max_ticks: end after so many ticks, >= 1; None is no limit.

        Returns:
            The ticks of this run.
        """
        _check_run(poll_seconds, max_ticks)
        before = self._ticks
        limit = float("inf") if max_ticks is None else before + max_ticks
        looked = time.perf_counter()
        try:
            while self._ticks < limit and not self._stop.is_set() and bool(self._flag.item()):
                with on_device(self._flag.device):
                    for _ in range(self._check_every):
                        self._tick()
                        self._ticks += 1
                        if self._ticks == limit or self._stop.is_set():
                            break
                now = time.perf_counter()
                if on_progress is not None and now - looked >= poll_seconds:
                    looked = now
                    on_progress(self._ticks - before)
        finally:
            self._stop.clear()
        return self._ticks - before


def capture(
    tick: Callable[[], object],
    *,
    warmup: int = 3,
    device: torch.device | str | int | None = None,
) -> torch.cuda.CUDAGraph:
    """Record a tick as a CUDA graph on a device, for `DeviceLoop` or `HostLoop`.

    The tick is first called `warmup` times for real, on a stream of its own, so that what happens
    once (compilation, workspaces) is not recorded; in the last of these calls a wait for the device
    is an error. Its state moves on with every call; the recording itself does nothing to it.

    A failed capture leaves the process as it was: the recording is ended, the current stream is the
    one from before, and the next operation works. To name the offender the tick is then called
    once more, watched: its state is not to be used after an error.

    Random numbers of a `torch.Generator` of the tick's own are not found out here; the device would
    draw the same ones in every tick.

    Args:
        tick: one round of work on CUDA tensors that stay where they are. No wait for the device, no
            copy from unpinned memory, no random numbers of torch.
        warmup: calls before the recording, >= 1.
        device: the CUDA device that the tick's tensors are on, the current one in all calls of the
            tick; None is the device that is current now.

    Returns:
        The graph, made with ``keep_graph=True``.

    Raises:
        CaptureError: the tick does what a graph cannot hold, and the message names the operator of
            torch and its layer; or it launches no kernel on the device.
        ValueError: device is no CUDA device.
        RuntimeError: torch cannot capture here.
    """
    if not callable(tick):
        raise TypeError(f"tick must be a callable, got {described(tick)}")
    _check_count("warmup", warmup)
    wanted = _cuda_device(device)
    reason = _why_no_capture()
    if reason is not None:
        raise RuntimeError(f"no CUDA graph can be captured: {reason}")
    index = torch.cuda.current_device() if wanted.index is None else wanted.index
    place = torch.device("cuda", index)
    if _cuda_graph.is_capturing(place):
        raise RuntimeError(
            "no CUDA graph can be captured: the current stream is in a capture already"
        )
    with on_device(place):
        before = torch.cuda.current_stream()
        # Recorded on another stream than the calls were made on: the workspace that cuBLAS keeps
        # for a stream then comes from the graph's own memory. One from torch's common memory goes
        # back there when torch.compile records graphs elsewhere, and this graph writes to it still.
        calls, recording = torch.cuda.Stream(), torch.cuda.Stream()
        calls.wait_stream(before)
        try:
            with torch.cuda.stream(calls):
                for _ in range(warmup - 1):
                    tick()
                _dry_run(tick, place)
            recording.wait_stream(calls)
            return _record(tick, recording)
        finally:
            before.wait_stream(calls)
            before.wait_stream(recording)


def _cuda_device(device: torch.device | str | int | None) -> torch.device:
    place = (
        torch.device("cuda", device) if isinstance(device, int) else torch.device(device or "cuda")
    )
    if place.type != "cuda":
        raise ValueError(f"device must be a CUDA device, got {place}")
    return place


def _dry_run(tick: Callable[[], object], device: torch.device) -> None:
    """One call of the tick in which waits for the device, and random numbers, are errors."""

    def call() -> None:
        with waits_are_errors():
            tick()

    states = random_states(device)
    try:
        call()
    except Exception as error:
        watch, again = watched(call, device)
        raise CaptureError(waiting_message(watch, _told(watch, again, error))) from error
    if not same_states(states, random_states(device)):
        watch, _ = watched(call, device)
        raise CaptureError(random_message(watch))


def _record(tick: Callable[[], object], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    try:
        return _cuda_graph.record(tick, stream, needs=_NEEDS)
    except EmptyGraphError as error:
        raise CaptureError(_cannot_capture("it launches no kernel", error)) from error
    except Exception as error:
        watch, again = watched(lambda: _cuda_graph.record(tick, stream))
        raise CaptureError(recording_message(watch, _told(watch, again, error))) from error


def _told(watch: OperatorWatch, again: Exception | None, first: Exception) -> Exception:
    """Which error to tell: under the watch compiled code may fail in ways of its own."""
    return again if again is not None and watch.failed is not None else first


def waiting_message(watch: OperatorWatch, error: Exception) -> str:
    """For a dry run that failed."""
    return _cannot_capture(f"it fails{_where(watch)} when it may not wait for the device", error)


def random_message(watch: OperatorWatch) -> str:
    """For a dry run that moved torch's generators."""
    site = f", by {watch.random}" if watch.random else ""
    return _cannot_capture(
        f"it draws random numbers of torch{site}, and would draw the same in every tick"
    )


def recording_message(watch: OperatorWatch, error: Exception) -> str:
    """For a recording that failed."""
    return _cannot_capture(f"the recording fails{_where(watch)}", error)


def _where(watch: OperatorWatch) -> str:
    if watch.failed:
        return f" at {watch.failed}"
    return f" after {watch.last}" if watch.last else ""


def _cannot_capture(what: str, error: Exception | None = None) -> str:
    lines = str(error).strip().splitlines() if error is not None else []
    cause = f" ({type(error).__name__}: {lines[0]})" if lines else ""
    return f"the tick cannot be captured in a CUDA graph: {what}{cause}; HostLoop takes it as it is"


def _why_no_capture() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if not hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph"):
        return f"torch {torch.__version__} does not give its graphs away, {_OLDEST_TORCH} does"
    return None


def _pauses(longest: float) -> Iterator[float]:
    pause = FIRST_PAUSE
    while True:
        yield min(pause, longest)
        pause = min(2 * pause, longest)


def _check_flag(flag: object) -> None:
    check_tensor("flag", flag, (torch.int32,))
    assert isinstance(flag, Tensor)
    check_shape("flag", flag, (1,))


def _check_run(poll_seconds: float, max_ticks: int | None) -> None:
    check_number("poll_seconds", poll_seconds, low=0, open_low=True)
    if max_ticks is not None:
        _check_count("max_ticks", max_ticks)


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {described(value)}")
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")
