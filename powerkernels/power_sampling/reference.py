"""The state of all lanes and their transition, in plain torch: the truth for the kernels.

A lane is a row of a static batch. It holds one chain; its *working* copy of the completion is what
is being written, its *current* copy is the chain's state. Every lane is at its own position and
lanes never wait for one another. metropolis_hastings.py has the same transition for one chain, with
the formulas; this file is the form in which many run at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from powerkernels.logprob import TokenSamples
from powerkernels.power_sampling.config import PowerSamplingConfig
from powerkernels.power_sampling.metropolis_hastings import match_draws, transition_draws

# Phases of a lane.
IDLE, EXTEND, PROPOSE = 0, 1, 2
# First index of `tokens`, `scores`, `w_cumsum`: the two copies of a completion.
WORKING, CURRENT = 0, 1
# Last index of `scores`.
LOG_PROB, LOG_Q, ENTROPY, NUM_SCORES = 0, 1, 2, 3
# Last index of `trace`.
TRACE_FIELDS = ("block", "cut", "length", "accepted", "log_accept_ratio", "log_likelihood")


@dataclass(frozen=True)
class LaneState:
    """Static tensors, written in place. C lanes, L = max_new_tokens, M = transitions of a chain."""

    chain: Tensor  # int64 [C], last word of the Philox counters
    phase: Tensor  # int64 [C]
    block: Tensor  # int64 [C], -1 before the first
    length: Tensor  # int64 [C], tokens of the current completion
    ended: Tensor  # bool [C], the current completion ends with EOS
    cursor: Tensor  # int64 [C], completion position whose token is drawn next
    divergence: Tensor  # int64 [C], first position written since the last commit
    banned: Tensor  # int64 [C], token excluded at `divergence`, -1 for none
    transition: Tensor  # int64 [C], number of the transition under way or last made, from 1
    cut: Tensor  # int64 [C]
    log_u: Tensor  # float64 [C]
    decoded: Tensor  # int64 [C], tokens the model decoded for this chain
    tokens: Tensor  # int64 [2, C, L]
    scores: Tensor  # float64 [2, C, L, NUM_SCORES]
    w_cumsum: Tensor  # float64 [2, C, L + 1]
    trace: Tensor  # float64 [C, M, len(TRACE_FIELDS)]
    block_limits: Tensor  # int64 [number of blocks]
    log_int: Tensor  # float64 [L + 1], log of 0, 1, … L
    eos: Tensor  # int64 [number of EOS tokens]
    seed: Tensor  # int64 [1]

    @property
    def limit(self) -> Tensor:
        """int64 [C], the length limit of each lane's block; 0 before the first."""
        limits = self.block_limits[self.block.clamp(min=0)]
        return torch.where(self.block < 0, torch.zeros_like(limits), limits)


def init_lanes(
    num_lanes: int, config: PowerSamplingConfig, eos: tuple[int, ...], device: torch.device
) -> LaneState:
    """All lanes idle. Memory: about 80 bytes per lane and token of `max_new_tokens`."""
    limits = config.block_limits
    length = config.max_new_tokens
    num_transitions = len(limits) * config.num_mcmc_steps

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    log_int = [-math.inf, *(math.log(n) for n in range(1, length + 1))]
    # A seed of 2^63 and more keeps its bits.
    seed = config.seed - 2**64 if config.seed >= 2**63 else config.seed
    return LaneState(
        chain=zeros(num_lanes),
        phase=zeros(num_lanes),
        block=zeros(num_lanes),
        length=zeros(num_lanes),
        ended=zeros(num_lanes, dtype=torch.bool),
        cursor=zeros(num_lanes),
        divergence=zeros(num_lanes),
        banned=zeros(num_lanes) - 1,
        transition=zeros(num_lanes),
        cut=zeros(num_lanes),
        log_u=zeros(num_lanes, dtype=torch.float64),
        decoded=zeros(num_lanes),
        tokens=zeros(2, num_lanes, length),
        scores=zeros(2, num_lanes, length, NUM_SCORES, dtype=torch.float64),
        w_cumsum=zeros(2, num_lanes, length + 1, dtype=torch.float64),
        trace=zeros(num_lanes, num_transitions, len(TRACE_FIELDS), dtype=torch.float64),
        block_limits=torch.tensor(limits, device=device),
        log_int=torch.tensor(log_int, dtype=torch.float64, device=device),
        eos=torch.tensor(eos, dtype=torch.int64, device=device),
        seed=torch.tensor([seed], dtype=torch.int64, device=device),
    )


def load_chains(state: LaneState, lane: Tensor, chain: Tensor) -> None:
    """Put new chains (int64 [F]), without any token yet, on idle lanes [F]; `begin` starts them."""
    state.chain[lane] = chain
    state.block[lane] = -1
    for field in (state.length, state.ended, state.transition, state.decoded):
        field[lane] = 0
    state.w_cumsum[:, lane, 0] = 0.0


def append(state: LaneState, config: PowerSamplingConfig, samples: TokenSamples) -> Tensor:
    """Write one drawn token per lane and say which lanes are through with what they were doing.

    Args:
        samples: one token per lane with its entropy [C]. Rows of idle lanes are ignored.

    Returns:
        int64 [F], the lanes that have a complete completion or a proposal that cannot be accepted.
    """
    token = samples.token
    assert samples.entropy is not None
    active = state.phase != IDLE
    lane = torch.arange(token.shape[0], device=token.device)
    log_prob, log_z = samples.log_prob.double(), samples.log_z.double()
    alpha, s = float(config.alpha), config.proposal_power
    w = log_z if s == alpha else log_z + (alpha - s) * log_prob
    if 1.0 <= s <= alpha:
        w = w.clamp(max=0.0)
    log_q = s * log_prob - log_z

    # An idle lane's working copy is nobody's: what lands there is never read.
    t = state.cursor
    state.tokens[WORKING, lane, t] = token
    state.scores[WORKING, lane, t] = torch.stack(
        (log_prob, log_q, samples.entropy.double()), dim=-1
    )
    w_sum = state.w_cumsum[WORKING, lane, t] + w
    state.w_cumsum[WORKING, lane, t + 1] = w_sum
    state.decoded.add_(active)
    length = t + 1
    through = (length == state.limit) | torch.isin(token, state.eos)
    if config.can_reject_early:
        through |= (state.phase == PROPOSE) & (
            _log_accept_ratio(state, lane, length) <= state.log_u
        )
    through &= active
    # The cursor of a lane that is through stays where it is until `commit`.
    state.cursor.copy_(torch.where(through | ~active, t, length))
    return through.nonzero()[:, 0]


def commit(state: LaneState, lane: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Accept or reject on the lanes that are through: one copy becomes the other.

    Args:
        lane: int64 [F], from `append`.

    Returns:
        (accepted bool [F], first int64 [F], last int64 [F]): the completion positions first..last
        are those in which the two copies differed.
    """
    first, last = state.divergence[lane], state.cursor[lane]
    length = last + 1
    token = state.tokens[WORKING, lane, last]
    proposing = state.phase[lane] == PROPOSE
    ended = torch.isin(token, state.eos)
    log_r = _log_accept_ratio(state, lane, length)
    # A proposal that is not complete is here because its bound fell to log u.
    accepted = ~proposing | (state.log_u[lane] < log_r)

    source = torch.where(accepted, WORKING, CURRENT)
    position = torch.arange(state.tokens.shape[-1], device=lane.device)
    changed = (position >= first[:, None]) & (position <= last[:, None])
    row, column = changed.nonzero(as_tuple=True)
    at = lane[row]
    source = source[row]
    state.tokens[1 - source, at, column] = state.tokens[source, at, column]
    state.scores[1 - source, at, column] = state.scores[source, at, column]
    state.w_cumsum[1 - source, at, column + 1] = state.w_cumsum[source, at, column + 1]
    state.length[lane] = torch.where(accepted, length, state.length[lane])
    state.ended[lane] = torch.where(accepted, ended, state.ended[lane])

    _record(state, lane[proposing], accepted[proposing], log_r[proposing])
    return accepted, first, last


def begin(state: LaneState, config: PowerSamplingConfig, lane: Tensor) -> Tensor:
    """Start what comes next on lanes that are through or new: a proposal or the next block.

    Args:
        lane: int64 [F].

    Returns:
        int64 [D], the lanes whose chain is finished; they are idle now.
    """
    done = []
    while lane.numel():
        # Transitions of a chain are numbered through its blocks, so this many ends the block.
        block_over = state.transition[lane] == (state.block[lane] + 1) * config.num_mcmc_steps
        over, lane = lane[block_over], lane[~block_over]
        last = state.block[over] + 1 == state.block_limits.numel()
        state.phase[over[last]] = IDLE
        state.cursor[over[last]] = 0
        done.append(over[last])
        over = over[~last]
        state.block[over] += 1
        ended = state.ended[over]
        extend = over[~ended]
        state.phase[extend] = EXTEND
        state.divergence[extend] = state.length[extend]
        state.cursor[extend] = state.length[extend]
        state.banned[extend] = -1
        repeated = _begin_proposal(state, config, lane)
        # A completion that has its EOS is not extended: its next block starts with a proposal. A
        # proposal that repeats the completion entirely is accepted at no cost.
        lane = torch.cat((over[ended], repeated))
    return torch.cat(done) if done else lane


def _begin_proposal(state: LaneState, config: PowerSamplingConfig, lane: Tensor) -> Tensor:
    """Draw cut and divergence. Returns the lanes whose proposal repeats the whole completion."""
    if not lane.numel():
        return lane
    state.transition[lane] += 1
    n, transition, chain = state.length[lane], state.transition[lane], state.chain[lane]
    cut, log_u = transition_draws(n, transition, chain, seed=state.seed)
    divergence, banned = cut, torch.full_like(cut, -1)
    if config.shared_prefix_skip:
        position = torch.arange(int(cut.min()), int(n.max()), device=lane.device)
        grid = position.expand(lane.numel(), -1)
        u = match_draws(
            grid,
            transition[:, None].expand_as(grid),
            chain[:, None].expand_as(grid),
            seed=state.seed,
        )
        log_q = state.scores[CURRENT, lane[:, None], grid, LOG_Q]
        differs = (u >= log_q.exp()) & (grid >= cut[:, None]) & (grid < n[:, None])
        found = differs.any(dim=1)
        divergence = torch.where(found, position[0] + differs.int().argmax(dim=1), n)
        banned = state.tokens[CURRENT, lane, divergence.clamp(max=n.max() - 1)]
    state.cut[lane] = cut
    state.log_u[lane] = log_u
    state.divergence[lane] = divergence
    state.banned[lane] = banned
    repeats = divergence == n
    state.cursor[lane] = torch.where(repeats, n - 1, divergence)
    state.phase[lane] = PROPOSE
    repeated = lane[repeats]
    _record(state, repeated, torch.ones_like(repeated), torch.zeros_like(repeated))
    return repeated


def _log_accept_ratio(state: LaneState, lane: Tensor, length: Tensor) -> Tensor:
    """log r float64 of the working copies taken as proposals of `length` tokens; lane, length [F].

    The two prefix sums are equal up to the divergence, so their difference is that of the redrawn
    parts. For 1 <= s <= alpha each term only falls while a proposal grows, in floating point too:
    before its end this is an upper bound.
    """
    n = state.length[lane]
    proposal = state.w_cumsum[WORKING, lane, length]
    return (proposal - state.w_cumsum[CURRENT, lane, n]) + state.log_int[n] - state.log_int[length]


def _record(state: LaneState, lane: Tensor, accepted: Tensor, log_r: Tensor) -> None:
    """Write the trace row of the transition that the lanes [F] have just made."""
    n = state.length[lane]
    log_prob = state.scores[CURRENT, lane, :, LOG_PROB]
    inside = torch.arange(log_prob.shape[1], device=lane.device) < n[:, None]
    log_likelihood = torch.where(inside, log_prob, 0.0).cumsum(dim=1)[:, -1]
    fields = (state.block[lane], state.cut[lane], n, accepted, log_r, log_likelihood)
    row = torch.stack([field.double() for field in fields], dim=-1)
    state.trace[lane, state.transition[lane] - 1] = row
