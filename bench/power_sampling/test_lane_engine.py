"""What a tick of the lane engine costs beside the model's own step, and the loop on the device.

On a GPU, 64 lanes of a model of the shape of Qwen2.5-1.5B with random weights:

- ``model``: its step, replayed as a graph of its own,
- ``copy``: reading its weights once, as a copy of as many bytes takes half of,
- ``tick-device``, ``tick-host``: whole ticks (step, draw, transition, moves of the cache) repeated
  by the device, and replayed one by one from the host,
- ``engine``: ticks of a model whose step does nothing: all that is ours.

Not yet run on a GPU. On a CPU only ``engine`` runs, by the C++ transition and by the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.power_sampling.launches import launched
from powerkernels import _cuda_graph
from powerkernels.power_sampling import PowerSamplingConfig, engine, lane_state, reference
from powerkernels.power_sampling.lane_model import TransformersLaneModel

HAS_GPU = torch.cuda.is_available()
TICKS = 200
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")]


class NoModel:
    """Lanes whose step costs nothing: the same logits for every prefix."""

    def __init__(self, num_lanes: int, vocab_size: int, device: torch.device) -> None:
        self.num_lanes, self.vocab_size, self.device = num_lanes, vocab_size, device
        generator = torch.Generator(device).manual_seed(0)
        self._logits = torch.randn(num_lanes, vocab_size, generator=generator, device=device)
        self._logits = 3 * self._logits.to(torch.bfloat16)

    def prefill(self, lane: int, tokens: tuple[int, ...]) -> None:
        pass

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self._logits

    def move(self, moves: Tensor, offset: Tensor) -> None:
        pass


def settings(num_lanes: int, device_loop: bool | None = None) -> PowerSamplingConfig:
    return PowerSamplingConfig(
        alpha=4.0,
        max_new_tokens=512,
        block_size=32,
        num_mcmc_steps=10,
        num_lanes=num_lanes,
        device_loop=device_loop,
    )


def loaded(lanes: engine.LaneEngine, num_lanes: int) -> engine.LaneEngine:
    """With a chain on every lane, begun."""
    state = lanes._state
    lane_state.reset_lanes(state, 0)
    every = list(range(num_lanes))
    lane_state.load_chains(state, every, every)
    lane_state.join_chains(state, every, every, [[5, 6, 7]] * num_lanes)
    lanes._transition(None)
    return lanes


def ticks(lanes: engine.LaneEngine, count: int) -> None:
    if isinstance(lanes._loop, engine.DeviceLoop):
        launched(lanes._loop, count)
        return
    made = lanes._loop.run(max_ticks=count)
    assert made == count, f"the chains ended after {made} ticks"


@pytest.mark.parametrize("transition", ["compiled", "reference"])
@pytest.mark.parametrize("num_lanes", [16, 64])
def test_engine_without_a_model(
    benchmark: Callable, monkeypatch: pytest.MonkeyPatch, num_lanes: int, transition: str
) -> None:
    device = torch.device("cuda" if HAS_GPU else "cpu")
    if transition == "reference":
        monkeypatch.setattr(engine, "state_device", lambda device: torch.device("cpu"))
        monkeypatch.setattr(
            engine,
            "transition_of",
            lambda state: functools.partial(reference.transition, state),
        )
    model = NoModel(num_lanes, 32768, device)
    # By the reference on the CPU there can be no loop on the device, and none is asked for.
    device_loop = False if transition == "reference" else None
    lanes = engine.LaneEngine(model, settings(num_lanes, device_loop), eos=(0,))
    benchmark.group = f"{num_lanes} lanes, vocabulary 32768, ticks without a model"
    benchmark.extra_info["ticks"] = 20
    benchmark.pedantic(
        ticks, setup=lambda: ((loaded(lanes, num_lanes), 20), {}), rounds=20, warmup_rounds=2
    )


class TestModelOf1500M:
    pytestmark = needs_gpu
    num_lanes = 64

    @pytest.fixture(scope="class")
    def model(self) -> object:
        import transformers

        config = transformers.Qwen2Config(
            vocab_size=151936,
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
        )
        with torch.device("cuda"):
            torch.manual_seed(0)
            model = transformers.Qwen2ForCausalLM(config).to(torch.bfloat16)
        return model.eval()

    @pytest.mark.parametrize("variant", ["copy", "model", "tick-device", "tick-host"])
    def test_tick(self, benchmark: Callable, model: torch.nn.Module, variant: str) -> None:
        benchmark.group = f"{self.num_lanes} lanes, 1.5B parameters, {TICKS} ticks"
        benchmark.extra_info["ticks"] = TICKS
        lanes = TransformersLaneModel(model, self.num_lanes, 1024)
        if variant == "copy":
            size = sum(p.numel() * p.element_size() for p in model.parameters())
            source = torch.empty(size // 2, dtype=torch.uint8, device="cuda")
            target = torch.empty_like(source)
            run = self.replayed(lambda: target.copy_(source))
        elif variant == "model":
            tokens = torch.full((self.num_lanes,), 5, device="cuda")
            positions = torch.full_like(tokens, 300)
            with lanes.running():
                run = self.replayed(lambda: lanes.step(tokens, positions))
        else:
            config = settings(self.num_lanes)
            with lanes.running():
                ours = engine.LaneEngine(lanes, config, eos=())
            if variant == "tick-host":
                assert isinstance(ours._loop, engine.DeviceLoop)
                ours._loop = engine.HostLoop(ours._loop._tick, ours._state.go)

            def run() -> None:
                ticks(loaded(ours, self.num_lanes), TICKS)

        benchmark.pedantic(run, rounds=5, warmup_rounds=1)

    def replayed(self, work: Callable[[], object]) -> Callable[[], None]:
        for _ in range(3):
            work()
        graph = _cuda_graph.record(work, torch.cuda.Stream())
        graph.instantiate()

        def run() -> None:
            for _ in range(TICKS):
                graph.replay()
            torch.cuda.synchronize()

        return run
