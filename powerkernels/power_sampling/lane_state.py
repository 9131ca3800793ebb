"""The state of all lanes: static tensors that a transition writes in place.

A lane is a row of the model's static batch. A chain runs in a *slot* and is worked on by one lane
or several. What a chain does is a list of *items*, `num_mcmc_steps + 1` a block: item 0 of a block
extends the completion to the block's limit, the others are its transitions. Each lane works on one
item, from a completion of its own: its *current* copy is the state of the chain before the item,
its *working* copy is what is being written.

With one lane, items are made one after another. More lanes *prefetch*: they make the next
transitions from the same state, as the chain itself would if the earlier ones were rejected. What a
transition draws depends on its number and on the state, so a chain has the same bits with any
number of lanes. What turns out to have started from the wrong state goes on if it would have come
this far from the right one too: its cut is the same, and the two states differ behind the token
that it replaced first. Else it is dropped.

The *newest* state of a chain is that after all items resolved so far, those under way taken as
rejected. Items are handed out from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from powerkernels.power_sampling.config import PowerSamplingConfig

# Phases of a lane. IDLE: without a chain; WAIT: of a chain, without an item.
IDLE, WAIT, EXTEND, PROPOSE = 0, 1, 2, 3
# Columns of `lanes`.
SLOT = 0  # slot of its chain, -1 for none
PHASE = 1
ITEM = 2
LENGTH = 3  # tokens of its current copy
AGREE = 4  # its current copy is equal to the newest state before this position
CURSOR = 5  # position whose token is drawn next
DIVERGENCE = 6  # first position that the item writes
WRITTEN = 7  # first position behind those written for the item
BANNED = 8  # token excluded at `DIVERGENCE`, -1 for none
LIMIT = 9  # tokens that the item may reach
CUT = 10
PROMPT_TOKEN = 11  # the prompt's last token
NUM_LANE_FIELDS = 12
# Columns of `slots`.
STATUS = 0
CHAIN = 1  # last word of the Philox counters
NEXT_ITEM = 2  # first item to be handed out; all before it were
END_ITEM = 3  # items of the chain
NEWEST = 4  # a lane whose current copy is the newest state
NEWEST_LENGTH = 5
ENDED = 6  # the newest state ends with EOS
NUM_SLOT_FIELDS = 7
# Values of STATUS.
EMPTY, RUNNING, FINISHED = 0, 1, 2
# Entries of `totals`.
BAD, NUM_FINISHED, NUM_RUNNING, NUM_BUSY, NUM_DECODED = 0, 1, 2, 3, 4
NUM_TOTALS = 5
# First index of `tokens`, `scores`, `w_sum`: the two copies of a completion.
WORKING, CURRENT = 0, 1
# Last index of `scores`.
LOG_PROB, LOG_Q, ENTROPY, LOG_PROB_SUM, NUM_SCORES = 0, 1, 2, 3, 4
# Columns of `moves`; see `lane_moves`.
SOURCE_LANE, SOURCE_COPY, FIRST, COUNT, BOTH_FROM = 0, 1, 2, 3, 4
NUM_MOVE_FIELDS = 5
# Last index of `trace`. An extension counts as accepted, with cut 0 and ratio 0.
TRACE_FIELDS = (
    "block",
    "cut",
    "length",
    "accepted",
    "log_accept_ratio",
    "log_likelihood",
    "decoded",
)


class Rules(NamedTuple):
    """What a transition does; the last four are True, False, False, False for p^alpha."""

    alpha: float
    proposal_power: float  # s
    num_mcmc_steps: int
    block_size: int
    early_rejection: bool  # asked for, and 1 <= s <= alpha
    shared_prefix_skip: bool
    length_term: bool = True  # log n - log n' is in log r
    growth_cap: bool = False  # a proposal ends at n; a block adds block_size to what there is
    truncated_sum: bool = False  # the sum over the current completion ends where the proposal does
    stop_at_eos: bool = False  # the chain is over after the block in which it has its EOS

    @property
    def bounded(self) -> bool:
        """Whether every w is <= 0."""
        return 1.0 <= self.proposal_power <= self.alpha

    @property
    def items_per_block(self) -> int:
        return self.num_mcmc_steps + 1


def rules_of(config: PowerSamplingConfig) -> Rules:
    public = config.compat == "reference"
    return Rules(
        alpha=float(config.alpha),
        proposal_power=config.proposal_power,
        num_mcmc_steps=config.num_mcmc_steps,
        block_size=config.block_limits[0],
        early_rejection=config.can_reject_early,
        shared_prefix_skip=config.shared_prefix_skip,
        length_term=not public,
        growth_cap=public,
        truncated_sum=public,
        stop_at_eos=public,
    )


@dataclass(frozen=True)
class LaneState:
    """C lanes, C slots, L = max_new_tokens, N = items of a chain."""

    rules: Rules
    lanes: Tensor  # int64 [C, NUM_LANE_FIELDS]
    slots: Tensor  # int64 [C, NUM_SLOT_FIELDS]
    offset: Tensor  # int64 [C], position in the cache of the prompt's last token
    log_u: Tensor  # float64 [C], of each lane's proposal
    tokens: Tensor  # int64 [2, C, L]
    scores: Tensor  # float64 [2, C, L, NUM_SCORES]
    w_sum: Tensor  # float64 [2, C, L + 1], Σ of w over the first t tokens
    trace: Tensor  # float64 [C slots, N, len(TRACE_FIELDS)]
    # What the next model step takes.
    fed: Tensor  # int64 [C], tokens
    position: Tensor  # int64 [C], in the cache
    counters: Tensor  # int64 [C, 4], Philox counters of the draw
    ban: Tensor  # int64 [C], token excluded from the draw, -1 for none
    # What the last transition asks the cache to do, and how things stand.
    moves: Tensor  # int64 [C, NUM_MOVE_FIELDS]
    totals: Tensor  # int64 [NUM_TOTALS]
    go: Tensor  # int32 [1], 1 while there are chains, none has finished and no token was bad
    # Constants.
    block_limits: Tensor  # int64 [number of blocks]
    log_int: Tensor  # float64 [L + 1], log of 0, 1, … L
    eos: Tensor  # int64 [number of EOS tokens]
    seed: Tensor  # int64 [1]

    @property
    def num_lanes(self) -> int:
        return self.lanes.shape[0]

    @property
    def num_items(self) -> int:
        return self.trace.shape[1]


def init_lanes(
    num_lanes: int,
    config: PowerSamplingConfig,
    eos: tuple[int, ...],
    device: torch.device,
    rules: Rules | None = None,
) -> LaneState:
    """All lanes idle. Memory: about 100 bytes per lane and token of `max_new_tokens`."""
    rules = rules or rules_of(config)
    limits = config.block_limits
    length = config.max_new_tokens
    # The memory of a lane's tokens, scores and sums is zero where nothing was written.
    ints: dict[str, Any] = {"dtype": torch.int64, "device": device}
    floats: dict[str, Any] = {"dtype": torch.float64, "device": device}
    lanes = torch.zeros(num_lanes, NUM_LANE_FIELDS, **ints)
    lanes[:, SLOT] = -1
    log_int = [-math.inf, *(math.log(n) for n in range(1, length + 1))]
    return LaneState(
        rules=rules,
        lanes=lanes,
        slots=torch.zeros(num_lanes, NUM_SLOT_FIELDS, **ints),
        offset=torch.zeros(num_lanes, **ints),
        log_u=torch.zeros(num_lanes, **floats),
        tokens=torch.zeros(2, num_lanes, length, **ints),
        scores=torch.zeros(2, num_lanes, length, NUM_SCORES, **floats),
        w_sum=torch.zeros(2, num_lanes, length + 1, **floats),
        trace=torch.zeros(
            num_lanes, len(limits) * rules.items_per_block, len(TRACE_FIELDS), **floats
        ),
        fed=torch.zeros(num_lanes, **ints),
        position=torch.zeros(num_lanes, **ints),
        counters=torch.zeros(num_lanes, 4, **ints),
        ban=torch.full((num_lanes,), -1, **ints),
        moves=torch.zeros(num_lanes, NUM_MOVE_FIELDS, **ints),
        totals=torch.zeros(NUM_TOTALS, **ints),
        go=torch.zeros(1, dtype=torch.int32, device=device),
        block_limits=torch.tensor(limits, device=device),
        log_int=torch.tensor(log_int, dtype=torch.float64, device=device),
        eos=torch.tensor(eos, dtype=torch.int64, device=device),
        seed=torch.full((1,), _signed(config.seed), **ints),
    )


def _signed(seed: int) -> int:
    """A seed of 2^63 and more keeps its bits."""
    return seed - 2**64 if seed >= 2**63 else seed


def reset_lanes(state: LaneState, seed: int) -> None:
    """All lanes idle, all slots empty, all counts zero."""
    state.seed.fill_(_signed(seed))
    for tensor in (state.lanes, state.slots, state.moves, state.totals, state.go):
        tensor.zero_()
    state.lanes[:, SLOT] = -1


def load_chains(state: LaneState, lanes: Sequence[int], chains: Sequence[int]) -> None:
    """Put new chains, by their Philox numbers, into the slots that are numbered as the lanes.

    The lanes are to join them.
    """
    slots = torch.zeros(len(lanes), NUM_SLOT_FIELDS, dtype=torch.int64)
    slots[:, STATUS] = RUNNING
    slots[:, CHAIN] = torch.tensor(chains)
    slots[:, END_ITEM] = state.num_items
    slots[:, NEWEST] = torch.tensor(lanes)
    state.slots[torch.tensor(lanes)] = slots.to(state.slots.device)


def join_chains(
    state: LaneState, lanes: Sequence[int], slots: Sequence[int], prompts: Sequence[Sequence[int]]
) -> None:
    """Let idle lanes, whose cache holds the prompts, work on the chains in the slots."""
    rows = torch.zeros(len(lanes), NUM_LANE_FIELDS, dtype=torch.int64)
    rows[:, SLOT] = torch.tensor(slots)
    rows[:, PHASE] = WAIT
    rows[:, BANNED] = -1
    rows[:, PROMPT_TOKEN] = torch.tensor([prompt[-1] for prompt in prompts])
    at = torch.tensor(lanes)
    state.lanes[at] = rows.to(state.lanes.device)
    offset = torch.tensor([len(prompt) - 1 for prompt in prompts])
    state.offset[at] = offset.to(state.offset.device)


def release_slots(state: LaneState, slots: Sequence[int]) -> list[int]:
    """Empty slots whose chains are finished; returns the lanes that are idle now."""
    freed = torch.isin(state.lanes[:, SLOT], torch.tensor(slots).to(state.lanes.device))
    state.slots[torch.tensor(slots), STATUS] = EMPTY
    state.lanes[freed, SLOT] = -1
    state.lanes[freed, PHASE] = IDLE
    return freed.nonzero()[:, 0].tolist()
