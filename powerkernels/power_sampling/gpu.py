"""Launches the Triton kernels of the transition."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from powerkernels._triton import EXACT, device_of, power_of_2
from powerkernels.logprob import TokenSamples
from powerkernels.power_sampling import kernels
from powerkernels.power_sampling.lane_state import LaneState

# Positions that are searched for the divergence at a time.
BLOCK_T = 128
# Lanes that a warp of a slot's program holds; fewer than its threads cost as much as one a thread.
MIN_LANES, LANES_PER_WARP, MAX_WARPS = 32, 64, 16
# Of a thread, where that leaves room for all programs at once on a large GPU (132 multiprocessors).
# Left to itself the assembler spills to end at 128, for the sake of warps that are not there.
ROOMY_WARPS = 4
MAX_REGISTERS = 192
# Entries that a lane's program moves at a time, and its warps.
MOVE_BLOCK, MOVE_WARPS = 1024, 8


def transition_of(state: LaneState) -> Callable[[TokenSamples | None], None]:
    """The transition of a state on a GPU; its calls allocate nothing and wait for nothing."""
    rules = state.rules
    device = state.lanes.device
    powers = torch.tensor([rules.alpha, rules.proposal_power], dtype=torch.float64, device=device)
    num_lanes, max_length = state.num_lanes, state.tokens.shape[2]
    block_lanes = max(power_of_2(num_lanes), MIN_LANES)
    num_warps = min(max(block_lanes // LANES_PER_WARP, 1), MAX_WARPS)
    constants = {
        "OTHER_POWER": rules.proposal_power != rules.alpha,
        "BOUNDED": rules.bounded,
        "EARLY_REJECTION": rules.early_rejection,
        "SHARED_PREFIX_SKIP": rules.shared_prefix_skip,
        "LENGTH_TERM": rules.length_term,
        "GROWTH_CAP": rules.growth_cap,
        "TRUNCATED_SUM": rules.truncated_sum,
        "STOP_AT_EOS": rules.stop_at_eos,
        "BLOCK_C": block_lanes,
        "BLOCK_T": BLOCK_T,
        "num_warps": num_warps,
        "maxnreg": MAX_REGISTERS if num_warps <= ROOMY_WARPS else None,
        **EXACT,
    }

    def transition(drawn: TokenSamples | None) -> None:
        columns: list[Tensor | None] = [None] * 4
        if drawn is not None:
            columns = [None if column is None else column.contiguous() for column in drawn]
        with device_of(state.lanes):
            kernels.mh_transition_kernel[(num_lanes,)](
                state.lanes,
                state.slots,
                state.log_u,
                state.tokens,
                state.scores,
                state.w_sum,
                state.trace,
                state.moves,
                state.totals,
                state.block_limits,
                state.log_int,
                state.eos,
                state.seed,
                powers,
                *columns,
                num_lanes,
                max_length,
                state.num_items,
                state.eos.numel(),
                rules.num_mcmc_steps,
                rules.block_size,
                **constants,
            )
            kernels.prepare_step_kernel[(num_lanes + 1,)](
                state.lanes,
                state.slots,
                state.offset,
                state.tokens,
                state.scores,
                state.w_sum,
                state.fed,
                state.position,
                state.counters,
                state.ban,
                state.moves,
                state.totals,
                state.go,
                num_lanes,
                max_length,
                rules.num_mcmc_steps,
                BLOCK=MOVE_BLOCK,
                num_warps=MOVE_WARPS,
                **EXACT,
            )

    return transition
