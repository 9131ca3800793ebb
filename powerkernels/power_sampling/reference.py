"""A tick's transition on all lanes, one lane after another in plain Python: the truth.

metropolis_hastings.py has the same transition for one chain, with the formulas; lane_state.py says
what lanes, slots and items are. kernels.py and csrc/cpu/lane_transition.cpp are this file in Triton
and C++, with the same bits.
"""

from __future__ import annotations

from dataclasses import fields
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from powerkernels.logprob import TokenSamples
from powerkernels.power_sampling.lane_state import (
    AGREE,
    BAD,
    BANNED,
    CHAIN,
    COUNT,
    CURRENT,
    CURSOR,
    CUT,
    DIVERGENCE,
    END_ITEM,
    ENDED,
    EXTEND,
    FINISHED,
    IDLE,
    ITEM,
    LENGTH,
    LIMIT,
    LOG_PROB_SUM,
    LOG_Q,
    NEWEST,
    NEWEST_LENGTH,
    NEXT_ITEM,
    NUM_BUSY,
    NUM_DECODED,
    NUM_FINISHED,
    NUM_RUNNING,
    PHASE,
    PROMPT_TOKEN,
    PROPOSE,
    RUNNING,
    SLOT,
    STATUS,
    WAIT,
    WORKING,
    WRITTEN,
    LaneState,
)
from powerkernels.power_sampling.metropolis_hastings import (
    TOKEN_DRAW,
    match_draws,
    token_weight,
    transition_draws,
)


class Source(NamedTuple):
    """Where the newest state of a chain lies at a moment of a transition."""

    lane: int
    copy: int


def transition(state: LaneState, drawn: TokenSamples | None) -> None:
    """Append the drawn tokens, accept or reject what is complete, begin what comes next.

    Args:
        state: on a CPU. Written in place: everything but its constants.
        drawn: a token per lane with its entropy [C]; rows of lanes without an item are ignored.
            None appends nothing: lanes that wait, those of new chains too, are given items.
    """
    _Transition(state, drawn).run()


class _Transition:
    def __init__(self, state: LaneState, drawn: TokenSamples | None) -> None:
        self.rules = state.rules
        # Views of the same memory; numpy's scalars are quicker to reach than torch's.
        for field in fields(state):
            value = getattr(state, field.name)
            if isinstance(value, Tensor):
                setattr(self, field.name, value.numpy())
        self.eos_tokens = set(state.eos.tolist())
        self.seed_tensor = state.seed
        self.drawn = None if drawn is None else _Drawn.of(drawn)
        self.through: dict[int, tuple[float, bool]] = {}  # lane: (log r or its bound, complete)

    lanes: np.ndarray
    slots: np.ndarray
    offset: np.ndarray
    log_u: np.ndarray
    tokens: np.ndarray
    scores: np.ndarray
    w_sum: np.ndarray
    trace: np.ndarray
    fed: np.ndarray
    position: np.ndarray
    counters: np.ndarray
    ban: np.ndarray
    moves: np.ndarray
    totals: np.ndarray
    go: np.ndarray
    block_limits: np.ndarray
    log_int: np.ndarray

    def run(self) -> None:
        self.moves[:] = 0
        members: dict[int, list[int]] = {}
        for lane, slot in enumerate(self.lanes[:, SLOT]):
            if slot >= 0:
                members.setdefault(int(slot), []).append(lane)
        for slot, lanes in members.items():
            if self.slots[slot, STATUS] == RUNNING:
                self._advance(slot, lanes)
        for lane in range(len(self.lanes)):
            self._move(lane)
        for lane in range(len(self.lanes)):
            self._prepare_step(lane)
        status, phase = self.slots[:, STATUS], self.lanes[:, PHASE]
        self.totals[NUM_FINISHED] = (status == FINISHED).sum()
        self.totals[NUM_RUNNING] = (status == RUNNING).sum()
        self.totals[NUM_BUSY] = (phase >= EXTEND).sum()
        bad, finished, running = self.totals[[BAD, NUM_FINISHED, NUM_RUNNING]]
        self.go[0] = running > 0 and finished == 0 and bad == 0

    def _advance(self, slot: int, lanes: list[int]) -> None:
        if self.drawn is not None:
            for lane in lanes:
                if self.lanes[lane, PHASE] >= EXTEND:
                    self._append(lane)
        source = self._resolve(slot, lanes)
        for lane in lanes:
            if self.lanes[lane, PHASE] == WAIT:
                self._begin(slot, lane, lanes, source)
        busy = any(self.lanes[lane, PHASE] >= EXTEND for lane in lanes)
        if not busy and self.slots[slot, NEXT_ITEM] >= self.slots[slot, END_ITEM]:
            self.slots[slot, STATUS] = FINISHED
            for lane in lanes:
                self.lanes[lane, PHASE] = IDLE

    def _append(self, lane: int) -> None:
        """Write the drawn token; note whether the item is through."""
        assert self.drawn is not None
        me, rules = self.lanes[lane], self.rules
        token = int(self.drawn.token[lane])
        log_prob, log_z = float(self.drawn.log_prob[lane]), float(self.drawn.log_z[lane])
        s = rules.proposal_power
        w = token_weight(log_prob, log_z, alpha=rules.alpha, proposal_power=s)
        if token < 0:
            self.totals[BAD] = 1
        self.totals[NUM_DECODED] += 1
        t = int(me[CURSOR])
        before = self.scores[WORKING, lane, t - 1, LOG_PROB_SUM] if t else 0.0
        self.tokens[WORKING, lane, t] = token
        self.scores[WORKING, lane, t] = (
            log_prob,
            s * log_prob - log_z,
            self.drawn.entropy[lane],
            before + log_prob,
        )
        self.w_sum[WORKING, lane, t + 1] = self.w_sum[WORKING, lane, t] + w
        me[WRITTEN] = length = t + 1
        complete = token in self.eos_tokens or length == me[LIMIT]
        if me[PHASE] == EXTEND:
            if complete:
                self.through[lane] = (0.0, True)
        elif complete:
            self.through[lane] = (self._log_accept_ratio(lane, length), True)
        elif rules.early_rejection:
            bound = self._log_accept_bound(lane, length)
            if bound <= self.log_u[lane]:
                self.through[lane] = (bound, False)
        if lane not in self.through:
            me[CURSOR] = length

    def _log_accept_ratio(self, lane: int, length: int) -> float:
        """log r of a complete proposal of `length` tokens.

        The two prefix sums are equal up to the divergence, so their difference is that of the
        redrawn parts.
        """
        n = int(self.lanes[lane, LENGTH])
        if self.rules.truncated_sum:
            n = min(n, length)
        return self._ratio(lane, length, n)

    def _log_accept_bound(self, lane: int, length: int) -> float:
        """What log r cannot exceed, `length` tokens into the proposal.

        Each term only falls while a proposal grows, in floating point too.
        """
        return self._ratio(lane, length, int(self.lanes[lane, LENGTH]))

    def _ratio(self, lane: int, length: int, n: int, state: Source | None = None) -> float:
        copy, of = (CURRENT, lane) if state is None else (state.copy, state.lane)
        # inf - inf is NaN, which neither stops a proposal nor accepts it.
        with np.errstate(invalid="ignore"):
            ratio = self.w_sum[WORKING, lane, length] - self.w_sum[copy, of, n]
        if self.rules.length_term:
            ratio = (ratio + self.log_int[n]) - self.log_int[length]
        return float(ratio)

    def _resolve(self, slot: int, lanes: list[int]) -> Source:
        """Reject and accept what is through, first item first; returns the newest state."""
        chain = self.slots[slot]
        winner = -1
        for lane in lanes:
            is_first = winner < 0 or self.lanes[lane, ITEM] < self.lanes[winner, ITEM]
            if lane in self.through and is_first and self._is_accepted(lane):
                winner = lane
        for lane in lanes:
            earlier = winner < 0 or self.lanes[lane, ITEM] < self.lanes[winner, ITEM]
            if lane in self.through and earlier:
                n = int(self.lanes[lane, LENGTH])
                self._record(slot, lane, Source(lane, CURRENT), n, accepted=False)
                self._drop(lane)
        if winner < 0:
            return Source(int(chain[NEWEST]), CURRENT)

        me = self.lanes[winner]
        first, length, item = int(me[DIVERGENCE]), int(me[WRITTEN]), int(me[ITEM])
        self._record(slot, winner, Source(winner, WORKING), length, accepted=True)
        split = min(first, int(me[AGREE]))
        earlier = [
            lane
            for lane in lanes
            if self.lanes[lane, PHASE] >= EXTEND and self.lanes[lane, ITEM] < item
        ]
        # The other lanes take the items that follow, none left out, so they can hold these.
        last = item + len(lanes) - len(earlier)
        for lane in lanes:
            other = self.lanes[lane]
            if lane == winner:
                continue
            other[AGREE] = min(other[AGREE], split)
            # What was begun after this item was begun from another state.
            if other[PHASE] >= EXTEND and other[ITEM] > item:
                if other[ITEM] <= last and self._is_the_same_from(winner, lane, slot):
                    self._go_on_from(winner, lane)
                else:
                    self._drop(lane)
        self.moves[winner] = (winner, WORKING, first, length - first, first)
        me[PHASE] = WAIT
        me[LENGTH] = me[AGREE] = me[DIVERGENCE] = length
        chain[NEWEST], chain[NEWEST_LENGTH] = winner, length
        chain[ENDED] = int(self.tokens[WORKING, winner, length - 1]) in self.eos_tokens
        chain[END_ITEM] = self.trace.shape[1]
        self._hand_out_from(slot, item + 1, lanes)
        return Source(winner, WORKING)

    def _is_accepted(self, lane: int) -> bool:
        log_r, complete = self.through[lane]
        extends = self.lanes[lane, PHASE] == EXTEND
        return bool(extends or (complete and self.log_u[lane] < log_r))

    def _is_the_same_from(self, winner: int, lane: int, slot: int) -> bool:
        """Whether a proposal would be what it is had it been begun from the accepted one.

        The accepted one is in the winner's working copy, and `AGREE` says how far it is the state
        that the proposal was begun from.
        """
        me, rules = self.lanes[lane], self.rules
        n, item, written = int(self.lanes[winner, WRITTEN]), int(me[ITEM]), int(me[WRITTEN])
        if me[PHASE] != PROPOSE or lane in self.through or me[DIVERGENCE] >= me[AGREE]:
            return False
        # Behind an extension comes another state.
        if item // rules.items_per_block != self.lanes[winner, ITEM] // rules.items_per_block:
            return False
        if (rules.growth_cap and me[LIMIT] != n) or self._cut(self.slots[slot], item, n) != me[CUT]:
            return False
        if not rules.early_rejection:
            return True
        bound = self._ratio(lane, written, n, Source(winner, WORKING))
        return not bound <= self.log_u[lane]

    def _go_on_from(self, winner: int, lane: int) -> None:
        """Make the accepted proposal the state that a lane's proposal is compared with.

        Its working copy keeps what was written for the item.
        """
        me = self.lanes[lane]
        n, first = int(self.lanes[winner, WRITTEN]), int(me[AGREE])
        self.moves[lane] = (winner, WORKING, first, n - first, max(first, int(me[WRITTEN])))
        me[LENGTH] = me[AGREE] = n

    def _drop(self, lane: int) -> None:
        self.lanes[lane, PHASE] = WAIT

    def _begin(self, slot: int, lane: int, lanes: list[int], source: Source) -> None:
        """Give a lane the chain's next item that takes a model step, if there is one."""
        chain, me, rules = self.slots[slot], self.lanes[lane], self.rules
        # Nothing is known of the state behind an extension before it is there.
        if any(self.lanes[other, PHASE] == EXTEND for other in lanes):
            return
        n = int(chain[NEWEST_LENGTH])
        while chain[NEXT_ITEM] < chain[END_ITEM]:
            item = int(chain[NEXT_ITEM])
            block, number = divmod(item, rules.items_per_block)
            limit = int(self.block_limits[block])
            if number == 0 and block > 0 and chain[ENDED] and rules.stop_at_eos:
                chain[END_ITEM] = item
                return
            self._hand_out_from(slot, item + 1, lanes)
            cut, log_u, divergence, banned, phase = 0, 0.0, n, -1, EXTEND
            if number > 0:
                phase = PROPOSE
                cut, log_u, divergence = self._draw(chain, item, n, source)
                if rules.shared_prefix_skip and divergence < n:
                    banned = int(self.tokens[source.copy, source.lane, divergence])
            if divergence == n and (number > 0 or chain[ENDED]):
                # A proposal that repeats the whole completion, accepted at no cost, or a
                # completion with its EOS, which is not extended.
                self._record_item(slot, item, cut, n, True, 0.0, source, 0)
                continue
            if rules.growth_cap:
                limit = n if number > 0 else min(n + rules.block_size, self.tokens.shape[2])
            self._sync(lane, n, source)
            me[PHASE], me[ITEM], me[CUT], me[LIMIT] = phase, item, cut, limit
            me[CURSOR] = me[DIVERGENCE] = me[WRITTEN] = divergence
            me[BANNED] = banned
            self.log_u[lane] = log_u
            return

    def _hand_out_from(self, slot: int, item: int, lanes: list[int]) -> None:
        """Let the next item be the first one from `item` on that no lane is at."""
        held = {int(self.lanes[lane, ITEM]) for lane in lanes if self.lanes[lane, PHASE] >= EXTEND}
        while item in held:
            item += 1
        self.slots[slot, NEXT_ITEM] = item

    def _cut(self, chain: np.ndarray, item: int, n: int) -> int:
        return int(self._transition_draws(chain, item, n)[0])

    def _transition_draws(self, chain: np.ndarray, item: int, n: int) -> tuple[Tensor, Tensor]:
        number = torch.tensor([self._transition_number(item)])
        chain_number = torch.tensor([int(chain[CHAIN])])
        return transition_draws(torch.tensor([n]), number, chain_number, seed=self.seed_tensor)

    def _draw(self, chain: np.ndarray, item: int, n: int, source: Source) -> tuple[int, float, int]:
        """Cut, log u and divergence of a proposal; the divergence is n if it repeats everything."""
        cut, log_u = self._transition_draws(chain, item, n)
        m = int(cut)
        if not self.rules.shared_prefix_skip:
            return m, float(log_u), m
        position = torch.arange(m, n)
        u = match_draws(
            position,
            torch.full_like(position, self._transition_number(item)),
            torch.full_like(position, int(chain[CHAIN])),
            seed=self.seed_tensor,
        )
        q = torch.from_numpy(self.scores[source.copy, source.lane, m:n, LOG_Q]).exp()
        differs = (u >= q).nonzero()
        return m, float(log_u), m + int(differs[0]) if differs.numel() else n

    def _sync(self, lane: int, n: int, source: Source) -> None:
        """Make both copies of a lane the newest state, n tokens."""
        me = self.lanes[lane]
        if me[AGREE] >= n:
            # Its own current copy is: undo what was written.
            first, last = int(me[DIVERGENCE]), min(int(me[WRITTEN]), n)
            move = (lane, CURRENT, first, last - first, first)
        else:
            first = min(int(me[AGREE]), int(me[DIVERGENCE]))
            move = (*source, first, n - first, first)
        if move[COUNT] > 0:
            self.moves[lane] = move
        me[LENGTH] = me[AGREE] = n

    def _record(self, slot: int, lane: int, state: Source, length: int, accepted: bool) -> None:
        """Write the trace of the item that a lane is through with."""
        me = self.lanes[lane]
        decoded = int(me[WRITTEN] - me[DIVERGENCE])
        log_r, _ = self.through[lane]
        self._record_item(
            slot, int(me[ITEM]), int(me[CUT]), length, accepted, log_r, state, decoded
        )

    def _record_item(
        self,
        slot: int,
        item: int,
        cut: int,
        length: int,
        accepted: bool,
        log_r: float,
        state: Source,
        decoded: int,
    ) -> None:
        log_likelihood = self.scores[state.copy, state.lane, length - 1, LOG_PROB_SUM]
        block = item // self.rules.items_per_block
        self.trace[slot, item] = (block, cut, length, accepted, log_r, log_likelihood, decoded)

    def _transition_number(self, item: int) -> int:
        """Number of a transition among the chain's, from 1; 0 for an extension."""
        block, number = divmod(item, self.rules.items_per_block)
        return block * self.rules.num_mcmc_steps + number if number else 0

    def _move(self, lane: int) -> None:
        """Do a lane's move to its tokens, scores and sums."""
        source_lane, copy, first, count, both_from = map(int, self.moves[lane])
        if count == 0:
            return
        end = first + count
        for target in (WORKING, CURRENT):
            if (target, lane) == (copy, source_lane):
                continue
            start = both_from if target == copy else first
            at, after = slice(start, end), slice(start + 1, end + 1)
            self.tokens[target, lane, at] = self.tokens[copy, source_lane, at]
            self.scores[target, lane, at] = self.scores[copy, source_lane, at]
            self.w_sum[target, lane, after] = self.w_sum[copy, source_lane, after]

    def _prepare_step(self, lane: int) -> None:
        """What the model is fed next. A lane without an item repeats the prompt's last token."""
        me = self.lanes[lane]
        busy = me[PHASE] >= EXTEND
        cursor = int(me[CURSOR]) if busy else 0
        self.fed[lane] = self.tokens[WORKING, lane, cursor - 1] if cursor else me[PROMPT_TOKEN]
        self.position[lane] = self.offset[lane] + cursor
        self.ban[lane] = me[BANNED] if busy and cursor == me[DIVERGENCE] else -1
        number = self._transition_number(int(me[ITEM])) if busy else 0
        chain = self.slots[me[SLOT], CHAIN] if busy else 0
        self.counters[lane] = (TOKEN_DRAW, cursor, number, chain)


class _Drawn(NamedTuple):
    token: np.ndarray
    log_prob: np.ndarray
    log_z: np.ndarray
    entropy: np.ndarray

    @classmethod
    def of(cls, drawn: TokenSamples) -> _Drawn:
        assert drawn.entropy is not None
        return cls(
            drawn.token.numpy(),
            drawn.log_prob.double().numpy(),
            drawn.log_z.double().numpy(),
            drawn.entropy.double().numpy(),
        )
