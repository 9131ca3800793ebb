"""Ticks of a model whose step does nothing: all that is ours, compiled and by the reference.

`python -m bench.gpu.tick` is the same beside a real model's step. Not yet run on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from bench.power_sampling.ticks import NoModel, begin_chains, launched
from powerkernels.power_sampling import PowerSamplingConfig, engine, reference

HAS_GPU = torch.cuda.is_available()


def settings(num_lanes: int, device_loop: bool | None = None) -> PowerSamplingConfig:
    return PowerSamplingConfig(
        alpha=4.0,
        max_new_tokens=512,
        block_size=32,
        num_mcmc_steps=10,
        num_lanes=num_lanes,
        device_loop=device_loop,
    )


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
        ticks, setup=lambda: ((begin_chains(lanes), 20), {}), rounds=20, warmup_rounds=2
    )
