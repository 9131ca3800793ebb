"""What a tick costs beside its own work: repeated on the device, and replayed from the host.

The tick is one kernel that does next to nothing, so the time of a round is the time around it.
`microseconds_per_tick` in the JSON is the figure; the counts of ticks are checked.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.power_sampling.ticks import launched
from powerkernels.power_sampling.graph_loop import (
    DeviceLoop,
    HostLoop,
    capture,
    why_no_graph_loop,
)

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or why_no_graph_loop("cuda") is not None,
    reason=f"no loop on the device: {why_no_graph_loop('cuda')}",
)


class Empty:
    """A tick of one kernel, and a flag that stays 1."""

    def __init__(self) -> None:
        self.state = torch.zeros(1, device="cuda")
        self.flag = torch.ones(1, dtype=torch.int32, device="cuda")
        self.graph = capture(lambda: self.state.add_(1))
        self.state.zero_()


def on_the_device(empty: Empty) -> Callable[[int], None]:
    loop = DeviceLoop(empty.graph, empty.flag)

    return lambda ticks: launched(loop, ticks)


def replayed_and_looked_at(empty: Empty) -> Callable[[int], None]:
    loop = HostLoop(empty.graph, empty.flag)

    def run(ticks: int) -> None:
        assert loop.run(max_ticks=ticks) == ticks

    return run


def replayed_blindly(empty: Empty) -> Callable[[int], None]:
    def run(ticks: int) -> None:
        for _ in range(ticks):
            empty.graph.replay()
        torch.cuda.synchronize()

    return run


VARIANTS = [on_the_device, replayed_and_looked_at, replayed_blindly]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.__name__)
def test_empty_ticks(
    benchmark: Callable, quick: bool, variant: Callable[[Empty], Callable[[int], None]]
) -> None:
    ticks = 500 if quick else 10_000
    rounds = 3 if quick else 20
    empty = Empty()
    run = variant(empty)
    benchmark.group = f"{ticks} ticks of one kernel"
    benchmark.extra_info |= {"ticks": ticks, "device": torch.cuda.get_device_name()}
    benchmark.pedantic(run, args=(ticks,), rounds=rounds, warmup_rounds=1)
    benchmark.extra_info["microseconds_per_tick"] = 1e6 * benchmark.stats.stats.median / ticks
    assert empty.state.item() == (rounds + 1) * ticks
