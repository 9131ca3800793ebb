"""The loop on the device and its twin on the host; what a tick must not do, and who is named."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import dropout, scaled_dot_product_attention

from powerkernels import _cuda_graph, _extension
from powerkernels.power_sampling import graph_loop
from powerkernels.power_sampling.graph_loop import (
    CaptureError,
    DeviceLoop,
    HostLoop,
    TickLoop,
    capture,
    why_no_graph_loop,
)
from powerkernels.power_sampling.operator_watch import OperatorWatch, layer_name, watched
from python_tests import fake_cuda

CPU = torch.device("cpu")


class Countdown:
    """A toy tick: a number of ticks to go, and a sum that depends on the order of the ticks."""

    def __init__(self, ticks: int, device: str = "cpu") -> None:
        self.left = torch.full((1,), ticks, dtype=torch.int64, device=device)
        self.sum = torch.zeros(1, dtype=torch.int64, device=device)
        self.flag = torch.full((1,), int(ticks > 0), dtype=torch.int32, device=device)

    def tick(self) -> None:
        self.left.sub_(1)
        self.sum.mul_(3).add_(self.left).remainder_(1_000_003)
        self.flag.copy_(self.left > 0)

    def restart(self, ticks: int) -> None:
        self.left.fill_(ticks)
        self.sum.zero_()
        self.flag.fill_(int(ticks > 0))


def expected_sum(start: int, ticks: int) -> int:
    total = 0
    for i in range(ticks):
        total = (total * 3 + start - 1 - i) % 1_000_003
    return total


# On the host.


@given(st.integers(0, 12), st.none() | st.integers(1, 15))
def test_host_loop_makes_the_ticks_that_the_flag_asks_for(ticks: int, limit: int | None) -> None:
    toy = Countdown(ticks)
    loop = HostLoop(toy.tick, toy.flag)
    made = min(ticks, ticks if limit is None else limit)
    assert loop.run(max_ticks=limit) == made
    assert toy.left.item() == ticks - made
    assert toy.sum.item() == expected_sum(ticks, made)
    assert loop.run() == ticks - made
    assert loop.ticks == ticks
    assert toy.flag.item() == 0


@given(st.integers(0, 12), st.integers(1, 5), st.none() | st.integers(1, 15))
def test_a_rare_look_makes_whole_rounds(ticks: int, every: int, limit: int | None) -> None:
    toy = Countdown(ticks)
    rounds = -(-ticks // every) * every
    made = HostLoop(toy.tick, toy.flag, check_every=every).run(max_ticks=limit)
    assert made == min(rounds, rounds if limit is None else limit)


def test_host_loop_takes_the_flag_at_its_word_when_it_begins() -> None:
    toy = Countdown(5)
    toy.flag.zero_()
    assert HostLoop(toy.tick, toy.flag).run() == 0
    toy.flag.fill_(-7)
    assert HostLoop(toy.tick, toy.flag).run() == 5


def test_host_loop_reports_and_stops() -> None:
    toy = Countdown(10**9)
    loop = HostLoop(toy.tick, toy.flag)
    seen: list[int] = []

    def look(ticks: int) -> None:
        seen.append(ticks)
        if len(seen) == 3:
            loop.request_stop()

    made = loop.run(on_progress=look, poll_seconds=1e-9)
    assert seen == [1, 2, 3]
    assert made == 3
    assert loop.run(max_ticks=4) == 4  # the stop was for one run


def test_host_loop_is_stopped_by_another_thread() -> None:
    toy = Countdown(10**9)
    loop = HostLoop(toy.tick, toy.flag)
    timer = threading.Timer(0.05, loop.request_stop)
    timer.start()
    made = loop.run()
    timer.join()
    assert made == loop.ticks == 10**9 - toy.left.item() > 0


def test_a_stop_before_the_run_is_kept_for_it() -> None:
    toy = Countdown(3)
    loop = HostLoop(toy.tick, toy.flag)
    loop.request_stop()
    assert loop.run() == 0
    assert loop.run() == 3


def test_what_a_tick_raises_is_raised() -> None:
    toy = Countdown(5)

    def tick() -> None:
        toy.tick()
        if toy.left.item() == 2:
            raise KeyboardInterrupt

    loop = HostLoop(tick, toy.flag)
    loop_without_graph: TickLoop = loop
    with pytest.raises(KeyboardInterrupt):
        loop_without_graph.run()
    assert loop.run() == 2


BAD_FLAGS = [
    (None, TypeError, "flag must be a dense tensor of int32, got NoneType"),
    (torch.ones(1), TypeError, "flag must be int32, got float32"),
    (torch.ones(2, dtype=torch.int32), ValueError, r"flag must have shape \[1\]"),
    (torch.ones((), dtype=torch.int32), ValueError, r"flag must have shape \[1\]"),
]


@pytest.mark.parametrize(("flag", "error", "message"), BAD_FLAGS)
def test_bad_flag(flag: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        HostLoop(lambda: None, flag)


def test_bad_arguments() -> None:
    toy = Countdown(3)
    with pytest.raises(TypeError, match=r"tick must be a torch\.cuda\.CUDAGraph or a callable"):
        HostLoop(3, toy.flag)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"tick must be a torch\.cuda\.CUDAGraph, got function"):
        DeviceLoop(lambda: None, toy.flag)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="check_every must be >= 1, got 0"):
        HostLoop(toy.tick, toy.flag, check_every=0)
    loop = HostLoop(toy.tick, toy.flag)
    with pytest.raises(ValueError, match="max_ticks must be >= 1, got 0"):
        loop.run(max_ticks=0)
    with pytest.raises(TypeError, match="max_ticks must be an int, got bool"):
        loop.run(max_ticks=True)
    with pytest.raises(ValueError, match="poll_seconds must be a finite number > 0"):
        loop.run(poll_seconds=0)
    with pytest.raises(TypeError, match="tick must be a callable"):
        capture(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="warmup must be >= 1"):
        capture(toy.tick, warmup=0)
    assert loop.ticks == 0


# Where it cannot be on the device.


def test_why_not_on_a_cpu() -> None:
    assert why_no_graph_loop("cpu") == "it needs a CUDA device, got cpu"


def test_every_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in (why_no_graph_loop("cuda") or "")
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    with monkeypatch.context() as older:
        older.setattr(torch.cuda, "CUDAGraph", type("CUDAGraph", (), {}))
        assert "2.8" in (why_no_graph_loop("cuda") or "")

    module = SimpleNamespace(has_cuda=False)
    monkeypatch.setattr(_extension, "extension", lambda: None)
    monkeypatch.setattr(_extension, "why_missing", lambda: "no compiler")
    assert "is missing: no compiler" in (why_no_graph_loop("cuda:1") or "")
    monkeypatch.setattr(_extension, "extension", lambda: module)
    assert "was built without CUDA" in (why_no_graph_loop("cuda") or "")
    module.has_cuda = True
    assert "older than 12.4" in (why_no_graph_loop("cuda") or "")
    module.GraphLoop = object
    module.why_no_graph_loop = lambda: "there is no CUDA driver"
    assert why_no_graph_loop("cuda") == "there is no CUDA driver"
    module.why_no_graph_loop = lambda: ""
    assert why_no_graph_loop("cuda") is None


def compiled_loop() -> Any:
    module = _extension.extension()
    if module is None or not hasattr(module, "GraphLoop"):
        pytest.skip("the compiled part has no loop on the device")
    return module


def test_compiled_loop_checks_its_addresses() -> None:
    module = compiled_loop()
    with pytest.raises(ValueError, match="tick_graph must be a cudaGraph_t"):
        module.GraphLoop(0, 64, 0)
    with pytest.raises(ValueError, match="flag must be the address"):
        module.GraphLoop(64, 0, 0)
    with pytest.raises(ValueError, match="graph must be a cudaGraph_t"):
        module.graph_node_kinds(0)


def test_compiled_loop_without_a_gpu_says_so() -> None:
    module = compiled_loop()
    reason = module.why_no_graph_loop()
    if not reason:
        pytest.skip("there is a GPU")
    assert "driver" in reason or "cudaError" in reason or "device" in reason
    with pytest.raises(RuntimeError) as raised:
        module.GraphLoop(64, 64, 0)
    assert str(raised.value) == f"no loop on the device: {reason}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_capture_without_a_gpu_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"no CUDA graph can be captured: .*CUDA"):
        capture(lambda: None)


# The wait of DeviceLoop, with a launch that a test can hold.


class Launch:
    """Stands in for the compiled GraphLoop: is done `polls` looks after its launch or its stop."""

    def __init__(self, polls: int) -> None:
        self.polls = polls
        self.calls: list[str] = []
        self.count = 0
        self.left = 0
        self.stopped = False

    def launch(self, stream: int, max_ticks: int) -> None:
        assert self.left == 0, "one launch at a time"
        self.calls.append(f"launch {max_ticks}")
        self.left = 0 if self.stopped else self.polls

    def is_done(self) -> bool:
        self.count += self.left > 0
        self.left = max(self.left - 1, 0)
        return self.left == 0

    def request_stop(self) -> None:
        self.calls.append("stop")
        self.stopped = True
        self.left = min(self.left, 2)

    def clear_stop(self) -> None:
        self.calls.append("clear")
        self.stopped = False

    def ticks(self) -> int:
        return self.count


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> tuple[DeviceLoop, Launch]:
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    launch = Launch(polls=8)
    loop = object.__new__(DeviceLoop)
    loop._loop, loop._flag, loop._running = launch, torch.ones(1, dtype=torch.int32), False
    return loop, launch


def test_device_loop_waits_for_its_launch(held: tuple[DeviceLoop, Launch]) -> None:
    loop, launch = held
    seen: list[int] = []
    assert loop.run(max_ticks=5, on_progress=seen.append, poll_seconds=1e-6) == 8
    assert seen == list(range(1, 8))
    assert loop.run() == 8
    assert loop.ticks == 16
    assert launch.calls == ["launch 5", "clear", "launch 0", "clear"]


def test_device_loop_honours_a_stop_before_its_run(held: tuple[DeviceLoop, Launch]) -> None:
    loop, _ = held
    loop.request_stop()
    assert loop.run() == 0
    assert loop.run() == 8


def test_an_interrupt_stops_the_launch_and_is_raised(held: tuple[DeviceLoop, Launch]) -> None:
    loop, launch = held
    launch.polls = 10**9

    def interrupt(ticks: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.run(on_progress=interrupt, poll_seconds=1e-6)
    assert launch.calls == ["launch 0", "stop", "clear"]
    assert launch.left == 0
    launch.polls = 3
    assert loop.run() == 3


def test_a_second_interrupt_leaves_the_end_to_the_next_run(
    held: tuple[DeviceLoop, Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, launch = held
    launch.polls = 10**9
    with monkeypatch.context() as impatient:

        def sleep(seconds: float) -> None:
            raise KeyboardInterrupt

        impatient.setattr(time, "sleep", sleep)
        with pytest.raises(KeyboardInterrupt):
            loop.run()
    assert launch.left > 0
    assert launch.calls == ["launch 0", "stop"]
    launch.polls = 3
    assert loop.run() == 3
    assert launch.calls == ["launch 0", "stop", "stop", "clear", "launch 0", "clear"]


def test_an_error_of_the_launch_is_raised(held: tuple[DeviceLoop, Launch]) -> None:
    loop, launch = held

    def fail(stream: int, max_ticks: int) -> None:
        raise RuntimeError("cudaGraphLaunch failed: cudaErrorUnknown: unknown error")

    launch.launch = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="cudaGraphLaunch failed"):
        loop.run()
    assert not loop._running


# Who is named.


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.item()


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity(), inner])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x + 1


# torch refuses to read a value of this device, as it refuses a wait during a capture.
UNREADABLE = torch.ones(1, device="meta")


def test_the_operator_that_fails_is_named_with_its_layer() -> None:
    watch, error = watched(lambda: Outer(Inner())(UNREADABLE))
    assert isinstance(error, RuntimeError)
    operator = "aten._local_scalar_dense.default (a tensor's value read by Python, as in .item())"
    assert str(watch.failed) == f"{operator} in Outer.layers.1 (Inner)"
    watch, error = watched(lambda: UNREADABLE.add(1).item())
    assert str(watch.failed) == operator


def test_the_last_operator_is_kept_where_none_failed() -> None:
    def call() -> None:
        Outer(nn.Identity())(torch.ones(1))
        raise ValueError("from between two operators")

    watch, error = watched(call)
    assert isinstance(error, ValueError)
    assert watch.failed is None
    assert str(watch.last) == "aten.add.Tensor in Outer"


def test_a_layer_left_by_an_exception_is_left() -> None:
    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            with contextlib.suppress(RuntimeError):
                self.inner(x)
            return x.neg()

    watch, error = watched(lambda: Tries()(UNREADABLE))
    assert error is None
    assert str(watch.last) == "aten.neg.default in Tries"


def test_a_layer_that_is_nobodys_child() -> None:
    inner, outer = Inner(), Outer(nn.Identity())
    assert layer_name([outer]) == "Outer"
    assert layer_name([outer, inner]) == "Outer > Inner"


def test_the_watch_leaves_nothing_behind() -> None:
    watch, _ = watched(lambda: Outer(Inner())(UNREADABLE))
    before = watch.last
    Outer(nn.Identity())(torch.ones(1))
    assert watch.last is before
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks


def test_random_numbers_are_found_by_the_generator() -> None:
    class Dropout(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return dropout(x.abs(), 0.5, training=True)

    watch, _ = watched(lambda: Outer(Dropout())(torch.ones(3)), CPU)
    assert "bernoulli" in str(watch.random) or "dropout" in str(watch.random)
    assert str(watch.random).endswith("in Outer.layers.1 (Dropout)")

    # Attention says of itself that it may draw random numbers. Without dropout it does not.
    query = torch.ones(1, 1, 2, 8)
    watch, _ = watched(lambda: scaled_dot_product_attention(query, query, query), CPU)
    assert watch.last is not None
    assert watch.random is None


@pytest.fixture
def waits_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dry run without torch.cuda's switch, for ticks on the CPU."""
    monkeypatch.setattr(graph_loop, "waits_are_errors", contextlib.nullcontext)


@pytest.mark.usefixtures("waits_allowed")
def test_dry_run_names_the_wait() -> None:
    calls = []

    def tick() -> None:
        calls.append(1)
        Outer(Inner())(UNREADABLE)

    with pytest.raises(CaptureError) as raised:
        graph_loop._dry_run(tick, CPU)
    message = str(raised.value)
    assert message.startswith("the tick cannot be captured in a CUDA graph: it fails at aten._loc")
    assert "in Outer.layers.1 (Inner) when it may not wait for the device" in message
    assert "(RuntimeError: Tensor.item() cannot be called on meta tensors)" in message
    assert message.endswith("; HostLoop takes it as it is")
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert len(calls) == 2  # the dry run and the watched one


@pytest.mark.usefixtures("waits_allowed")
def test_dry_run_names_the_random_numbers() -> None:
    state = torch.zeros(3)
    with pytest.raises(CaptureError, match=r"draws random numbers of torch, by aten\.uniform_"):
        graph_loop._dry_run(lambda: state.uniform_(), CPU)


@pytest.mark.usefixtures("waits_allowed")
def test_dry_run_passes_a_clean_tick_unwatched(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Countdown(5)
    query = torch.ones(1, 1, 2, 8)

    def tick() -> None:
        toy.tick()
        scaled_dot_product_attention(query, query, query)

    monkeypatch.setattr(graph_loop, "watched", None)
    graph_loop._dry_run(tick, CPU)
    assert toy.left.item() == 4


def test_a_failed_recording_names_the_last_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    def tick() -> None:
        torch.ones(1).neg()
        raise RuntimeError("operation not permitted when stream is capturing\nand more lines")

    monkeypatch.setattr(_cuda_graph, "record", lambda tick, stream, needs=(): tick())
    with pytest.raises(CaptureError) as raised:
        graph_loop._record(tick, None)  # type: ignore[arg-type]
    assert (
        "the recording fails after aten.neg.default (RuntimeError: operation not permitted when "
        "stream is capturing); HostLoop"
    ) in str(raised.value)


def test_messages_without_a_site() -> None:
    watch = OperatorWatch()
    assert "it fails when it may not" in graph_loop.waiting_message(watch, RuntimeError())
    assert "numbers of torch, and" in graph_loop.random_message(watch)
    assert "the recording fails; " in graph_loop.recording_message(watch, RuntimeError())


def test_what_the_watch_breaks_by_itself_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [RuntimeError("the first"), RuntimeError("compiled code under a watch")]

    def record(tick: Any, stream: Any, needs: Any = ()) -> None:
        raise errors.pop(0)

    monkeypatch.setattr(_cuda_graph, "record", record)
    with pytest.raises(CaptureError, match="RuntimeError: the first"):
        graph_loop._record(lambda: None, None)  # type: ignore[arg-type]
    assert not errors


# Where captures and launches are made, with a torch.cuda of two devices that does no work.


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> fake_cuda.FakeCuda:
    return fake_cuda.install(monkeypatch)


def test_a_tick_is_captured_on_the_device_that_is_named(cuda: fake_cuda.FakeCuda) -> None:
    devices: list[tuple[int, bool]] = []

    def tick() -> None:
        devices.append((cuda.device, cuda.stream.is_default))
        cuda.launch()

    graph = capture(tick, device="cuda:1")
    assert devices == [(1, False)] * 4  # three calls and the recording
    assert graph.device == 1  # type: ignore[attr-defined]
    assert graph.nodes == {"kernel": 1}  # type: ignore[attr-defined]
    assert cuda.device == 0
    assert cuda.stream.is_default
    assert cuda.done_on == {"synchronize": [1], "empty_cache": [1]}
    assert capture(tick).device == 0  # type: ignore[attr-defined]
    with torch.cuda.device(1):
        assert capture(tick).device == 1  # type: ignore[attr-defined]
        assert capture(tick, device=0).device == 0  # type: ignore[attr-defined]


def test_a_tick_is_recorded_on_a_stream_that_it_was_not_called_on(
    cuda: fake_cuda.FakeCuda,
) -> None:
    streams: list[fake_cuda.Stream] = []
    capture(lambda: (streams.append(cuda.stream), cuda.launch()))
    assert streams[0] == streams[1] == streams[2] != streams[3]
    before = cuda.streams[0]
    assert (streams[0], before) in cuda.waits  # for what was queued before
    assert (streams[3], streams[0]) in cuda.waits
    assert cuda.waits[-2:] == [(before, streams[0]), (before, streams[3])]


def test_capture_is_for_cuda_devices(cuda: fake_cuda.FakeCuda) -> None:
    with pytest.raises(ValueError, match="device must be a CUDA device, got cpu"):
        capture(cuda.launch, device="cpu")


def test_no_capture_within_one(cuda: fake_cuda.FakeCuda) -> None:
    with pytest.raises(CaptureError, match="the current stream is in a capture already"):
        capture(lambda: cuda.is_recording and capture(cuda.launch), device=1)
    assert not cuda.is_recording


@pytest.mark.parametrize("counts", [True, False], ids=["compiled part", "torch's warning"])
def test_a_tick_without_kernels_is_refused(
    cuda: fake_cuda.FakeCuda, counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not counts:
        monkeypatch.setattr(_extension, "extension", lambda: None)
    calls = []
    with pytest.raises(CaptureError, match=r"it launches no kernel .*it holds nothing.* on cuda:1"):
        capture(lambda: calls.append(1), device=1)
    assert len(calls) == 4  # nobody is looked for: no call under a watch

    def on_the_other_device() -> None:
        with torch.cuda.device(1):
            cuda.launch()

    with pytest.raises(CaptureError, match="cuda:0"):
        capture(on_the_other_device, device=0)
    if counts:
        with pytest.raises(CaptureError, match="it holds 1 memcpy"):
            capture(lambda: cuda.launch("memcpy"))
    assert cuda.stream.is_default


def test_other_warnings_of_a_capture_are_passed_on(cuda: fake_cuda.FakeCuda) -> None:
    cuda.warning = "something else"
    with pytest.warns(UserWarning, match="something else"):
        capture(cuda.launch)


def test_a_failed_capture_leaves_the_next_one_its_way(cuda: fake_cuda.FakeCuda) -> None:
    def fails() -> None:
        cuda.launch()
        if cuda.is_recording:
            cuda.invalidate()

    with pytest.raises(CaptureError, match="the recording fails"):
        capture(fails, device=1)
    assert (cuda.device, cuda.stream.is_default, cuda.is_recording) == (0, True, False)
    assert not cuda.begun  # no pool that torch believes to be in a recording
    assert set(cuda.references.values()) <= {0}
    assert not cuda.generator_captures
    graph = capture(cuda.launch, device=1)
    assert graph.nodes == {"kernel": 1}  # type: ignore[attr-defined]


def test_every_capture_has_a_pool_of_its_own(cuda: fake_cuda.FakeCuda) -> None:
    graphs = [capture(cuda.launch) for _ in range(3)]
    assert len({graph.pool() for graph in graphs}) == 3


def test_garbage_is_not_collected_while_recording(cuda: fake_cuda.FakeCuda) -> None:
    collects: list[bool] = []
    assert gc.isenabled()
    capture(lambda: (collects.append(gc.isenabled()), cuda.launch()))
    assert collects == [True, True, True, False]
    assert gc.isenabled()


def test_a_replayed_graph_needs_a_kernel_too(cuda: fake_cuda.FakeCuda) -> None:
    flag = torch.ones(1, dtype=torch.int32)
    stream = torch.cuda.Stream()
    copies = _cuda_graph.record(lambda: cuda.launch("memcpy"), stream)
    with pytest.raises(ValueError, match=r"repeated for ever: .* a kernel node, it holds 1 memcpy"):
        HostLoop(copies, flag)
    graph = _cuda_graph.record(cuda.launch, stream)
    loop = HostLoop(graph, flag)
    assert loop.run(max_ticks=5) == 5
    assert graph.replays == [0] * 5  # type: ignore[attr-defined]


def test_host_loop_replays_on_the_flags_device(cuda: fake_cuda.FakeCuda) -> None:
    devices: list[int] = []
    flag = cuda.tensor(torch.ones(1, dtype=torch.int32), 1)
    assert HostLoop(lambda: devices.append(cuda.device), flag).run(max_ticks=3) == 3
    assert devices == [1, 1, 1]
    assert cuda.device == 0


def test_device_loop_wants_a_flag_of_one_int32_on_a_device(cuda: fake_cuda.FakeCuda) -> None:
    tick = capture(cuda.launch, device=1)
    with pytest.raises(ValueError, match=r"flag must be on a CUDA device, got .*cpu"):
        DeviceLoop(tick, torch.ones(1, dtype=torch.int32))
    for flag, error, message in BAD_FLAGS:
        with pytest.raises(error, match=message):
            DeviceLoop(tick, flag)


def test_device_loop_is_built_and_launched_on_the_flags_device(cuda: fake_cuda.FakeCuda) -> None:
    flag = cuda.tensor(torch.ones(1, dtype=torch.int32), 1)
    loop = DeviceLoop(capture(cuda.launch, device=1), flag)
    with torch.cuda.device(1), torch.cuda.stream(torch.cuda.Stream()):
        stream = cuda.stream
        with torch.cuda.device(0):
            assert loop.run(max_ticks=7) == 7
    assert loop._loop.launches == [(1, stream.cuda_stream)]
    assert cuda.device == 0


@pytest.mark.parametrize("failure", ["at the begin", "at the end", "between"])
def test_a_pool_is_released_once_for_each_capture(cuda: fake_cuda.FakeCuda, failure: str) -> None:
    # Once too often is an assertion of torch's allocator; in a destructor that ends the process.
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
    kept = _cuda_graph.record(cuda.launch, stream, pool=pool)

    def fails() -> None:
        if failure == "between":
            raise RuntimeError("a capture that is still valid")
        cuda.invalidate()

    cuda.fails_to_begin = failure == "at the begin"
    with pytest.raises(RuntimeError, match="captur"):
        _cuda_graph.record(fails, stream, pool=pool)
    cuda.fails_to_begin = False
    assert cuda.references[pool] == 1
    assert not cuda.begun
    if failure == "at the end":
        with pytest.raises(RuntimeError, match="already recording to mempool_id"):
            _cuda_graph.record(cuda.launch, stream, pool=pool)
        assert cuda.references[pool] == 1
    _cuda_graph.record(cuda.launch, stream).reset()
    kept.reset()
    assert cuda.references[pool] == 0


# On a GPU.

gpu = [
    pytest.mark.gpu,
    pytest.mark.may_hang,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def on_gpu() -> None:
    reason = why_no_graph_loop("cuda")
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.usefixtures("on_gpu")
class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("ticks", [0, 1, 2, 1000])
    def test_device_host_and_python_agree(self, ticks: int) -> None:
        toy = Countdown(ticks, "cuda")
        graph = capture(toy.tick)
        for loop in (
            DeviceLoop(graph, toy.flag),
            HostLoop(graph, toy.flag),
            HostLoop(toy.tick, toy.flag),
        ):
            toy.restart(ticks)
            assert loop.run() == ticks
            assert toy.sum.item() == expected_sum(ticks, ticks)
            assert toy.left.item() == 0
            assert toy.flag.item() == 0

    def test_relaunch_and_limit(self) -> None:
        toy = Countdown(100, "cuda")
        loop = DeviceLoop(capture(toy.tick), toy.flag)
        toy.restart(100)
        assert [loop.run(max_ticks=30) for _ in range(5)] == [30, 30, 30, 10, 0]
        assert loop.ticks == 100
        toy.restart(7)
        assert loop.run(max_ticks=7) == 7
        assert toy.sum.item() == expected_sum(7, 7)

    def test_on_a_side_stream_in_order(self) -> None:
        toy = Countdown(50, "cuda")
        loop = DeviceLoop(capture(toy.tick), toy.flag)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            toy.restart(50)
            assert loop.run() == 50
            total = toy.sum.clone()
        stream.synchronize()
        assert total.item() == expected_sum(50, 50)

    def test_stop_and_progress(self) -> None:
        toy = Countdown(2**40, "cuda")
        loop = DeviceLoop(capture(toy.tick), toy.flag)
        toy.restart(2**40)
        seen: list[int] = []

        def look(ticks: int) -> None:
            seen.append(ticks)
            if len(seen) == 4:
                loop.request_stop()

        made = loop.run(on_progress=look, poll_seconds=0.005)
        assert 0 < seen[0] < seen[1] < seen[2] < seen[3] <= made
        assert toy.left.item() == 2**40 - made  # no tick is cut short
        assert loop.run(max_ticks=5) == 5

    def test_stop_from_another_thread(self) -> None:
        toy = Countdown(2**40, "cuda")
        loop = DeviceLoop(capture(toy.tick), toy.flag)
        toy.restart(2**40)
        timer = threading.Timer(0.1, loop.request_stop)
        timer.start()
        made = loop.run()
        timer.join()
        assert toy.left.item() == 2**40 - made

    def test_interrupt(self) -> None:
        toy = Countdown(2**40, "cuda")
        loop = DeviceLoop(capture(toy.tick), toy.flag)
        toy.restart(2**40)

        def interrupt(ticks: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            loop.run(on_progress=interrupt)
        assert toy.left.item() == 2**40 - loop.ticks
        assert loop.run(max_ticks=3) == 3

    def test_a_loop_dropped_while_it_runs_ends(self) -> None:
        toy = Countdown(2**40, "cuda")
        loop = DeviceLoop(capture(toy.tick), toy.flag)
        toy.restart(2**40)
        torch.cuda.synchronize()
        loop._loop.launch(torch.cuda.current_stream().cuda_stream)
        deadline = time.monotonic() + 30
        while loop.ticks == 0:
            assert time.monotonic() < deadline, "no tick in half a minute"
            time.sleep(1e-3)
        assert not loop._loop.is_done()
        del loop
        torch.cuda.synchronize()
        assert toy.left.item() < 2**40

    @pytest.mark.parametrize("loop_type", [DeviceLoop, HostLoop])
    def test_a_tick_without_kernels_is_refused(self, loop_type: Any) -> None:
        flag = torch.ones(1, dtype=torch.int32, device="cuda")
        other = flag.clone()
        stream = torch.cuda.Stream()
        copies = _cuda_graph.record(lambda: flag.copy_(other), stream)
        assert _cuda_graph.node_kinds(copies) == {"memcpy": 1}
        with pytest.raises(ValueError, match="kernel node"):
            loop_type(copies, flag)
        with pytest.raises(CaptureError, match="it launches no kernel"):
            capture(lambda: flag.copy_(other))
        with pytest.raises(CaptureError, match="it launches no kernel"):
            capture(lambda: None)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    def test_on_a_device_that_is_not_the_current_one(self) -> None:
        toy = Countdown(100, "cuda:1")
        graph = capture(toy.tick, device="cuda:1")
        for loop in (DeviceLoop(graph, toy.flag), HostLoop(graph, toy.flag)):
            toy.restart(100)
            assert loop.run() == 100
            assert toy.sum.item() == expected_sum(100, 100)
        assert torch.cuda.current_device() == 0

    def test_a_failed_recording_leaves_the_graphs_of_its_pool(self) -> None:
        x = torch.ones(1 << 20, device="cuda")
        stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        kept = _cuda_graph.record(lambda: x.mul(2).add_(1), stream, pool=pool)
        with pytest.raises(RuntimeError):
            _cuda_graph.record(lambda: x.mul(2).sum().item(), stream, pool=pool)
        assert torch.cuda.current_stream() != stream
        assert not torch.cuda.is_current_stream_capturing()
        for graph in (kept, _cuda_graph.record(lambda: x.add_(1), stream)):
            graph.replay()
        assert x.sum().item() == 2 * x.numel()
        del graph, kept
        torch.cuda.empty_cache()
        assert torch.rand(4, device="cuda").sum().item() > 0

    def test_node_kinds(self) -> None:
        toy = Countdown(1, "cuda")
        graph = capture(toy.tick)
        kinds = _extension.compiled().graph_node_kinds(graph.raw_cuda_graph())
        assert kinds["kernel"] >= 4  # sub, mul, add, remainder, compare, copy
        assert set(kinds) <= {"kernel", "memcpy"}

    def test_a_graph_that_was_not_kept(self) -> None:
        toy = Countdown(1, "cuda")
        toy.tick()  # what is loaded once is not recorded
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            toy.tick()
        with pytest.raises(RuntimeError, match="keep_graph"):
            DeviceLoop(graph, toy.flag)

    def test_unpinned_memory_is_named(self) -> None:
        state = torch.zeros(1 << 16, device="cuda")
        unpinned = torch.ones(1 << 16)
        flag = torch.ones(1, dtype=torch.int32, device="cuda")

        def tick() -> None:
            state.add_(1)
            state.copy_(unpinned, non_blocking=True)

        with pytest.raises((CaptureError, ValueError), match=r"not pinned|copy_"):
            DeviceLoop(capture(tick), flag)

    @pytest.mark.parametrize(
        ("offence", "message"),
        [
            (lambda x: x.item(), r"_local_scalar_dense.*in Offender"),
            (lambda x: x.nonzero(), r"aten\.nonzero\.default in Offender"),
            (lambda x: x.cpu(), r"aten\._to_copy\.default in Offender"),
            (lambda x: x.uniform_(), r"random numbers of torch, by aten\.uniform_.* in Offender"),
            (lambda x: torch.cuda.synchronize(), r"(after|at) aten\.neg\.default in Offender"),
        ],
        ids=["item", "nonzero", "cpu", "random", "synchronize"],
    )
    def test_a_failed_capture_names_the_offender_and_leaves_no_harm(
        self, offence: Any, message: str
    ) -> None:
        class Offender(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                y = x.neg()
                offence(x)
                return y

        layer, x = Offender(), torch.ones(1, device="cuda")
        before = torch.cuda.current_stream()
        with pytest.raises(CaptureError, match=message):
            capture(lambda: layer(x))
        assert torch.cuda.current_stream() == before
        assert not torch.cuda.is_current_stream_capturing()
        assert torch.cuda.get_sync_debug_mode() == 0
        assert torch.rand(4, device="cuda").sum().item() > 0
        toy = Countdown(9, "cuda")
        loop = DeviceLoop(capture(toy.tick), toy.flag)
        toy.restart(9)
        assert loop.run() == 9
        torch.cuda.empty_cache()
