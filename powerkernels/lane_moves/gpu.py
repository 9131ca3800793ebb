"""Launches the Triton kernel of the moves between lanes."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from powerkernels._triton import EXACT, device_of, power_of_2
from powerkernels.lane_moves import kernels
from powerkernels.lane_moves.caches import LaneCaches

# Of a run of positions in one cache, as nearly as rows allow.
RUN_BYTES = 16384
# Words that a program copies at a time, 4 a thread. With 16-byte words the programs of an H200 have
# 8.6 MB on their way, four times what 4.3 TB/s and a microsecond of latency ask for.
ACCESSES, WARPS = 512, 4
PROGRAMS_PER_MULTIPROCESSOR = 8  # all resident
INTERPRETED_PROGRAMS = 3


def move_positions(caches: LaneCaches, moves: Tensor, offset: Tensor) -> None:
    """See the reference."""
    if not caches.num_tensors:
        return
    with device_of(moves):
        kernels.move_kernel[(num_programs(caches.device),)](
            caches.table,
            caches.num_tensors,
            moves,
            offset,
            caches.num_lanes,
            caches.num_positions,
            max(1, RUN_BYTES // caches.max_row_bytes),
            LANES=power_of_2(caches.num_lanes),
            WORD_BYTES=caches.word_bytes,
            ACCESSES=ACCESSES,
            num_warps=WARPS,
            **EXACT,
        )


@functools.cache
def num_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return int(PROGRAMS_PER_MULTIPROCESSOR * count)
