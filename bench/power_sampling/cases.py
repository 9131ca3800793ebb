"""What the lane engine adds to the model's own step: transitions, draws, moves of the cache."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from bench.harness.cases import QWEN_7B, SMOLLM2, Call, Case, Kernel, Outputs, Size, Variant
from bench.power_sampling.ticks import NoModel, begin_chains
from powerkernels.lane_moves import reference as moves_reference
from powerkernels.lane_moves.caches import LaneCaches
from powerkernels.lane_moves.functional import move_positions
from powerkernels.power_sampling import PowerSamplingConfig, engine, lane_state, reference

TICKS = 20
VOCAB = 32768


@dataclass
class Lanes:
    num_lanes: int
    device: torch.device

    def loaded(self, *, state_on_host: bool = False) -> engine.LaneEngine:
        """With a chain on every lane, begun."""
        # So many transitions that no chain ends while it is timed, in some hundred thousand ticks.
        config = PowerSamplingConfig(
            alpha=4.0,
            max_new_tokens=512,
            block_size=32,
            num_mcmc_steps=100,
            num_lanes=self.num_lanes,
            device_loop=False,  # the clock makes graphs of its own
        )
        place = contextlib.nullcontext()
        if state_on_host:
            host = torch.device("cpu")
            place = mock.patch.object(engine, "state_device", return_value=host)
        with place:
            model = NoModel(self.num_lanes, VOCAB, self.device)
            return begin_chains(engine.LaneEngine(model, config, eos=(0,)))


def ticks_of(lanes: engine.LaneEngine) -> Call:
    """The ticks themselves: a loop would look at its flag in between, or sleep until it is done."""
    state = lanes._state

    def call() -> Outputs:
        for _ in range(TICKS):
            lanes._tick()
        return {
            "tokens": state.tokens,
            "lanes": state.lanes,
            "trace": state.trace,
            "go on": state.go,
        }

    return call


def ours(x: Lanes) -> Call:
    return ticks_of(x.loaded())


def in_torch(x: Lanes) -> Call:
    """Transitions by the reference, on the CPU; what is drawn and moved is as in ours."""
    lanes = x.loaded(state_on_host=True)
    lanes._transition = functools.partial(reference.transition, lanes._state)
    return ticks_of(lanes)


def exact(x: Lanes, found: Outputs) -> Outputs:
    return in_torch(x)()


def lane_cases(size: Size) -> list[Case]:
    counts = {"device": (64, 16, 256), "host": (16, 64), "quick": (4, 64)}[size]
    return [
        Case(
            f"{count} lanes, {TICKS} ticks",
            {"lanes": count, "vocab": VOCAB},
            torch.bfloat16,
            memory=count * VOCAB * 2,
            sweep=("lanes",),
        )
        for count in counts
    ]


MH_TRANSITION = Kernel(
    name="mh_transition",
    part="power_sampling",
    summary=f"{TICKS} ticks of the loop without a model: draw of a vocabulary of {VOCAB}, "
    "transition, moves",
    cases=lane_cases,
    inputs=lambda case, device: Lanes(case.shape["lanes"], device),
    few=lambda x: x,
    expected=exact,
    rotates=False,
    variants=[
        Variant("powerkernels", ours, ours=True),
        Variant("transitions in torch", in_torch, peer="eager", on_host=True),
    ],
)


# ---- moves of the cache


@dataclass
class Moves:
    caches: LaneCaches
    moves: Tensor  # int64 [C, 5]
    offset: Tensor  # int64 [C]
    before: tuple[Tensor, Tensor]  # the first and the last cache, before any move


def move_cases(size: Size) -> list[Case]:
    sizes = {
        "device": [(QWEN_7B, 64, 1024, 28), (QWEN_7B, 16, 4096, 28)],
        "host": [(SMOLLM2, 16, 256, 30)],
        "quick": [(SMOLLM2, 4, 64, 2)],
    }
    found = []
    for model, lanes, positions, layers in sizes[size]:
        row = 2 * layers * model.kv_heads * model.head_size * 2
        moved = positions // 4  # what a proposal wrote, of every lane
        found.append(
            Case(
                f"{model.name}, {lanes} lanes, {moved} of {positions} positions",
                {
                    "lanes": lanes,
                    "positions": positions,
                    "layers": layers,
                    "moved": moved,
                    "width": model.kv_heads * model.head_size,
                },
                torch.bfloat16,
                bytes=2 * lanes * moved * row,
                memory=2 * lanes * positions * row,
                sweep=("lanes",),
            )
        )
    return found


def make_moves(case: Case, device: torch.device) -> Moves:
    generator = torch.Generator(device).manual_seed(0)
    lanes, positions, width = (case.shape[name] for name in ("lanes", "positions", "width"))
    shape = (2, lanes * positions, width)
    copies = [
        torch.empty(shape, dtype=case.dtype, device=device).normal_(generator=generator)
        for _ in range(2 * case.shape["layers"])
    ]
    columns = (torch.arange(lanes), 0, positions // 2, case.shape["moved"], positions // 2)
    moves = torch.zeros(lanes, lane_state.NUM_MOVE_FIELDS, dtype=torch.int64)
    for number, column in enumerate(columns):
        moves[:, number] = torch.as_tensor(column)
    offset = torch.zeros(lanes, dtype=torch.int64)
    before = copies[0].clone(), copies[-1].clone()
    return Moves(LaneCaches(copies, positions), moves.to(device), offset.to(device), before)


def our_moves(x: Moves) -> Call:
    def call() -> Outputs:
        move_positions(x.caches, x.moves, x.offset)
        return {"first cache": x.caches.copies[0], "last cache": x.caches.copies[-1]}

    return call


def torch_moves(x: Moves) -> Call:
    """One copy a cache, by indices that are known before."""
    rows = torch.arange(x.caches.num_positions, device=x.caches.device)
    first, count = int(x.moves[0, lane_state.FIRST]), int(x.moves[0, lane_state.COUNT])
    lanes = torch.arange(x.caches.num_lanes, device=x.caches.device)[:, None]
    index = (lanes * x.caches.num_positions + rows[first : first + count]).flatten()

    def call() -> Outputs:
        for working, current in x.caches.copies:
            current[index] = working[index]
        return {"first cache": x.caches.copies[0], "last cache": x.caches.copies[-1]}

    return call


def exact_moves(x: Moves, found: Outputs) -> Outputs:
    caches = LaneCaches([copies.clone() for copies in x.before], x.caches.num_positions)
    moves_reference.move_positions(caches, x.moves, x.offset)
    return {"first cache": caches.copies[0], "last cache": caches.copies[1]}


MOVE_POSITIONS = Kernel(
    name="move_positions",
    part="power_sampling",
    summary="what a tick in which every lane ends a proposal copies between the two copies of "
    "the cache",
    cases=move_cases,
    inputs=make_moves,
    few=lambda x: x,
    expected=exact_moves,
    ceiling="copy",
    rotates=False,
    variants=[
        Variant("powerkernels", our_moves, ours=True),
        Variant("torch, an index copy a cache", torch_moves, peer="eager"),
    ],
)

KERNELS = [MH_TRANSITION, MOVE_POSITIONS]
