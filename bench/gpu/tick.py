"""A tick of the sampler's loop on a model of 1.5B parameters with random weights, taken apart.

    python -m bench.gpu.tick --out tick.json [--compile]

Milliseconds a tick of 64 lanes: repeated by the device (DeviceLoop), replayed from the host as a
captured graph, and called eagerly; beside them the model's step alone and one read of its weights,
which no step is faster than. With the kinds of nodes of the captured tick and the kernels that take
most of it. Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness import ceilings, timing
from bench.harness.cases import QWEN_1B
from bench.jobs.cases import random_model
from bench.power_sampling.ticks import begin_chains, launched
from powerkernels import _extension
from powerkernels.power_sampling import PowerSamplingConfig
from powerkernels.power_sampling.engine import LaneEngine
from powerkernels.power_sampling.graph_loop import CaptureError, DeviceLoop, capture
from powerkernels.power_sampling.lane_model import TransformersLaneModel

LANES, POSITIONS = 64, 1024
TICKS, EAGER_TICKS, ROUNDS = 200, 20, 5
PROFILED_TICKS = 5
NUM_KERNELS = 20


class Tick:
    """The engine's tick on one model, and the ways to repeat it.

    Args:
        device: of the model.
        compile: the model's step through torch.compile.
        tiny: a model of two small layers on four lanes, to see that all of it runs.
        clock: call -> seconds of it, on the device.
    """

    def __init__(
        self, device: torch.device, *, compile: bool, tiny: bool, clock: Callable[..., float]
    ) -> None:
        self._device, self._clock = device, clock
        self.num_lanes = 4 if tiny else LANES
        self.ticks, self.eager_ticks = (4, 2) if tiny else (TICKS, EAGER_TICKS)
        dtype = torch.float32 if tiny else torch.bfloat16
        self._model = random_model(None if tiny else QWEN_1B, dtype, device)
        positions = 128 if tiny else POSITIONS
        self._lanes = TransformersLaneModel(self._model, self.num_lanes, positions, compile=compile)
        config = PowerSamplingConfig(
            alpha=4.0,
            max_new_tokens=positions // 2,
            block_size=32,
            num_mcmc_steps=10,
            num_lanes=self.num_lanes,
        )
        with self._lanes.running():
            self._engine = LaneEngine(self._lanes, config, eos=())

    def measure(self, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Everything, each by itself: what cannot be is a reason in its place.

        keep: called with all that there is after each; what may hang comes last.
        """
        found: dict[str, Any] = {"node_kinds": self._or_reason(self.node_kinds)}
        found["milliseconds"], found["kernels"] = {}, self._or_reason(self.kernels)
        ways: dict[str, Callable[[], float]] = {
            "replayed": self.replayed,
            "eager": self.eager,
            "model step, replayed": self.model_step,
            "one read of the weights": self.weights_read,
            "device loop": self.by_device,
        }
        for name, way in ways.items():
            keep(found)
            found["milliseconds"][name] = self._or_reason(lambda way=way: 1e3 * way())
        keep(found)
        return found

    def _or_reason(self, part: Callable[[], Any]) -> Any:
        try:
            return part()
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            return {"why_not": f"{type(error).__name__}: {lines[0]}"}

    @property
    def _graph(self) -> torch.cuda.CUDAGraph:
        """The captured tick, repeated by the device, or by the host where the device cannot."""
        tick = self._engine._loop._tick
        graph = getattr(tick, "__self__", tick)  # the host's loop keeps its replay
        if not isinstance(graph, torch.cuda.CUDAGraph):
            raise RuntimeError("the host makes the ticks here, kernel by kernel: no graph of one")
        return graph

    def _begin(self) -> None:
        with self._lanes.running():
            begin_chains(self._engine)

    def _per_tick(self, run: Callable[[], object], ticks: int) -> float:
        """Median seconds a tick of a run, from fresh chains."""
        samples = []
        for _ in range(ROUNDS):
            self._begin()
            samples.append(self._clock(run) / ticks)
        return timing.median(samples)

    def by_device(self) -> float:
        loop = self._engine._loop
        if not isinstance(loop, DeviceLoop):
            raise RuntimeError("the host drives the loop here")
        return self._per_tick(lambda: launched(loop, self.ticks), self.ticks)

    def replayed(self) -> float:
        return self._per_tick(_repeated(self._graph.replay, self.ticks), self.ticks)

    def eager(self) -> float:
        def run() -> None:
            with self._lanes.running():
                for _ in range(self.eager_ticks):
                    self._engine._tick()

        return self._per_tick(run, self.eager_ticks)

    def model_step(self) -> float:
        tokens = torch.full((self.num_lanes,), 5, device=self._device)
        positions = torch.full_like(tokens, POSITIONS // 4 if self.num_lanes == LANES else 9)
        with self._lanes.running():
            step = functools.partial(self._lanes.step, tokens, positions)
            graph = capture(step, device=self._device)
        return self._per_tick(_repeated(graph.replay, self.ticks), self.ticks)

    def weights_read(self) -> float:
        size = sum(weight.numel() * weight.element_size() for weight in self._model.parameters())
        read = ceilings.read_of(size, self._device)
        return self._per_tick(_repeated(read, self.eager_ticks), self.eager_ticks)

    def node_kinds(self) -> dict[str, int]:
        """Nodes of the captured tick by their kind, those of child graphs included."""
        found: dict[str, int] = _extension.compiled().graph_node_kinds(self._graph.raw_cuda_graph())
        return found

    def kernels(self) -> list[dict[str, Any]]:
        """The kernels that take most of a replayed tick: name, calls and microseconds a tick."""
        graph = self._graph
        self._begin()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(PROFILED_TICKS):
                graph.replay()
            torch.cuda.synchronize(self._device)
        events = sorted(
            profile.key_averages(), key=lambda event: event.device_time_total, reverse=True
        )
        total = sum(event.device_time_total for event in events)
        if not total:
            raise RuntimeError("the profiler saw no kernel")
        return [
            {
                "name": event.key,
                "calls": event.count / PROFILED_TICKS,
                "microseconds": event.device_time_total / PROFILED_TICKS,
                "share": event.device_time_total / total,
            }
            for event in events[:NUM_KERNELS]
        ]


def _repeated(call: Callable[[], object], count: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(count):
            call()

    return run


def device_seconds(device: torch.device, run: Callable[[], object]) -> float:
    """Seconds of a run between two events on the device's current stream."""
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def stub_seconds(run: Callable[[], object]) -> float:
    """Runs it and says a second: for a rehearsal, whose times are none."""
    run()
    return 1.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    parser.add_argument("--compile", action="store_true", help="the step through torch.compile")
    parser.add_argument(
        "--rehearsal", action="store_true", help="a tiny model on the CPU, and a clock that is none"
    )
    options = parser.parse_args(argv)
    device = torch.device("cpu" if options.rehearsal else "cuda")
    clock = stub_seconds if options.rehearsal else functools.partial(device_seconds, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what torch.compile and the profiler import
        try:
            tick = Tick(device, compile=options.compile, tiny=options.rehearsal, clock=clock)
        except (CaptureError, RuntimeError, ValueError) as error:
            print(f"no tick: {error}", file=sys.stderr)
            return 1
        facts = {
            "compile": options.compile,
            "lanes": tick.num_lanes,
            "stub_clock": options.rehearsal,
        }

        def keep(found: dict[str, Any]) -> None:
            text = json.dumps({**facts, **found}, indent=1, allow_nan=False)
            options.out.write_text(text + "\n")

        found = {**facts, **tick.measure(keep)}
    print("\n".join(lines(found)))
    failed = [part for part in found["milliseconds"].values() if isinstance(part, dict)]
    return 0 if options.rehearsal or not failed else 1


def lines(found: dict[str, Any]) -> list[str]:
    """As a short table."""
    compiled = "compiled" if found["compile"] else "not compiled"
    unit = "(stub clock)" if found["stub_clock"] else "ms"
    printed = [f"a tick of {found['lanes']} lanes, model {compiled}:"]
    for name, value in found["milliseconds"].items():
        shown = value["why_not"] if isinstance(value, dict) else f"{value:.3f} {unit}"
        printed.append(f"  {name:<26}{shown}")
    kinds, kernels = found["node_kinds"], found["kernels"]
    if "why_not" in kinds:
        printed.append(f"  nodes: {kinds['why_not']}")
    else:
        printed.append("  nodes: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()))
    if isinstance(kernels, dict):
        printed.append(f"  kernels: {kernels['why_not']}")
    else:
        printed += [
            f"  {each['microseconds']:8.1f} µs {each['calls']:6.0f} calls {each['share']:4.0%}  "
            f"{each['name'][:80]}"
            for each in kernels
        ]
    return printed


if __name__ == "__main__":
    sys.exit(main())
