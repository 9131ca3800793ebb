"""The sampler with its loop on the device: the same chains, no waits, errors that name layers."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers

from powerkernels import PowerSample, PowerSampler, _advice, _extension
from powerkernels._cuda_graph import waits_are_errors
from powerkernels.power_sampling import engine as engine_module
from powerkernels.power_sampling import reference
from powerkernels.power_sampling.graph_loop import CaptureError, DeviceLoop, HostLoop
from powerkernels.power_sampling.lane_model import TransformersLaneModel
from python_tests import fake_cuda
from python_tests.power_sampling.test_paths import (
    PROMPTS,
    assert_same_chain,
    config,
    small_llama,
)

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.may_hang,
]


def gpu_llama() -> transformers.LlamaForCausalLM:
    return small_llama(torch.float32).cuda()


def loop_of(sampler: PowerSampler) -> object:
    assert sampler._engine is not None
    return sampler._engine._loop


def assert_same_run(a: list[PowerSample], b: list[PowerSample]) -> None:
    for x, y in zip(a, b, strict=True):
        assert_same_chain(x, y)
        assert torch.equal(x.trace.log_accept_ratio, y.trace.log_accept_ratio)
        assert x.decoded_tokens == y.decoded_tokens


class TestOnAGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("changes", [{}, {"num_lanes": 16}, {"proposal_temperature": 0.7}])
    def test_device_host_and_reference_make_the_same_chains(
        self, changes: dict, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = gpu_llama()
        on_device = PowerSampler(model, config=config(device_loop=True, **changes))
        samples = on_device.sample(PROMPTS, num_samples=2)
        assert isinstance(loop_of(on_device), DeviceLoop)
        assert on_device.stats.used_tokens == sum(s.decoded_tokens for s in samples)

        from_host = PowerSampler(model, config=config(device_loop=False, **changes))
        assert_same_run(from_host.sample(PROMPTS, num_samples=2), samples)
        assert isinstance(loop_of(from_host), HostLoop)

        monkeypatch.setattr(engine_module, "state_device", lambda device: torch.device("cpu"))
        monkeypatch.setattr(
            engine_module,
            "transition_of",
            lambda state: lambda drawn: reference.transition(state, drawn),
        )
        from_reference = PowerSampler(model, config=config(device_loop=False, **changes))
        assert_same_run(from_reference.sample(PROMPTS, num_samples=2), samples)

    def test_one_graph_serves_all_prompts(self) -> None:
        sampler = PowerSampler(gpu_llama(), config=config(device_loop=True))
        first = sampler.sample(PROMPTS)
        loop = loop_of(sampler)
        assert_same_run(sampler.sample(PROMPTS), first)
        sampler.sample(PROMPTS[::-1])
        assert loop_of(sampler) is loop

    def test_weights_that_change_in_place_are_seen(self) -> None:
        model = gpu_llama()
        sampler = PowerSampler(model, config=config(device_loop=True))
        first = sampler.sample(PROMPTS)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(0.7)
        changed = sampler.sample(PROMPTS)
        assert [s.tokens for s in changed] != [s.tokens for s in first]
        assert_same_run(changed, PowerSampler(model, config=config()).sample(PROMPTS))

    def test_nothing_waits_inside_a_launch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sampler = PowerSampler(gpu_llama(), config=config(device_loop=True))
        expected = sampler.sample(PROMPTS)
        run = DeviceLoop.run
        launches = 0

        def strict_run(self: DeviceLoop, **options: object) -> int:
            nonlocal launches
            launches += 1
            with torch.profiler.profile() as profile, waits_are_errors():
                ticks = run(self, **options)
            names = [event.key for event in profile.key_averages()]
            assert not [name for name in names if "Memcpy" in name and "HtoD" in name]
            assert not [name for name in names if name.startswith("aten::")]
            return ticks

        monkeypatch.setattr(DeviceLoop, "run", strict_run)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the profiler
            assert_same_run(sampler.sample(PROMPTS), expected)
        assert launches >= 1

    def test_model_that_waits_is_named_and_the_host_takes_over(self) -> None:
        model = gpu_llama()
        layer = model.model.layers[1].mlp
        forward = layer.forward

        def waiting(x: torch.Tensor) -> torch.Tensor:
            return forward(x) if float(x.sum()) < float("inf") else x

        layer.forward = waiting
        with pytest.raises(CaptureError, match=r"layers\.1\.mlp"):
            PowerSampler(model, config=config(device_loop=True)).sample(PROMPTS)
        _advice.warn_once.cache_clear()
        sampler = PowerSampler(model, config=config())
        with pytest.warns(UserWarning, match=r"layers\.1\.mlp"):
            samples = sampler.sample(PROMPTS)
        assert isinstance(loop_of(sampler), HostLoop)
        layer.forward = forward
        assert_same_run(PowerSampler(model, config=config()).sample(PROMPTS), samples)

    def test_interrupt_ends_the_launch_and_keeps_what_is_finished(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sampler = PowerSampler(gpu_llama(), config=config(device_loop=True, num_lanes=1))
        everything = sampler.sample(PROMPTS)
        run = DeviceLoop.run

        def interrupted(self: DeviceLoop, **options: object) -> int:
            if sampler.stats.finished_chains == 2:

                def press(ticks: int) -> None:
                    raise KeyboardInterrupt

                options |= {"on_progress": press, "poll_seconds": 1e-6}
            return run(self, **options)

        monkeypatch.setattr(DeviceLoop, "run", interrupted)
        samples = sampler.sample(PROMPTS)
        assert sampler.stats.interrupted
        assert 2 <= len(samples) < len(PROMPTS)
        monkeypatch.undo()
        assert_same_run(samples, everything[: len(samples)])
        assert_same_run(sampler.sample(PROMPTS), everything)

    def test_host_replays_where_only_the_loop_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = gpu_llama()
        expected = PowerSampler(model, config=config(device_loop=True)).sample(PROMPTS)

        def fails(graph: object, flag: object) -> DeviceLoop:
            raise RuntimeError("cudaGraphInstantiateWithParams failed")

        monkeypatch.setattr(engine_module, "DeviceLoop", fails)
        _advice.warn_once.cache_clear()
        sampler = PowerSampler(model, config=config())
        with pytest.warns(UserWarning, match="the host replays the sampler's tick.*Instantiate"):
            samples = sampler.sample(PROMPTS)
        assert isinstance(loop_of(sampler)._tick.__self__, torch.cuda.CUDAGraph)  # type: ignore[attr-defined]
        assert_same_run(samples, expected)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    def test_model_on_a_device_that_is_not_the_current_one(self) -> None:
        expected = PowerSampler(gpu_llama(), config=config(device_loop=True)).sample(PROMPTS)
        for device_loop in (True, False):
            sampler = PowerSampler(gpu_llama().to("cuda:1"), config=config(device_loop=device_loop))
            assert_same_run(sampler.sample(PROMPTS), expected)
        assert torch.cuda.current_device() == 0

    def test_bad_logits_stop_the_loop(self) -> None:
        model = gpu_llama()
        with torch.no_grad():
            model.lm_head.weight.fill_(float("nan"))
        with pytest.raises(FloatingPointError, match="logits"):
            PowerSampler(model, config=config(device_loop=True)).sample(PROMPTS)


def test_device_loop_that_cannot_be_is_an_error_where_it_is_demanded() -> None:
    if torch.cuda.is_available():
        pytest.skip("it can be here")
    sampler = PowerSampler(small_llama(torch.float32), config=config(device_loop=True))
    with pytest.raises(CaptureError, match="device_loop is True, but it needs a CUDA device"):
        sampler.sample(PROMPTS)


# Who makes the ticks, with a torch.cuda that does no work.

GPU = torch.device("cuda", 1)  # which is not the current one


def engine_on(
    cuda: fake_cuda.FakeCuda, monkeypatch: pytest.MonkeyPatch, device_loop: bool | None
) -> tuple[engine_module.LaneEngine, list[int]]:
    """An engine whose tick is one kernel, and the devices that were current when it was called."""
    calls: list[int] = []

    def tick(self: engine_module.LaneEngine) -> None:
        calls.append(cuda.device)
        cuda.launch()

    monkeypatch.setattr(engine_module.LaneEngine, "_tick_on_device", tick)
    made = object.__new__(engine_module.LaneEngine)
    made.model = SimpleNamespace(device=GPU)  # type: ignore[assignment]
    made._config = config(device_loop=device_loop)
    go = cuda.tensor(torch.ones(1, dtype=torch.int32), 1)
    made._state = SimpleNamespace(go=go)  # type: ignore[assignment]
    _advice.warn_once.cache_clear()
    return made, calls


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> fake_cuda.FakeCuda:
    return fake_cuda.install(monkeypatch)


def test_the_loop_is_made_on_the_models_device(
    cuda: fake_cuda.FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, calls = engine_on(cuda, monkeypatch, None)
    assert isinstance(made._make_loop(), DeviceLoop)
    assert calls == [1, 1, 1, 1]
    assert cuda.device == 0


@pytest.mark.parametrize("failure", ["of the loop", "of the compiled part"])
def test_the_host_replays_the_tick_where_only_the_loop_fails(
    cuda: fake_cuda.FakeCuda, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    if failure == "of the loop":
        reason = "cudaGraphInstantiateWithFlags failed"
        cuda.loop_error = RuntimeError(reason)
    else:
        reason = "was built without CUDA"
        monkeypatch.setattr(
            _extension, "extension", lambda: SimpleNamespace(has_cuda=False, why_no_graph_loop=None)
        )
    made, calls = engine_on(cuda, monkeypatch, None)
    with pytest.warns(UserWarning, match=f"the host replays the sampler's tick.*{reason}"):
        loop = made._make_loop()
    calls.clear()
    assert isinstance(loop, HostLoop)
    assert loop.run(max_ticks=5) == 5
    assert not calls
    (graph,) = [graph for graph in cuda.graphs.values() if graph.replays]
    assert graph.replays == [1] * 5
    made, _ = engine_on(cuda, monkeypatch, True)
    with pytest.raises(CaptureError, match=f"device_loop is True, but .*{reason}"):
        made._make_loop()


def test_the_host_calls_the_tick_where_it_cannot_be_captured(
    cuda: fake_cuda.FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, calls = engine_on(cuda, monkeypatch, None)
    monkeypatch.setattr(cuda, "launch", lambda: None)  # on another device, say
    with pytest.warns(UserWarning, match="kernel by kernel: .*it launches no kernel"):
        loop = made._make_loop()
    calls.clear()
    assert loop.run(max_ticks=5) == 5
    assert calls == [1] * 5


def test_no_graph_where_none_is_wanted(
    cuda: fake_cuda.FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, calls = engine_on(cuda, monkeypatch, False)
    loop = made._make_loop()
    assert not calls
    assert loop.run(max_ticks=2) == 2
    assert calls == [1, 1]


def test_the_models_device_is_the_current_one_while_samples_are_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lanes = TransformersLaneModel(small_llama(torch.float32), 2, 16)
    cuda = fake_cuda.install(monkeypatch)
    monkeypatch.setattr(lanes, "device", GPU)
    with lanes.running():
        assert cuda.device == 1
    assert cuda.device == 0
