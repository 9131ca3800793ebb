"""Moves between lanes, bit for bit what single positions copied one by one give; bad input."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from powerkernels.lane_moves import LaneCaches, move_positions
from python_tests import tiers

WORKING, CURRENT = 0, 1
# (W, dtype): rows of 1, 3, 6, 12, 24, 48 and 1008 bytes.
ANY_WIDTHS = [(1, torch.int8), (3, torch.uint8), (3, torch.bfloat16), (3, torch.float32)]
WORDS = {
    1: ANY_WIDTHS,
    2: [(3, torch.float16), (504, torch.bfloat16)],
    4: [(3, torch.float32), (6, torch.bfloat16)],
    8: [(3, torch.int64), (24, torch.bfloat16)],
    16: [(24, torch.bfloat16), (252, torch.float32)],
}

# A move of one lane: (source lane, source copy, first, count, both from).
Move = tuple[int, int, int, int, int]


def random_copies(
    lanes: int, positions: int, widths: Sequence[tuple[int, torch.dtype]], seed: int = 0
) -> list[Tensor]:
    """[2, C · S, W] each, of random bytes: NaN of all kinds among them."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(
            256,
            (2, lanes * positions, width * dtype.itemsize),
            dtype=torch.uint8,
            generator=generator,
        ).view(dtype)
        for width, dtype in widths
    ]


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().view(torch.uint8)


def moved_one_by_one(
    copies: Sequence[Tensor], positions: int, moves: Sequence[Move], offset: Sequence[int]
) -> list[Tensor]:
    """Everything is read from the tensors as they were."""
    results = [as_bytes(tensor).clone() for tensor in copies]
    for before, result in zip(copies, results, strict=True):
        for lane, (source, copy, first, count, both_from) in enumerate(moves):
            for position in range(first, first + count):
                at = offset[lane] + position
                row = as_bytes(before)[copy, source * positions + at]
                for target in (WORKING, CURRENT):
                    if target != copy or (source != lane and position >= both_from):
                        result[target, lane * positions + at] = row
    return results


def check(
    copies: Sequence[Tensor],
    positions: int,
    moves: Sequence[Move],
    offset: Sequence[int],
    device: str = "cpu",
) -> None:
    expected = moved_one_by_one(copies, positions, moves, offset)
    placed = [tensor.to(device, copy=True) for tensor in copies]
    caches = LaneCaches(placed, positions)
    move_positions(caches, torch.tensor(moves, device=device), torch.tensor(offset, device=device))
    for tensor, true in zip(placed, expected, strict=True):
        assert torch.equal(as_bytes(tensor), true)


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, list[Move], list[int], list[tuple[int, torch.dtype]]]:
    """Lanes that are read by others move nothing, or from the copy that is read to the other."""
    lanes, positions = draw(st.integers(1, 9)), draw(st.integers(1, 40))
    prompt = draw(st.integers(0, positions - 1))  # of a source and its target it is the same
    offset = [prompt] * lanes
    givers = draw(st.lists(st.booleans(), min_size=lanes, max_size=lanes))
    copy_of = draw(st.lists(st.integers(0, 1), min_size=lanes, max_size=lanes))
    sources = [lane for lane in range(lanes) if givers[lane]]
    moves = []
    for lane in range(lanes):
        first = draw(st.integers(0, positions - prompt))
        count = draw(st.integers(-2, positions - prompt - first))
        source = lane
        if not givers[lane]:
            if sources and draw(st.booleans()):
                source = draw(st.sampled_from(sources))
            else:
                offset[lane] = draw(st.integers(0, prompt))
        both_from = first + draw(st.integers(0, max(count, 0) + 1))
        moves.append((source, copy_of[source], first, count, both_from))
    widths = draw(st.sampled_from([*WORDS.values(), [pair for w in WORDS.values() for pair in w]]))
    return positions, moves, offset, widths


def check_case(case: tuple, device: str = "cpu") -> None:
    positions, moves, offset, widths = case
    check(random_copies(len(moves), positions, widths), positions, moves, offset, device)


@given(case=cases())
def test_random_moves(backend: str, case: tuple) -> None:
    check_case(case)


@tiers.examples(0.25)
@given(case=cases())
def test_random_moves_in_the_kernel(kernel_device: str, case: tuple) -> None:
    pytest.importorskip("triton")
    check_case(case, kernel_device)


# Lane 0 commits, 1 restores, 2 takes from 4's current copy, 3 from its working one and keeps some
# of its own; 5 is idle.
MOVES: list[Move] = [
    (0, WORKING, 2, 900, 2),
    (1, CURRENT, 0, 7, 0),
    (4, CURRENT, 5, 333, 5),
    (4, WORKING, 0, 1000, 431),
    (4, CURRENT, 0, 0, 0),
    (0, CURRENT, 3, -1, 3),
]
OFFSET = [11, 40, 3, 3, 3, 0]


@pytest.mark.parametrize("word", WORDS)
def test_long_moves(backend: str, word: int) -> None:
    check(random_copies(6, 1024, WORDS[word]), 1024, MOVES, OFFSET)


@pytest.mark.parametrize("word", WORDS)
def test_long_moves_in_the_kernel(kernel_device: str, word: int) -> None:
    """Several runs a move, and rows longer than a program copies at a time."""
    pytest.importorskip("triton")
    copies = random_copies(6, 1024, WORDS[word])
    assert LaneCaches(copies, 1024).word_bytes == word
    check(copies, 1024, MOVES, OFFSET, kernel_device)


def test_wide_rows_in_the_kernel(kernel_device: str) -> None:
    pytest.importorskip("triton")
    from powerkernels.lane_moves import gpu

    width = gpu.RUN_BYTES // 4 + 100
    moves = [(0, WORKING, 1, 2, 1), (0, WORKING, 0, 4, 1)]
    check(random_copies(2, 4, [(width, torch.float32)]), 4, moves, [0, 0], kernel_device)


def test_copies_that_lie_apart(backend: str) -> None:
    """The stride from one copy to the other is free; what lies between them stays as it was."""
    storage = random_copies(2, 2 * 5, [(3, torch.int16)])[0]
    copies = storage[:, 10:20]
    before, expected = storage.clone(), moved_one_by_one([copies], 5, [(0, 0, 0, 3, 0)] * 2, [1, 1])
    move_positions(
        LaneCaches([copies], 5), torch.tensor([(0, 0, 0, 3, 0)] * 2), torch.tensor([1, 1])
    )
    assert torch.equal(as_bytes(copies), expected[0])
    assert torch.equal(storage[:, :10], before[:, :10])


def test_nothing_to_move(backend: str) -> None:
    copies = random_copies(2, 3, [(4, torch.float32), (5, torch.int8)])
    check(copies, 3, [(9, 7, 5, 0, 5), (-1, 3, 2, -5, 2)], [99, -99])
    run_on_nothing("cpu")


def test_nothing_to_move_in_the_kernel(kernel_device: str) -> None:
    pytest.importorskip("triton")
    run_on_nothing(kernel_device)


def run_on_nothing(device: str) -> None:
    """Rows without bytes, and no lanes."""
    integers = {"dtype": torch.int64, "device": device}
    empty = LaneCaches([torch.zeros(2, 6, 0, device=device)], 3)
    moves = torch.tensor([(0, 0, 0, 3, 0), (0, 0, 0, 3, 0)], **integers)
    move_positions(empty, moves, torch.zeros(2, **integers))
    no_lanes = LaneCaches([torch.zeros(2, 0, 4, device=device)], 3)
    move_positions(no_lanes, torch.zeros(0, 4, **integers), torch.zeros(0, **integers))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replay_of_a_captured_move() -> None:
    """The moves are read on the device, at the time of the replay."""
    copies = random_copies(6, 1024, WORDS[16])
    placed = [tensor.cuda() for tensor in copies]
    caches = LaneCaches(placed, 1024)
    moves = torch.zeros(6, 5, dtype=torch.int64, device="cuda")
    offset = torch.zeros(6, dtype=torch.int64, device="cuda")
    move_positions(caches, moves, offset)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        move_positions(caches, moves, offset)
    graph.replay()
    for tensor, before in zip(placed, copies, strict=True):
        assert torch.equal(as_bytes(tensor), as_bytes(before))
    moves.copy_(torch.tensor(MOVES))
    offset.copy_(torch.tensor(OFFSET))
    graph.replay()
    for tensor, true in zip(placed, moved_one_by_one(copies, 1024, MOVES, OFFSET), strict=True):
        assert torch.equal(as_bytes(tensor), true)


@pytest.mark.parametrize("threads", [1, 2])
def test_any_number_of_threads(compiled_backend: None, restore_threads: None, threads: int) -> None:
    torch.set_num_threads(threads)
    check(random_copies(6, 1024, WORDS[2]), 1024, MOVES, OFFSET)


@pytest.mark.parametrize(
    ("copies", "positions", "error", "message"),
    [
        ([], 4, ValueError, "copies must hold at least one tensor"),
        ([torch.zeros(2, 8, 3)], 0, ValueError, "num_positions must be >= 1"),
        ([torch.zeros(2, 8, 3)], 3, ValueError, r"copies must be \[2, C · S, W\] with S = 3"),
        ([torch.zeros(3, 8, 3)], 4, ValueError, r"copies must be \[2, C · S, W\]"),
        ([torch.zeros(8, 3)], 4, ValueError, r"copies must be \[2, C · S, W\]"),
        ([torch.zeros(2, 8, 6)[:, :, ::2]], 4, ValueError, "copies must have contiguous rows"),
        ([torch.zeros(2, 8, 6)[:, :, :3]], 4, ValueError, "copies must have contiguous rows"),
        ([torch.zeros(2, 8, 3), torch.zeros(2, 4, 3)], 4, ValueError, "copies must agree"),
        ([torch.zeros(2, 8, 3), torch.zeros(2, 8, 3, device="meta")], 4, ValueError, "agree"),
        ([[0.0]], 4, TypeError, "copies must be dense tensors"),
    ],
)
def test_bad_input(copies: list, positions: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LaneCaches(copies, positions)
