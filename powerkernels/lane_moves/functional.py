"""Moves of cached positions between lanes: which backend."""

from __future__ import annotations

from torch import Tensor

from powerkernels import _extension
from powerkernels.lane_moves import reference
from powerkernels.lane_moves.caches import LaneCaches


def move_positions(caches: LaneCaches, moves: Tensor, offset: Tensor) -> None:
    """Copies a range of each lane's positions from a copy of a lane's caches, in all of them.

    Row l of `moves`, (source lane, source copy, first, count, both from), says what lane l gets:
    its positions offset[l] + first … offset[l] + first + count - 1, which are those of the source
    lane too,
        nothing                      if count <= 0,
        its other copy               from the source copy,
        its copy of the same name    likewise from offset[l] + both from on, if the source lane is
                                     another one; both from >= first.
    All as if at once: nothing that one move reads may another one write. On a GPU nothing waits for
    the device, and it can be captured in a CUDA graph. Nothing is checked.

    Args:
        caches: written in place.
        moves: int64 [C, 5], contiguous, on the caches' device.
        offset: int64 [C], likewise.
    """
    backend = _extension.backend_for(caches.device)
    if backend == "triton":
        from powerkernels.lane_moves import gpu

        gpu.move_positions(caches, moves, offset)
    elif backend == "cpp":
        _extension.compiled().move_positions(
            table=caches.table.data_ptr(),
            num_tensors=caches.num_tensors,
            num_positions=caches.num_positions,
            moves=moves.data_ptr(),
            offset=offset.data_ptr(),
            num_lanes=caches.num_lanes,
            num_threads=_extension.num_threads(),
        )
    else:
        reference.move_positions(caches, moves, offset)
