"""The transition of the lanes: every backend against the reference, bit for bit, after every tick.

The histories are random: chains come and go, lanes join them at any time, and the tokens are of no
model, so that ends, rejections, repeats and drops come in every order.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import fields
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from powerkernels.logprob import TokenSamples, sample_tokens
from powerkernels.power_sampling import PowerSamplingConfig, lane_state, reference
from powerkernels.power_sampling.lane_state import (
    AGREE,
    BAD,
    CHAIN,
    CURRENT,
    CURSOR,
    DIVERGENCE,
    EMPTY,
    END_ITEM,
    ENDED,
    EXTEND,
    FINISHED,
    IDLE,
    ITEM,
    LENGTH,
    LIMIT,
    NEWEST,
    NEWEST_LENGTH,
    NEXT_ITEM,
    NUM_DECODED,
    PHASE,
    PROPOSE,
    RUNNING,
    SLOT,
    STATUS,
    WAIT,
    WORKING,
    WRITTEN,
    LaneState,
    Rules,
    rules_of,
)
from powerkernels.power_sampling.metropolis_hastings import TOKEN_DRAW
from powerkernels.power_sampling.transition import Transition, transition_of
from python_tests import tiers
from python_tests.power_sampling.enumerable import EOS, EnumerableModel

# A token of probability zero gives sums of -inf and their difference, in the reference by numpy.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

# alpha, s: 1 <= s <= alpha, inside and at both ends, and s below and above it.
POWERS = [(2.0, 2.0), (4.0, 1.5), (2.0, 1.0), (2.0, 0.7), (1.5, 2.6), (0.0, 0.0), (1.0, 1.0)]
MAX_TOKENS = 12
MAX_OFFSET = 3
VOCAB_SIZE = 5
STUCK = 4000  # ticks


class Case(NamedTuple):
    """A history to be made, all of it a function of this."""

    config: PowerSamplingConfig
    rules: Rules
    num_lanes: int
    chains: tuple[int, ...]  # their numbers
    eos: tuple[int, ...]
    eos_share: float  # of the tokens
    scale: float  # of log p and log z
    join: float  # probability that an idle lane joins a chain between two ticks
    dtype: torch.dtype
    seed: int

    def state(self, device: str = "cpu") -> LaneState:
        return lane_state.init_lanes(
            self.num_lanes, self.config, self.eos, torch.device(device), self.rules
        )


def make_case(
    *,
    powers: tuple[float, float] = (2.0, 2.0),
    max_new_tokens: int = 7,
    block_size: int = 3,
    num_mcmc_steps: int = 3,
    key: int = 0,
    num_lanes: int = 4,
    chains: tuple[int, ...] = (0, 7),
    eos: tuple[int, ...] = (0,),
    eos_share: float = 0.1,
    scale: float = 0.5,
    join: float = 0.5,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **switches: bool,
) -> Case:
    config = PowerSamplingConfig(
        alpha=powers[0],
        max_new_tokens=max_new_tokens,
        block_size=block_size,
        num_mcmc_steps=num_mcmc_steps,
        seed=key,
    )
    rules = rules_of(config)._replace(proposal_power=powers[1], **switches)
    rules = rules._replace(early_rejection=rules.early_rejection and rules.bounded)
    return Case(config, rules, num_lanes, chains, eos, eos_share, scale, join, dtype, seed)


SWITCHES = (
    "early_rejection",
    "shared_prefix_skip",
    "length_term",
    "growth_cap",
    "truncated_sum",
    "stop_at_eos",
)


@st.composite
def cases(draw: Callable) -> Case:
    # Choices from lists, of which each is as likely: integers would mostly be the smallest.
    choose = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    block_size, num_blocks = choose(3, 1, 2, 4), choose(2, 1, 3)
    max_new_tokens = max(block_size * num_blocks - choose(0, 1), 1)
    return make_case(
        powers=choose(*POWERS),
        max_new_tokens=max_new_tokens,
        block_size=block_size,
        num_mcmc_steps=choose(4, 0, 1, 2, 3),
        key=draw(st.integers(0, 2**64 - 1)),
        num_lanes=choose(4, 1, 2, 3, 5, 6),
        chains=tuple(draw(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4))),
        eos=choose((0,), (), (0, 3), (4, 1, 2)),
        eos_share=choose(0.05, 0.0, 0.02, 0.2, 0.9),
        scale=choose(0.5, 0.0, 0.03, 3.0),
        join=choose(1.0, 0.0, 0.3),
        dtype=choose(torch.float32, torch.float64),
        seed=draw(st.integers(0, 2**32)),
        **{name: choose(True, False) for name in SWITCHES},
    )


# Each switch and each kind of power, without all of their products: on a GPU each is compiled.
CASES = {
    "plain": {},
    "s < alpha": dict(powers=(4.0, 1.5), eos=(0, 3), scale=0.3),
    "s > alpha": dict(powers=(1.5, 2.6), dtype=torch.float64, key=2**64 - 5),
    "s < 1": dict(powers=(2.0, 0.7), chains=(2**32 - 1, 2**31), eos_share=0.3),
    "no early rejection": dict(early_rejection=False, eos_share=0.3),
    "no skip": dict(shared_prefix_skip=False),
    "repeats": dict(scale=0.01, eos_share=0.9, num_mcmc_steps=4),
    "no length term": dict(length_term=False, eos_share=0.3),
    "growth cap": dict(growth_cap=True, eos_share=0.2),
    "public": dict(
        growth_cap=True, truncated_sum=True, stop_at_eos=True, length_term=False, eos_share=0.2
    ),
    "no transitions": dict(num_mcmc_steps=0),
    "no EOS": dict(eos=(), num_lanes=5),
    "one lane": dict(num_lanes=1, chains=(3,)),
    "many lanes": dict(
        num_lanes=7,
        chains=(3, 4),
        max_new_tokens=12,
        block_size=12,
        num_mcmc_steps=9,
        shared_prefix_skip=False,
        length_term=False,
        eos_share=0.02,
        scale=0.3,
        join=1.0,
    ),
}


class History:
    """What the engine does between two ticks, and what a model would have drawn."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.random = random.Random(case.seed)
        self.waiting = list(case.chains)
        self.prompts: dict[int, tuple[int, ...]] = {}  # of a slot
        self.loaded: list[int] = []  # lanes with a new chain since the last call of `admit`
        self.joined: list[tuple[int, int]] = []  # lanes and slots, likewise
        self.num_ticks = 0

    def admit(self, *states: LaneState) -> bool:
        """Empty the finished slots, load chains, let lanes join; whether any chain is left.

        The same in all states, as the first one has it.
        """
        first = states[0]
        self.loaded, self.joined = [], []
        self.num_ticks += 1
        assert self.num_ticks < STUCK
        for slot in column(first.slots, STATUS, FINISHED):
            for state in states:
                lane_state.release_slots(state, [slot])
        idle = column(first.lanes, SLOT, -1)
        assert all(int(first.lanes[lane, PHASE]) == IDLE for lane in idle)
        self.random.shuffle(idle)
        for lane in idle:
            running = column(first.slots, STATUS, RUNNING)
            if self.waiting and (not running or self.random.random() < 0.5):
                chain = self.waiting.pop()
                prompt = tuple(self.random.choices(range(VOCAB_SIZE), k=1 + lane % MAX_OFFSET))
                self.prompts[lane] = prompt
                self.loaded.append(lane)
                for state in states:
                    load_chain(state, lane, chain, prompt)
            elif running and self.random.random() < self.case.join:
                slot = self.random.choice(running)
                self.joined.append((lane, slot))
                for state in states:
                    lane_state.join_chains(state, [lane], [slot], [self.prompts[slot]])
        return bool(column(first.slots, STATUS, RUNNING))

    def drawn(self) -> TokenSamples | None:
        """Mostly a row for each lane, of idle ones too; None as the engine has it now and then."""
        if self.random.random() < (0.7 if self.loaded else 0.02):
            return None
        case, rows = self.case, []
        others = [token for token in range(VOCAB_SIZE) if token not in case.eos]
        for _ in range(case.num_lanes):
            ends = case.eos and self.random.random() < case.eos_share
            token = self.random.choice(case.eos if ends else others)
            log_prob, log_z = (-case.scale * self.random.expovariate(1.0) for _ in range(2))
            if self.random.random() < 0.01:
                log_prob = -float("inf")
            if self.random.random() < 0.1:
                log_z = 1e-7  # rounded up
            rows.append((token, log_prob, log_z, self.random.random()))
        token, *scores = zip(*rows, strict=True)
        return TokenSamples(
            torch.tensor(token), *(torch.tensor(score, dtype=case.dtype) for score in scores)
        )


def load_chain(state: LaneState, lane: int, chain: int, prompt: tuple[int, ...]) -> None:
    lane_state.load_chains(state, [lane], [chain])
    lane_state.join_chains(state, [lane], [lane], [prompt])


def column(table: Tensor, index: int, value: int) -> list[int]:
    """The rows with that value."""
    return (table[:, index] == value).nonzero()[:, 0].tolist()


def tensors(state: LaneState) -> dict[str, Tensor]:
    return {f.name: getattr(state, f.name) for f in fields(state) if f.name != "rules"}


def copy_state(source: LaneState, target: LaneState) -> None:
    for name, tensor in tensors(target).items():
        tensor.copy_(getattr(source, name))


def moved(drawn: TokenSamples | None, device: str) -> TokenSamples | None:
    return None if drawn is None else TokenSamples(*(value.to(device) for value in drawn))


def assert_equal(truth: LaneState, tested: LaneState) -> None:
    """Bit for bit, any NaN being any other; log u within 2 ulp."""
    for name, a in tensors(truth).items():
        b = getattr(tested, name).cpu()
        assert a.dtype == b.dtype
        if a.is_floating_point():
            far = (a.view(torch.int64) - b.view(torch.int64)).abs()
            far[a.isnan() & b.isnan()] = 0
            assert int(far.max()) <= (2 if name == "log_u" else 0), name
        else:
            assert torch.equal(a, b), name


def follow(
    case: Case, transition_of: Callable[[LaneState], Transition], device: str = "cpu"
) -> None:
    """Both from the first tick to the last, each with its own state."""
    history = History(case)
    truth, tested = case.state(), case.state(device)
    transition = transition_of(tested)
    while history.admit(truth, tested):
        drawn = history.drawn()
        reference.transition(truth, drawn)
        transition(moved(drawn, device))
        assert_equal(truth, tested)
    assert not history.waiting


def spot_check(
    case: Case,
    transition_of: Callable[[LaneState], Transition],
    device: str,
    *,
    num_histories: int,
) -> None:
    """Of several histories the ticks in which something happens that did not happen before.

    Each from the state that the reference has led to.
    """
    seen: set[tuple] = set()
    for seed in range(num_histories):
        case = case._replace(seed=seed)
        history = History(case)
        truth, tested, before = case.state(), case.state(device), case.state()
        transition = transition_of(tested)
        while history.admit(truth):
            drawn = history.drawn()
            copy_state(truth, before)
            reference.transition(truth, drawn)
            new = events(before, truth) - seen
            if new:
                seen |= new
                copy_state(before, tested)
                transition(moved(drawn, device))
                assert_equal(truth, tested)


def events(before: LaneState, after: LaneState) -> set[tuple]:
    """What a tick did, of each slot and of each lane."""
    found: set[tuple] = set()
    sign = lambda a, b: (a > b) - (a < b)  # noqa: E731
    slots = list(zip(before.slots.tolist(), after.slots.tolist(), strict=True))
    of_slot = [
        (sign(new[NEXT_ITEM], old[NEXT_ITEM]), sign(new[END_ITEM], old[END_ITEM]))
        for old, new in slots
    ]
    found |= {
        (*of_slot[i], old[STATUS], new[STATUS], old[ENDED], new[ENDED], new[NEWEST_LENGTH] == 0)
        for i, (old, new) in enumerate(slots)
    }
    moves = after.moves.tolist()
    agree = [
        [0, *before.lanes[before.lanes[:, SLOT] == i, AGREE].tolist()] for i in range(len(slots))
    ]
    for lane, (me, new) in enumerate(zip(before.lanes.tolist(), after.lanes.tolist(), strict=True)):
        source, copy, first, count, both_from = moves[lane]
        split = (both_from > first) + (both_from >= first + count)
        move = (count > 0, source == lane, copy, split)
        going = (me[PHASE], new[PHASE], me[PHASE] == new[PHASE] and me[ITEM] != new[ITEM])
        at_limit = me[CURSOR] == me[LIMIT] - 1
        # The newest state is no longer that which it began with, but nearer to another lane's.
        diverged = me[AGREE] < me[DIVERGENCE] and me[AGREE] < max(agree[me[SLOT]])
        found |= {(*going, *move, diverged), (*going, at_limit, *of_slot[me[SLOT]][:1])}
    return found


class Cache:
    """The tokens that a model's cache holds for each lane, in the place of keys and values."""

    def __init__(self, case: Case) -> None:
        length = MAX_OFFSET + case.config.max_new_tokens
        # Poison: what is read before it was written is no token.
        self.tokens = torch.full((2, case.num_lanes, length), -(10**6))

    def prefill(self, lane: int, prompt: tuple[int, ...]) -> None:
        self.tokens[:, lane, : len(prompt) - 1] = torch.tensor(prompt[:-1], dtype=torch.int64)

    def tick(self, state: LaneState) -> None:
        """The moves as if at once, then what is fed."""
        before = self.tokens.clone()
        for lane, (source, copy, first, count, both_from) in enumerate(state.moves.tolist()):
            offset = int(state.offset[lane])
            for target in (WORKING, CURRENT) if count else ():
                start = both_from if target == copy else first
                at = slice(offset + start, offset + first + count)
                if (target, lane) != (copy, source):
                    self.tokens[target, lane, at] = before[copy, source, at]
        lanes = torch.arange(state.num_lanes)
        self.tokens[WORKING, lanes, state.position] = state.fed


def check_invariants(state: LaneState, cache: Cache, prompts: dict[int, tuple[int, ...]]) -> None:
    lanes, slots = state.lanes.tolist(), state.slots.tolist()
    for lane, me in enumerate(lanes):
        assert (me[PHASE] == IDLE) == (me[SLOT] < 0 or slots[me[SLOT]][STATUS] == FINISHED)
        if me[PHASE] < EXTEND:
            continue
        cursor = me[CURSOR]
        assert 0 <= me[DIVERGENCE] <= cursor == me[WRITTEN] < me[LIMIT] <= state.tokens.shape[2]
        assert me[AGREE] <= me[LENGTH]
        # What the model sees of a lane is its prompt and the completion it writes.
        seen = cache.tokens[WORKING, lane, : int(state.position[lane]) + 1].tolist()
        assert seen == [*prompts[me[SLOT]], *state.tokens[WORKING, lane, :cursor].tolist()]
        assert_same_completion(state, (WORKING, lane), (CURRENT, lane), me[DIVERGENCE])
        skips = state.rules.shared_prefix_skip and me[PHASE] == PROPOSE
        excluded = int(state.tokens[CURRENT, lane, cursor]) if skips else -1
        assert int(state.ban[lane]) == (excluded if cursor == me[DIVERGENCE] else -1)
        block, number = divmod(me[ITEM], state.rules.items_per_block)
        number += block * state.rules.num_mcmc_steps if number else 0
        assert state.counters[lane].tolist() == [TOKEN_DRAW, cursor, number, slots[me[SLOT]][CHAIN]]
    for slot, chain in enumerate(slots):
        if chain[STATUS] == EMPTY:
            continue
        members = [lane for lane, me in enumerate(lanes) if me[SLOT] == slot]
        busy = [lane for lane in members if lanes[lane][PHASE] >= EXTEND]
        items = [lanes[lane][ITEM] for lane in busy]
        assert len(set(items)) == len(items)
        assert all(0 <= item < chain[NEXT_ITEM] <= chain[END_ITEM] for item in items)
        extending = [lanes[lane][ITEM] for lane in busy if lanes[lane][PHASE] == EXTEND]
        assert extending in ([], [chain[NEXT_ITEM] - 1])
        idle = [lane for lane in members if lanes[lane][PHASE] == WAIT]
        assert not idle or extending or chain[NEXT_ITEM] == chain[END_ITEM]
        newest, n = chain[NEWEST], chain[NEWEST_LENGTH]
        assert newest in members
        assert lanes[newest][LENGTH] == lanes[newest][AGREE] == n
        for lane in members:
            agree = min(lanes[lane][AGREE], n)
            assert_same_completion(state, (CURRENT, lane), (CURRENT, newest), agree)
    check_moves(state)


def check_moves(state: LaneState) -> None:
    """What is a source is no target, and all is between lanes of one slot."""
    sources, targets = set(), set()
    for lane, (source, copy, first, count, both_from) in enumerate(state.moves.tolist()):
        if not count:
            continue
        assert both_from >= first
        assert int(state.lanes[lane, SLOT]) == int(state.lanes[source, SLOT]) >= 0
        assert 0 <= first < first + count <= state.tokens.shape[2]
        sources.add((copy, source))
        targets |= {(1 - copy, lane)} | ({(copy, lane)} if both_from < first + count else set())
        targets -= {(copy, source)} if source == lane else set()
    assert not sources & targets


def assert_same_completion(
    state: LaneState, a: tuple[int, int], b: tuple[int, int], n: int
) -> None:
    assert torch.equal(state.tokens[a][:n], state.tokens[b][:n])
    assert torch.equal(state.scores[a][:n].view(torch.int64), state.scores[b][:n].view(torch.int64))
    sums = state.w_sum[a][: n + 1], state.w_sum[b][: n + 1]
    torch.testing.assert_close(*sums, rtol=0, atol=0, equal_nan=True)


@given(case=cases())
def test_invariants(case: Case) -> None:
    check_history(case)


@pytest.mark.parametrize("name", CASES)
def test_invariants_of_long_histories(name: str) -> None:
    check_history(make_case(**CASES[name] | dict(chains=tuple(range(25)))))


def check_history(case: Case) -> None:
    history, cache, state = History(case), Cache(case), case.state()
    num_decoded = 0
    while history.admit(state):
        for lane in history.loaded:
            cache.prefill(lane, history.prompts[lane])
        for lane, slot in history.joined:
            cache.prefill(lane, history.prompts[slot])
        drawn = history.drawn()
        if drawn is not None:
            num_decoded += int((state.lanes[:, PHASE] >= EXTEND).sum())
        reference.transition(state, drawn)
        cache.tick(state)
        check_invariants(state, cache, history.prompts)
        assert state.totals.tolist() == [
            0,
            len(column(state.slots, STATUS, FINISHED)),
            len(column(state.slots, STATUS, RUNNING)),
            int((state.lanes[:, PHASE] >= EXTEND).sum()),
            num_decoded,
        ]
        assert bool(state.go) == (
            bool(column(state.slots, STATUS, RUNNING)) and not column(state.slots, STATUS, FINISHED)
        )


@tiers.examples(4)
@given(case=cases())
def test_compiled(compiled_backend: None, case: Case) -> None:
    follow(case, transition_of)


@pytest.mark.parametrize("name", CASES)
def test_compiled_long_histories(compiled_backend: None, name: str) -> None:
    options = {"num_lanes": 5, "num_mcmc_steps": 5, **CASES[name]}
    options |= dict(
        max_new_tokens=MAX_TOKENS, block_size=5, chains=tuple(range(40)), eos_share=0.03
    )
    follow(make_case(**options, seed=2), transition_of)


def test_compiled_with_many_lanes(compiled_backend: None, restore_threads: None) -> None:
    torch.set_num_threads(2)  # several tasks, on two threads
    follow(make_case(num_lanes=300, chains=tuple(range(200)), num_mcmc_steps=2), transition_of)


@pytest.fixture
def kernels() -> object:
    pytest.importorskip("triton")
    from powerkernels.power_sampling import gpu

    return gpu


@pytest.fixture
def small_blocks(kernels: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks in a search and in a move."""
    monkeypatch.setattr(kernels, "BLOCK_T", 2)
    monkeypatch.setattr(kernels, "MOVE_BLOCK", 2)


# In the fast tier; all are followed by the compiled transition in test_compiled_long_histories.
KERNEL_CASES = ("s > alpha", "public", "many lanes")


@pytest.mark.parametrize(
    "name",
    [x if x in KERNEL_CASES else pytest.param(x, marks=pytest.mark.slow) for x in CASES],
)
def test_kernels(kernel_device: str, small_blocks: None, name: str) -> None:
    options = {"chains": (0, 7, 8, 2**31), "num_lanes": 5, **CASES[name]}
    spot_check(make_case(**options), transition_of, kernel_device, num_histories=2)


def test_kernels_all_the_way(kernel_device: str, kernels: object) -> None:
    follow(make_case(max_new_tokens=5, num_lanes=3, num_mcmc_steps=2), transition_of, kernel_device)


def check_bad_token(transition_of: Callable[[LaneState], Transition], device: str) -> None:
    state = make_case(num_lanes=3).state(device)
    transition = transition_of(state)
    for lane in range(2):
        load_chain(state, lane, lane, (1,))
    transition(None)
    scores = [torch.full((3,), -0.5, device=device) for _ in range(3)]
    # That of a lane without an item is ignored.
    transition(TokenSamples(torch.tensor([2, 2, -1], device=device), *scores))
    assert int(state.totals[BAD]) == 0
    assert int(state.go) == 1
    scores[0][1] = float("nan")
    for token in ([2, -1, 2], [2, 2, 2]):
        transition(TokenSamples(torch.tensor(token, device=device), *scores))
        assert int(state.totals[BAD]) == 1
        assert int(state.go) == 0
    assert state.totals[NUM_DECODED] == 6


def test_bad_token() -> None:
    check_bad_token(reference_of, "cpu")


def test_bad_token_compiled(compiled_backend: None) -> None:
    check_bad_token(transition_of, "cpu")


def test_bad_token_kernels(kernel_device: str) -> None:
    check_bad_token(transition_of, kernel_device)


def reference_of(state: LaneState) -> Transition:
    return lambda drawn: reference.transition(state, drawn)


class Finished(NamedTuple):
    tokens: list[int]
    scores: Tensor
    w_sum: Tensor
    trace: Tensor
    num_ticks: int


def draw_chain(
    case: Case, model: EnumerableModel, transition_of: Callable[[LaneState], Transition]
) -> Finished:
    """A chain on all lanes of a case, which join it one after another, with a model's tokens."""
    state = case.state()
    transition = transition_of(state)
    slot = case.num_lanes // 2
    load_chain(state, slot, case.chains[0], (2, 1))
    others = [lane for lane in range(case.num_lanes) if lane != slot]
    joins = random.Random(case.seed)
    num_ticks = 0
    drawn = None
    while int(state.slots[slot, STATUS]) == RUNNING:
        while others and joins.random() < case.join:
            lane_state.join_chains(state, [others.pop()], [slot], [(2, 1)])
        transition(drawn)
        length = (state.position - state.offset).tolist()
        prefixes = [state.tokens[WORKING, i, :n].tolist() for i, n in enumerate(length)]
        drawn = sample_tokens(
            torch.stack([model.logits[model.code(tuple(prefix))] for prefix in prefixes]),
            alpha=case.rules.proposal_power,
            seed=state.seed,
            counters=state.counters,
            banned=state.ban,
            entropy=True,
        )
        num_ticks += 1
        assert num_ticks < STUCK
    _, chain, _, end, newest, n, _ = state.slots[slot].tolist()
    assert chain == case.chains[0]
    at = (CURRENT, newest)
    return Finished(
        state.tokens[at][:n].tolist(),
        state.scores[at][:n],
        state.w_sum[at][: n + 1],
        state.trace[slot, :end],
        num_ticks,
    )


@tiers.examples(0.15)
@given(case=cases(), model_seed=st.integers(0, 5), join=st.sampled_from([0.1, 0.5, 1.0]))
def test_a_chain_is_the_same_with_any_number_of_lanes(
    case: Case, model_seed: int, join: float
) -> None:
    model = EnumerableModel(3, MAX_TOKENS, scale=1.5, eos_logit=-1.0, seed=model_seed)
    case = case._replace(eos=(EOS,) if case.eos else (), join=join)
    alone = draw_chain(case._replace(num_lanes=1), model, reference_of)
    for num_lanes in (2, 3, 6):
        together = draw_chain(case._replace(num_lanes=num_lanes), model, reference_of)
        assert together.num_ticks <= alone.num_ticks + 1
        assert alone.tokens == together.tokens
        for name in ("scores", "w_sum", "trace"):
            assert torch.equal(getattr(alone, name), getattr(together, name)), name


def test_more_lanes_take_fewer_ticks() -> None:
    # Proposals from p itself are rejected more often than not.
    model = EnumerableModel(3, MAX_TOKENS, scale=1.5, eos_logit=-3.0)
    case = make_case(powers=(4.0, 1.0), max_new_tokens=MAX_TOKENS, num_mcmc_steps=8, join=1.0)
    one, four = (
        sum(
            draw_chain(
                case._replace(num_lanes=num_lanes, chains=(chain,)), model, reference_of
            ).num_ticks
            for chain in range(10)
        )
        for num_lanes in (1, 4)
    )
    assert four < 0.7 * one


def test_what_an_acceptance_leaves_as_it_is_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = EnumerableModel(3, MAX_TOKENS, scale=1.0, eos_logit=-3.0)
    case = make_case(
        max_new_tokens=MAX_TOKENS, block_size=6, num_mcmc_steps=8, join=1.0, num_lanes=6
    )

    def draw() -> list[Finished]:
        return [
            draw_chain(case._replace(chains=(chain,)), model, reference_of) for chain in range(10)
        ]

    kept = draw()
    monkeypatch.setattr(reference._Transition, "_is_the_same_from", lambda *arguments: False)
    dropped = draw()
    assert all(torch.equal(a.trace, b.trace) for a, b in zip(kept, dropped, strict=True))
    assert sum(chain.num_ticks for chain in kept) < 0.9 * sum(chain.num_ticks for chain in dropped)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_in_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POWERKERNELS_BACKEND", "triton")
    case = make_case(num_lanes=6, chains=tuple(range(5)))
    history = History(case)
    eager, replayed = case.state("cuda"), case.state("cuda")
    transition, captured = transition_of(eager), transition_of(replayed)
    drawn = TokenSamples(
        torch.zeros(6, dtype=torch.int64, device="cuda"),
        *(torch.zeros(6, device="cuda") for _ in range(3)),
    )
    captured(drawn)  # compiles; there is no chain yet
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured(drawn)
    while history.admit(eager, replayed):
        new = moved(history.drawn(), "cuda")
        transition(new)
        if new is None:
            captured(None)
        else:
            for static, value in zip(drawn, new, strict=True):
                static.copy_(value)
            graph.replay()
        for name, tensor in tensors(eager).items():
            assert torch.equal(tensor, getattr(replayed, name)), name
