"""Ticks of the lane engine, for what times them: lanes without a model, chains on all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from powerkernels.power_sampling import lane_state
from powerkernels.power_sampling.engine import LaneEngine
from powerkernels.power_sampling.graph_loop import DeviceLoop

PROMPT = [5, 6, 7]


class NoModel:
    """Lanes whose step costs nothing: the same logits for every prefix."""

    def __init__(self, num_lanes: int, vocab_size: int, device: torch.device) -> None:
        self.num_lanes, self.vocab_size, self.device = num_lanes, vocab_size, device
        generator = torch.Generator().manual_seed(0)
        logits = 3 * torch.randn(num_lanes, vocab_size, generator=generator)
        self._logits = logits.to(device, torch.bfloat16)

    def prefill(self, lane: int, tokens: tuple[int, ...]) -> None:
        pass

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self._logits

    def move(self, moves: Tensor, offset: Tensor) -> None:
        pass


def begin_chains(engine: LaneEngine) -> LaneEngine:
    """With a chain on every lane, begun; of the prompt a model's cache holds nothing."""
    state = engine._state
    every = list(range(state.num_lanes))
    lane_state.reset_lanes(state, 0)
    lane_state.load_chains(state, every, every)
    lane_state.join_chains(state, every, every, [PROMPT] * state.num_lanes)
    engine._transition(None)
    return engine


def launched(loop: DeviceLoop, ticks: int) -> None:
    """So many ticks in one launch; returns when the device has made them.

    Without the pauses of a loop that looks now and then whether it is done.
    """
    before, stream = loop.ticks, torch.cuda.current_stream()
    loop._loop.launch(stream.cuda_stream, ticks)
    stream.synchronize()
    made = loop.ticks - before
    assert made == ticks, f"the loop ended after {made} of {ticks} ticks"
