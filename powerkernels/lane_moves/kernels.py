"""The GPU kernel of the moves between lanes, in Triton.

A range of a lane's positions is contiguous in each cache. It is cut into runs of a fixed number of
positions; a run in one cache is a unit, and a fixed number of programs take the units by turns.
Each counts the units itself from the moves, so the host knows none of it, and where nothing moves
every program ends after that one look.

Floor: bytes read + written at 4.3 TB/s; a lane that takes from another writes two copies for one
read. Where nothing moves, the launch.

Not yet run on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def word_pointer(address, WORD_BYTES: tl.constexpr):
    """The pointer to an address that is a multiple of WORD_BYTES; for 16 to words of 8."""
    if WORD_BYTES == 1:
        pointer = address.to(tl.pointer_type(tl.int8))
    elif WORD_BYTES == 2:
        pointer = address.to(tl.pointer_type(tl.int16))
    elif WORD_BYTES == 4:
        pointer = address.to(tl.pointer_type(tl.int32))
    else:
        pointer = address.to(tl.pointer_type(tl.int64))
    return tl.multiple_of(pointer, WORD_BYTES)


@triton.jit(do_not_specialize=["num_tensors", "num_lanes", "num_positions", "run"])
def move_kernel(
    table_ptr,  # int64 [T, 3]: addresses of copy 0 and of copy 1, bytes of a row
    num_tensors,
    moves_ptr,  # int64 [C, 5]: source lane, source copy, first, count, both from
    offset_ptr,  # int64 [C]
    num_lanes,
    num_positions,
    run,  # positions
    LANES: tl.constexpr,  # a power of 2, >= C
    WORD_BYTES: tl.constexpr,  # what addresses and rows are multiples of
    ACCESSES: tl.constexpr,  # words copied at a time
):
    """Copies every unit; any number of programs."""
    lanes = tl.arange(0, LANES)
    counts = tl.load(moves_ptr + 5 * lanes + 3, mask=lanes < num_lanes, other=0)
    runs = (tl.maximum(counts, 0).to(tl.int32) + run - 1) // run
    end = tl.cumsum(runs, axis=0)
    units = tl.sum(runs, axis=0) * num_tensors

    WORD: tl.constexpr = 8 if WORD_BYTES == 16 else WORD_BYTES
    BLOCK: tl.constexpr = ACCESSES * WORD_BYTES // WORD
    word = tl.arange(0, BLOCK)
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        index = unit // num_tensors
        row_ptr = table_ptr + 3 * (unit % num_tensors)
        is_before = (end <= index).to(tl.int32)
        lane = tl.sum(is_before, axis=0)
        skipped = (index - tl.sum(is_before * runs, axis=0)).to(tl.int64) * run

        move_ptr = moves_ptr + 5 * lane
        source = tl.load(move_ptr)
        copy = tl.load(move_ptr + 1)
        begin = tl.load(move_ptr + 2) + skipped
        first = tl.load(offset_ptr + lane) + begin
        left = tl.load(move_ptr + 3) - skipped
        only_other = tl.maximum(tl.load(move_ptr + 4) - begin, 0)
        row_bytes = tl.load(row_ptr + 2)
        from_row = (source * num_positions + first) * row_bytes
        to_row = (lane.to(tl.int64) * num_positions + first) * row_bytes
        read = tl.load(row_ptr + copy)
        from_ptr = word_pointer(read + from_row, WORD_BYTES)
        to_ptr = word_pointer(tl.load(row_ptr + 1 - copy) + to_row, WORD_BYTES)
        to_same_ptr = word_pointer(read + to_row, WORD_BYTES)

        # A multiple of two words of 8, so that 16 bytes are masked together.
        row_words = (row_bytes // WORD_BYTES) * (WORD_BYTES // WORD)
        words = tl.minimum(left, run) * row_words
        same_from = tl.where(source == lane, words, only_other * row_words)
        for start in range(0, words, BLOCK):
            at = start + word
            kept = at < words
            x = tl.load(from_ptr + at, mask=kept)
            tl.store(to_ptr + at, x, mask=kept)
            tl.store(to_same_ptr + at, x, mask=kept & (at >= same_from))
