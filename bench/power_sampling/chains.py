"""Chains on all lanes of an engine, for what times its ticks."""

from __future__ import annotations

from powerkernels.power_sampling import lane_state
from powerkernels.power_sampling.engine import LaneEngine

PROMPT = [5, 6, 7]


def begin_chains(engine: LaneEngine) -> LaneEngine:
    """With a chain on every lane, begun; where the model's step reads its cache it is zeros."""
    state = engine._state
    every = list(range(state.num_lanes))
    lane_state.reset_lanes(state, 0)
    lane_state.load_chains(state, every, every)
    lane_state.join_chains(state, every, every, [PROMPT] * state.num_lanes)
    engine._transition(None)
    return engine
