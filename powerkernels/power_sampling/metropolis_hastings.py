"""Metropolis-Hastings on completions: the transition as pure functions, for any sampler.

The target is pi(x) ∝ p(x)^alpha over completions that end at their first EOS or at a length limit.
A transition cuts the current completion at a uniform position m, redraws everything from m on from
q ∝ p^s token by token, and accepts with

    log r = Σ_{t=m}^{n'-1} w'_t − Σ_{t=m}^{n-1} w_t + log n − log n',
    w_t   = alpha log p(x_t | x_<t) − log q(x_t | x_<t) = (alpha − s) log_prob_t + log_z_t

where log_z_t = log Σ_v p(v | x_<t)^s. n and n' are the two lengths; without log n − log n', or with
proposals that may not grow past n, the chain has another stationary law.

The lane engine runs the same transition for many chains at once (reference.py); this file is its
oracle, and the piece to take for a sampler of one's own: `step`, or where many proposals are drawn
at once, `begin`, `grow` and `decide`.

Source: Karan & Du 2025, "Reasoning with Sampling", Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from powerkernels.philox import philox4x32, uniform53

# First word of the Philox counter (index, position, step, chain): what a uniform is for.
TOKEN_DRAW = 0
TRANSITION_DRAW = 1
MATCH_DRAW = 2


class ScoredToken(NamedTuple):
    """One token drawn from q: the token, its log p, and log_z = log Σ_v p(v)^s at its position."""

    token: int
    log_prob: float
    log_z: float


class MHState(NamedTuple):
    """A chain: its current completion (n tokens) and what a transition needs to know of it."""

    tokens: tuple[int, ...]  # n, EOS included
    log_prob: tuple[float, ...]  # n: log p(x_t | x_<t)
    log_q: tuple[float, ...]  # n: log q(x_t | x_<t)
    w_cumsum: tuple[float, ...]  # n + 1: Σ of w over the first t tokens, left to right, float64
    transition: int  # transitions made so far


class MHInfo(NamedTuple):
    """What happened in one transition."""

    accepted: bool
    cut: int  # m
    divergence: int  # first position that was decoded; n where the proposal repeated x entirely
    proposal_length: int  # n', or the tokens there were when the proposal was rejected early
    log_accept_ratio: float  # log r, or its upper bound where the proposal was rejected early
    log_u: float
    decoded_tokens: int


# (prefix, banned, limit) -> tokens of a continuation, drawn one by one from q, up to and including
# its first EOS, or until prefix and continuation have `limit` tokens. The first one is drawn from q
# restricted to v != banned (None: unrestricted).
Propose = Callable[[tuple[int, ...], int | None, int], Iterable[ScoredToken]]


def transition_draws(
    length: Tensor, transition: Tensor, chain: Tensor, *, seed: int | Tensor
) -> tuple[Tensor, Tensor]:
    """The cut m, uniform on 0..length-1, and log u of a transition.

    Args:
        length: int64 [C], current lengths n >= 1.
        transition: int64 [C], number of the transition, from 1.
        chain: int64 [C], the chain's number, below 2^32.
        seed: key of the Philox stream.

    Returns:
        (cut int64 [C], log_u float64 [C]).
    """
    zero = torch.zeros_like(chain)
    words = philox4x32(
        torch.stack((zero + TRANSITION_DRAW, zero, transition, chain), dim=-1), seed=seed
    )
    cut = (words[..., 0] * length) >> 32
    return cut, uniform53(words[..., 1], words[..., 2]).log()


def match_draws(
    position: Tensor, transition: Tensor, chain: Tensor, *, seed: int | Tensor
) -> Tensor:
    """Uniforms float64, one per element, that decide whether a redrawn token repeats x_t."""
    index = torch.full_like(position, MATCH_DRAW)
    words = philox4x32(torch.stack((index, position, transition, chain), dim=-1), seed=seed)
    return uniform53(words[..., 0], words[..., 1])


def token_counters(position: Tensor, transition: Tensor, chain: Tensor) -> Tensor:
    """Philox counters int64 [C, 4] of `sample_tokens` for the token at completion position [C]."""
    index = torch.full_like(position, TOKEN_DRAW)
    return torch.stack((index, position, transition, chain), dim=-1)


def token_weight(log_prob: float, log_z: float, *, alpha: float, proposal_power: float) -> float:
    """w of one token in float64. Where 1 <= s <= alpha it is <= 0, rounding included."""
    w = float(log_z)
    if proposal_power != alpha:
        w += (alpha - proposal_power) * float(log_prob)
    return min(w, 0.0) if 1.0 <= proposal_power <= alpha else w


def init(
    completion: Iterable[ScoredToken], *, alpha: float, proposal_power: float | None = None
) -> MHState:
    """Start a chain at a completion.

    Args:
        completion: the tokens up to and including the first EOS, or up to the length limit, with
            log_prob (nats) and log_z at power s of each position. At least one.
        alpha: power of the target, >= 0.
        proposal_power: s of the proposal q ∝ p^s. None is alpha.

    Returns:
        The state before the first transition.

    Raises:
        ValueError: no token.
    """
    empty = MHState((), (), (), (0.0,), 0)
    state = extend(empty, completion, alpha=alpha, proposal_power=proposal_power)
    if not state.tokens:
        raise ValueError("completion must hold at least one token, got none")
    return state


def extend(
    state: MHState,
    continuation: Iterable[ScoredToken],
    *,
    alpha: float,
    proposal_power: float | None = None,
) -> MHState:
    """The chain with more tokens at its end, drawn from q: Algorithm 1's step to the next block.

    Args:
        state: the chain; its completion must not end with EOS.
        continuation: the tokens, as in `init`; may be none.
        alpha, proposal_power: as in `init`.
    """
    s = alpha if proposal_power is None else proposal_power
    for scored in continuation:
        state = _append(state, scored, alpha=alpha, proposal_power=s)
    return state


def step(
    state: MHState,
    propose: Propose,
    *,
    limit: int,
    alpha: float,
    proposal_power: float | None = None,
    seed: int = 0,
    chain: int = 0,
    early_rejection: bool = True,
    shared_prefix_skip: bool = True,
) -> tuple[MHState, MHInfo]:
    """One transition; a pure function of its arguments as long as `propose` is.

    Args:
        state: the chain.
        propose: draws continuations from q; see `Propose`. It may be a generator: it is not
            advanced further once the proposal is known to be rejected.
        limit: length limit of the completion in tokens, at least the current length. A proposal may
            grow up to it.
        alpha: power of the target, >= 0.
        proposal_power: s of the proposal q ∝ p^s. None is alpha.
        seed, chain: key and last counter word of the Philox stream of cut, acceptance and matches.
        early_rejection: stop the proposal once log r cannot exceed log u any more. In effect for
            1 <= s <= alpha. The chain is the same with and without it.
        shared_prefix_skip: decide from the stored log q how much of the completion is repeated, and
            ask `propose` for the rest only. The law is the same with and without it.

    Returns:
        (the next state, what happened).

    Raises:
        ValueError: limit below the current length, or a proposal past it.
    """
    n = len(state.tokens)
    s = alpha if proposal_power is None else proposal_power
    if limit < n:
        raise ValueError(f"limit must be at least the current length {n}, got {limit}")
    may_stop = early_rejection and 1.0 <= s <= alpha
    proposal = begin(state, seed=seed, chain=chain, shared_prefix_skip=shared_prefix_skip)
    if not proposal.repeats:
        for scored in propose(proposal.written.tokens, proposal.banned, limit):
            proposal = grow(proposal, scored, alpha=alpha, proposal_power=s)
            length = len(proposal.written.tokens)
            if length > limit:
                raise ValueError(f"propose must stop at limit = {limit} tokens, got {length}")
            if may_stop and proposal.is_rejected:
                break
    return decide(proposal)


class Proposal(NamedTuple):
    """A transition under way, for samplers that draw many proposals at once.

    `begin` makes it, `grow` adds a token, `decide` ends it. `step` is these three for one chain.
    """

    state: MHState  # before the transition
    written: MHState  # the proposal so far: what it shares with the state, then what was drawn
    cut: int  # m
    divergence: int  # first position to draw
    banned: int | None  # token excluded there
    log_u: float
    log_accept_ratio: float  # log r if the proposal ended here; inf before the first token

    @property
    def repeats(self) -> bool:
        """Whether the proposal is the current completion; it is accepted, with nothing drawn."""
        return self.divergence == len(self.state.tokens)

    @property
    def is_rejected(self) -> bool:
        """Whether log r is too small already; where 1 <= s <= alpha it cannot grow any more."""
        return self.log_accept_ratio <= self.log_u


def begin(
    state: MHState, *, seed: int = 0, chain: int = 0, shared_prefix_skip: bool = True
) -> Proposal:
    """Draw the cut, log u and, with the skip, the divergence of the next transition."""
    n = len(state.tokens)
    transition = state.transition + 1
    as_tensor = lambda value: torch.tensor([value], dtype=torch.int64)  # noqa: E731
    draws = transition_draws(as_tensor(n), as_tensor(transition), as_tensor(chain), seed=seed)
    cut, log_u = int(draws[0]), float(draws[1])
    divergence, banned = cut, None
    if shared_prefix_skip:
        divergence = _first_difference(state, cut, transition, chain, seed)
        banned = state.tokens[divergence] if divergence < n else None
    written = MHState(
        state.tokens[:divergence],
        state.log_prob[:divergence],
        state.log_q[:divergence],
        state.w_cumsum[: divergence + 1],
        transition,
    )
    return Proposal(state, written, cut, divergence, banned, log_u, math.inf)


def grow(
    proposal: Proposal,
    scored: ScoredToken,
    *,
    alpha: float,
    proposal_power: float | None = None,
) -> Proposal:
    """The proposal with one more token, drawn from q (the first one: restricted to v != banned)."""
    s = alpha if proposal_power is None else proposal_power
    written = _append(proposal.written, scored, alpha=alpha, proposal_power=s)
    return proposal._replace(
        written=written, log_accept_ratio=_log_accept_ratio(proposal.state, written)
    )


def decide(proposal: Proposal) -> tuple[MHState, MHInfo]:
    """Accept or reject a proposal that is complete or known to be rejected.

    Returns:
        (the next state, what happened).

    Raises:
        ValueError: nothing was drawn for the proposal.
    """
    state, written, divergence = proposal.state, proposal.written, proposal.divergence
    length = len(written.tokens)
    if proposal.repeats:
        info = MHInfo(True, proposal.cut, length, length, 0.0, proposal.log_u, 0)
        return written, info
    if length == divergence:
        raise ValueError("propose must yield at least one token, got none")
    accepted = proposal.log_u < proposal.log_accept_ratio
    info = MHInfo(
        accepted,
        proposal.cut,
        divergence,
        length,
        proposal.log_accept_ratio,
        proposal.log_u,
        length - divergence,
    )
    return (written if accepted else state._replace(transition=written.transition)), info


def _log_accept_ratio(state: MHState, proposed: MHState) -> float:
    """log r. Both prefix sums agree up to the divergence.

    Each term only falls while a proposal grows, so before its end this bounds log r from above.
    """
    n, length = len(state.tokens), len(proposed.tokens)
    return (proposed.w_cumsum[-1] - state.w_cumsum[-1]) + math.log(n) - math.log(length)


def _append(state: MHState, scored: ScoredToken, *, alpha: float, proposal_power: float) -> MHState:
    log_prob, log_z = float(scored.log_prob), float(scored.log_z)
    w = token_weight(log_prob, log_z, alpha=alpha, proposal_power=proposal_power)
    return state._replace(
        tokens=(*state.tokens, int(scored.token)),
        log_prob=(*state.log_prob, log_prob),
        log_q=(*state.log_q, proposal_power * log_prob - log_z),
        w_cumsum=(*state.w_cumsum, state.w_cumsum[-1] + w),
    )


def _first_difference(state: MHState, cut: int, transition: int, chain: int, seed: int) -> int:
    """The first position from `cut` on whose redrawn token is not x_t; n if there is none."""
    n = len(state.tokens)
    position = torch.arange(cut, n)
    u = match_draws(
        position,
        torch.full_like(position, transition),
        torch.full_like(position, chain),
        seed=seed,
    )
    q = torch.tensor(state.log_q[cut:], dtype=torch.float64).exp()
    differs = (u >= q).nonzero()
    return cut + int(differs[0]) if differs.numel() else n
