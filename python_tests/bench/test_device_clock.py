"""The clock of a GPU: graphs where calls can be captured, plain calls where they cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.harness import ceilings, machine, results, runner, timing
from bench.harness.cases import Call, Kernel, Variant
from bench.logprob.cases import SCORE_TOKENS_BWD
from bench.power_sampling.cases import MH_TRANSITION
from powerkernels._cuda_graph import EmptyGraphError
from python_tests import fake_cuda
from python_tests.bench import toy

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.xdist_group("gpu_clock"),  # what else the device does would be timed too
]

PLAN = timing.Plan(0.0, min_rounds=5, max_rounds=5)
BYTES = 2**26
GPU = torch.device("cuda", 1)  # which is not the current one


# With a torch.cuda that does no work.


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_cuda.FakeCuda]:
    timing._capture_stream.cache_clear()
    made = fake_cuda.install(monkeypatch)
    monkeypatch.setattr(timing, "Evictor", lambda device: lambda: None)
    yield made
    timing._capture_stream.cache_clear()


def waits(cuda: fake_cuda.FakeCuda) -> Call:
    """What `.item()` does."""

    def call() -> None:
        cuda.launch()
        torch.cuda.synchronize()

    return call


def test_calls_are_captured_and_timed_on_their_device(cuda: fake_cuda.FakeCuda) -> None:
    places: set[tuple[int, bool]] = set()

    def call() -> None:
        places.add((cuda.device, cuda.stream.is_default))
        cuda.launch()

    samples = timing.interleaved({"ours": [call]}, GPU, PLAN)
    assert places == {(1, False)}
    assert set(cuda.done_on["event"]) == {1}
    assert samples["ours"].timed_by == "graph"
    assert samples["ours"].graph
    assert samples["ours"].cold == samples["ours"].sustained == [1e-3 * fake_cuda.MS_REPLAYED] * 5
    assert (cuda.device, cuda.stream.is_default) == (0, True)


def test_a_capture_that_fails_leaves_the_clock_its_stream_and_its_pool(
    cuda: fake_cuda.FakeCuda,
) -> None:
    calls = {"before": [cuda.launch], "waits": [waits(cuda)], "after": [cuda.launch]}
    samples = timing.interleaved(calls, GPU, PLAN)
    assert {name: taken.timed_by for name, taken in samples.items()} == {
        "before": "graph",
        "waits": "plain calls",
        "after": "graph",
    }
    assert "not permitted when stream is capturing" in (samples["waits"].why_no_graph or "")
    assert samples["waits"].cold == [1e-3 * fake_cuda.MS_LAUNCHED] * 5
    assert (cuda.device, cuda.stream.is_default, cuda.is_recording) == (0, True, False)
    assert not cuda.begun
    assert not cuda.generator_captures


def test_graphs_share_a_pool_until_a_recording_fails_and_give_it_back(
    cuda: fake_cuda.FakeCuda,
) -> None:
    pools: list[Any] = []

    def kept(call: Call) -> Call:
        def keeping() -> None:
            if cuda.is_recording:
                pools.append(cuda.recording._pool)  # type: ignore[union-attr]
            call()

        return keeping

    calls = {
        "one": [kept(cuda.launch)],
        "two": [kept(cuda.launch)],
        "waits": [kept(waits(cuda))],
        "four": [kept(cuda.launch)],
    }
    timing.interleaved(calls, GPU, PLAN)
    first, *others = pools
    assert others[:4] == [first] * 4  # two graphs each, and the one that failed
    assert len(set(others[4:])) == 1
    assert others[4] != first
    assert not any(cuda.references.values())


def test_a_graph_that_does_nothing_has_no_time(cuda: fake_cuda.FakeCuda) -> None:
    on_cpu = torch.zeros(3)
    heard: dict[str, Exception] = {}
    calls = {"on the CPU": [lambda: on_cpu.add_(1)], "copies": [lambda: cuda.launch("memcpy")]}
    samples = timing.interleaved(calls, GPU, PLAN, heard.__setitem__)
    assert list(samples) == ["copies"]
    assert isinstance(heard["on the CPU"], EmptyGraphError)
    assert "it holds nothing: the work is not done on cuda:1" in str(heard["on the CPU"])


def test_work_of_the_host_is_timed_there(cuda: fake_cuda.FakeCuda) -> None:
    plan = timing.Plan(0.0, min_rounds=5, max_rounds=5, on_host=frozenset({"mixed"}))
    samples = timing.interleaved({"mixed": [waits(cuda)]}, GPU, plan)["mixed"]
    assert samples.timed_by == "wall clock"
    assert samples.graph is False
    assert "the host" in (samples.why_no_graph or "")
    assert not cuda.graphs
    synchronised = cuda.done_on["synchronize"]
    assert set(synchronised) == {1}
    # Each call waits by itself, and each sample before it begins and when it ends.
    assert len(synchronised) >= 5 * (1 + 2 + samples.calls + 2)


def forward_and_backward(cuda: fake_cuda.FakeCuda) -> Callable[[Tensor], Call]:
    """As autograd does: the backward's work goes to the stream of its forward."""

    def bind(x: Tensor) -> Call:
        stream = cuda.stream

        def call() -> dict[str, Tensor]:
            cuda.launch(stream=stream)
            return {"y": 2 * x}

        return call

    return bind


def measured(
    variants: Sequence[Variant], ceiling: Callable[[], object]
) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows of the toy kernel on the GPU, by variant and mode."""
    made = toy.kernel(variants)
    kernel = Kernel(**(vars(made) | {"ceiling": lambda case, x: ("toy", ceiling)}))
    document = results.Document({}, "powerkernels bench toy", None)
    document.suite["ceilings"] = {"copy, GB/s": 1.0}
    settings = runner.Settings("quick", GPU, frozenset({"eager"}), free_bytes=2**40)
    runner.run([kernel], settings, document, say=lambda text: None, show=lambda rows: None)
    assert not document.suite["failed"]
    return {(row.variant, row.mode): row.info for row in results.rows_of(document.data)}


def launching(cuda: fake_cuda.FakeCuda, call: Call) -> Callable[[Tensor], Call]:
    def bind(x: Tensor) -> Call:
        return lambda: (call(), {"y": 2 * x})[1]

    return bind


def test_a_backward_whose_forward_is_not_timed_is_captured(cuda: fake_cuda.FakeCuda) -> None:
    variant = Variant("backward", forward_and_backward(cuda), ours=True)
    rows = measured([variant], cuda.launch)
    assert rows["backward", "cold"]["timed_by"] == "graph"
    assert set(cuda.done_on["memory"]) == {1}


def test_the_ceiling_is_timed_as_each_variant_is(cuda: fake_cuda.FakeCuda) -> None:
    variants = [
        Variant("captured", launching(cuda, cuda.launch), ours=True),
        Variant("waits", launching(cuda, waits(cuda)), peer="eager"),
        Variant("on the host", launching(cuda, waits(cuda)), peer="eager", on_host=True),
    ]
    rows = measured(variants, cuda.launch)
    ways = {name: info["timed_by"] for (name, mode), info in rows.items() if mode == "cold"}
    assert ways == {
        "captured": "graph",
        "waits": "plain calls",
        "on the host": "wall clock",
        "ceiling: toy": "graph",
        "ceiling, plain calls: toy": "plain calls",
        "ceiling, wall clock: toy": "wall clock",
    }
    assert rows["captured", "cold"]["ratio_to_ceiling"] == pytest.approx(1.0)
    assert rows["waits", "sustained"]["ratio_to_ceiling"] == pytest.approx(1.0)
    ceiling, mixed = rows["ceiling, wall clock: toy", "cold"], rows["on the host", "cold"]
    assert mixed["ratio_to_ceiling"] == pytest.approx(ceiling["median_ms"] / mixed["median_ms"])
    assert all(info["why_no_ratio"] is None for info in rows.values())


def test_a_ceiling_that_cannot_be_captured_is_beside_no_graph(cuda: fake_cuda.FakeCuda) -> None:
    variants = [
        Variant("captured", launching(cuda, cuda.launch), ours=True),
        Variant("waits", launching(cuda, waits(cuda)), peer="eager"),
    ]
    rows = measured(variants, waits(cuda))
    assert rows["captured", "cold"]["ratio_to_ceiling"] is None
    why = rows["captured", "cold"]["why_no_ratio"]
    assert why.startswith("timed by graph, and the ceiling by plain calls, as operation not perm")
    assert rows["waits", "cold"]["ratio_to_ceiling"] == pytest.approx(1.0)


def test_ticks_are_timed_without_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop sleeps between two looks at a GPU, and its launch is no part of a graph."""
    from powerkernels.power_sampling.graph_loop import HostLoop

    monkeypatch.delattr(HostLoop, "run")
    case, *_ = MH_TRANSITION.cases("quick")
    lanes = MH_TRANSITION.inputs(case, toy.CPU)
    found = [variant.bind(lanes)() for variant in MH_TRANSITION.variants]
    for name, value in MH_TRANSITION.expected(lanes, found[0]).items():
        assert torch.equal(value, found[0][name]), name
        assert torch.equal(value, found[1][name]), name
    assert found[0]["go on"].item() == 1
    assert [variant.on_host for variant in MH_TRANSITION.variants] == [False, True]


# On a GPU.


class TestOnGpu:
    pytestmark = on_gpu

    def test_graphs_and_calls_that_wait_for_the_host(self) -> None:
        device = torch.device("cuda")
        x = torch.randn(BYTES // 4, device=device)
        calls = {
            "waits": [lambda: float(x.sum())],
            "captured": [lambda: x.mul(2.0)],
            "four times": [lambda: [x.mul(2.0) for _ in range(4)]],
        }
        before = torch.cuda.current_stream()
        samples = timing.interleaved(calls, device, PLAN)
        assert torch.cuda.current_stream() == before
        assert not torch.cuda.is_current_stream_capturing()
        assert samples["captured"].graph
        assert samples["four times"].graph
        assert samples["waits"].graph is False
        assert samples["waits"].why_no_graph
        for taken in samples.values():
            assert len(taken.cold) == len(taken.sustained) == 5
            assert min(taken.cold + taken.sustained) > 0
        ratio = timing.median(samples["four times"].sustained) / timing.median(
            samples["captured"].sustained
        )
        assert 2.5 < ratio < 6

    def test_work_on_the_cpu_has_no_time(self) -> None:
        heard: dict[str, Exception] = {}
        on_cpu = torch.zeros(3)
        calls = {"on the CPU": [lambda: on_cpu.add_(1)]}
        assert not timing.interleaved(calls, torch.device("cuda"), PLAN, heard.__setitem__)
        assert isinstance(heard["on the CPU"], EmptyGraphError)

    @pytest.mark.parametrize("kernel", [SCORE_TOKENS_BWD, MH_TRANSITION], ids=lambda k: k.name)
    def test_what_has_to_be_captured_is(self, kernel: Kernel) -> None:
        document = results.Document(machine.environment(torch.device("cuda")), "bench", None)
        document.suite["ceilings"] = {"copy, GB/s": 1.0}
        settings = runner.Settings("quick", torch.device("cuda"), frozenset({"eager"}))
        runner.run([kernel], settings, document, say=print, show=lambda rows: None)
        assert not document.suite["failed"]
        assert not document.suite["skipped"]
        ways = {row.variant: row.info["timed_by"] for row in results.rows_of(document.data)}
        for variant in kernel.variants:
            assert ways[variant.name] == ("wall clock" if variant.on_host else "graph")

    def test_ceilings_are_of_the_order_of_the_machine(self) -> None:
        found = ceilings.measure(torch.device("cuda"), "host")
        assert found["copy, GB/s"] > 50
        assert found["read, GB/s"] > 50
        assert found["matmul bfloat16, TFLOP/s"] > 0.1
